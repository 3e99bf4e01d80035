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
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from hpcssl.core.atomic import digest_file
from hpcssl.core.world import World
from hpcssl.loader.stream import LoaderConfig, StreamRequest, TileStream
from hpcssl.plan.recipe import dino_augment
from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.spec import ScheduleSpec
from hpcssl.stores.scan import BuildOptions, build_store
from hpcssl.stores.store import Store, identity, index_files

GLOBAL_BATCH, RANKS, STEPS = 1080, 12, 9
PER_SLIDE, ORGANS = 10_000, 10


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
    slides = slides.assign(organ=[f"organ-{i % ORGANS}" for i in range(len(first))], num_tiles=counts, first_tile=first)
    slides.to_parquet(folder / "slides.parquet", index=False)
    folders = [f"{row.organ}/{row.slide_id}".encode() for row in slides.itertuples()]
    (folder / "folders.bin").write_bytes(b"".join(folders))
    np.save(folder / "folders.npy", np.cumsum([len(name) for name in folders]).astype("<u8"))
    files = {name: digest_file(folder / name) for name in index_files(packed=True)}
    header = {key: base.header[key] for key in ("format", "kind", "shards")} | {"files": files}
    header |= {"num_tiles": num_tiles, "num_slides": len(slides), **identity(slides, files)}
    (folder / "store.json").write_text(json.dumps(header))


def make_schedule(store: Path, out: Path, pseudo_epochs: int, positions: int) -> None:
    """Build a schedule of a store."""
    slides = Store.open(store).slides
    repeats = -(-5 * positions // int(slides["num_tiles"].sum())) * 4
    spec = ScheduleSpec(
        num_pseudo_epochs=pseudo_epochs, positions_per_pseudo_epoch=positions, num_groups=5, max_repeats=repeats
    )
    build_schedule(spec, slides, out, jobs=len(os.sched_getaffinity(0)))


def child(store: Path, schedule: Path, start_step: int) -> dict[str, float]:
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
    batches = iter(TileStream(Store.open(store), Schedule.open(schedule), request, config=config))
    next(batches)
    first_s = time.perf_counter() - begun
    for _ in batches:
        pass
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    anonymous = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    return {"first_batch_s": first_s, "anonymous_mb": anonymous / 1000}


def in_child(store: Path, schedule: Path, start_step: int) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--child", str(store), str(schedule), str(start_step)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Take every figure `repeats` times."""
    base = build_store(args.tiles, folder / "base", options=BuildOptions(pack=True))
    small, large = folder / "small", folder / "large"
    write_large_store(small, base, 10_000)
    write_large_store(large, base, args.store_tiles)
    make_schedule(small, folder / "short", 1, 50_000)
    make_schedule(large, folder / "long", args.pseudo_epochs, args.positions)
    later = args.at // GLOBAL_BATCH
    found: dict[str, list[float]] = {}
    for repeat in range(args.repeats + 1):  # the first warms up
        at_0, at_later = in_child(large, folder / "long", 0), in_child(large, folder / "long", later)
        of_small = in_child(small, folder / "short", 0)
        row = {
            "restart_vs_start": at_later["first_batch_s"] / at_0["first_batch_s"],
            "start_s": at_0["first_batch_s"],
            "anonymous_mb_large": at_later["anonymous_mb"],
            "anonymous_mb_small": of_small["anonymous_mb"],
            "growth_mb": at_later["anonymous_mb"] - of_small["anonymous_mb"],
        }
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), file=sys.stderr, flush=True)
        if repeat:
            for name, value in row.items():
                found.setdefault(name, []).append(value)
    told: dict[str, object] = {"pseudo_epochs": args.pseudo_epochs, "positions": args.positions, "at": args.at}
    told |= {"store_tiles": args.store_tiles, "repeats": args.repeats}
    for name, values in found.items():
        told[name] = float(f"{statistics.median(values):.4g}")
        told[f"{name}_spread"] = [float(f"{min(values):.4g}"), float(f"{max(values):.4g}")]
    return told | {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=Path, required=True, help="tiles as <organ>/<slide_id>/*.jpg")
    parser.add_argument("--pseudo-epochs", type=int, default=3)
    parser.add_argument("--positions", type=int, default=50_000, help="of a pseudo-epoch")
    parser.add_argument("--store-tiles", type=int, default=200_000)
    parser.add_argument("--at", type=int, default=120_000, help="position of the restart")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        print(json.dumps(measure(folder, args)))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
