"""Random numbers: the published Philox vectors, independence of order, and keyed permutations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from hpcssl.core.rng import below, happens, key_of, permute, philox4x32, sides, uniforms

THRESHOLD = 1e-3  # p of every statistical test; seeds are fixed, so a pass stays a pass
MASK = 0xFFFFFFFF

# Random123's kat_vectors for philox4x32-10: counter, key, output
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

Draw = Callable[[int, np.ndarray], np.ndarray]


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_in_integers(counter: list[int], key: list[int], rounds: int = 10) -> list[int]:
    """Philox written a second time, in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_philox_gives_the_published_vectors(counter: str, key: str, output: str) -> None:
    k0, k1 = words_of(key)
    found = philox4x32(np.array(words_of(counter), np.uint64), (k0, k1))
    assert found.dtype == np.uint32
    assert [f"{word:08x}" for word in found] == output.split()
    assert philox_in_integers(words_of(counter), [k0, k1]) == words_of(output)
    assert philox_in_integers(words_of(counter), [k0, k1], rounds=9) != words_of(output)


def test_philox_of_many_counters_is_that_of_each() -> None:
    counters = np.random.default_rng(0).integers(0, 2**32, (3, 5, 4), dtype=np.uint64)
    found = philox4x32(counters, (7, 9))
    for place in np.ndindex(3, 5):
        assert found[place].tolist() == philox_in_integers(counters[place].tolist(), [7, 9])


@pytest.mark.parametrize("position", [0, 1, 2**32 - 1, 2**32, 3_000_000_000, 3_250_000_000 + 2**33, 2**63 + 5])
@pytest.mark.parametrize(("view", "stream"), [(0, 0), (9, 7 << 16), (2**32 - 1, 2**32 - 1)])
def test_every_bit_of_the_identity_reaches_the_counter(position: int, view: int, stream: int) -> None:
    digest = hashlib.blake2b(b"5|plan", digest_size=8).digest()
    key = int.from_bytes(digest, "little")
    counter = [position & MASK, position >> 32, view, stream]
    expected = philox_in_integers(counter, [key & MASK, key >> 32])
    assert uniforms(5, "plan", position, view, stream).tolist() == expected


def check_any_batching(draw: Draw) -> None:
    """A position's words are the same alone, in any batch, in any order."""
    positions = np.concatenate([np.arange(64), np.arange(40) + 3_000_000_000, np.arange(24) + 2**32 - 12])
    whole = draw(0, positions)
    for size in (1, 3, 8, 50, len(positions)):
        parts = [draw(0, positions[i : i + size]) for i in range(0, len(positions), size)]
        assert (np.concatenate(parts) == whole).all(), f"batches of {size}"
    order = np.random.default_rng(1).permutation(len(positions))
    assert (draw(0, positions[order]) == whole[order]).all(), "another order"
    assert (draw(0, np.repeat(positions, 2)) == np.repeat(whole, 2, axis=0)).all(), "each position twice"
    assert len(np.unique(whole, axis=0)) == len(positions), "two positions share their words"


def check_seeds_do_not_meet(draw: Draw) -> None:
    """No seed's words turn up under another seed, at the same or at a neighbouring position."""
    positions = np.arange(1000)
    drawn = np.concatenate([draw(seed, positions) for seed in range(20)])
    assert len(np.unique(drawn, axis=0)) == len(drawn)


def test_uniforms_do_not_depend_on_the_batch_and_those_of_two_seeds_do_not_meet() -> None:
    check_any_batching(lambda seed, positions: uniforms(seed, "plan", positions))
    check_seeds_do_not_meet(lambda seed, positions: uniforms(seed, "plan", positions))


def test_the_checks_catch_a_generator_and_added_seeds() -> None:
    with pytest.raises(AssertionError, match="batches of 1"):
        check_any_batching(lambda seed, at: np.random.default_rng(seed).integers(0, 2**32, (len(at), 4)))
    with pytest.raises(AssertionError):
        check_seeds_do_not_meet(lambda seed, positions: uniforms(0, "plan", positions + seed))


def test_uniforms_broadcast_position_view_and_stream() -> None:
    grid = uniforms(3, "plan", np.arange(5)[:, None, None], np.arange(3)[None, :, None], np.arange(2)[None, None, :])
    assert grid.shape == (5, 3, 2, 4)
    for p, v, s in np.ndindex(5, 3, 2):
        assert (grid[p, v, s] == uniforms(3, "plan", p, v, s)).all()
    assert len(np.unique(grid.reshape(-1, 4), axis=0)) == 30


def test_keys_tell_seed_and_purpose_apart() -> None:
    keys = {key_of(seed, purpose) for seed in range(-20, 100) for purpose in ("plan", "order/1", "order/11", "1|plan")}
    assert len(keys) == 120 * 4
    assert key_of(1, "1|plan") != key_of(11, "|plan")
    assert all(0 <= key < 2**64 for key in keys)
    assert key_of(0, "plan") == 0x2B8DC8E2F8D2C503, "a golden: keys may never change between versions"


def test_words_are_uniform_and_uncorrelated() -> None:
    words = uniforms(0, "plan", np.arange(100_000)) / 2**32
    for i in range(4):
        assert stats.kstest(words[:, i], "uniform").pvalue > THRESHOLD
    neighbours = np.concatenate([words[:-1], words[1:]], axis=1)
    correlation = np.corrcoef(neighbours.T) - np.eye(8)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(len(words))


def test_below_and_happens_at_their_edges() -> None:
    words = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
    assert below(words, 1).tolist() == [0] * 5
    assert below(words, 2).tolist() == [0, 0, 0, 1, 1]
    assert below(words, 2**31).tolist() == [0, 0, 2**30 - 1, 2**30, 2**31 - 1]
    assert below(words, [1, 2, 3, 4, 5]).tolist() == [0, 0, 1, 2, 4]
    assert happens(words, 0).tolist() == [False] * 5
    assert happens(words, 1).tolist() == [True] * 5
    assert happens(words, 0.5).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("bound", [2, 5, 24])
def test_below_is_uniform(bound: int) -> None:
    counts = np.bincount(below(uniforms(1, "below", np.arange(24_000))[:, 0], bound), minlength=bound)
    assert stats.chisquare(counts).pvalue > THRESHOLD


# keyed permutations; tests/schedule/test_kernels.py looks at the likelihood of many thousands, test_order.py at trends


def permute_in_integers(index: int, size: int, key: int, member: int = 0, number: int = 0, rounds: int = 8) -> int:
    """The generalised Feistel cipher of Black and Rogaway written a second time, in Python's integers."""
    rows = next(r for r in range(8, 2**31) if r * r >= size)
    columns = next(c for c in range(8, 2**31) if c * rows >= size)

    def word(place: int, r: int) -> int:
        return philox_in_integers([place // 4, number, member, r], [key & MASK, key >> 32])[place % 4]

    while True:
        row, column = divmod(index, columns)
        for r in range(0, rounds, 2):
            row = (row + word(column, r) * rows // 2**32) % rows
            column = (column + word(row, r + 1) * columns // 2**32) % columns
        index = row * columns + column
        if index < size:
            return index


@pytest.mark.parametrize("size", [1, 2, 5, 63, 64, 65, 72, 73, 1000, 7700, 65_000])
def test_permute_is_the_cipher_of_black_and_rogaway(size: int) -> None:
    some = np.random.default_rng(size).integers(0, size, 20)
    for identity in ((0, 0, 0), (2**64 - 1, 2**32 - 1, 2**32 - 1), (key_of(0, "order"), 3, 5)):
        expected = [permute_in_integers(int(i), size, *identity) for i in some]
        assert permute(some, size, *identity).tolist() == expected, identity
    if size >= 63:
        shorter = [permute_in_integers(int(i), size, 7, rounds=6) for i in some]
        assert permute(some, size, 7).tolist() != shorter


def test_permute_of_a_few_is_a_golden() -> None:
    """Permutations may never change between versions."""
    assert permute(np.arange(10), 10, 0).tolist() == [3, 4, 6, 7, 0, 1, 5, 2, 8, 9]
    assert permute(np.arange(5), 65_000_000, 1, 2, 3).tolist() == [32553697, 34882278, 43400849, 26097997, 33247189]


@pytest.mark.parametrize("size", [*range(1, 300), 7700, 65_000, 65_000_000, 2**31 - 1])
def test_the_grid_holds_every_place_and_hardly_more(size: int) -> None:
    rows, columns = sides(size)
    assert rows * columns >= size
    if size > 64:
        assert (rows - 1) * columns < size, "one row fewer would do"
        assert rows * (columns - 1) < size, "one column fewer would do"
        assert 0 <= rows - columns <= 1


@pytest.mark.parametrize("size", [*range(1, 71), 1000, 2**20 + 7])
def test_permute_is_a_bijection(size: int) -> None:
    keys = [2**64 - 1] if size > 1000 else [0, 1, 123, 2**63, 2**64 - 1]
    for key in keys:
        assert (np.bincount(permute(np.arange(size), size, key), minlength=size) == 1).all(), key


def test_permute_keeps_the_shape_and_its_argument() -> None:
    grid = np.arange(24).reshape(2, 3, 4)
    found = permute(grid, 24, 5)
    assert found.dtype == np.int64
    assert found.tolist() == permute(np.arange(24), 24, 5).reshape(2, 3, 4).tolist()
    assert grid.tolist() == np.arange(24).reshape(2, 3, 4).tolist()
    assert permute(7, 24, 5).shape == ()
    assert permute(np.zeros(0, np.int64), 5, 0).shape == (0,)


@pytest.mark.parametrize("size", [65_000_000, 2**31 - 1])
def test_permute_of_many(size: int) -> None:
    index = np.concatenate([np.arange(5000), size - 1 - np.arange(5000)])
    places = permute(index, size, 9)
    assert places.min() >= 0
    assert places.max() < size
    assert len(np.unique(places)) == len(index)
    assert stats.kstest(places / size, "uniform").pvalue > THRESHOLD


@pytest.mark.parametrize("size", [0, -1, 2**31])
def test_permute_of_none_or_too_many_is_a_defect_of_the_caller(size: int) -> None:
    with pytest.raises(AssertionError):
        permute([0], size, 0)


def test_different_keys_members_and_numbers_give_different_permutations() -> None:
    steps = [*range(100), *(2**k for k in range(7, 32))]
    identities = [(key, 0, 0) for key in [*steps, *(2**k for k in range(32, 64))]]
    identities += [(5, member, 0) for member in steps] + [(5, 0, number) for number in steps[1:]]
    identities += [(0, n, n) for n in steps[1:]]
    drawn = np.array([permute(np.arange(1000), 1000, *identity) for identity in identities])
    # (5, 0, 0) stands twice among them
    assert len(np.unique(drawn, axis=0)) == len(identities) - 1
    same_place = (drawn[:-1] == drawn[1:]).mean()  # expected 1 / 1000
    assert same_place < 0.002
