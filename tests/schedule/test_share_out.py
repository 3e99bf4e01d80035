"""Sharing out positions, against a second solution in exact rationals."""

from __future__ import annotations

import decimal
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpcssl.schedule.balance import power_weight, share_out, share_out_to_slides, slide_weights

Shares = list[int]
Case = tuple[int, Shares, Shares, Shares]  # total, weights, at least, at most
EDGE_OF_64_BITS = [2**31 - 1, 2**31 - 2, 3, 2**30]  # tiles of slides
FIXED = settings(derandomize=True, deadline=None, max_examples=400, database=None)


@st.composite
def cases(draw: st.DrawFn, *, largest_weight: int = 50) -> Case:
    count = draw(st.integers(1, 8))
    weights = draw(st.lists(st.integers(1, largest_weight), min_size=count, max_size=count))
    low = draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
    high = [lo + draw(st.integers(0, 30)) for lo in low]
    return draw(st.integers(sum(low), sum(high))), weights, low, high


def check_shares(shares: SimpleNamespace, share: Callable[..., Shares], case: Case) -> None:
    total, weights, low, high = case
    found = share(total, weights, low, high)
    assert sum(found) == total
    assert all(lo <= x <= hi for x, lo, hi in zip(found, low, high))
    assert found == shares.whole(*case)


@FIXED
@given(cases())
def test_share_out_is_water_filling_with_largest_remainders(shares, case):
    check_shares(shares, share_out, case)


@FIXED
@given(cases(largest_weight=10**15))
def test_share_out_with_weights_beyond_64_bit_products(shares, case):
    total, weights, low, high = case
    check_shares(shares, share_out, (total, [w**3 for w in weights], low, high))


@st.composite
def slide_cases(draw: st.DrawFn) -> tuple[int, Shares, int, float]:
    """Total, tiles of the slides, draws of a tile at most, power."""
    tiles = draw(st.lists(st.integers(1, 100_000), min_size=1, max_size=8))
    repeats = draw(st.integers(1, 4))
    # near either bound, so that bounds bind
    total = draw(st.one_of(st.integers(len(tiles), min(40, sum(tiles))), st.integers(len(tiles), repeats * sum(tiles))))
    return total, tiles, repeats, draw(st.sampled_from([0.0, 0.5, 1.0, 1.5]))


@FIXED
@given(slide_cases())
@example((2**31 - 1, EDGE_OF_64_BITS, 20, 0.0))
@example((2**31 - 1, EDGE_OF_64_BITS, 20, 0.5))
@example((2**31 - 1, EDGE_OF_64_BITS, 20, 1.0))
def test_slides_share_with_at_least_one_draw_each(shares, case):
    total, tiles, repeats, power = case
    weights = slide_weights(np.array(tiles), power)
    found = share_out_to_slides(total, weights, repeats * np.array(tiles))
    assert found.dtype == np.int64
    exact = [power_weight(n, power) for n in tiles]
    assert found.tolist() == shares.whole(total, exact, [1] * len(tiles), [repeats * n for n in tiles])


@pytest.mark.parametrize("power", [0, 0.0, 0.5, 1, 1.0, 2.0])
def test_weights_of_slides_are_in_proportion_to_their_power(power):
    tiles = np.array([1, 4, 9, 9, 100, 2**31 - 1])
    weights = slide_weights(tiles, power)
    assert all(
        int(w) * power_weight(1, power) == int(weights[0]) * power_weight(int(n), power) for w, n in zip(weights, tiles)
    )
    assert (weights.dtype == np.int64) == (power in (0, 1)), "int64 where that is exact: it is much faster"


def test_the_check_catches_rounding_and_one_sided_bounds(shares):
    def rounded(total: int, weights: Shares, low: Shares, high: Shares) -> Shares:
        return [round(total * w / sum(weights)) for w in weights]

    def clipped_at_once(total: int, weights: Shares, low: Shares, high: Shares) -> Shares:
        rest = shares.whole(total, weights, [0] * len(low), [total] * len(low))
        return [min(max(x, lo), hi) for x, lo, hi in zip(rest, low, high)]

    def ties_to_the_last(total: int, weights: Shares, low: Shares, high: Shares) -> Shares:
        return share_out(total, weights[::-1], low[::-1], high[::-1])[::-1]

    check_shares(shares, share_out, (7, [1, 1, 1], [0, 0, 0], [9, 9, 9]))
    check_shares(shares, share_out, (10, [8, 1, 1], [1, 1, 1], [4, 9, 9]))
    for broken, case in (
        (rounded, (7, [1, 1, 1], [0, 0, 0], [9, 9, 9])),
        (clipped_at_once, (10, [8, 1, 1], [1, 1, 1], [4, 9, 9])),
        (ties_to_the_last, (7, [1, 1, 1], [0, 0, 0], [9, 9, 9])),
    ):
        with pytest.raises(AssertionError):
            check_shares(shares, broken, case)


def test_what_cannot_be_shared_is_a_defect_of_the_caller():
    with pytest.raises(AssertionError):
        share_out(10, [1, 1], [0, 0], [4, 4])
    with pytest.raises(AssertionError):
        share_out(1, [1, 1], [1, 1], [4, 4])


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("count", [1, 2, 99, 3_250_000_000])
def test_power_weight_to_twelve_decimal_places(count, power):
    with decimal.localcontext() as context:
        context.prec = 80
        exact = (decimal.Decimal(count).ln() * decimal.Decimal(power)).exp() * 10**12
    digits = decimal.Decimal(10) ** (len(str(int(exact))) - 38)  # 40 digits are computed
    assert abs(power_weight(count, power) - exact) <= max(decimal.Decimal("0.5000001"), digits)


def test_power_weight_ignores_the_callers_decimal_context():
    with decimal.localcontext() as context:
        context.prec = 5
        context.rounding = decimal.ROUND_UP
        assert power_weight(12345, 0.5) == 111_108055513541


@pytest.mark.parametrize("factor", [1.0, 0.1, 1e-6, 2.5, 1e6])
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_power_weight_times_a_factor_is_exact(power, factor):
    for count in (1, 7, 423_563, 3_250_000_000):
        assert power_weight(count, power, factor) == Fraction(count) ** int(power) * Fraction(str(factor)) * 10**12


def test_power_weight_is_never_nothing():
    assert power_weight(1, 0.0, 1e-6) == 10**6
    assert power_weight(1, 4.0, 1e-6) == 10**6
