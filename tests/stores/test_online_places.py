"""Places on slides: what a draw may give is exactly what has enough tissue, and integers alone decide it."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from hpcssl.core.rng import uniforms
from hpcssl.stores import online_places
from hpcssl.stores.online_places import Runs, corner_cells, draw_corner, first_pixel, runs_of

SLIDE_PX = (1000, 730)
CELL = 16.7  # pixels a side; the last row and column of cells reach beyond the slide
MASK = (44, 60)  # rows, columns
LEAST = 0.4
GOLDEN_CORNERS = [[777, 64], [639, 49], [873, 489], [840, 21]]


def blobs(seed: int, shape: tuple[int, int] = MASK) -> NDArray[np.bool_]:
    """Return a mask with pieces of every size and single cells."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    mask = random.uniform(size=shape) < 0.03
    for _ in range(6):
        y, x, r = random.uniform(0, shape[0]), random.uniform(0, shape[1]), random.uniform(1, 9)
        mask |= (rows - y) ** 2 + (columns - x) ** 2 < r * r
    return mask


def share_of_tissue(mask: NDArray[np.bool_], x: float, y: float, side: float) -> float:
    """Return the share of tissue in a tile, from the overlap of the tile with every cell; corner and side in pixels."""

    def overlaps(start: float, cells: int) -> NDArray[np.float64]:
        edges = np.arange(cells + 1) * CELL
        return np.clip(np.minimum(edges[1:], start + side) - np.maximum(edges[:-1], start), 0, None)

    return float(overlaps(y, mask.shape[0]) @ mask @ overlaps(x, mask.shape[1])) / side**2


def allowed(mask: NDArray[np.bool_], side: float) -> NDArray[np.bool_]:
    return corner_cells(mask, CELL, SLIDE_PX, side, LEAST)


def test_run_lengths_are_the_mask() -> None:
    for mask in (*map(blobs, range(5)), np.zeros(MASK, bool), np.ones(MASK, bool)):
        runs = runs_of(mask)
        assert [runs.cell(rank) for rank in range(runs.total)] == np.flatnonzero(mask).tolist()
    assert (runs.starts.tolist(), runs.ends.tolist()) == ([0], [44 * 60]), "a full mask is one run"


def worst_share(mask: NDArray[np.bool_], cells: NDArray[np.bool_], side: float) -> float:
    """Return the least tissue of a tile that begins on a lattice of nine places in any of the cells."""
    lattice = list(product(np.linspace(0, 0.9999, 9), repeat=2))
    return min(
        share_of_tissue(mask, (column + part_x) * CELL, (row + part_y) * CELL, side)
        for row, column in np.argwhere(cells)
        for part_y, part_x in lattice
    )


@pytest.mark.parametrize("side", [40.0, 57.3, 100.0, 224.9])
def test_every_tile_that_may_be_drawn_has_enough_tissue(side: float) -> None:
    mask = blobs(1)
    cells = allowed(mask, side)
    assert 20 < cells.sum() < mask.size / 2, "neither nothing nor everything"
    assert worst_share(mask, cells, side) >= LEAST - 1e-6


def test_the_check_catches_cells_judged_by_their_corners_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least tissue may be inside a cell, where the tile's far edge crosses another one's."""

    def corners_alone(cells: int, reach: float) -> NDArray[np.float64]:
        return np.repeat(np.arange(cells + 1.0), 2)[:-1]

    monkeypatch.setattr(online_places, "_knots", corners_alone)
    mask, side = np.random.default_rng(0).uniform(size=MASK) < 0.5, 2.4 * CELL
    assert worst_share(mask, allowed(mask, side), side) < LEAST - 0.002
    monkeypatch.undo()
    assert worst_share(mask, allowed(mask, side), side) >= LEAST - 1e-6


def test_no_cell_is_left_out_that_would_do() -> None:
    """A cell is left out only where some tile in it has too little tissue, or leaves the slide."""
    mask, side = blobs(2), 57.3
    cells, knots = allowed(mask, side), (0, -side / CELL % 1, 1)
    for row, column in np.argwhere(~cells):
        leaves = any(first_pixel(at + 1, CELL) - 1 + side > px for at, px in zip((column, row), SLIDE_PX))
        shares = [share_of_tissue(mask, (column + a) * CELL, (row + b) * CELL, side) for a in knots for b in knots]
        assert leaves or min(shares) < LEAST


@pytest.mark.parametrize("band", [1, 7, 1000])
def test_rows_computed_together_change_nothing(monkeypatch: pytest.MonkeyPatch, band: int) -> None:
    mask = blobs(3)
    whole = allowed(mask, 57.3)
    monkeypatch.setattr(online_places, "_BAND", band)
    assert (allowed(mask, 57.3) == whole).all()


def test_a_slide_full_of_tissue_may_be_drawn_up_to_its_edges() -> None:
    cells = corner_cells(np.ones((10, 10), bool), 10.0, (100, 100), 31.0, 0.9)
    assert cells[:7, :7].all(), "from the last pixel of cell 6, 69, a tile ends at 100, as the slide does"
    assert cells.sum() == 49


def draws(count: int, runs: Runs, seed: int = 5) -> NDArray[np.int64]:
    """Return `count` corners (x, y)."""
    words = uniforms(seed, "place", np.arange(count)).tolist()
    return np.array([draw_corner(runs, w[1:], MASK[1], CELL) for w in words])


def test_draws_are_even_over_the_cells_and_never_elsewhere() -> None:
    mask = blobs(4)
    cells = allowed(mask, 57.3)
    runs, count = runs_of(cells), 40_000
    corners = draws(count, runs)
    counts = np.zeros(MASK, np.int64)
    np.add.at(counts, tuple((corners[:, ::-1] / CELL).astype(int).T), 1)
    assert not counts[~cells].any()
    expected = count / runs.total
    chi_squared = ((counts[cells] - expected) ** 2 / expected).sum()
    freedom = runs.total - 1
    assert abs(chi_squared - freedom) < 4 * np.sqrt(2 * freedom), "four standard deviations"


def test_all_pixels_of_a_cell_are_drawn() -> None:
    mask = np.zeros(MASK, bool)
    mask[20, 30] = True
    corners = draws(8000, runs_of(mask))
    assert sorted(set(corners[:, 0].tolist())) == list(range(501, 518)), "from 30 × 16.7 to before 31 × 16.7"
    assert sorted(set(corners[:, 1].tolist())) == list(range(334, 351))


def test_the_places_of_some_positions_are_these() -> None:
    """A golden: the same on every machine."""
    runs = runs_of(allowed(blobs(4), 57.3))
    assert draws(4, runs).tolist() == GOLDEN_CORNERS
