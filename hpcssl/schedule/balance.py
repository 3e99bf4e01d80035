"""Sharing out positions in exact arithmetic: the same integers on any machine."""

from __future__ import annotations

import decimal
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_WEIGHT_SCALE = 10**12
_WEIGHT_DIGITS = 40


def power_weight(count: int, power: float, factor: float = 1.0) -> int:
    """Return factor · count^power as an integer, the same on any machine: exact for powers 0 and 1, else to 12 places.

    Decimal computes with integers alone: its digits are the same everywhere, those of a floating-point `pow` are not.

    >>> power_weight(16, 1), power_weight(16, 0), power_weight(16, 0.5), power_weight(16, 1, 0.1)
    (16000000000000, 1000000000000, 4000000000000, 1600000000000)
    """
    with decimal.localcontext() as context:
        context.prec = _WEIGHT_DIGITS
        scaled = decimal.Decimal(count) ** decimal.Decimal(repr(power)) * decimal.Decimal(repr(factor)) * _WEIGHT_SCALE
        return max(1, int(scaled.to_integral_value(decimal.ROUND_HALF_EVEN)))


def share_out(total: int, weights: Sequence[int], at_least: Sequence[int], at_most: Sequence[int]) -> list[int]:
    """Share `total` in proportion to integer weights, within bounds, by water-filling and largest remainder.

    What a bound withholds or adds is shared by the others in proportion to their weights; ties of the remainder go to
    the earlier entry. Needs sum(at_least) <= total <= sum(at_most) and positive weights.

    >>> share_out(10, [8, 1, 1], at_least=[1, 1, 1], at_most=[4, 9, 9])
    [4, 3, 3]
    >>> share_out(7, [1, 1, 1], [0, 0, 0], [9, 9, 9])
    [3, 2, 2]
    """
    w, low, high = (np.array(a, dtype=object) for a in (weights, at_least, at_most))
    return [int(x) for x in _share_out(total, w, low, high)]


def slide_weights(num_tiles: NDArray[np.int64], power: float) -> np.ndarray:
    """Return the weight of every slide, tiles^power: int64, or Python's integers where the power is not 0 or 1."""
    if power in (0, 1):
        return num_tiles if power else np.ones_like(num_tiles)
    counts, place = np.unique(num_tiles, return_inverse=True)
    return np.array([power_weight(int(n), power) for n in counts], dtype=object)[place]


def share_out_to_slides(total: int, weights: np.ndarray, at_most: NDArray[np.int64]) -> NDArray[np.int64]:
    """`share_out` for many slides at once, with at least one draw for each; total and int64 weights below 2^31."""
    assert total < 2**31, "64-bit products"
    return _share_out(total, weights, np.ones_like(at_most), at_most).astype(np.int64)


def _share_out(total: int, weights: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Fix whichever bounds bind more (all too low or all too high ones), share the rest anew, until none binds."""
    assert int(low.sum()) <= total <= int(high.sum()), (int(low.sum()), total, int(high.sum()))
    result = np.zeros_like(weights)
    free = np.arange(len(weights))
    rest = total
    while free.size:
        w, lo, hi = weights[free], low[free], high[free]
        weight_sum = int(w.sum())
        # a share is rest·w/weight_sum; compare without dividing: floor and ceiling decide against integers
        floor = rest * w // weight_sum
        exact = floor * weight_sum == rest * w
        under = floor < lo
        over = (floor > hi) | ((floor == hi) & ~exact)
        deficit = int(lo[under].sum()) * weight_sum - rest * int(w[under].sum())
        excess = rest * int(w[over].sum()) - int(hi[over].sum()) * weight_sum
        if deficit <= 0 and excess <= 0:
            result[free] = floor
            by_remainder = np.argsort(floor * weight_sum - rest * w, kind="stable")
            result[free[by_remainder[: rest - int(floor.sum())]]] += 1
            break
        bound = under if deficit >= excess else over
        result[free[bound]] = (lo if deficit >= excess else hi)[bound]
        rest -= int(result[free[bound]].sum())
        free = free[~bound]
    return result
