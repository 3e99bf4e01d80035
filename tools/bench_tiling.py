#!/usr/bin/env python3
"""Times tiling whole slides beside plain loops over OpenSlide and TiffSlide, and online tiles beside JPEG files.

`python tools/bench_tiling.py [--width N] [--height N] [--slides N] [--threads N,N] [--tiles N] [--repeats N]
[--folder DIR]`: takes some minutes. `--width 24576 --height 6144 --slides 2 --tiles 400 --repeats 5` are slides as
scanners make them; `--folder /dev/shm` measures in memory, where making small files on a busy disk is most of the time
on both sides. It draws its own slides: *native* (0.5 MPP, JPEG blocks), *half* (0.25 MPP without a level of 0.5, JPEG),
*resampled* (0.31 MPP, JPEG), *jpeg2000* (0.5 MPP).

Tiling is all of `hpcssl tile`: finding tissue, cutting, pictures, index, synced files. The loops get the places of the
tiles for nothing, sync nothing, and do what everybody starts from: each thread opens the slide and takes its share of
the rows, `read_region`, Pillow's resize and save with the same quality. Online tiles are drawn anywhere on tissue; both
they and the JPEG files go through DINO's multi-crop. Both sides of a ratio are taken in turns. `tile_vs_openslide` is
the lowest of the three kinds of JPEG blocks, `online_vs_jpeg` that of native, both with the most threads and by the
clock; `_cpu` stands for ratios of the processor time of all threads. Prints one JSON object last; of every figure the
median, and the least and the largest as `_spread`.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: threads are ours

import numpy as np
import openslide
import pandas as pd
import torch
from measuring import clocks, machine, options, print_figures, repeated, summary
from PIL import Image

from hpcssl.loader import cpu
from hpcssl.plan.draw import draw_plan
from hpcssl.plan.recipe import dino_augment
from hpcssl.slides.cutting import CutOptions
from hpcssl.stores.kinds import open_store
from hpcssl.stores.online_build import OnlineOptions, build_online
from hpcssl.stores.store import Store
from hpcssl.stores.tiling import TilingOptions, tile_slides
from hpcssl.synthetic.drawn_slides import draw_slide

try:
    import tiffslide
except ImportError:  # not needed for anything else
    tiffslide = None

KINDS: dict[str, dict[str, Any]] = {
    "native": {"mpp": 0.5, "downsamples": (1, 4, 16), "kind": "svs"},
    "half": {"mpp": 0.25, "downsamples": (1, 4, 16), "kind": "svs"},
    "resampled": {"mpp": 0.31, "downsamples": (1, 4, 16), "kind": "svs"},
    "jpeg2000": {"mpp": 0.5, "downsamples": (1, 4, 16), "kind": "svs-jpeg2000"},
}
CUT = CutOptions()


def draw(folder: Path, kind: str, size: tuple[int, int], count: int) -> pd.DataFrame:
    """Draw the slides of a kind; returns their table."""
    rows = []
    for number in range(count):
        path = folder / f"{kind}-{number}.svs"
        draw_slide(path, seed=number, width=size[0], height=size[1], **KINDS[kind])
        rows.append({"slide_id": path.stem, "organ": "skin", "path": str(path), "mpp": ""})
    return pd.DataFrame(rows)


def loop(opened: Callable[[str], Any], store: Store, out: Path, threads: int) -> None:
    """Cut the same tiles slide by slide, row by row with `read_region`; every thread opens the slide for itself."""
    for number, row in enumerate(store.slides.to_dict("records")):
        folder = out / row["slide_id"]
        folder.mkdir(parents=True)
        first, count = store.tiles_of_slide(number)
        corners = sorted((store.coordinates_of(tile) for tile in range(first, first + count)), key=lambda at: at[::-1])

        def cut(
            share: list[tuple[int, int]], path: str = row["path"], mpp: float = row["mpp"], to: Path = folder
        ) -> None:
            slide = opened(path)
            level = slide.get_best_level_for_downsample(CUT.mpp / mpp + 0.01)
            side = round(CUT.tile_px * CUT.mpp / mpp / slide.level_downsamples[level])
            for x, y in share:
                image = slide.read_region((x, y), level, (side, side)).convert("RGB")
                if side != CUT.tile_px:
                    image = image.resize((CUT.tile_px, CUT.tile_px), Image.Resampling.BICUBIC)
                image.save(to / f"{x}_{y}.jpg", quality=CUT.quality, subsampling=0)

        each = -(-len(corners) // threads)
        spread(cut, [corners[n : n + each] for n in range(0, len(corners), each)], threads)


def spread(work: Callable[[Any], object], items: Iterable[Any], threads: int) -> None:
    """Do work on all items with so many threads."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, items))


def tiling_row(slides: pd.DataFrame, folder: Path, threads: int) -> dict[str, float]:
    """Take every figure of tiling once."""
    out, row = folder / "out", {}
    megabytes = sum(Path(path).stat().st_size for path in slides["path"]) / 1e6
    options = TilingOptions(cut=CUT, threads=threads)
    row["tile_s"], row["tile_cpu_s"] = clocks(lambda: tile_slides(slides, out, options))
    store = open_store(out)
    row |= {"slides_per_s": len(slides) / row["tile_s"], "tiles_per_s": store.num_tiles / row["tile_s"]}
    row["mb_per_s"] = megabytes / row["tile_s"]
    for name, opened in (("openslide", openslide.OpenSlide), ("tiffslide", tiffslide and tiffslide.TiffSlide)):
        if opened:
            took, used = clocks(lambda opened=opened: loop(opened, store, folder / "loop", threads))
            row |= {f"{name}_tiles_per_s": store.num_tiles / took, f"tile_vs_{name}": took / row["tile_s"]}
            row[f"tile_vs_{name}_cpu"] = used / row["tile_cpu_s"]
            shutil.rmtree(folder / "loop")
    shutil.rmtree(out)
    return row


def multi_crop(store: Store, num: int, threads: int) -> Callable[[], None]:
    """Return the work of fetching, decoding and augmenting some tiles at random, in DINO's views."""
    recipe = dino_augment()
    tiles = np.random.default_rng(0).integers(0, store.num_tiles, num).tolist()
    positions = np.arange(num)
    plan = draw_plan(recipe, 0, positions)
    out = [np.empty((kind.count, num, kind.view_px, kind.view_px, 3), np.uint8) for kind in recipe.kinds]

    def one(index: int) -> None:
        cpu.augment(cpu.decode(store.fetch(index, tiles[index]), name="tile"), recipe, plan, index, out)

    return lambda: spread(one, range(num), threads)


def online_row(loose: Store, online: Store, num: int, threads: int) -> dict[str, float]:
    """Take every figure of reading once."""
    (jpeg, jpeg_cpu), (slide, slide_cpu) = (clocks(multi_crop(store, num, threads)) for store in (loose, online))
    ratios = {"online_vs_jpeg": jpeg / slide, "online_vs_jpeg_cpu": jpeg_cpu / slide_cpu}
    return {"jpeg_tiles_per_s": num / jpeg, "online_tiles_per_s": num / slide, **ratios}


def of_kind(kind: str, folder: Path, args: argparse.Namespace, threads: list[int]) -> dict[str, object]:
    """Return the figures of a kind of slide, each taken with these numbers of threads."""
    table = draw(folder, kind, (args.width, args.height), args.slides)
    tile_slides(table, folder / "loose", TilingOptions(cut=CUT, threads=max(threads)))
    loose = open_store(folder / "loose")
    online = build_online(table, folder / "online", OnlineOptions(mpps=(CUT.mpp,))).drawn_by(0, {})

    def take() -> dict[str, float]:
        rows = {n: tiling_row(table, folder, n) | online_row(loose, online, args.tiles, n) for n in threads}
        return {f"{name}_{kind}_{n}_threads": value for n, row in rows.items() for name, value in row.items()}

    figures = summary(repeated(take, args.repeats))
    for name in ("loose", "online"):
        shutil.rmtree(folder / name)
    return figures


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Take every figure `repeats` times."""
    torch.set_num_threads(1)
    threads = [int(number) for number in args.threads.split(",")]
    figures: dict[str, Any] = {}
    for kind in KINDS:
        figures |= of_kind(kind, folder, args, threads)
    most = f"{max(threads)}_threads"
    kinds = ("native", "half", "resampled")
    figures["tile_vs_openslide"] = min(figures[f"tile_vs_openslide_{kind}_{most}"] for kind in kinds)
    figures["online_vs_jpeg"] = figures[f"online_vs_jpeg_native_{most}"]
    sizes = {"size": (args.width, args.height), **{name: vars(args)[name] for name in ("slides", "tiles", "repeats")}}
    packages = ("numpy", "imagecodecs", "tifffile", "openslide-bin", "openslide-python", "tiffslide", "pillow")
    return {**sizes, "quality": CUT.quality, **figures, **machine(*packages)}


if __name__ == "__main__":
    sizes = {"width": 12288, "height": 6144, "slides": 1, "tiles": 200, "threads": "1,2", "repeats": 3}
    print_figures(measure, options(__doc__, **sizes, folder=None).parse_args())
