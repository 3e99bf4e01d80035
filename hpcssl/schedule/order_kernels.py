"""The hot loops of a schedule, compiled: the keyed permutation of `hpcssl.core.rng.permute`, in bulk.

All of them release the interpreter lock. Integers only, so that every machine computes the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hpcssl.core.compiled import compiled
from hpcssl.core.rng import KEY_STEPS, ROUND_MULTIPLIERS, ROUNDS, SHORTEST_SIDE

Words = NDArray[np.uint32]
Tiles = NDArray[np.unsignedinteger]
_U32, _U64 = np.uint32, np.uint64
_MASK32, _SHIFT32 = _U64(0xFFFFFFFF), _U64(32)
_M0, _M1 = ROUND_MULTIPLIERS
_W0, _W1 = _U64(KEY_STEPS[0]), _U64(KEY_STEPS[1])
_BLOCK = 4096  # places at a time: they stay in the fastest cache while all rounds go over them


def tables_for(size: int) -> Words:
    """Return room for the round tables of permutations of up to `size`, (ROUNDS, longest side)."""
    side = max(SHORTEST_SIDE, int(np.ceil(np.sqrt(size))) + 1)
    return np.empty((ROUNDS, -(-side // 4) * 4), np.uint32)


@compiled
def sides(size: int) -> tuple[int, int]:
    """`hpcssl.core.rng.sides`, compiled."""
    root = np.int64(np.sqrt(np.float64(size)))
    while root * root < size:
        root += 1
    while (root - 1) * (root - 1) >= size:
        root -= 1
    rows = max(SHORTEST_SIDE, root)
    return rows, max(SHORTEST_SIDE, (size + rows - 1) // rows)


@compiled
def fill_tables(tables: Words, size: int, key: int, member: int, number: int) -> None:
    """Draw the round functions of the permutation (key, member, number) of [0, size)."""
    rows, columns = sides(size)
    for r in range(ROUNDS):
        bound = _U64(rows if r % 2 == 0 else columns)
        table = tables[r]
        for i in range((max(rows, columns) + 3) // 4):
            c0, c1, c2, c3 = _U64(i), _U64(number) & _MASK32, _U64(member) & _MASK32, _U64(r)
            k0, k1 = _U64(key) & _MASK32, _U64(key) >> _SHIFT32
            for _ in range(10):
                p0, p1 = _M0 * c0, _M1 * c2
                c0, c1, c2, c3 = (p1 >> _SHIFT32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> _SHIFT32) ^ c3 ^ k1, p0 & _MASK32
                k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
            table[4 * i] = _U32((c0 * bound) >> _SHIFT32)
            table[4 * i + 1] = _U32((c1 * bound) >> _SHIFT32)
            table[4 * i + 2] = _U32((c2 * bound) >> _SHIFT32)
            table[4 * i + 3] = _U32((c3 * bound) >> _SHIFT32)


@compiled
def permute_run(tables: Words, size: int, start: int, row: Words, out: Words) -> None:
    """Write where the permutation sends start, start + 1, …, into `out`; `row` is room of the same length."""
    rows, columns = sides(size)
    r, c = start // columns, start % columns
    for k in range(out.size):
        row[k], out[k] = r, c
        c += 1
        if c == columns:
            r, c = r + 1, 0
    _rounds(tables, rows, columns, row, out)
    for k in range(out.size):
        r, c = np.int64(row[k]), np.int64(out[k])
        while r * columns + c >= size:  # rare, but for a few tiles
            for i in range(0, ROUNDS, 2):
                r += np.int64(tables[i, c])
                r -= rows if r >= rows else 0
                c += np.int64(tables[i + 1, r])
                c -= columns if c >= columns else 0
        out[k] = r * columns + c


@compiled
def _rounds(tables: Words, rows: int, columns: int, row: Words, column: Words) -> None:
    """Send rows and columns through the network, in place; loops that the compiler turns into vector instructions."""
    num_rows, num_columns = _U32(rows), _U32(columns)
    for r in range(0, ROUNDS, 2):
        table = tables[r]
        for k in range(row.size):
            value = _U32(row[k] + table[column[k]])
            row[k] = min(value, _U32(value - num_rows))  # modulo: a negative difference wraps around to a large one
        table = tables[r + 1]
        for k in range(row.size):
            value = _U32(column[k] + table[row[k]])
            column[k] = min(value, _U32(value - num_columns))


@compiled
def draw_tiles(
    slide: NDArray[np.int64],
    num_tiles: NDArray[np.int64],
    first_tile: NDArray[np.int64],
    before: NDArray[np.int64],
    draws: NDArray[np.int64],
    key: int,
    tables: Words,
    out: Tiles,
) -> None:
    """Write the tile numbers of draws [before, before + draws) of every slide, slide after slide, into `out`.

    Draw j of a slide with n tiles is place j mod n of its permutation number ⌊j/n⌋.
    """
    row, index = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.uint32)
    at = 0
    for s in range(slide.size):
        n, first = num_tiles[s], first_tile[s]
        j, end = before[s], before[s] + draws[s]
        while j < end:
            number, place = j // n, j % n
            if place == 0 or j == before[s]:
                fill_tables(tables, n, key, slide[s], number)
            count = min(_BLOCK, n - place, end - j)
            permute_run(tables, n, place, row[:count], index[:count])
            for k in range(count):
                out[at + k] = first + np.int64(index[k])
            at += count
            j += count


@compiled
def take_in_order(tiles: Tiles, start: int, tables: Words, out: Tiles) -> None:
    """Write what stands at positions start, start + 1, …: the tiles that the permutation in `tables` names."""
    row, index = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.uint32)
    for at in range(0, out.size, _BLOCK):
        count = min(_BLOCK, out.size - at)
        permute_run(tables, tiles.size, start + at, row[:count], index[:count])
        for k in range(count):
            out[at + k] = tiles[index[k]]
