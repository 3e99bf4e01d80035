"""The pixel loops of the `cpu` backend, compiled: Pillow's colour operations on planes of float32.

Legend: p planes (3, N) float32 that hold whole numbers 0 … 255; N pixels of a view, row after row.
Each operation rounds and clamps as Pillow's does, so the same plan gives the same picture to within a level or two.
All of them release the interpreter lock; no fast-math, so that every machine computes the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcssl.core.compiled import compiled

Planes = NDArray[np.float32]
_F = np.float32


@compiled
def split(pixels: NDArray[np.uint8], p: Planes) -> None:
    """Split (H, W, 3) pixels into planes."""
    flat = pixels.reshape(-1)
    for c in range(3):
        for k in range(p.shape[1]):
            p[c, k] = flat[3 * k + c]


@compiled
def join(p: Planes, out: NDArray[np.uint8]) -> None:
    """Join planes to (H, W, 3) pixels."""
    flat = out.reshape(-1)
    for k in range(p.shape[1]):
        flat[3 * k] = np.uint8(p[0, k])
        flat[3 * k + 1] = np.uint8(p[1, k])
        flat[3 * k + 2] = np.uint8(p[2, k])


@compiled
def _luma(r: float, g: float, b: float) -> float:
    """Return Pillow's 8-bit grey: ITU-R 601-2 in 16-bit fixed point."""
    return _F((np.int32(r) * 19595 + np.int32(g) * 38470 + np.int32(b) * 7471 + 0x8000) >> 16)


@compiled
def _clamped(value: float) -> float:
    return _F(np.floor(min(max(value, _F(0)), _F(255))))


@compiled
def brightness(p: Planes, factor: float) -> None:
    """Blend with black."""
    f = _F(factor)
    for c in range(3):
        for k in range(p.shape[1]):
            p[c, k] = _clamped(f * p[c, k])


@compiled
def contrast(p: Planes, factor: float) -> None:
    """Blend with the mean grey."""
    total = 0
    for k in range(p.shape[1]):
        total += np.int32(_luma(p[0, k], p[1, k], p[2, k]))
    mean, f = _F(np.floor(total / p.shape[1] + 0.5)), _F(factor)
    for c in range(3):
        for k in range(p.shape[1]):
            p[c, k] = _clamped(mean + f * (p[c, k] - mean))


@compiled
def saturation(p: Planes, factor: float) -> None:
    """Blend with grey."""
    f = _F(factor)
    for k in range(p.shape[1]):
        grey = _luma(p[0, k], p[1, k], p[2, k])
        p[0, k] = _clamped(grey + f * (p[0, k] - grey))
        p[1, k] = _clamped(grey + f * (p[1, k] - grey))
        p[2, k] = _clamped(grey + f * (p[2, k] - grey))


@compiled
def hue(p: Planes, shift: int) -> None:
    """Turn the hue by `shift` of 256 steps, in Pillow's 8-bit HSV."""
    for k in range(p.shape[1]):
        r, g, b = p[0, k], p[1, k], p[2, k]
        top, low = max(r, max(g, b)), min(r, min(g, b))
        span = top - low
        inverse = _F(1) / max(span, _F(1))
        turn = _F(4) + (r - g) * inverse
        turn = _F(2) + (b - r) * inverse if g == top else turn
        turn = (g - b) * inverse if r == top else turn
        turn = turn * _F(1 / 6) + _F(1)
        h = (np.int32((turn - np.floor(turn)) * _F(255)) + shift) & 255 if span > 0 else shift & 255
        full = np.floor(span * _F(255) / max(top, _F(1))) * _F(1 / 255)
        at = _F(h) * _F(6 / 255)
        p[0, k] = _channel(top, full, at + _F(5))
        p[1, k] = _channel(top, full, at + _F(3))
        p[2, k] = _channel(top, full, at + _F(1))


@compiled
def _channel(top: float, full: float, at: float) -> float:
    """Return a channel of HSV → RGB; `at` is the hue in sixths of a turn plus 5 (red), 3 (green) or 1 (blue)."""
    k = at - _F(6) if at >= _F(6) else at
    return np.floor(top - top * full * max(_F(0), min(k, min(_F(4) - k, _F(1)))) + _F(0.5))


@compiled
def grey(p: Planes) -> None:
    """Make all planes the grey one."""
    for k in range(p.shape[1]):
        value = _luma(p[0, k], p[1, k], p[2, k])
        p[0, k], p[1, k], p[2, k] = value, value, value


@compiled
def solarize(p: Planes) -> None:
    """Invert what is 128 or more."""
    for c in range(3):
        for k in range(p.shape[1]):
            p[c, k] = _F(255) - p[c, k] if p[c, k] >= _F(128) else p[c, k]


def _weighing(reach: int) -> Any:
    """Compile a symmetric sum of 2 · reach + 1 neighbours, `step` apart; a fixed reach makes it one vectorised loop."""

    @compiled
    def weigh(source: NDArray[np.float32], step: int, kernel: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        for x in range(out.size):
            at = np.uint64(x + reach * step)
            total = kernel[reach] * source[at]
            for t in range(1, reach + 1):
                total += kernel[reach + t] * (source[at - np.uint64(t * step)] + source[at + np.uint64(t * step)])
            out[x] = total

    return weigh


_weigh_3, _weigh_6 = _weighing(3), _weighing(6)  # sigma below 1.41, and up to 2.45


@compiled
def _weigh(source: NDArray[np.float32], step: int, kernel: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    reach = len(kernel) // 2
    if reach == 3:
        _weigh_3(source, step, kernel, out)
    elif reach == 6:
        _weigh_6(source, step, kernel, out)
    else:
        middle = source[reach * step : reach * step + out.size]
        for x in range(out.size):
            out[x] = kernel[reach] * middle[x]
        for t in range(1, reach + 1):
            a, b = source[(reach - t) * step :], source[(reach + t) * step :]
            for x in range(out.size):
                out[x] += kernel[reach + t] * (a[x] + b[x])


@compiled
def blur(p: Planes, width: int, kernel: NDArray[np.float32]) -> None:
    """Convolve rows, then columns, with a symmetric kernel of odd length; edges are repeated."""
    reach, height = len(kernel) // 2, p.shape[1] // width
    row = np.empty(width + 2 * reach, np.float32)
    tall = np.empty((height + 2 * reach, width), np.float32)
    for c in range(3):
        plane = p[c].reshape(height, width)
        for y in range(height):
            row[:reach], row[reach + width :] = plane[y, 0], plane[y, width - 1]
            row[reach : reach + width] = plane[y]
            _weigh(row, 1, kernel, tall[y + reach])
        for y in range(reach):
            tall[y], tall[height + reach + y] = tall[reach], tall[height + reach - 1]
        _weigh(tall.reshape(-1), width, kernel, p[c])
        for k in range(p.shape[1]):
            p[c, k] = np.floor(p[c, k] + _F(0.5))
