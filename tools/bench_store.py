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
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
from measuring import clocks, machine, options, print_figures, repeated, summary

from hpcssl.stores.index_writer import IndexWriter, seal
from hpcssl.stores.kinds import open_store
from hpcssl.stores.loose import LooseStore
from hpcssl.stores.scan import THREADS, BuildOptions, build_store
from hpcssl.stores.store_build import write_header
from hpcssl.stores.tile_files import Tiles

SIZES = {"slides": 5, "tiles_per_slide": 40, "tile_bytes": 15_000, "open_tiles": 20_000, "repeats": 1}


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


def tar(tiles: Path, out: Path) -> None:
    """Write the same files with tar, and sync them."""
    subprocess.run(["tar", "--format=ustar", "-cf", out, "-C", tiles, "."], check=True)
    with out.open("rb") as stream:
        os.fsync(stream.fileno())


def measure(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Take every figure `repeats` times."""
    slides, tiles = args.slides, args.tiles_per_slide
    root, store, shard = folder / "tiles", folder / "store", folder / "all.tar"
    write_tiles(root, slides, tiles, args.tile_bytes)
    (folder / "large").mkdir()
    write_index(folder / "large", args.open_tiles)

    def build(choice: BuildOptions) -> tuple[float, float]:
        taken = clocks(lambda: build_store(root, store, options=choice))
        shutil.rmtree(store)
        return taken

    def take() -> dict[str, float]:
        row: dict[str, float] = {}
        for check in (False, True):
            for threads in (1, THREADS):
                name = ("check" if check else "no_check") + ("_1_thread" if threads == 1 else "")
                wall, cpu = build(BuildOptions(check=check, threads=threads))
                row |= {f"files_per_s_{name}": slides * tiles / wall, f"files_per_cpu_s_{name}": slides * tiles / cpu}
        row["tar_s"], _ = clocks(lambda: tar(root, shard))
        row["pack_s"], _ = build(BuildOptions(pack=True))
        row["pack_1_thread_s"], _ = build(BuildOptions(pack=True, threads=1))
        row["pack_vs_tar"] = row["pack_s"] / row["tar_s"]
        row["open_s"], _ = clocks(lambda: open_store(folder / "large"))
        shard.unlink()
        return row

    figures = summary(repeated(take, args.repeats))
    return {**{name: vars(args)[name] for name in SIZES}, "threads": THREADS, **figures, **machine("numpy")}


if __name__ == "__main__":
    print_figures(measure, options(__doc__, **SIZES, folder=None).parse_args())
