#!/usr/bin/env python3
"""Times indexing loose tiles, packing them against `tar`, and opening a store, on the disk of `--folder`.

`python tools/bench_store.py [--slides N] [--tiles-per-slide N] [--open-tiles N] [--repeats N] [--folder DIR]`: the
defaults check in seconds that all of it runs, their figures mean little; `--slides 500 --tiles-per-slide 400
--open-tiles 1000000 --repeats 5` is a measurement. Files are in the page cache, what is written is synced, both sides
of a ratio are taken in turns. `files_per_s` is by the clock, `files_per_cpu_s` by the processor time of all threads.
Prints one JSON object last; of every figure the median, and the least and the largest as `_spread`.
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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from hpcssl.stores.index_writer import IndexWriter, seal
from hpcssl.stores.kinds import open_store
from hpcssl.stores.loose import LooseStore
from hpcssl.stores.scan import THREADS, BuildOptions, build_store
from hpcssl.stores.store_build import write_header
from hpcssl.stores.tile_files import Tiles


def write_tiles(folder: Path, slides: int, tiles: int, tile_bytes: int) -> None:
    """Write files with a JPEG's two ends and random bytes between them."""
    random = np.random.default_rng(0)
    for slide in range(slides):
        path = folder / f"organ-{slide % 5}" / f"slide-{slide:06d}"
        path.mkdir(parents=True)
        for tile in range(tiles):
            content = b"\xff\xd8\xff" + random.bytes(max(0, tile_bytes - 5)) + b"\xff\xd9"
            (path / f"tile_x{tile * 224}_y{slide * 224}.jpg").write_bytes(content)


def write_index(folder: Path, num_tiles: int) -> None:
    """Write a loose store of that many tiles that are not there, 10,000 a slide."""
    writer = IndexWriter(folder, LooseStore.layout)
    counts = [min(10_000, num_tiles - first) for first in range(0, num_tiles, 10_000)]
    for slide, count in enumerate(counts):
        names = [f"tile_x{tile * 224}_y0.jpg".encode() for tile in range(count)]
        writer.add(f"organ/slide-{slide:06d}", Tiles(names=names, sizes=[15_000] * count).entry)
    slides = pd.DataFrame({"slide_id": [f"slide-{i:06d}" for i in range(len(counts))], "organ": "organ"})
    slides = slides.assign(num_tiles=writer.finish())
    write_header(folder, seal(folder, LooseStore, slides, {"root": str(folder)}))


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return how long it takes by the clock, and of this process's processor time."""
    begun, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begun, time.process_time() - used


def tar(tiles: Path, out: Path) -> None:
    """Write the same files with tar, and sync them."""
    subprocess.run(["tar", "--format=ustar", "-cf", out, "-C", tiles, "."], check=True)
    with out.open("rb") as stream:
        os.fsync(stream.fileno())


def measure(folder: Path, slides: int, tiles: int, tile_bytes: int, open_tiles: int, repeats: int) -> dict[str, object]:
    """Take every figure `repeats` times."""
    root, store, shard = folder / "tiles", folder / "store", folder / "all.tar"
    write_tiles(root, slides, tiles, tile_bytes)
    (folder / "large").mkdir()
    write_index(folder / "large", open_tiles)
    found: dict[str, list[float]] = {}

    def build(options: BuildOptions) -> tuple[float, float]:
        took = seconds(lambda: build_store(root, store, options=options))
        shutil.rmtree(store)
        return took

    for repeat in range(repeats + 1):  # the first warms up
        row: dict[str, float] = {}
        for name, check, threads in (
            ("no_check_1_thread", False, 1),
            ("no_check", False, THREADS),
            ("check_1_thread", True, 1),
            ("check", True, THREADS),
        ):
            wall, cpu = build(BuildOptions(check=check, threads=threads))
            row |= {f"files_per_s_{name}": slides * tiles / wall, f"files_per_cpu_s_{name}": slides * tiles / cpu}
        row["tar_s"], _ = seconds(lambda: tar(root, shard))
        row["pack_s"], _ = build(BuildOptions(pack=True))
        row["pack_1_thread_s"], _ = build(BuildOptions(pack=True, threads=1))
        row["pack_vs_tar"] = row["pack_s"] / row["tar_s"]
        row["open_s"], _ = seconds(lambda: open_store(folder / "large"))
        shard.unlink()
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), file=sys.stderr, flush=True)
        if repeat:
            for name, value in row.items():
                found.setdefault(name, []).append(value)
    told: dict[str, object] = {"slides": slides, "tiles_per_slide": tiles, "tile_bytes": tile_bytes}
    told |= {"open_tiles": open_tiles, "repeats": repeats, "threads": THREADS}
    for name, values in found.items():
        told[name] = float(f"{statistics.median(values):.5g}")
        told[f"{name}_spread"] = [float(f"{min(values):.5g}"), float(f"{max(values):.5g}")]
    told |= {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine()}
    return told | {"python": platform.python_version(), "numpy": np.__version__}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=5)
    parser.add_argument("--tiles-per-slide", type=int, default=40)
    parser.add_argument("--tile-bytes", type=int, default=15_000)
    parser.add_argument("--open-tiles", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        sizes = (args.slides, args.tiles_per_slide, args.tile_bytes, args.open_tiles)
        print(json.dumps(measure(Path(folder), *sizes, args.repeats)))


if __name__ == "__main__":
    main()
