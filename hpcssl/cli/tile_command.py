"""`hpcssl tile`: whole slides into a store of JPEG tiles."""

from __future__ import annotations

import argparse
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from hpcssl.cli.array_arguments import add_array_arguments, array_profile, tell_job

if TYPE_CHECKING:
    from hpcssl.jobs.profile import Profile
    from hpcssl.stores.tiling import TilingOptions

SUMMARY = "cut whole slides into JPEG tiles at a target MPP, and write their store"
EXAMPLE = (
    "hpcssl tile slides.csv --out TILES --mpp 0.5 --tile-px 224\n"
    "  hpcssl tile slides.csv --out TILES --pack --cluster slurm --array 64 --profile a100"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "slides", type=Path, metavar="SLIDES", help="slide table (slide_id, organ, path, mpp), or a folder of slides"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="TILES",
        help="folder of the tiles and their store; the same command goes on where it was",
    )
    parser.add_argument("--mpp", type=float, default=0.5, help="microns per pixel of the tiles (%(default)s)")
    parser.add_argument("--tile-px", type=int, default=224, metavar="N", help="side of a tile (%(default)s)")
    parser.add_argument(
        "--min-tissue", type=float, default=0.4, metavar="SHARE", help="of a tile that must be tissue (%(default)s)"
    )
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs, with chrominance in full (%(default)s)")
    parser.add_argument(
        "--assume-mpp",
        type=float,
        metavar="MPP",
        help="of slides whose MPP neither the table nor the file says (default: such a slide fails)",
    )
    parser.add_argument("--pack", action="store_true", help="write tar shards instead of a file a tile")
    parser.add_argument(
        "--shard-gb",
        type=float,
        default=16.0,
        metavar="N",
        help="with --pack: a shard ends with the slide that fills it (%(default)s)",
    )
    parser.add_argument(
        "--share",
        type=share_of,
        metavar="K/N",
        help="cut only the K-th of N shares of the slides; the command without it then writes the store",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="that decode and encode (default: one a core; not on SLURM)"
    )
    add_array_arguments(parser)


def share_of(text: str) -> tuple[int, int]:
    """Return (K - 1, N) of `K/N`.

    >>> share_of("3/16")
    (2, 16)
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}; expected K/N, such as 3/16")
    return int(found[1]) - 1, int(found[2])


def run(args: argparse.Namespace) -> int:
    """Tile the slides; slides that failed are an error, after the others are done."""
    from hpcssl.cli.progress import progress
    from hpcssl.core.errors import SlideError
    from hpcssl.slides.cutting import CutOptions
    from hpcssl.slides.slide_list import FAILED, slides_to_read
    from hpcssl.stores.tiling import TilingOptions, describe_failed, tile_slides

    profile = array_profile(args)
    cut = CutOptions(
        mpp=args.mpp,
        tile_px=args.tile_px,
        min_tissue=args.min_tissue,
        quality=args.quality,
        assume_mpp=args.assume_mpp,
    )
    threads = len(os.sched_getaffinity(0)) if args.threads is None else args.threads
    options = TilingOptions(cut=cut, pack=args.pack, shard_gb=args.shard_gb, threads=threads)
    if profile:
        return _submit(args, options, profile)
    slides = slides_to_read(args.slides)
    with ExitStack() as stack:
        advance = [lambda n: None]

        def begin(total: int) -> None:
            advance[0] = stack.enter_context(progress("tiling", total=total, unit="slides"))

        store, failed = tile_slides(
            slides, args.out, options, share=args.share, on_total=begin, on_progress=lambda n: advance[0](n)
        )
    if store:
        counted = f"{store.num_slides} slide{'s' * (store.num_slides > 1)}, {store.num_tiles} tiles"
        area = store.slides["tissue_mm2"].sum()
        print(
            f"{args.out}: {counted} of {args.tile_px} px at {args.mpp:g} MPP, {area:.1f} mm² of tissue;"
            f" look at {args.out / 'qc'}"
        )
    elif args.share:
        print(f"{args.out}: this share is cut; the command without --share writes the store")
    if failed:
        next_time = "the command without --share tries them again"
        where = next_time if args.share else f"all are in {args.out / FAILED}"
        raise SlideError(describe_failed(failed, len(slides), where))
    return 0


def _submit(args: argparse.Namespace, options: TilingOptions, profile: Profile) -> int:
    from hpcssl.core.errors import ConfigError
    from hpcssl.jobs.tiling import submit_tiling

    for name in ("threads", "share"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name}: the tasks of an array have theirs; leave it out")
    array, last = submit_tiling(args.slides, args.out, options=options, profile=profile, num_tasks=args.array)
    if array and array.tasks:
        tell_job(array.job, args.out, f"submitted: {array.tasks} tasks cut the slides that are missing in {args.out}")
    elif array:
        tell_job(array.job, args.out, "is under way already; nothing is submitted beside it")
    if last:
        what = "writes the store" if last.tasks else "is under way already: it writes the store"
        tell_job(last.job, args.out, f"{what}, and lists the slides that failed")
    return 0
