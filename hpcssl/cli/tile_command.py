"""`hpcssl tile`: whole slides into a store of JPEG tiles."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hpcssl.cli.array_arguments import add_array_arguments, array_profile, tell_stage

SUMMARY = "cut whole slides into JPEG tiles at a target MPP, and write their store"
EXAMPLE = (
    "hpcssl tile slides.csv --out TILES --mpp 0.5 --tile-px 224\n"
    "  hpcssl tile slides.csv --out TILES --pack --cluster slurm --array 64 --profile a100"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    slides = "slide table (slide_id, organ, path, mpp), or a folder of slides"
    add("slides", type=Path, metavar="SLIDES", help=slides)
    out = "folder of the tiles and their store; the same command goes on where it was"
    add("--out", type=Path, required=True, metavar="TILES", help=out)
    add("--mpp", type=float, default=0.5, help="microns per pixel of the tiles (%(default)s)")
    add("--tile-px", type=int, default=224, metavar="N", help="side of a tile (%(default)s)")
    tissue = "of a tile that must be tissue (%(default)s)"
    add("--min-tissue", type=float, default=0.4, metavar="SHARE", help=tissue)
    add("--quality", type=int, default=90, help="of the JPEGs, with chrominance in full (%(default)s)")
    assumed = "of slides whose MPP neither the table nor the file says (default: such a slide fails)"
    add("--assume-mpp", type=float, metavar="MPP", help=assumed)
    add("--pack", action="store_true", help="write tar shards instead of a file a tile")
    shard = "with --pack: a shard ends with the slide that fills it (%(default)s)"
    add("--shard-gb", type=float, default=16.0, metavar="N", help=shard)
    threads = "that decode and encode (default: one a core; not on SLURM)"
    add("--threads", type=int, metavar="N", help=threads)
    add_array_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Tile the slides; slides that failed are an error, after the others are done."""
    from hpcssl.cli.progress import late_progress
    from hpcssl.core.errors import ConfigError
    from hpcssl.pipelines.tile import submit_tiling, tile
    from hpcssl.slides.cutting import CutOptions
    from hpcssl.stores.tiling import TilingOptions

    profile = array_profile(args)
    cut = CutOptions(
        **{name: getattr(args, name) for name in ("mpp", "tile_px", "min_tissue", "quality", "assume_mpp")}
    )
    threads = len(os.sched_getaffinity(0)) if args.threads is None else args.threads
    options = TilingOptions(cut=cut, pack=args.pack, shard_gb=args.shard_gb, threads=threads)
    if profile:
        if args.threads is not None:
            raise ConfigError("--threads: the tasks of an array have theirs; leave it out")
        jobs = submit_tiling(args.slides, args.out, options, profile=profile, num_tasks=args.array)
        does, ends = (
            f"cut the slides that are missing in {args.out}",
            "writes the store, and lists the slides that failed",
        )
        tell_stage(jobs, args.out, array=does, last=ends)
        return 0
    with late_progress("tiling", "slides") as shown:
        tiled = tile(args.slides, args.out, options, **shown)
    if tiled.store:
        counted = f"{tiled.store.num_slides} slide{'s' * (tiled.store.num_slides > 1)}, {tiled.store.num_tiles} tiles"
        area = tiled.store.slides["tissue_mm2"].sum()
        print(
            f"{args.out}: {counted} of {args.tile_px} px at {args.mpp:g} MPP, {area:.1f} mm² of tissue;"
            f" look at {args.out / 'qc'}"
        )
    tiled.check()
    return 0
