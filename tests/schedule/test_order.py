"""The fourth guarantee: the order of a pseudo-epoch's draws is a keyed permutation, without any trend.

Every check is a function, and every function is shown orders that have what it looks for. test_kernels.py is about the
likelihood of each permutation, and about one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.spec import ScheduleSpec

THRESHOLD = 1e-3  # p of every test; seeds are fixed, so a pass stays a pass
DEVIATIONS = 4.5  # of a correlation from 0, in units of 1/√n
TILES = 5 * 10**4
LARGE = ScheduleSpec(seed=4, num_pseudo_epochs=2, num_groups=1, positions_per_pseudo_epoch=TILES, max_repeats=100)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, slides: pd.DataFrame) -> list[np.ndarray]:
    """Two pseudo-epochs of 50,000 positions of all 300 slides, each tile drawn several times."""
    out = tmp_path_factory.mktemp("order") / "sched"
    build_schedule(LARGE, slides, out)
    return [np.load(out / f"pseudo_epoch_000{n}.npy").astype(np.int64) for n in range(2)]


@pytest.fixture(scope="module")
def slide_of(slides: pd.DataFrame) -> np.ndarray:
    """The slide of every tile."""
    return np.repeat(np.arange(len(slides)), slides["num_tiles"])


@pytest.fixture(scope="module")
def organ_of(slides: pd.DataFrame, slide_of: np.ndarray) -> np.ndarray:
    """The organ of every tile, as a number."""
    return np.unique(slides["organ"].astype(str), return_inverse=True)[1][slide_of]


def check_no_trend(tiles: np.ndarray, slide_of: np.ndarray, organ_of: np.ndarray) -> None:
    """Neither tile, slide nor organ goes with the place."""
    place = np.arange(len(tiles))
    limit = DEVIATIONS / np.sqrt(len(tiles))
    for what, values in (("tile", tiles), ("slide", slide_of[tiles]), ("organ", organ_of[tiles])):
        for name, along in (("place", place), ("wave", np.sin(place * 2 * np.pi / len(tiles)))):
            assert abs(np.corrcoef(along, values)[0, 1]) < limit, f"the {what} goes with the {name}"


def check_spread(tiles: np.ndarray, group_of: np.ndarray) -> None:
    """Every group (slide or organ) has its share in each of ten parts of the pseudo-epoch."""
    _, group = np.unique(group_of[tiles], return_inverse=True)
    table = np.zeros((group.max() + 1, 10))
    np.add.at(table, (group, np.arange(len(tiles)) * 10 // len(tiles)), 1)
    assert stats.chi2_contingency(table).pvalue > THRESHOLD, "not spread over the parts"


def check_no_memory(tiles: np.ndarray, slide_of: np.ndarray, organ_of: np.ndarray, lags: Iterable[int]) -> None:
    """What stands at a place says nothing of what stands `lag` places on."""
    limit = DEVIATIONS / np.sqrt(len(tiles))
    for lag in lags:
        a, b = tiles[:-lag], tiles[lag:]
        assert abs(np.corrcoef(a, b)[0, 1]) < limit, f"tiles {lag} places apart go together"
        for what, of in (("slide", slide_of), ("organ", organ_of)):
            shares = np.bincount(of[tiles]) / len(tiles)
            expected = (shares**2).sum()
            same = (of[a] == of[b]).mean()
            deviation = (same - expected) / np.sqrt(expected * (1 - expected) / len(a))
            assert abs(deviation) < DEVIATIONS, f"the {what} {lag} places apart is the same in {same:.4f}"


LAGS = (1, 2, 3, 7, 64, 223, 224, 448)  # 224 is the side of the grid that permutes 50,000


@pytest.mark.parametrize("number", [0, 1])
def test_the_order_of_a_pseudo_epoch(large, slide_of, organ_of, number):
    check_no_trend(large[number], slide_of, organ_of)
    check_spread(large[number], slide_of)
    check_spread(large[number], organ_of)
    check_no_memory(large[number], slide_of, organ_of, LAGS)


def test_two_pseudo_epochs_do_not_go_together(large, slide_of):
    limit = DEVIATIONS / np.sqrt(TILES)
    assert abs(np.corrcoef(large[0], large[1])[0, 1]) < limit
    assert abs(np.corrcoef(slide_of[large[0]], slide_of[large[1]])[0, 1]) < limit


def test_the_first_places_of_many_pseudo_epochs(slides, tmp_path, organ_of):
    # the shares of organs at the first three places are those of the pseudo-epoch
    spec = replace(LARGE, num_pseudo_epochs=150, positions_per_pseudo_epoch=1500, max_repeats=1000)
    build_schedule(spec, slides, tmp_path / "sched")
    schedule = Schedule.open(tmp_path / "sched")
    whole = organ_of[schedule.tiles_at(0, schedule.num_positions)].reshape(150, 1500)
    shares = np.bincount(whole.ravel(), minlength=7) / whole.size

    def chance(organs: np.ndarray) -> float:
        first = np.bincount(organs[:, :3].ravel(), minlength=7)
        return float(stats.chisquare(first, shares * first.sum()).pvalue)

    assert chance(whole) > THRESHOLD
    assert chance(np.sort(whole, axis=1)) < THRESHOLD


def test_the_checks_catch_orders_with_a_trend(large, slide_of, organ_of):
    random = np.random.default_rng(0)
    tiles = large[0]
    by_organ = tiles[np.argsort(organ_of[tiles] + random.normal(0, 25, TILES))]  # hardly to be seen
    by_slide = tiles[np.argsort(slide_of[tiles] * 7919 % 300 + random.normal(0, 100, TILES))]
    for broken in (np.sort(tiles), by_organ):
        with pytest.raises(AssertionError, match="goes with the place"):
            check_no_trend(broken, slide_of, organ_of)
    for broken, of in ((np.sort(tiles), slide_of), (by_organ, organ_of), (by_slide, slide_of)):
        with pytest.raises(AssertionError, match="not spread"):
            check_spread(broken, of)


def test_the_checks_catch_orders_with_a_memory(large, slide_of, organ_of):
    pairs = np.sort(large[0])[: TILES // 2 * 2].reshape(-1, 2)  # two draws of a slide always stand together
    pairs = np.random.default_rng(0).permutation(pairs).ravel()
    check_no_trend(pairs, slide_of, organ_of)
    with pytest.raises(AssertionError, match="1 places apart"):
        check_no_memory(pairs, slide_of, organ_of, LAGS)
    dealt = large[0].copy()  # organs dealt in turn: none follows itself as often as by chance
    order = np.argsort(organ_of[dealt], kind="stable").reshape(10, -1).T.ravel()
    with pytest.raises(AssertionError, match="places apart"):
        check_no_memory(dealt[order], slide_of, organ_of, LAGS)
