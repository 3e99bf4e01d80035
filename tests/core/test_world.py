"""Ranks: equal slices that cover every position once, and world sizes that cannot have them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hpcssl.core.errors import ConfigError
from hpcssl.core.world import World, check_divides

SIZES = (1, 2, 3, 4, 8)
Slice = Callable[[int, int, int, int], range]


def check_shares(slice_of: Slice) -> None:
    """Every position of every step is computed by exactly one rank, in equal shares, for each world size."""
    for size in SIZES:
        for start in (0, 24, 3_000_000_000, 2**33 + 48):
            shares = [list(slice_of(rank, size, start, start + 24)) for rank in range(size)]
            assert {len(share) for share in shares} == {24 // size}, f"{size} ranks: unequal shares"
            positions = sorted(position for share in shares for position in share)
            assert positions == list(range(start, start + 24)), f"{size} ranks: not each position once"


def test_shares_cover_every_position_once() -> None:
    check_shares(lambda rank, size, start, stop: World(rank=rank, size=size).slice(start, stop))


def test_the_check_catches_broken_shares() -> None:
    def overlapping(rank: int, size: int, start: int, stop: int) -> range:
        return range(start + rank, start + rank + (stop - start) // size)

    def ignoring_the_rank(rank: int, size: int, start: int, stop: int) -> range:
        return range(start, start + (stop - start) // size)

    def dropping_the_remainder(rank: int, size: int, start: int, stop: int) -> range:
        share = (stop - start - 1) // size
        return range(start + rank * share, start + (rank + 1) * share)

    for broken in (overlapping, ignoring_the_rank, dropping_the_remainder):
        with pytest.raises(AssertionError, match="ranks"):
            check_shares(broken)


@pytest.mark.parametrize("rank", range(5))
def test_a_world_that_does_not_divide_is_refused_on_every_rank(rank: int) -> None:
    with pytest.raises(ConfigError) as caught:
        World(rank=rank, size=5).slice(1080, 2160 + 2)
    assert str(caught.value).startswith("5 processes cannot share a global batch of 1082 equally; ")


def test_the_error_lists_exactly_the_divisors() -> None:
    with pytest.raises(ConfigError) as caught:
        check_divides(7, 1080)
    listed = str(caught.value).split("; ")[1].removesuffix(" can").replace(" or ", ", ").split(", ")
    assert [int(n) for n in listed] == [d for d in range(1, 1081) if 1080 % d == 0]
    for divisor in listed:
        check_divides(int(divisor), 1080)


def test_the_error_reads_well_for_a_batch_of_one() -> None:
    with pytest.raises(ConfigError, match=r"equally; 1 can$"):
        check_divides(2, 1)


@pytest.mark.parametrize(("rank", "size"), [(1, 1), (-1, 2), (0, 0)])
def test_an_impossible_rank_is_a_defect(rank: int, size: int) -> None:
    with pytest.raises(AssertionError):
        World(rank=rank, size=size)
