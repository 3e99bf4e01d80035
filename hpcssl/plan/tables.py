"""Functions as tables of integers.

numpy's exp and log change their last bits between AVX2 and AVX-512, and libm between versions, so a plan drawn with
them would differ between two nodes. Decimal arithmetic is specified to the last digit; it computes the tables, once.
Unit: ONE = 2^30 stands for 1.
"""

from __future__ import annotations

import bisect
import decimal
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ONE_BITS = 30
ONE = 1 << ONE_BITS
_KNOTS = 1024
_CONTEXT = decimal.Context(prec=30)
_HALF_LOG_RATIO = (decimal.Decimal(4) / decimal.Decimal(3)).ln(_CONTEXT)  # ratio in (3/4, 4/3)


def _fixed(value: decimal.Decimal, scale: int = ONE) -> int:
    return int((value * scale).to_integral_value(decimal.ROUND_HALF_EVEN))


def interpolate(table: NDArray[np.int64], at: NDArray[np.int64]) -> NDArray[np.int64]:
    """Interpolate a table of 1025 knots linearly at `at` in [0, ONE], in integers."""
    bits = np.int64(ONE_BITS - 10)
    knot = np.minimum(at >> bits, _KNOTS - 1)
    rest = at - (knot << bits)
    return table[knot] + (((table[knot + 1] - table[knot]) * rest) >> bits)


@lru_cache(maxsize=16)
def area_table(low: float, high: float) -> NDArray[np.int64]:
    """Tabulate the area of a random resized crop as a function of a uniform number.

    torchvision draws (area, aspect ratio) until the window fits the tile, so an accepted area s has a density in
    proportion to the length of the log ratios that fit: min(log 4/3, -log s). This is the inverse of that density's
    integral, (1025,) int64 in units of 1/ONE, so that no draw is rejected.
    """
    s, cumulative = _cumulative_areas(low, high)
    targets = np.arange(_KNOTS + 1, dtype=object) * cumulative[-1]
    scaled = [value * _KNOTS for value in cumulative]  # Python's integers: target / _KNOTS against cumulative
    knots = []
    for target in targets:
        place = bisect.bisect_left(scaled, target, 1, _KNOTS) - 1
        below, above = scaled[place], scaled[place + 1]
        part = (target - below) * (s[place + 1] - s[place]) // (above - below) if above > below else 0
        knots.append(s[place] + part)
    return np.array(knots, dtype=np.int64)


def _cumulative_areas(low: float, high: float) -> tuple[list[int], list[int]]:
    """Return areas (units of 1/ONE) and the integral of min(log 4/3, -log s) up to each, scaled to integers."""
    with decimal.localcontext(_CONTEXT):
        first, last = decimal.Decimal(repr(low)), decimal.Decimal(repr(high))
        areas = [first + (last - first) * i / _KNOTS for i in range(_KNOTS + 1)]
        turn = decimal.Decimal(3) / 4

        def integral(s: decimal.Decimal) -> decimal.Decimal:
            if s <= turn:
                return s * _HALF_LOG_RATIO
            return turn * _HALF_LOG_RATIO + (s - s * s.ln()) - (turn - turn * turn.ln())

        start = integral(first)
        return [_fixed(a) for a in areas], [_fixed(integral(a) - start, 10**18) for a in areas]


@lru_cache(maxsize=1)
def ratio_limit_table() -> NDArray[np.int64]:
    """Tabulate min(log 4/3, -log s), the half width of the log ratios that fit, over s in [0, 1]; (1025,), of 1/ONE."""
    with decimal.localcontext(_CONTEXT):
        logs = [-(decimal.Decimal(i) / _KNOTS).ln() for i in range(_KNOTS + 1)]  # of 0: infinite
        return np.array([_fixed(min(_HALF_LOG_RATIO, log)) for log in logs], dtype=np.int64)


@lru_cache(maxsize=1)
def half_exp_table() -> NDArray[np.int64]:
    """Tabulate exp(x / 2) over x in [-log 4/3, log 4/3], (1025,) int64 in units of 1/ONE."""
    with decimal.localcontext(_CONTEXT):
        xs = [_HALF_LOG_RATIO * (2 * i - _KNOTS) / _KNOTS for i in range(_KNOTS + 1)]
        return np.array([_fixed((x / 2).exp()) for x in xs], dtype=np.int64)


LOG_RATIO_ONE = _fixed(_HALF_LOG_RATIO)  # log 4/3 in units of 1/ONE
