"""`hpcssl store`: index a folder of tiles, check it, look at it."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "build, verify and describe a tile store"
EXAMPLE = "hpcssl store build TILES --out STORE --slides slides.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    build = actions.add_parser(
        "build", help="index JPEG tiles laid out as <organ>/<slide_id>/<name>.jpg", epilog=f"example: {EXAMPLE}"
    )
    build.add_argument("tiles", type=Path, metavar="TILES", help="root of the tiles")
    build.add_argument("--out", type=Path, required=True, metavar="STORE", help="folder of the store; must not exist")
    build.add_argument(
        "--slides", type=Path, help="slide table (default: TILES/slides.csv where there is one, else all folders)"
    )
    build.set_defaults(run=_build)
    verify = actions.add_parser(
        "verify", help="check the index and that every tile is as it was", epilog="example: hpcssl store verify STORE"
    )
    verify.add_argument("store", type=Path, metavar="STORE")
    verify.set_defaults(run=_verify)
    stats = actions.add_parser(
        "stats", help="slides, tiles and bytes per organ", epilog="example: hpcssl store stats STORE"
    )
    stats.add_argument("store", type=Path, metavar="STORE")
    stats.set_defaults(run=_stats)


def run(args: argparse.Namespace) -> int:
    """Never called: the parser demands an action."""
    raise AssertionError(args)


def _build(args: argparse.Namespace) -> int:
    from hpcssl.cli.progress import progress
    from hpcssl.tiles.scan import build_store

    with progress("indexing", total=0, unit="slides") as advance:
        store = build_store(args.tiles, args.out, table=args.slides, on_progress=advance)
    print(f"{args.out}: {store.num_slides} slides, {store.num_tiles} tiles")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from hpcssl.cli.progress import progress
    from hpcssl.tiles.store import Store

    store = Store.open(args.store)
    with progress("verifying", total=store.num_tiles, unit="tiles") as advance:
        store.verify(advance)
    print(f"{args.store}: index whole, all {store.num_tiles} tile files there with their sizes")
    return 0


def _stats(args: argparse.Namespace) -> int:
    import numpy as np

    from hpcssl.tiles.store import Store

    store = Store.open(args.store)
    sizes = np.load(args.store / "sizes.npy", mmap_mode="r")
    print(f"{'organ':<20}{'slides':>10}{'tiles':>14}{'GB':>12}")
    for organ, slides in store.slides.groupby("organ"):
        size = sum(int(sizes[f : f + n].sum()) for f, n in zip(slides["first_tile"], slides["num_tiles"]))
        print(f"{organ:<20}{len(slides):>10,}{slides['num_tiles'].sum():>14,}{size / 1e9:>12.3f}")
    return 0
