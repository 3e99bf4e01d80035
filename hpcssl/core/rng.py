"""Counter-based random numbers: a function of identity, never of order.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), vectorised over
positions. Any worker on any node that asks for the same (seed, purpose, position, view, stream) gets the same
bits; adding a stream shifts no other.

The keyed permutation is the generalised Feistel cipher of Black and Rogaway, "Ciphers with arbitrary finite domains"
(CT-RSA 2002), its round functions drawn from Philox.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

U32 = np.uint32
U64 = np.uint64
_MASK32 = U64(0xFFFFFFFF)
ROUND_MULTIPLIERS = (U64(0xD2511F53), U64(0xCD9E8D57))
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 8
SHORTEST_SIDE = 8  # over fewer places the network has too few permutations to draw from evenly


def key_of(seed: int, purpose: str) -> int:
    """Return the 64-bit key of a seed and a purpose.

    Hashed, not added: seed 1 of one purpose never meets seed 0 of another.

    >>> key_of(0, "plan") != key_of(1, "plan") != key_of(1, "schedule")
    True
    """
    digest = hashlib.blake2b(f"{int(seed)}|{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Return the published Random123 output of ten Philox rounds, (..., 4) uint32.

    The counters are (..., 4) values below 2^32, the key two 32-bit integers.
    """
    c0, c1, c2, c3 = (counter[..., i].astype(U64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0 = ROUND_MULTIPLIERS[0] * c0
        p1 = ROUND_MULTIPLIERS[1] * c2
        c0 = (p1 >> U64(32)) ^ c1 ^ U64(k0)
        c2 = (p0 >> U64(32)) ^ c3 ^ U64(k1)
        c1, c3 = p1 & _MASK32, p0 & _MASK32
        k0 = (k0 + KEY_STEPS[0]) & 0xFFFFFFFF
        k1 = (k1 + KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(U32)


def uniforms(
    seed: int, purpose: str, position: ArrayLike, view: ArrayLike = 0, stream: ArrayLike = 0
) -> NDArray[np.uint32]:
    """Draw four 32-bit words, each uniform over [0, 2^32), for every identity, (..., 4) uint32.

    `position` (below 2^64), `view` and `stream` (below 2^32) broadcast against each other.

    >>> a = uniforms(7, "plan", [10, 11, 12])
    >>> bool((a[2] == uniforms(7, "plan", 12)).all())
    True
    """
    key = key_of(seed, purpose)
    pos, vw, st = np.broadcast_arrays(*(np.asarray(a).astype(U64) for a in (position, view, stream)))
    counter = np.stack([pos & _MASK32, pos >> U64(32), vw, st], axis=-1)
    return philox4x32(counter, (key & 0xFFFFFFFF, key >> 32))


def below(words: NDArray[np.uint32], bound: ArrayLike) -> NDArray[np.int64]:
    """Map words to integers in [0, bound) by fixed-point multiplication; bound at most 2^31.

    The bias is at most bound / 2^32.

    >>> below(np.array([0, 2**31, 2**32 - 1], dtype=np.uint32), 10).tolist()
    [0, 5, 9]
    """
    return ((words.astype(U64) * np.asarray(bound).astype(U64)) >> U64(32)).astype(np.int64)


def happens(words: NDArray[np.uint32], probability: float) -> NDArray[np.bool_]:
    """Return where an event of that probability happens; exact at 0 and 1."""
    return words.astype(U64) < U64(round(probability * 2**32))


def sides(size: int) -> tuple[int, int]:
    """Return rows and columns of the grid that a keyed permutation of [0, size) works on: at least size places.

    >>> sides(65_000_000), sides(10)
    ((8063, 8062), (8, 8))
    """
    rows = max(SHORTEST_SIDE, math.isqrt(size - 1) + 1)
    return rows, max(SHORTEST_SIDE, -(-size // rows))


def permute(index: ArrayLike, size: int, key: int, member: int = 0, number: int = 0) -> NDArray[np.int64]:
    """Return where a keyed permutation of [0, size) sends each `index`; size at most 2^31 - 1.

    Every (key, member, number) has a permutation of its own: `key` is that of a purpose, `member` and `number` (below
    2^32) tell apart whose permutation it is and which of its many.

    The index is a row and a column; in turns, a random function of the one is added to the other, modulo its range;
    what falls outside [0, size) goes through again. The round functions are drawn in full, as tables.

    >>> sorted(permute(np.arange(10), 10, 123).tolist()) == list(range(10))
    True
    """
    assert 0 < size < 2**31, size
    rows, columns = sides(size)
    tables = _round_tables(max(rows, columns), key, member, number)
    value = np.array(index, np.int64)
    flat = value.reshape(-1)
    todo = np.arange(flat.size)
    while todo.size:
        row, column = np.divmod(flat[todo], columns)
        for r in range(0, ROUNDS, 2):
            row = (row + below(tables[r][column], rows)) % rows
            column = (column + below(tables[r + 1][row], columns)) % columns
        flat[todo] = row * columns + column
        todo = todo[flat[todo] >= size]
    return value


def _round_tables(length: int, key: int, member: int, number: int) -> NDArray[np.uint32]:
    """Return the words of every round function at 0 … length - 1: four for every counter (i, number, member, round)."""
    counter = np.empty((ROUNDS, -(-length // 4), 4), U64)
    counter[..., 0] = np.arange(counter.shape[1])
    counter[..., 1:3] = (number, member)
    counter[..., 3] = np.arange(ROUNDS)[:, None]
    return philox4x32(counter, (key & 0xFFFFFFFF, key >> 32)).reshape(ROUNDS, -1)
