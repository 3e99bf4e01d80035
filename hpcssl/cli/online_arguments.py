"""`hpcssl store build --online`: a store that reads its tiles straight from whole slides."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from hpcssl.cli.array_arguments import tell_stage

if TYPE_CHECKING:
    from hpcssl.jobs.profile import Profile

_OF_TILES = ("pack", "no_check", "shard_gb", "slides")  # and not of slides
_OF_SLIDES = ("mpp", "grid", "tile_px", "min_tissue", "assume_mpp")


def add_online_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a store of slides."""
    example = "example: hpcssl store build slides.csv --out STORE --online --mpp 0.25,0.5,1.0,2.0"
    add = parser.add_argument_group("stores of slides", example).add_argument
    online = (
        "read tiles straight from slides, at a place that a position draws; TILES is then a slide table (slide_id,"
        " organ, path or URL, mpp) or a folder of slides"
    )
    add("--online", action="store_true", help=online)
    mpps = "microns per pixel, one or several (default 0.5); slides count by their tiles at the first"
    add("--mpp", type=mpps_of, metavar="LIST", help=mpps)
    add("--grid", action="store_true", help="draw no places: give the tiles that hpcssl tile would cut at the MPP")
    add("--tile-px", type=int, metavar="N", help="side of a tile (default 224)")
    add("--min-tissue", type=float, metavar="SHARE", help="of a tile that must be tissue (default 0.4)")
    add("--assume-mpp", type=float, metavar="MPP", help="of slides whose MPP neither the table nor the file says")


def mpps_of(text: str) -> tuple[float, ...]:
    """Return the numbers of a list such as `0.25,0.5`.

    >>> mpps_of("0.25,0.5")
    (0.25, 0.5)
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers such as 0.25,0.5,1.0") from None


def check_kind(args: argparse.Namespace) -> None:
    """Refuse arguments that are of the other kind of store."""
    from hpcssl.core.errors import StoreError

    given = [name for name in (_OF_TILES if args.online else _OF_SLIDES) if getattr(args, name) not in (None, False)]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise StoreError(
            f"{option} is not for a store of slides; leave it out, or --online"
            if args.online
            else f"{option} is for a store of slides; give --online, too"
        )


def build_online(args: argparse.Namespace, profile: Profile | None) -> int:
    """Build the store, here or by a job array; slides that failed are an error, after the others are done."""
    from hpcssl.cli.progress import late_progress
    from hpcssl.core.errors import ConfigError
    from hpcssl.pipelines.build_store import build_from_slides, submit_from_slides
    from hpcssl.stores.online_build import OnlineOptions

    given = {"tile_px": args.tile_px, "min_tissue": args.min_tissue, "assume_mpp": args.assume_mpp}
    options = OnlineOptions(
        mpps=args.mpp or (0.5,),
        of_grid=args.grid,
        threads=len(os.sched_getaffinity(0)) if args.threads is None else args.threads,
        **{name: value for name, value in given.items() if value is not None},
    )
    if profile:
        if args.threads is not None:
            raise ConfigError("--threads: the tasks of an array have theirs; leave it out")
        jobs = submit_from_slides(args.tiles, args.out, options, profile=profile, num_tasks=args.array)
        does, ends = f"look at the slides of {args.out}", "writes the store, and lists the slides that failed"
        tell_stage(jobs, args.out, array=does, last=ends)
        return 0
    with late_progress("looking at slides", "slides") as shown:
        built = build_from_slides(args.tiles, args.out, options, append=args.append, **shown)
    store = built.store
    where = "on a grid" if options.of_grid else "at places drawn by the position"
    print(
        f"{args.out}: {store.num_slides} slides, {store.slides['tissue_mm2'].sum():.1f} mm² of tissue, worth"
        f" {store.num_tiles} tiles of {options.tile_px} px at {options.mpps[0]:g} MPP; tiles {where}, MPP"
        f" {', '.join(f'{mpp:g}' for mpp in options.mpps)}"
    )
    built.check()
    return 0
