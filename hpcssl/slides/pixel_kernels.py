"""Loops over pixels, compiled: exact means, other sizes, what a cell looks like; whole numbers, so that all agree."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hpcssl.core.compiled import compiled

REACH = 2  # of the cubic kernel, in pixels of the result
_BITS = 14
_ONE = 1 << _BITS


@compiled
def means(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return the means of squares of `side` × `side` pixels of (height, width, 3), halves rounded up.

    Height and width are multiples of `side`.
    """
    height, width = pixels.shape[0] // side, pixels.shape[1] // side
    out = np.empty((height, width, 3), np.uint8)
    area = np.uint32(side * side)
    sums = np.empty((width, 3), np.uint32)
    for row in range(height):
        sums[:] = area // np.uint32(2)
        for y in range(row * side, (row + 1) * side):
            for column in range(width):
                for x in range(column * side, (column + 1) * side):
                    for c in range(3):
                        sums[column, c] += pixels[y, x, c]
        for column in range(width):
            for c in range(3):
                out[row, column, c] = sums[column, c] // area
    return out


@compiled
def changes(pixels: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """Return how far pixels are from the mean of their four neighbours in grey, as means of squares.

    The grey is (red + 2 green + blue) / 4; at the picture's edge, a pixel is its own neighbour. The pixels are
    (height, width, 3), height and width multiples of `side`.
    """
    height, width = pixels.shape[0], pixels.shape[1]
    grey = np.empty((height + 2, width + 2), np.int16)  # four times the grey, and once more around the edge
    for y in range(height):
        for x in range(width):
            grey[y + 1, x + 1] = np.int16(pixels[y, x, 0]) + 2 * np.int16(pixels[y, x, 1]) + np.int16(pixels[y, x, 2])
        grey[y + 1, 0], grey[y + 1, width + 1] = grey[y + 1, 1], grey[y + 1, width]
    grey[0], grey[height + 1] = grey[1], grey[height]
    sums = np.zeros((height // side, width // side), np.int64)
    apart = np.empty(width, np.int32)  # of a line
    for y in range(height):
        above, line, below = grey[y], grey[y + 1], grey[y + 2]
        for x in range(width):
            around = np.int32(above[x + 1]) + np.int32(below[x + 1]) + np.int32(line[x]) + np.int32(line[x + 2])
            apart[x] = abs(4 * np.int32(line[x + 1]) - around)
        for column in range(width // side):
            for x in range(column * side, (column + 1) * side):
                sums[y // side, column] += apart[x]
    return (sums / (16.0 * side * side)).astype(np.float32)


def resampled(pixels: NDArray[np.uint8], left: float, top: float, step: float, px: int) -> NDArray[np.uint8]:
    """Return a square window in another size, by the antialiased cubic convolution of Keys (1981) with a = -1/2.

    Parameters
    ----------
    pixels : (height, width, 3); must hold the window and `REACH` times max(step, 1) pixels around it
    left, top : where the window begins, in pixels
    step : pixels for one pixel of the result
    px : side of the result
    """
    height, width = pixels.shape[:2]
    rows = _rows(pixels.reshape(height, width * 3), *_taps(top, step, px))
    columns = np.ascontiguousarray(rows.reshape(px, width, 3).transpose(1, 0, 2))
    square = _rows(columns.reshape(width, px * 3), *_taps(left, step, px))
    return np.ascontiguousarray(square.reshape(px, px, 3).transpose(1, 0, 2))


@compiled
def _taps(start: float, step: float, count: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return of every pixel of the result the first pixel that it is made of, and the weights, in parts of _ONE."""
    scale = max(step, 1.0)
    reach = REACH * scale
    size = int(np.ceil(2 * reach)) + 1
    first, weights = np.empty(count, np.int64), np.zeros((count, size), np.int32)
    exact = np.empty(size, np.float64)
    for i in range(count):
        centre = start + (i + 0.5) * step
        first[i] = int(np.ceil(centre - reach - 0.5))
        for t in range(size):
            x = abs(first[i] + t + 0.5 - centre) / scale
            if x < 1:
                exact[t] = (1.5 * x - 2.5) * x * x + 1
            elif x < 2:
                exact[t] = ((-0.5 * x + 2.5) * x - 4) * x + 2
            else:
                exact[t] = 0.0
        total = exact.sum()
        for t in range(size):
            weights[i, t] = int(np.floor(exact[t] / total * _ONE + 0.5))
    return first, weights


@compiled
def _rows(pixels: NDArray[np.uint8], first: NDArray[np.int64], weights: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Return weighted sums of rows, (len(first), width) from (height, width)."""
    width = pixels.shape[1]
    out = np.empty((len(first), width), np.uint8)
    sums = np.empty(width, np.int32)
    for i in range(len(first)):
        sums[:] = _ONE // 2
        for t in range(weights.shape[1]):
            weight = weights[i, t]
            if weight:
                row = pixels[first[i] + t]
                for x in range(width):
                    sums[x] += weight * np.int32(row[x])
        for x in range(width):
            out[i, x] = np.uint8(min(max(sums[x] >> _BITS, 0), 255))
    return out
