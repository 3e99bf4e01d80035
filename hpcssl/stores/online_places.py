"""Where on a slide tiles may lie, and the place that a position draws there.

A slide is covered by cells of a side in level-0 pixels that need not be whole. Sets of cells are kept as run lengths
over the rows laid end to end: where every run starts, and how many cells there are up to its end. A draw is then one
search in them, and the same on every machine: integers decide, but for the product of a cell's number and side.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Cells = NDArray[np.bool_]
Words = Sequence[int]  # of 32 bits
_BAND = 256  # rows of cells computed together
_ROUNDING = 1e-6  # of sums of areas, in cells


class Runs(NamedTuple):
    """A set of cells: first cell of every run, and cells up to and with its end; both (runs,) uint32."""

    starts: NDArray[np.uint32]
    ends: NDArray[np.uint32]

    @property
    def total(self) -> int:
        """Number of cells."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def cell(self, rank: int) -> int:
        """Return the flat number of the cell that `rank` others precede."""
        run = int(np.searchsorted(self.ends, rank, side="right"))
        return int(self.starts[run]) + rank - (int(self.ends[run - 1]) if run else 0)


def runs_of(cells: Cells) -> Runs:
    """Return the run lengths of a mask.

    >>> runs = runs_of(np.array([[False, True, True], [True, False, True]]))
    >>> runs.starts.tolist(), runs.ends.tolist()
    ([1, 5], [3, 4])
    >>> [runs.cell(rank) for rank in range(runs.total)]
    [1, 2, 3, 5]
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], cells.ravel(), [False]])))
    starts, stops = edges[::2], edges[1::2]
    return Runs(starts.astype("<u4"), np.cumsum(stops - starts).astype("<u4"))


def first_pixel(number: int, cell: float) -> int:
    """Return the first level-0 pixel in a row or column of cells.

    >>> [first_pixel(number, 3.5) for number in range(4)]
    [0, 4, 7, 11]
    """
    return math.ceil(number * cell)


def corner_cells(tissue: Cells, cell: float, slide_px: tuple[int, int], side: float, least: float) -> Cells:
    """Return the cells in which the upper left corner of a tile may lie, wherever in them it lies.

    Every tile with such a corner is within the slide, and at least a share `least` of its area is tissue. The cells of
    `tissue`, (rows, columns), cover the slide of width and height `slide_px`; `cell` and `side` are the sides of a cell
    and of a tile, in level-0 pixels.
    """
    height, width = tissue.shape
    sums = np.zeros((height + 1, width + 1))
    np.cumsum(np.cumsum(tissue, axis=0, dtype=np.int64), axis=1, out=sums[1:, 1:])
    reach = side / cell
    across, fits_across = _knots(width, reach), _fits(width, cell, slide_px[0], side)
    enough = np.zeros(tissue.shape, np.bool_)
    for first in range(0, height, _BAND):
        rows = slice(first, min(first + _BAND, height))
        down = _knots(height, reach)[2 * rows.start : 2 * rows.stop + 1]
        strip = _at(sums, down + reach, axis=0) - _at(sums, down, axis=0)
        area = _at(strip, across + reach, axis=1) - _at(strip, across, axis=1)
        least_y = np.minimum(np.minimum(area[:-1:2], area[1::2]), area[2::2])
        least_yx = np.minimum(np.minimum(least_y[:, :-1:2], least_y[:, 1::2]), least_y[:, 2::2])
        enough[rows] = least_yx >= least * reach * reach - _ROUNDING
    return enough & _fits(height, cell, slide_px[1], side)[:, None] & fits_across


def _knots(cells: int, reach: float) -> NDArray[np.float64]:
    """Return where a tile's near edge, or its far edge, crosses a cell's edge: two for every cell, and the end.

    Between them the tissue in a tile is a linear function of its place, so that its least is at one of them.
    """
    knots = np.repeat(np.arange(cells + 1.0), 2)[:-1]
    knots[1::2] += -reach % 1
    return knots


def _at(sums: NDArray[np.float64], places: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Return sums at places between their entries, by linear interpolation."""
    last = sums.shape[axis] - 1
    below = np.clip(places.astype(np.int64), 0, max(last - 1, 0))
    share = np.clip(places - below, 0, 1)
    share = share[:, None] if axis == 0 else share
    low, high = np.take(sums, below, axis), np.take(sums, np.minimum(below + 1, last), axis)
    return low + share * (high - low)


def _fits(cells: int, cell: float, pixels: int, side: float) -> Cells:
    """Return the rows or columns of cells from whose last pixel a tile does not reach over the slide's end."""
    ends = np.array([first_pixel(number + 1, cell) for number in range(cells)])
    return ends - 1 + side <= pixels


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Return weights as whole numbers in the same proportion, to one part in a million of the largest.

    >>> whole_weights([0.5, 1, 0])
    [500000, 1000000, 0]
    """
    largest = max(weights)
    return [round(weight / largest * 1_000_000) for weight in weights]


def choose(word: int, weights: Sequence[int]) -> int:
    """Return the number of the weight that a word falls on.

    >>> [choose(word, [1, 0, 3]) for word in (0, 2**30 - 1, 2**30, 2**32 - 1)]
    [0, 0, 2, 2]
    """
    return bisect(list(accumulate(weights)), word * sum(weights) >> 32)


def draw_corner(runs: Runs, words: Words, columns: int, cell: float) -> tuple[int, int]:
    """Return a level-0 corner (x, y): a cell by the first word, a pixel in it by the second and third.

    `runs` are the cells in which it may lie, at least one, of so many `columns`, with sides `cell` of at least a pixel.
    """
    row, column = divmod(runs.cell(words[0] * runs.total >> 32), columns)
    first, end = [(first_pixel(column + k, cell), first_pixel(row + k, cell)) for k in (0, 1)]
    x, y = (start + (word * (stop - start) >> 32) for start, stop, word in zip(first, end, words[1:], strict=True))
    return x, y
