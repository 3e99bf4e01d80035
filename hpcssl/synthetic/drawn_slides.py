"""Procedural H&E-like tiles and whole slides, for the demo where the user has none and for tests.

The label is carried by texture in about half of a positive slide's tiles: large, irregular nuclei in disorder and
ragged glands against small, even nuclei in rows. Nuclei cover the same area under both labels; stain, cellularity and
white space vary between slides far more than between labels, so that mean colour tells little.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from hpcssl.core.atomic import atomic_dir, atomic_file, write_atomic
from hpcssl.core.claim import check_same
from hpcssl.core.errors import ConfigError, StoreError
from hpcssl.synthetic.tissue import ATLAS_PX, COARSE_PX, ORGANS, Materials, Slide, colour_table, draw_tile, generator

Counts = Mapping[str, tuple[int, int]]  # by organ: slides, and their mean tiles; a slide has 0.5 to 1.5 times the mean
DEMO: Counts = {"breast": (75, 24), "lung": (45, 17), "colon": (30, 15)}
LABELS = ("benign", "malignant")
BLOCK_PX = 256
GLASS, PEN = (243, 242, 244), (24, 140, 110)
# how slides vary, uniformly: relative to their organ, and without it
_BUILD = {"present": (0.75, 1.25), "radius": (0.9, 1.1), "wall": (0.85, 1.15)}
_LOOK = {"cells": (0.5, 1.6), "gaps": (0, 0.55), "crowding": (0.6, 1), "haem": (0.14, 0.42), "eosin": (0.35, 0.65)}
_FORMAT = 1
_WRITERS = 8  # threads that write and sync; one alone waits on the disk for longer than a tile takes to draw
_PATCH_PX, _PATCH_MPP, _PATCHES = 224, 0.5, 12  # of a whole slide: its tissue repeats them
_CENTIMETRE = 10_000.0  # microns
# compression, and its libjpeg quality or signal over noise in dB; a JPEG of RGB halves the resolution of chrominance
_BLOCKS = {"tiff": ("jpeg", 85), "svs": ("jpeg", 85), "svs-jpeg2000": ("aperio_jp2000_rgb", 38)}


def draw_tiles(
    out: Path,
    *,
    seed: int,
    organs: Counts = DEMO,
    tile_px: int = 224,
    on_progress: Callable[[int], None] = lambda num_tiles: None,
) -> Path:
    """Draw `<out>/<organ>/<slide_id>/<tile>.jpg` and, last, `<out>/slides.csv`; goes on where it was stopped.

    `tile_px`, a tile's side, is a multiple of 4. `on_progress` is called with the number of tiles after every slide,
    also for slides that were there already. ConfigError for an organ that is not known or numbers that cannot be drawn;
    StoreError if `out` holds something else than a draw with these settings.
    """
    _claim(out, seed, organs, tile_px)
    slides, materials = plan_slides(seed, organs), Materials(seed)
    for slide in slides:
        folder, numbers = out / slide.organ / slide.slide_id, range(slide.num_tiles)
        if not folder.is_dir():
            # no thread outlives the folder: the pool is left first
            with atomic_dir(folder) as partial, ThreadPoolExecutor(_WRITERS) as writers:
                files = (partial / f"{i:03d}.jpg" for i in numbers)
                jpegs = (encode_jpeg(draw_tile(materials, slide, i, tile_px=tile_px)) for i in numbers)
                list(writers.map(_write_synced, files, jpegs))
        on_progress(slide.num_tiles)
    rows = [",".join(map(str, row[:5])) for row in (Slide._fields, *slides)]
    write_atomic(out / "slides.csv", "\n".join(rows) + "\n")
    return out


def plan_slides(seed: int, organs: Counts = DEMO) -> list[Slide]:
    """Return every slide's row and look; half of an organ's patients are positive, every third has two slides."""
    slides = []
    for organ, (count, mean_tiles) in organs.items():
        patients = [p for p in range(count) for _ in range(2 if p % 3 == 0 else 1)][:count]
        positive = generator(seed, f"labels/{organ}").permutation(patients[-1] + 1) % 2
        slides += [_plan_slide(seed, organ, i, p, positive[p], mean_tiles) for i, p in enumerate(patients)]
    return slides


def _plan_slide(seed: int, organ: str, index: int, patient: int, positive: int, mean_tiles: int) -> Slide:
    random, usual = generator(seed, f"slide/{organ}/{index}"), ORGANS[organ]
    num_tiles = int(random.integers(max(1, mean_tiles // 2), mean_tiles + (mean_tiles + 1) // 2 + 1))
    share = random.uniform(0.4, 0.6)
    altered = random.permutation(num_tiles)[: max(1, round(share * num_tiles))].tolist() if positive else ()
    look = {name: usual.get(name, 1) * random.uniform(*ends) for name, ends in (_BUILD | _LOOK).items()}
    names = f"{organ}_{index:03d}", organ, f"{organ}_p{patient:03d}", LABELS[positive]
    return Slide(*names, num_tiles, frozenset(altered), colour_table(random), **usual | look)


def encode_jpeg(tile: NDArray[np.uint8]) -> bytes:
    """Return a drawn tile as JPEG."""
    buffer = io.BytesIO()
    Image.frombuffer("RGBX", tile.shape[:2], tile, "raw", "RGBX", 0, 1).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _claim(out: Path, seed: int, organs: Counts, tile_px: int) -> None:
    """Check the settings and note them in the folder before the first tile; refuse a folder of anything else."""
    unknown = [organ for organ in organs if organ not in ORGANS]
    if unknown:
        raise ConfigError(f"synthetic tiles: organ {unknown[0]} is not known; known: {', '.join(ORGANS)}")
    if not organs or min(map(min, organs.values())) < 1:
        raise ConfigError(
            f"synthetic tiles: {dict(organs)}; expected one positive number of slides and of tiles for each organ"
        )
    if tile_px % COARSE_PX or not 32 <= tile_px <= ATLAS_PX:
        expected = f"a multiple of {COARSE_PX} from 32 to {ATLAS_PX}"
        raise ConfigError(f"synthetic tiles: tile_px {tile_px}; expected {expected}")
    note, slides, tiles = out / "drawn.json", *map(list, zip(*organs.values()))
    requested = json.dumps([_FORMAT, seed, list(organs), slides, tiles, tile_px])
    if note.exists():
        settings = {"settings": note.read_text(encoding="utf-8").strip()}, {"settings": requested}
        made, advice = f"{out}: holds tiles drawn with", "choose another folder"
        check_same(*settings, made=made, now="not", advice=advice, error=StoreError)
    elif out.is_dir() and any(out.iterdir()):
        raise StoreError(f"{out}: not empty and not drawn here; choose another folder for the tiles")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(note, requested + "\n")


def draw_slide(
    path: Path,
    *,
    seed: int,
    width: int,
    height: int,
    mpp: float = 0.25,
    with_mpp: bool = True,
    downsamples: Sequence[int] = (1, 2, 4),
    kind: Literal["tiff", "svs", "svs-jpeg2000"] = "tiff",
) -> NDArray[np.uint8]:
    """Draw islands of tissue on glass, crossed by a pen, as a tiled pyramid; returns level 0, (height, width, 3).

    `width` and `height` are those of level 0, in pixels of `mpp`, which the file says only `with_mpp`. Levels but the
    first, at `downsamples`, are means of level 0. An SVS is Aperio's; its second picture is a thumbnail.
    """
    pixels = _draw_pixels(seed, width, height, mpp)
    aperio, (compression, level) = kind != "tiff", _BLOCKS[kind]
    plain: dict[str, Any] = {"photometric": "rgb", "metadata": None, "software": False}
    blocks = plain | {"tile": (BLOCK_PX,) * 2, "compression": compression, "compressionargs": {"level": level}}
    if with_mpp and not aperio:
        blocks |= {"resolution": (_CENTIMETRE / mpp,) * 2, "resolutionunit": "CENTIMETER"}
    with atomic_file(path) as temporary, tifffile.TiffWriter(temporary) as writer:
        for number, downsample in enumerate(downsamples):
            reduced = np.asarray(Image.fromarray(pixels).reduce(downsample))
            if aperio:
                size = f"{width}x{height} ({BLOCK_PX}x{BLOCK_PX})"
                size += f" -> {reduced.shape[1]}x{reduced.shape[0]}" if number else ""
                scan = f"|ScanScope ID = DRAWN|MPP = {mpp:.4f}" if with_mpp else ""
                blocks["description"] = f"Aperio Image Library v12.0.0\r\n{size} JPEG/RGB{scan}"
            writer.write(reduced, subfiletype=int(number > 0 and not aperio), **blocks)
            if aperio and number == 0:
                writer.write(np.asarray(Image.fromarray(pixels).resize((width // 16, height // 16))), **plain)
    return pixels


def _draw_pixels(seed: int, width: int, height: int, mpp: float) -> NDArray[np.uint8]:
    random, side = generator(seed, "whole slide"), round(_PATCH_PX * _PATCH_MPP / mpp)
    pixels = np.array(GLASS, np.uint8) - random.integers(0, 3, (height, width, 1), np.uint8)
    materials, slide = Materials(seed), plan_slides(seed, {"colon": (1, _PATCHES)})[0]
    tiles = (draw_tile(materials, slide, i, tile_px=_PATCH_PX)[..., :3] for i in range(_PATCHES))
    patches = [np.asarray(Image.fromarray(tile).resize((side, side), Image.Resampling.BICUBIC)) for tile in tiles]
    chosen = random.integers(0, _PATCHES, (-(-height // side), -(-width // side)))
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    wave_x, wave_y = random.uniform(0, 6, 2)
    for row, numbers in enumerate(chosen):
        lines = np.s_[row * side : (row + 1) * side]
        strip, down = pixels[lines], y[lines]
        wobble = 0.08 * np.sin(7 * x + wave_x) + 0.08 * np.cos(6 * down + wave_y)
        tissue = ((x + 0.15) / 0.62) ** 2 + (down / 0.7) ** 2 + wobble < 1
        mosaic = np.hstack([patches[number] for number in numbers])[: len(strip), :width]
        np.copyto(strip, mosaic, where=tissue[..., None])
        strip[np.abs(x - 0.3 * down - 0.1) < 0.03] = PEN
    return pixels
