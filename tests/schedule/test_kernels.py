"""The compiled keyed permutation: the same numbers as `hpcssl.core.rng.permute`, and every permutation as likely."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hpcssl.core.rng import key_of, permute, sides
from hpcssl.schedule import builder as builder_module
from hpcssl.schedule import order_kernels as kernels
from hpcssl.schedule.builder import Builder
from hpcssl.schedule.spec import ScheduleSpec

THRESHOLD = 1e-3  # p of every test; seeds are fixed, so a pass stays a pass
LAST = 2**32 - 1
IDENTITIES = [(0, 0, 0), (2**64 - 1, 0, 0), (2**64 - 1, LAST, LAST), (2**63 + 5, 7, 0), (key_of(0, "order"), 0, 49)]
Permutations = Callable[[int, int, int], np.ndarray]  # size, how many, key → (how many, size)


def compiled(size: int, key: int, member: int = 0, number: int = 0, *, start: int = 0, count: int = -1) -> np.ndarray:
    """Places of `count` (-1: all) indices from `start` on, by the kernel."""
    tables = kernels.tables_for(size)
    kernels.fill_tables(tables, size, np.uint64(key), member, number)
    row, out = np.empty((2, size - start if count < 0 else count), np.uint32)
    kernels.permute_run(tables, size, start, row, out)
    return out


@pytest.mark.parametrize("size", [*range(1, 71), 100, 7700, 65_000])
def test_the_kernel_is_permute(size):
    for identity in IDENTITIES:
        found = compiled(size, *identity)
        assert (found == permute(np.arange(size), size, *identity)).all(), identity
        assert (np.bincount(found, minlength=size) == 1).all(), identity


@pytest.mark.parametrize("size", [10**6 + 3, 65_000_000, 2**31 - 1])
def test_the_kernel_is_permute_at_many_places_of_large_sizes(size):
    for start in (0, 1, size // 2, size - 5000):
        index = np.arange(start, start + 5000)
        for identity in IDENTITIES[-2:]:
            assert (compiled(size, *identity, start=start, count=5000) == permute(index, size, *identity)).all()


def test_the_sides_are_those_of_the_library():
    squares = [n * n + d for n in (8, 9, 100, 8062, 46340, 46341) for d in (-1, 0, 1)]
    for size in [*range(1, 2000), *(s for s in squares if s < 2**31), 65_000_000, 2**31 - 1]:
        assert tuple(kernels.sides(size)) == sides(size), size
        assert kernels.tables_for(size).shape[1] >= max(sides(size)), size


@pytest.mark.parametrize("size", [1, 5, 64, 4096, 4097, 10_000])
@pytest.mark.parametrize("before", [0, 3, 4096, 9_999])
def test_draws_of_a_slide_go_through_its_permutations(size, before):
    members, first = np.array([3, 8]), np.array([100, 70_000])
    draws = np.array([size + (4100 if size > 60 else 40), 2 * size + 1])
    out = np.full(draws.sum() + 1, 7, np.uint32)
    n, start = np.full(2, size), np.full(2, before)
    kernels.draw_tiles(members, n, first, start, draws, np.uint64(9), kernels.tables_for(size), out[:-1])
    expected = []
    for member, begin, count in zip(members, first, draws):
        j = np.arange(before, before + count)
        orders = {number: permute(np.arange(size), size, 9, int(member), int(number)) for number in set(j // size)}
        expected += [begin + orders[number][place] for number, place in zip(j // size, j % size)]
    assert out[:-1].tolist() == expected
    assert out[-1] == 7, "nothing is written beyond the end"


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_taking_in_order(dtype):
    tiles = np.random.default_rng(0).integers(0, 2**32, 10_000).astype(dtype) * dtype(1 if dtype == np.uint32 else 9)
    tables = kernels.tables_for(len(tiles))
    kernels.fill_tables(tables, len(tiles), np.uint64(5), 0, 3)
    whole = tiles[permute(np.arange(len(tiles)), len(tiles), 5, 0, 3)]
    for start, count in ((0, 10_000), (0, 1), (9_999, 1), (17, 4096), (4000, 5000), (5, 0)):
        out = np.empty(count, dtype)
        kernels.take_in_order(tiles, start, tables, out)
        assert (out == whole[start : start + count]).all(), (start, count)


@pytest.mark.parametrize("piece", [1, 7, 64, 999, 1000, 1001])
def test_the_size_of_the_pieces_changes_nothing(piece, monkeypatch):
    slides = pd.DataFrame({"slide_id": list("abcdef"), "organ": list("xxyyyz"), "num_tiles": [1, 90, 30, 4, 7, 500]})
    spec = ScheduleSpec(num_pseudo_epochs=3, num_groups=1, positions_per_pseudo_epoch=1000, max_repeats=50)

    def tiles() -> list[int]:
        builder = Builder(spec, slides)
        return [int(t) for number in range(3) for chunk in builder.chunks(number) for t in chunk]

    whole = tiles()
    assert len(whole) == 3000
    monkeypatch.setattr(builder_module, "_CHUNK", piece)
    assert tiles() == whole


# every permutation as likely


def by_number(size: int, count: int, key: int) -> np.ndarray:
    """Permutations number 0, 1, … of one member."""
    return drawn(size, np.zeros(1, np.int64), count, key)


def by_member(size: int, count: int, key: int) -> np.ndarray:
    """Permutation number 0 of the members 0, 1, …"""
    return drawn(size, np.arange(count), 1, key)


def by_key(size: int, count: int, key: int) -> np.ndarray:
    """Those of the keys key, key + 1, …"""
    return np.array([compiled(size, key + k) for k in range(count)], np.int64)


def drawn(size: int, members: np.ndarray, numbers: int, key: int) -> np.ndarray:
    same = np.full(len(members), size)
    out = np.empty(size * len(members) * numbers, np.uint32)
    kernels.draw_tiles(members, same, 0 * same, 0 * same, same * numbers, np.uint64(key), kernels.tables_for(size), out)
    return out.reshape(-1, size).astype(np.int64)


def check_all_as_likely(permutations: Permutations, size: int, key: int) -> None:
    """Chi-squared of all size! permutations, 500 expected of each."""
    number = math.factorial(size)
    orders = permutations(size, 500 * number, key)
    _, counts = np.unique(orders @ (10 ** np.arange(size)), return_counts=True)
    assert len(counts) == number, "not every permutation comes up"
    assert stats.chisquare(counts).pvalue > THRESHOLD


def check_uniform_places(permutations: Permutations, size: int, key: int) -> None:
    """Every index goes to every place equally often, and every two neighbours differ by any distance."""
    count = 100 * size
    orders = permutations(size, count, key)
    for index in {0, 1, size // 2, size - 1}:
        assert stats.chisquare(np.bincount(orders[:, index], minlength=size)).pvalue > THRESHOLD, f"index {index}"
    distance = np.bincount((orders[:, 1] - orders[:, 0]) % size, minlength=size)[1:]
    assert stats.chisquare(distance).pvalue > THRESHOLD, "the second tells the first"


def check_none_tells_the_next(permutations: Permutations, size: int, key: int) -> None:
    """Two in sequence agree at as many indices as any two."""
    orders = permutations(size, 100 * size, key)
    again = (orders[1:] == orders[:-1]).mean()
    assert abs(again - 1 / size) < 4.5 * np.sqrt(1 / size / orders[1:].size), f"{again:.4f} agree"


@pytest.mark.parametrize("size", [3, 4, 5])
@pytest.mark.parametrize("permutations", [by_number, by_member, by_key])
@pytest.mark.parametrize("key", [0, 2**63])
def test_every_permutation_of_a_few_is_as_likely(size, permutations, key):
    check_all_as_likely(permutations, size, key)


@pytest.mark.parametrize("size", [8, 63, 64, 65, 100])
@pytest.mark.parametrize("permutations", [by_number, by_member, by_key])
def test_every_place_is_as_likely(size, permutations):
    check_uniform_places(permutations, size, 1)
    check_none_tells_the_next(permutations, size, 1)


@pytest.mark.parametrize("permutations", [by_number, by_member, by_key])
def test_half_of_the_permutations_are_even(permutations):
    # without cycle walking: 64 and 72 places are whole grids
    for size in (64, 72):
        signs = [round(np.linalg.det(np.eye(size)[order])) for order in permutations(size, 2000, 3)]
        assert stats.binomtest(signs.count(1), len(signs)).pvalue > THRESHOLD


def test_the_checks_catch_weaker_permutations():
    def rotations(size: int, count: int, key: int) -> np.ndarray:
        return (np.arange(size) + np.random.default_rng(key).integers(0, size, count)[:, None]) % size

    def even_ones(size: int, count: int, key: int) -> np.ndarray:
        orders = by_number(size, 2 * count + 500, key)
        signs = np.array([round(np.linalg.det(np.eye(size)[order])) for order in orders])
        return orders[signs == 1][:count]

    def slightly_uneven(size: int, count: int, key: int) -> np.ndarray:
        orders = by_number(size, count, key)
        orders[::30] = np.arange(size)
        return orders

    for broken in (rotations, even_ones, slightly_uneven):
        with pytest.raises(AssertionError):
            check_all_as_likely(broken, 4, 1)
    with pytest.raises(AssertionError, match="the second tells the first"):
        check_uniform_places(rotations, 8, 1)
    with pytest.raises(AssertionError, match="agree"):
        check_none_tells_the_next(
            lambda size, count, key: np.repeat(by_number(size, count // 2, key), 2, axis=0), 64, 1
        )
    with pytest.raises(AssertionError, match="index 0"):
        check_uniform_places(lambda size, count, key: np.tile(np.arange(size), (count, 1)), 8, 1)
