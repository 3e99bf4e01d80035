"""The grid of a slide: which tiles of a regular net hold enough tissue, and in which order they stand in a store."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcssl.slides.foreground import Foreground
from hpcssl.slides.sampling import Sampling
from hpcssl.slides.slide import Slide

MOST_PEN = 0.05  # share of a tile
_REGION_PX = 1792  # pixels of a level that are read together: 8 × 8 tiles of 224 px, and whole blocks of 256


def grid(slide: Slide, foreground: Foreground, sampling: Sampling, min_tissue: float) -> NDArray[np.int64]:
    """Return the upper left corners (x, y) of the tiles with a share of `min_tissue`, (tiles, 2), level-0 pixels.

    Tiles touch each other, from the slide's corner on; those that reach beyond the slide are left out, and those that
    are more than `MOST_PEN` pen. Neighbours stand near each other: see `regions`.
    """
    side = sampling.side
    columns, rows = int(slide.width // side), int(slide.height // side)
    if not columns or not rows:
        return np.zeros((0, 2), np.int64)
    lefts, tops = np.arange(columns) * side, np.arange(rows) * side
    tissue, pen = (_shares(m, lefts, tops, side, foreground.cell) for m in (foreground.tissue, foreground.pen))
    row, column = np.nonzero((tissue >= min_tissue) & (pen <= MOST_PEN))
    span = region_tiles(sampling)
    order = np.lexsort((column, row, column // span, row // span))
    return np.stack([np.rint(lefts[column[order]]), np.rint(tops[row[order]])], 1).astype(np.int64)


def region_tiles(sampling: Sampling) -> int:
    """Return how many tiles a side a region has, whose tiles follow each other in the grid."""
    return max(1, round(_REGION_PX / (sampling.tile_px * sampling.step)))


def regions(corners: NDArray[np.int64], sampling: Sampling) -> list[tuple[int, int]]:
    """Return (first, end) of the runs of tiles of one region each, to be read together.

    >>> sampling = Sampling(level=0, step=1.0, downsample=1.0, tile_px=896)
    >>> regions(np.array([[0, 0], [896, 0], [1792, 0]]), sampling)
    [(0, 2), (2, 3)]
    """
    if not len(corners):
        return []
    tiles = np.rint(corners / sampling.side).astype(np.int64) // region_tiles(sampling)
    starts = np.flatnonzero((np.diff(tiles, axis=0, prepend=-1) != 0).any(1)).tolist()
    return list(zip(starts, [*starts[1:], len(corners)]))


def _shares(mask: NDArray[np.bool_], lefts: NDArray[Any], tops: NDArray[Any], side: float, cell: float) -> NDArray[Any]:
    """Return the share of every square that is in the mask, (tops, lefts); cells are counted by their parts."""
    sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int32)
    np.cumsum(mask, axis=0, dtype=np.int32, out=sums[1:, 1:])
    np.cumsum(sums, axis=1, out=sums)
    above, below = (_between(sums, edges / cell) for edges in (tops, tops + side))
    rows = below - above
    left, right = (_between(rows.T, edges / cell) for edges in (lefts, lefts + side))
    return (right - left).T / (side / cell) ** 2


def _between(sums: NDArray[Any], at: NDArray[Any]) -> NDArray[Any]:
    """Return rows of sums at places between rows."""
    at = np.clip(at, 0, len(sums) - 1)
    low = np.minimum(at.astype(np.int64), len(sums) - 2)
    part = (at - low)[:, None]
    return sums[low] * (1 - part) + sums[low + 1] * part
