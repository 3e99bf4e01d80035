"""Where a slide holds tissue, in cells of 8 microns: colour by Otsu's threshold, without pen, ink, glass and blur.

The slide is looked at once, at 2 microns per pixel; a cell is the mean of 4 × 4 of those. Colours are 0 to 255.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from hpcssl.slides.pixel_kernels import changes, means
from hpcssl.slides.slide import Slide

LOOK_MPP = 2.0
_NEAR = 1.01
CELL = 4  # pixels of the look a side
_STRIP_PX = 4_000_000  # pixels of the slide read together, or more:
_STRIP_ROWS = 512  # in whole numbers of these, which blocks mostly divide: hardly any is decoded for two strips
_CHROMA = (9.0, 22.0)  # Otsu's threshold is kept between these: no tissue in noise, and some in a slide full of it
_SHARP = 1.6  # mean change of grey to the neighbours' mean, at 2 microns; tissue in focus has 4 to 12
_FOCUS_CELLS = 15  # the focus is judged over so many cells a side, about a tile at 0.5 MPP
_FEWEST_CELLS = 40  # smaller pieces are dust
_FEWEST_PEN_CELLS = 12  # smaller strokes are pigment or ink on the tissue's edge
_PEN_MARGIN = 2  # cells around a stroke, which are tinged


@dataclass(frozen=True, kw_only=True)
class Foreground:
    """Where tissue and pen are; a cell is never both."""

    tissue: NDArray[np.bool_]  # (rows, columns)
    pen: NDArray[np.bool_]  # (rows, columns)
    colours: NDArray[np.uint8]  # (rows, columns, 3), mean colour of every cell
    cell: float  # level-0 pixels a side of a cell; the last row and column may reach beyond the slide
    cell_mm2: float  # area of a cell

    @property
    def tissue_mm2(self) -> float:
        """Area of the tissue."""
        return float(self.tissue.sum() * self.cell_mm2)


def find_foreground(
    slide: Slide, *, slide_mpp: float, each: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]] = map
) -> Foreground:
    """Look at a slide, whose level 0 has `slide_mpp`, and tell tissue from what is none; raises as `Slide.read`.

    `each` is `map`, or that of a pool whose threads then share the reading.
    """
    scale = max(1.0, LOOK_MPP / slide_mpp)  # level-0 pixels for one of the look
    level = max(n for n, size in enumerate(slide.levels) if n == 0 or size.downsample <= scale * _NEAR)
    step = scale / slide.levels[level].downsample
    if step <= _NEAR:  # a level of nearly this MPP: its pixels as they are
        step, scale = 1.0, slide.levels[level].downsample
    cell = CELL * step  # in pixels of the level
    size = slide.levels[level]
    rows, columns = math.ceil(size.height / cell), math.ceil(size.width / cell)
    least = max(1, round(_STRIP_ROWS / cell))
    together = least * max(1, int(_STRIP_PX / (columns * cell * cell * least)))
    strips = each(
        lambda first: _look(slide, level, step, first, min(together, rows - first), columns), range(0, rows, together)
    )
    colours, focus = map(np.concatenate, zip(*strips))
    tissue, pen = classify(colours, focus)
    side, area = CELL * scale, (CELL * scale * slide_mpp / 1000) ** 2
    return Foreground(tissue=tissue, pen=pen, colours=colours, cell=side, cell_mm2=area)


def _look(
    slide: Slide, level: int, step: float, first: int, rows: int, columns: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return colours and focus of some rows of cells."""
    top, bottom = first * CELL * step, (first + rows) * CELL * step
    y0, width = math.floor(top), math.ceil(columns * CELL * step)
    pixels = slide.read(0, y0, level, width, math.ceil(bottom) - y0)
    if step > 1:
        look = Image.fromarray(pixels).resize(
            (columns * CELL, rows * CELL), Image.Resampling.BOX, box=(0, top - y0, columns * CELL * step, bottom - y0)
        )
        pixels = np.asarray(look)
    return means(pixels, CELL), changes(pixels, CELL)


def classify(colours: NDArray[np.uint8], focus: NDArray[np.float32]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which cells are tissue, and which are pen, both (rows, columns).

    `colours`, (rows, columns, 3), are the cells' means; `focus`, (rows, columns), is the mean change of grey between
    neighbouring pixels of 2 microns.
    """
    red, green, blue = (np.ascontiguousarray(colours[..., c], np.int16) for c in range(3))
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    pen = _strokes(red, green, blue, chroma)
    usable = ~pen
    threshold = float(np.clip(otsu(chroma[usable]) if usable.any() else 0, *_CHROMA))
    tissue = _closed(usable & (chroma > threshold)) & usable
    tissue &= _sharp(tissue, focus)
    return _without_specks(_without_lines(tissue), _FEWEST_CELLS), pen


def _strokes(
    red: NDArray[np.int16], green: NDArray[np.int16], blue: NDArray[np.int16], chroma: NDArray[np.int16]
) -> NDArray[np.bool_]:
    """Return the cells in colours that haematoxylin and eosin do not have, with a margin around them."""
    coloured = chroma > 20
    cold = coloured & (green >= red - 2)  # green, teal and light blue: tissue takes away more green than red
    stained = coloured & ~cold
    usual = max(0.0, float(np.median((blue - red)[stained]))) if stained.any() else 0.0  # above 0: stained in violet
    blue_pen = (blue - red > 55 + usual) & (blue > green + 40)
    red_pen = (red - np.maximum(green, blue) > 95) & (blue - green < 22)
    black = (np.maximum(np.maximum(red, green), blue) < 66) & (chroma < 40)
    strokes = _without_specks(cold | blue_pen | red_pen | black, _FEWEST_PEN_CELLS)
    for _ in range(_PEN_MARGIN):
        strokes = _dilated(strokes)
    return strokes


def _dilated(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask and its neighbours above, below, left and right (scipy's takes twenty times as long)."""
    out = mask.copy()
    out[1:] |= mask[:-1]
    out[:-1] |= mask[1:]
    out[:, 1:] |= mask[:, :-1]
    out[:, :-1] |= mask[:, 1:]
    return out


def _closed(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask with its holes and gaps of one cell filled; beyond the picture it goes on as at the edge."""
    return ~_dilated(~_dilated(np.pad(mask, 2, mode="edge")))[2:-2, 2:-2]


def _without_lines(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask without lines of one cell, which are seams and the slide's edge: the squares of 2 × 2 within it."""
    squares = mask[:-1, :-1] & mask[1:, :-1] & mask[:-1, 1:] & mask[1:, 1:]
    out = np.zeros_like(mask)
    for rows, columns in itertools.product((slice(None, -1), slice(1, None)), repeat=2):
        out[rows, columns] |= squares
    return out


def _sharp(tissue: NDArray[np.bool_], focus: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return the cells around which tissue is in focus."""
    weight = tissue.astype(np.float32)
    total = ndimage.uniform_filter(focus * weight, _FOCUS_CELLS, mode="constant")
    count = ndimage.uniform_filter(weight, _FOCUS_CELLS, mode="constant")
    return total > _SHARP * count


def _without_specks(mask: NDArray[np.bool_], fewest: int) -> NDArray[np.bool_]:
    """Return a mask without the connected pieces of fewer cells."""
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= fewest)[labels]


def otsu(values: NDArray[Any]) -> float:
    """Return the threshold between two classes of whole values from 0 to 255 that lie furthest apart.

    N. Otsu, A threshold selection method from gray-level histograms, 1979, equation 12.

    >>> otsu(np.array([1, 2, 3, 3, 100, 101, 102]))
    3.0
    """
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below, first_moment = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (first_moment[-1] * below - first_moment * below[-1]) ** 2 / (below * above)
    return float(np.argmax(np.nan_to_num(between)))
