"""A picture of every slide to look at: what was taken for tissue, for pen, and where the tiles are."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hpcssl.slides.foreground import Foreground

_LONGEST_PX = 1024
_LINE_PX = 2
_QUALITY = 85
_TISSUE, _PEN, _TILE = (0, 160, 60), (220, 0, 200), (30, 90, 220)


def qc_picture(foreground: Foreground, corners: NDArray[np.int64], side: float) -> bytes:
    """Return a JPEG: the slide, the edges of tissue (green) and of pen (magenta), and the tiles (blue).

    The tiles' corners, (tiles, 2), and their side are in level-0 pixels.
    """
    rows, columns = foreground.tissue.shape
    scale = _LONGEST_PX / max(rows, columns)
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    picture = Image.fromarray(foreground.colours).resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    per_px = scale / foreground.cell
    for x, y in corners.tolist():
        square = x * per_px, y * per_px, (x + side) * per_px, (y + side) * per_px
        draw.rectangle(square, outline=_TILE, width=_LINE_PX)
    pixels = np.asarray(picture).copy()
    for mask, colour in ((foreground.tissue, _TISSUE), (foreground.pen, _PEN)):
        large = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        pixels[:-_LINE_PX][large[:-_LINE_PX] != large[_LINE_PX:]] = colour
        pixels[:, :-_LINE_PX][large[:, :-_LINE_PX] != large[:, _LINE_PX:]] = colour
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue()
