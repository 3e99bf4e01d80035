"""Counter-based random numbers: a function of identity, never of order.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), vectorised over
positions. Any worker on any node that asks for the same (seed, purpose, position, view, stream) gets the same
bits; adding a stream shifts no other.

The keyed permutation is the variable-length Philox bijection with cycle walking of Mitchell et al.,
"Bandwidth-optimal random shuffling for GPUs" (ACM TOPC 2022).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

U32 = np.uint32
U64 = np.uint64
_MASK32 = U64(0xFFFFFFFF)
_ROUND_MULTIPLIERS = (U64(0xD2511F53), U64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_BIJECTION_MULTIPLIER = 0xD2B74407B1CE6E93
_BIJECTION_ROUNDS = 24
_SMALLEST_DOMAIN_BITS = 6  # the network over fewer bits has too few permutations to draw from evenly


def key_of(seed: int, purpose: str) -> int:
    """Return the 64-bit key of a seed and a purpose.

    Hashed, not added: seed 1 of one purpose never meets seed 0 of another.

    >>> key_of(0, "plan") != key_of(1, "plan") != key_of(1, "schedule")
    True
    """
    digest = hashlib.blake2b(f"{int(seed)}|{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Apply ten Philox rounds.

    Parameters
    ----------
    counter : (..., 4) array of values below 2^32
    key : two 32-bit integers

    Returns
    -------
    (..., 4) uint32, the published Random123 output for that counter and key.
    """
    c0, c1, c2, c3 = (counter[..., i].astype(U64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0 = _ROUND_MULTIPLIERS[0] * c0
        p1 = _ROUND_MULTIPLIERS[1] * c2
        c0 = (p1 >> U64(32)) ^ c1 ^ U64(k0)
        c2 = (p0 >> U64(32)) ^ c3 ^ U64(k1)
        c1, c3 = p1 & _MASK32, p0 & _MASK32
        k0 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF
        k1 = (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(U32)


def uniforms(
    seed: int, purpose: str, position: ArrayLike, view: ArrayLike = 0, stream: ArrayLike = 0
) -> NDArray[np.uint32]:
    """Draw four 32-bit words, each uniform over [0, 2^32), for every identity.

    `position` (below 2^64), `view` and `stream` (below 2^32) broadcast against each other.

    Returns
    -------
    (..., 4) uint32, the leading shape that of the broadcast.

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


def permute(index: ArrayLike, size: ArrayLike, key: ArrayLike) -> NDArray[np.int64]:
    """Return where a keyed permutation of [0, size) sends `index`.

    `index`, `size` (at most 2^62) and `key` (64 bits) broadcast: a different permutation may stand at every place.

    >>> sorted(permute(np.arange(10), 10, 123).tolist()) == list(range(10))
    True
    """
    value, size_, key_ = (np.array(a, dtype=U64) for a in np.broadcast_arrays(index, size, key))
    shape = value.shape
    value, size_, key_ = value.ravel(), size_.ravel(), key_.ravel()
    bits = np.maximum(_bit_length(size_ - U64(1)), U64(_SMALLEST_DOMAIN_BITS))
    out = np.empty_like(value)
    todo = np.arange(value.size)
    while todo.size:
        value = _bijection(value, bits, key_)
        inside = value < size_
        out[todo[inside]] = value[inside]
        walk = ~inside
        todo, value, bits, key_, size_ = todo[walk], value[walk], bits[walk], key_[walk], size_[walk]
    return out.reshape(shape).astype(np.int64)


def _bit_length(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    length = np.zeros(values.shape, U64)
    rest = values.copy()
    for shift in (32, 16, 8, 4, 2, 1):
        big = rest >= U64(1 << shift)
        length[big] += U64(shift)
        rest = np.where(big, rest >> U64(shift), rest)
    return length + (rest > 0).astype(U64)


def _bijection(value: NDArray[np.uint64], bits: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Permute [0, 2^bits): a Feistel network whose round function is the two halves of one wide product."""
    one = U64(1)
    left_bits = bits >> one
    right_bits = bits - left_bits
    left_mask, right_mask = (one << left_bits) - one, (one << right_bits) - one
    left, right = value >> right_bits, value & right_mask
    for i in range(_BIJECTION_ROUNDS):
        round_key = _mix(key + U64((i * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF))
        high, low = _wide_product(left)
        low = (low << (right_bits - left_bits)) | (right >> left_bits)
        left, right = ((high ^ round_key) ^ right) & left_mask, low & right_mask
    return (left << right_bits) | right


def _wide_product(x: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the high and the low 64 bits of x · 0xD2B74407B1CE6E93, for x below 2^32."""
    multiplier_high, multiplier_low = U64(_BIJECTION_MULTIPLIER >> 32), U64(_BIJECTION_MULTIPLIER & 0xFFFFFFFF)
    low_part = x * multiplier_low
    high_part = x * multiplier_high + (low_part >> U64(32))
    return high_part >> U64(32), (high_part << U64(32)) | (low_part & _MASK32)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalise as SplitMix64 does (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))
