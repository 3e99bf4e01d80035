"""Procedural whole slides: islands of the demo's tissue on glass, with a pen stroke, as tiled TIFF pyramids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from hpcssl.core.atomic import atomic_file
from hpcssl.core.rng import key_of
from hpcssl.synthetic.drawn_tiles import draw_tile, plan_slides
from hpcssl.synthetic.materials import prepare

BLOCK_PX = 256
_PATCH_PX = 224
_PATCH_MPP = 0.5
_PATCHES = 12  # drawn; the rest of the tissue repeats them
_GLASS = (243, 242, 244)
_PEN = (24, 140, 110)
_LEVELS = {"jpeg": 85, "aperio_jp2000_rgb": 38}  # libjpeg's quality; signal over noise in dB
_CENTIMETRE = 10_000.0  # microns


def draw_slide(
    path: Path,
    *,
    seed: int,
    width: int,
    height: int,
    mpp: float = 0.25,
    mpp_told: float | None = None,
    downsamples: Sequence[int] = (1, 2, 4),
    aperio: bool = False,
    compression: str = "jpeg",
    pen: bool = True,
) -> NDArray[np.uint8]:
    """Draw a slide, write it and return its level 0 as it was before compression, (height, width, 3).

    Parameters
    ----------
    width, height : of level 0, in pixels of `mpp`
    mpp_told : what the file says, 0 for nothing (default: `mpp`)
    downsamples : of the levels; those but the first are means of level 0
    aperio : write an SVS, with a thumbnail as its second picture, instead of a plain TIFF
    compression : of the blocks; "jpeg", "aperio_jp2000_rgb", "deflate" or "none"
    pen : cross the slide with a green stroke
    """
    pixels = _draw(seed, width, height, mpp, pen=pen)
    told = mpp if mpp_told is None else mpp_told
    # a JPEG of RGB is written as YCbCr with chrominance at half the resolution
    options: dict[str, Any] = {"photometric": "rgb", "tile": (BLOCK_PX, BLOCK_PX), "metadata": None, "software": False}
    if compression != "none":
        options["compression"] = compression
    if compression in _LEVELS:
        options["compressionargs"] = {"level": _LEVELS[compression]}
    if told and not aperio:
        options |= {"resolution": (_CENTIMETRE / told,) * 2, "resolutionunit": "CENTIMETER"}
    with atomic_file(path) as temporary, tifffile.TiffWriter(temporary) as writer:
        for number, downsample in enumerate(downsamples):
            level = np.asarray(Image.fromarray(pixels).reduce(downsample))
            if aperio:
                size = f"{width}x{height} ({BLOCK_PX}x{BLOCK_PX})"
                size += f" -> {level.shape[1]}x{level.shape[0]}" if number else ""
                said = f"|ScanScope ID = DRAWN|MPP = {told:.4f}" if told else ""
                options["description"] = f"Aperio Image Library v12.0.0\r\n{size} JPEG/RGB{said}"
            writer.write(level, subfiletype=int(number > 0 and not aperio), **options)
            if aperio and number == 0:
                thumbnail = np.asarray(Image.fromarray(pixels).resize((width // 16, height // 16)))
                writer.write(thumbnail, photometric="rgb", metadata=None, software=False)
    return pixels


def _draw(seed: int, width: int, height: int, mpp: float, *, pen: bool) -> NDArray[np.uint8]:
    random = np.random.Generator(np.random.PCG64(key_of(seed, "synthetic/whole slide")))
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[...] = _GLASS
    pixels -= random.integers(0, 3, (height, width, 1), np.uint8)
    patches = _patches(seed, mpp)
    side = patches[0].shape[0]
    rows, columns = -(-height // side), -(-width // side)
    chosen = random.integers(0, len(patches), (rows, columns))
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    waves = random.uniform(0, 6), random.uniform(0, 6)
    for row in range(rows):
        lines = slice(row * side, (row + 1) * side)
        strip, down = pixels[lines], y[lines]
        wobble = 0.08 * np.sin(7 * x + waves[0]) + 0.08 * np.cos(6 * down + waves[1])
        tissue = ((x + 0.15) / 0.62) ** 2 + (down / 0.7) ** 2 + wobble < 1
        for column in range(columns):
            square = np.s_[:, column * side : (column + 1) * side]
            mask = tissue[square]
            patch = patches[chosen[row, column]][: mask.shape[0], : mask.shape[1]]
            strip[square][mask] = patch[mask]
        if pen:
            strip[np.abs(x - 0.3 * down - 0.1) < 0.03] = _PEN
    return pixels


def _patches(seed: int, mpp: float) -> list[NDArray[np.uint8]]:
    """Return some squares of tissue at an MPP."""
    random = np.random.Generator(np.random.PCG64(key_of(seed, "synthetic/materials")))
    materials = prepare(random)
    slide = plan_slides(seed, ("colon",), (1,), (_PATCHES,))[0]
    side = round(_PATCH_PX * _PATCH_MPP / mpp)
    drawn = (draw_tile(materials, slide, i, seed=seed, tile_px=_PATCH_PX)[..., :3] for i in range(_PATCHES))
    return [
        np.asarray(Image.fromarray(np.ascontiguousarray(patch)).resize((side, side), Image.Resampling.BICUBIC))
        for patch in drawn
    ]
