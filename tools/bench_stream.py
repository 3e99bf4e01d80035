#!/usr/bin/env python3
"""Times a restart of the tile stream at any position, and measures its memory, in processes of their own.

`python tools/bench_stream.py --tiles DIR [--pseudo-epochs N] [--positions N] [--store-tiles N] [--at N] [--repeats N]`:
the defaults check in seconds that all of it runs; `--pseudo-epochs 50 --positions 65000000 --store-tiles 20000000
--at 3000000000 --repeats 5` is a measurement (13 GB in `--folder` for about two minutes).

One rank of twelve with a global batch of 1,080 opens store and schedule and takes DINO's views of its first step, from
position 0 and from a later one, in turns; then those of eight more steps, after which its memory is read: what it
allocated, without the pages of mapped files. The large store is an index of as many tiles as wanted over the bytes of a
few real ones, packed. Prints one JSON object last; of every figure the median, and the least and the largest as
`_spread`.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
from measuring import in_process, machine, options, print_figures, repeated, summary

from hpcssl.core.world import World
from hpcssl.loader.stream import LoaderConfig, StreamRequest, TileStream
from hpcssl.plan.recipe import dino_augment
from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.spec import ScheduleSpec
from hpcssl.stores.index_writer import seal
from hpcssl.stores.kinds import open_store
from hpcssl.stores.packed import PackedStore
from hpcssl.stores.scan import BuildOptions, build_store
from hpcssl.stores.store import Store
from hpcssl.stores.store_build import write_header

GLOBAL_BATCH, RANKS, STEPS = 1080, 12, 9
PER_SLIDE, ORGANS = 10_000, 10
# of the schedule; of the store; position of the restart
SIZES = {"pseudo_epochs": 3, "positions": 50_000, "store_tiles": 200_000, "at": 120_000, "repeats": 1}


def write_large_store(folder: Path, base: Store, num_tiles: int) -> None:
    """Write a packed store of so many tiles, whose bytes are those of a small one, again and again."""
    folder.mkdir()
    for shard in base.path.glob("*.tar"):
        os.link(shard, folder / shard.name)
    tile = np.arange(num_tiles)
    digits = (tile[:, None] // 10 ** np.arange(9, -1, -1) % 10 + ord("0")).astype(np.uint8)
    ending = np.broadcast_to(np.frombuffer(b".jpg", np.uint8), (num_tiles, 4))
    np.hstack([digits, ending]).tofile(folder / "names.bin")
    np.save(folder / "names.npy", ((tile + 1) * 14).astype("<u8"))
    for name in ("sizes.npy", "offsets.npy"):
        few = np.load(base.index / name)
        np.save(folder / name, few[tile % len(few)])
    first = np.arange(0, num_tiles, PER_SLIDE)
    counts = np.minimum(PER_SLIDE, num_tiles - first)
    slides = pd.DataFrame({"slide_id": [f"slide-{i}" for i in range(len(first))]})
    slides = slides.assign(organ=[f"organ-{i % ORGANS}" for i in range(len(first))], num_tiles=counts)
    folders = [f"{row.organ}/{row.slide_id}".encode() for row in slides.itertuples()]
    (folder / "folders.bin").write_bytes(b"".join(folders))
    np.save(folder / "folders.npy", np.cumsum([len(name) for name in folders]).astype("<u8"))
    write_header(folder, seal(folder, PackedStore, slides, {"shards": base.header["shards"]}))


def make_schedule(store: Path, out: Path, pseudo_epochs: int, positions: int) -> None:
    """Build a schedule of a store."""
    slides = open_store(store).slides
    repeats = -(-5 * positions // int(slides["num_tiles"].sum())) * 4
    spec = ScheduleSpec(
        num_pseudo_epochs=pseudo_epochs, positions_per_pseudo_epoch=positions, num_groups=5, max_repeats=repeats
    )
    build_schedule(spec, slides, out, jobs=len(os.sched_getaffinity(0)))


def first_steps(store: Path, schedule: Path, start_step: int) -> dict[str, float]:
    """Open everything, take the first batch and some more."""
    begun = time.perf_counter()
    request = StreamRequest(
        recipe=dino_augment(),
        seed=0,
        global_batch=GLOBAL_BATCH,
        steps=range(start_step, start_step + STEPS),
        world=World(rank=0, size=RANKS),
    )
    config = LoaderConfig(threads=len(os.sched_getaffinity(0)))
    batches = iter(TileStream(open_store(store), Schedule.open(schedule), request, config=config))
    next(batches)
    first_s = time.perf_counter() - begun
    for _ in batches:
        pass
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    anonymous = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    return {"first_batch_s": first_s, "anonymous_mb": anonymous / 1000}


def measure(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Take every figure `repeats` times."""
    base = build_store(args.tiles, folder / "base", options=BuildOptions(pack=True))
    small, large = folder / "small", folder / "large"
    write_large_store(small, base, 10_000)
    write_large_store(large, base, args.store_tiles)
    make_schedule(small, folder / "short", 1, 50_000)
    make_schedule(large, folder / "long", args.pseudo_epochs, args.positions)

    def take() -> dict[str, float]:
        steps = (0, args.at // GLOBAL_BATCH)
        start, restart = (in_process(first_steps, large, folder / "long", step) for step in steps)
        of_small = in_process(first_steps, small, folder / "short", 0)
        return {
            "restart_vs_start": restart["first_batch_s"] / start["first_batch_s"],
            "start_s": start["first_batch_s"],
            "anonymous_mb_large": restart["anonymous_mb"],
            "anonymous_mb_small": of_small["anonymous_mb"],
            "growth_mb": restart["anonymous_mb"] - of_small["anonymous_mb"],
        }

    figures = summary(repeated(take, args.repeats))
    return {**{name: vars(args)[name] for name in SIZES}, **figures, **machine()}


if __name__ == "__main__":
    print_figures(measure, options(__doc__, tiles=Path, **SIZES, folder=None).parse_args())
