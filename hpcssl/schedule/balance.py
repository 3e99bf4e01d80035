"""Sharing out positions in exact arithmetic: the same integers on any machine."""

from __future__ import annotations

import decimal
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_WEIGHT_SCALE = 10**12
_WEIGHT_DIGITS = 40


def power_weight(count: int, power: float) -> int:
    """Return count^power as an integer, the same on any machine: exact for 0 and 1, else to 12 decimal places.

    Decimal arithmetic is specified to the last digit, where the floating-point `pow` of two machines differs.

    >>> power_weight(16, 1), power_weight(16, 0), power_weight(16, 0.5)
    (16000000000000, 1000000000000, 4000000000000)
    """
    with decimal.localcontext() as context:
        context.prec = _WEIGHT_DIGITS
        scaled = decimal.Decimal(count) ** decimal.Decimal(repr(power)) * _WEIGHT_SCALE
        return int(scaled.to_integral_value(decimal.ROUND_HALF_EVEN))


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


def share_out_by_tiles(
    total: int, num_tiles: NDArray[np.int64], at_least: NDArray[np.int64], at_most: NDArray[np.int64]
) -> NDArray[np.int64]:
    """`share_out` for many slides at once, in 64-bit integers; total and weights below 2^31 in every product."""
    assert total < 2**31, "64-bit products"
    assert int(num_tiles.max()) < 2**31, "64-bit products"
    return _share_out(total, num_tiles.astype(np.int64), at_least.astype(np.int64), at_most.astype(np.int64))


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
            result[free] = _largest_remainder(rest, w, weight_sum, floor)
            break
        bound = under if deficit >= excess else over
        result[free[bound]] = (lo if deficit >= excess else hi)[bound]
        rest -= int(result[free[bound]].sum())
        free = free[~bound]
    return result


def _largest_remainder(total: int, weights: np.ndarray, weight_sum: int, floor: np.ndarray) -> np.ndarray:
    remainder = total * weights - floor * weight_sum
    missing = total - int(floor.sum())
    order = np.argsort(-remainder, kind="stable")
    shares = floor.copy()
    shares[order[:missing]] += 1
    return shares
