"""`hpcssl store`: index or pack a folder of tiles, check it, look at it."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpcssl.cli.actions import Actions
from hpcssl.cli.array_arguments import add_array_arguments, array_profile, tell_stage
from hpcssl.cli.online_arguments import add_online_arguments, build_online, check_kind

SUMMARY = "build, verify and describe a tile store"
EXAMPLE = "hpcssl store build TILES --out STORE --slides slides.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    actions = Actions(parser)
    build = actions.add("build", _build, "index JPEG tiles laid out as <organ>/<slide_id>/<name>.jpg", EXAMPLE)
    text = "check the index and that every tile is as it was"
    verify = actions.add("verify", _verify, text, "hpcssl store verify STORE")
    text = "slides, tiles and bytes per organ, sizes of the files"
    stats = actions.add("stats", _stats, text, "hpcssl store stats STORE")
    add = build.add_argument
    add("tiles", type=Path, metavar="TILES", help="root of the tiles")
    out = "folder of the store; must not exist (but see --append)"
    add("--out", type=Path, required=True, metavar="STORE", help=out)
    slides = "slide table (default: TILES/slides.csv where there is one, else all folders)"
    add("--slides", type=Path, help=slides)
    add("--pack", action="store_true", help="copy the tiles into tar shards; TILES is not needed afterwards")
    shard = "with --pack: a shard ends with the slide that fills it (default 16)"
    add("--shard-gb", type=float, metavar="N", help=shard)
    append = "add new slides at the end of an existing store; its tiles keep their numbers"
    add("--append", action="store_true", help=append)
    unchecked = "take names and sizes alone; do not look at both ends of every JPEG"
    add("--no-check", action="store_true", help=unchecked)
    for action in (verify, stats):
        action.add_argument("store", type=Path, metavar="STORE")
    verify.add_argument("--deep", action="store_true", help="decode every JPEG, too")
    for action in (build, verify):
        action.add_argument("--threads", type=int, metavar="N", help="files read at a time (default 8)")
    add_array_arguments(build)
    add_online_arguments(build)


def _build(args: argparse.Namespace) -> int:
    from hpcssl.cli.progress import late_progress
    from hpcssl.core.errors import StoreError
    from hpcssl.pipelines.build_store import submit_parts
    from hpcssl.stores.kinds import open_store
    from hpcssl.stores.packed import PackedStore
    from hpcssl.stores.parts import parts_folder
    from hpcssl.stores.scan import BuildOptions, build_store

    check_kind(args)
    profile = array_profile(args)
    if profile and args.append:
        raise StoreError("--append is done by one process; leave out --cluster slurm")
    if args.online:
        return build_online(args, profile)
    if args.shard_gb is not None and not (args.pack or args.append):
        raise StoreError("--shard-gb is of a packed store; give --pack, too")
    before = open_store(args.out) if args.append and args.out.exists() else None
    if before and args.pack and not isinstance(before, PackedStore):
        raise StoreError(f"{args.out}: a loose store; it cannot be extended with --pack: pack it into another --out")
    given = {"shard_gb": args.shard_gb, "threads": args.threads}
    options = BuildOptions(pack=args.pack, check=not args.no_check, **{k: v for k, v in given.items() if v is not None})
    source = {"table": args.slides, "options": options}
    if profile:
        jobs = submit_parts(args.tiles, args.out, **source, profile=profile, num_tasks=args.array)
        does = f"build the parts of {args.out} that are missing"
        tell_stage(jobs, parts_folder(args.out), array=does, last="joins the parts")
        return 0
    with late_progress("indexing", "slides") as shown:
        store = build_store(args.tiles, args.out, **source, append=args.append, **shown)
    new = f" ({store.num_slides - before.num_slides} slides new)" if before else ""
    shards = f" in {len(store.header['shards'])} shards" if isinstance(store, PackedStore) else ""
    print(f"{args.out}: {store.num_slides} slides, {store.num_tiles} tiles{shards}{new}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from hpcssl.cli.progress import progress
    from hpcssl.core.errors import StoreError
    from hpcssl.stores.kinds import open_store
    from hpcssl.stores.scan import THREADS

    threads = THREADS if args.threads is None else args.threads
    if threads < 1:
        raise StoreError(f"{threads} threads; expected at least 1")
    store = open_store(args.store)
    with progress("verifying", total=store.num_tiles, unit="tiles") as advance:
        store.verify(advance, deep=args.deep, threads=threads)
    decoded = ", every tile decodes" if args.deep else ""
    print(f"{args.store}: index whole, {store.describe_tiles()} there with their sizes{decoded}")
    return 0


def _stats(args: argparse.Namespace) -> int:
    from hpcssl.stores.kinds import open_store
    from hpcssl.stores.online import OnlineStore
    from hpcssl.stores.stats import per_organ, spread_of, tissue_per_organ
    from hpcssl.stores.tile_store import TileStore

    store = open_store(args.store)
    if isinstance(store, OnlineStore):
        print(f"{'organ':<20}{'slides':>10}{'tiles':>16}{'mm² of tissue':>22}")
        for row in tissue_per_organ(store).itertuples(index=False):
            print(f"{row.organ:<20}{row.slides:>10,}{row.tiles:>16,}{row.tissue_mm2:>22,.1f}")
        return 0
    assert isinstance(store, TileStore), store
    print(f"{'organ':<20}{'slides':>10}{'tiles':>16}{'bytes':>22}")
    for row in per_organ(store).itertuples(index=False):
        print(f"{row.organ:<20}{row.slides:>10,}{row.tiles:>16,}{row.bytes:>22,}")
    sizes = spread_of(store.sizes)
    print(f"bytes of a tile: smallest {sizes.smallest:,}, median {sizes.median:,}, largest {sizes.largest:,}")
    return 0
