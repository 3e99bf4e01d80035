"""The first three guarantees, read from a schedule's files alone by code that shares nothing with the builder's.

Every check is a function, and every function is shown a schedule that breaks its guarantee. test_order.py is about the
fourth.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hpcssl.core.errors import ScheduleError
from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.spec import ScheduleSpec

THRESHOLD = 1e-3


@dataclass(frozen=True)
class Read:
    """A schedule's files, as anybody with numpy would read them."""

    spec: dict
    organ: np.ndarray  # of every slide
    first: np.ndarray
    count: np.ndarray
    eligible: np.ndarray
    files: list[np.ndarray]  # tile numbers of every pseudo-epoch
    told: list[dict]  # organs of schedule.json

    def draws(self, number: int) -> np.ndarray:
        """Draws of every slide in a pseudo-epoch."""
        return np.bincount(self.slide_of(self.files[number]), minlength=len(self.count))

    def slide_of(self, tiles: np.ndarray) -> np.ndarray:
        return np.repeat(np.arange(len(self.count)), self.count)[tiles]

    def passes(self) -> list[list[int]]:
        """The pseudo-epochs of every whole pass."""
        groups = self.spec["num_groups"]
        return [list(range(f, f + groups)) for f in range(0, len(self.files) - groups + 1, groups)]

    def changed(self, number: int, tiles: np.ndarray) -> Read:
        return replace(self, files=[tiles if n == number else file for n, file in enumerate(self.files)])


def read(path: Path) -> Read:
    header = json.loads((path / "schedule.json").read_text())
    slides = pd.read_parquet(path / "slides.parquet")
    count = slides["num_tiles"].to_numpy()
    assert slides["first_tile"].tolist() == [int(count[:i].sum()) for i in range(len(count))]
    files = [np.load(path / record["file"]) for record in header["pseudo_epochs"]]
    told = [record["organs"] for record in header["pseudo_epochs"]]
    organ, first, eligible = (slides[name].to_numpy() for name in ("organ", "first_tile", "eligible"))
    return Read(header["spec"], organ.astype(object), first, count, eligible, files, told)


@pytest.fixture(scope="module")
def schedule(built: Path) -> Read:
    return read(built)


def build_and_read(tmp_path: Path, spec: ScheduleSpec, slides: pd.DataFrame) -> Read:
    build_schedule(spec, slides, tmp_path / "sched")
    return read(tmp_path / "sched")


# 1. groups


def check_groups(schedule: Read) -> None:
    """Every slide in exactly one pseudo-epoch of each pass, organs spread evenly, another grouping each pass."""
    groupings = []
    for numbers in schedule.passes():
        used = np.array([schedule.draws(n) > 0 for n in numbers])
        once = used.sum(axis=0) == schedule.eligible
        assert once.all(), "not every slide is in exactly one pseudo-epoch of the pass"
        for organ in set(schedule.organ):
            sizes = used[:, schedule.organ == organ].sum(axis=1)
            assert sizes.max() - sizes.min() <= 1, f"{organ} is not spread evenly: {sizes}"
        groupings.append(used.argmax(axis=0))
    for a, b in itertools.pairwise(groupings):
        share_that_stayed = (a == b).mean()  # expected 1 / num_groups
        together = (a[:, None] == a) & (schedule.organ[:, None] == schedule.organ) & ~np.eye(len(a), dtype=bool)
        pairs_that_stayed = (b[:, None] == b)[together].mean()  # of one organ; expected about 1 / num_groups
        assert max(share_that_stayed, pairs_that_stayed) < 2 / schedule.spec["num_groups"], "the same groups again"


def test_every_slide_once_a_pass(schedule):
    assert len(schedule.passes()) == 2
    check_groups(schedule)


def test_the_last_pass_may_be_cut_short(schedule):
    used = np.array([schedule.draws(n) > 0 for n in (10, 11)])
    assert used.sum(axis=0).max() == 1
    assert 0.3 < used.any(axis=0).mean() < 0.5


def test_small_organs_do_not_crowd_the_first_group(tmp_path):
    slides = pd.DataFrame({"slide_id": [f"s{i}" for i in range(40)], "num_tiles": 5})
    slides["organ"] = [f"organ {i}" for i in range(40)]  # one slide each
    spec = ScheduleSpec(num_pseudo_epochs=20, positions_per_pseudo_epoch=60, num_groups=4, max_repeats=50)
    schedule = build_and_read(tmp_path, spec, slides)
    sizes = np.zeros(4)
    for numbers in schedule.passes():
        sizes += [(schedule.draws(n) > 0).sum() for n in numbers]
    assert stats.chisquare(sizes).pvalue > THRESHOLD


def test_the_check_catches_slides_that_leak_between_groups(schedule):
    leaked = schedule.files[0].copy()
    leaked[0] = schedule.files[1][0]
    dropped = schedule.files[3][schedule.slide_of(schedule.files[3]) != schedule.slide_of(schedule.files[3])[0]]
    for broken in (schedule.changed(0, leaked), schedule.changed(3, dropped)):
        with pytest.raises(AssertionError, match="exactly one"):
            check_groups(broken)
    with pytest.raises(AssertionError, match="the same groups again"):
        check_groups(replace(schedule, files=schedule.files[:5] * 2))
    rotated = [schedule.files[n] for n in (0, 1, 2, 3, 4, 1, 2, 3, 4, 0)]
    with pytest.raises(AssertionError, match="the same groups again"):
        check_groups(replace(schedule, files=rotated))
    unstratified = replace(schedule, organ=np.sort(schedule.organ.astype(str)).astype(object))
    with pytest.raises(AssertionError, match="not spread evenly"):
        check_groups(unstratified)


# 2. quotas


def is_shared(found: list[int], exact: list[Fraction]) -> bool:
    """Whether the largest remainders are rounded up, whoever gets a tie."""
    if sum(found) != sum(exact) or any(not 0 <= f - math.floor(e) <= 1 for f, e in zip(found, exact)):
        return False
    up = [e % 1 for f, e in zip(found, exact) if f > math.floor(e)]
    down = [e % 1 for f, e in zip(found, exact) if f == math.floor(e)]
    return not up or not down or min(up) >= max(down)


def weight(size: int, power: float, factor: float = 1.0) -> Fraction:
    """factor · size^power; of square roots, twelve decimal places."""
    if power == 0.5:
        return Fraction((math.isqrt(math.floor(4 * size * 10**24 * Fraction(str(factor)) ** 2)) + 1) // 2, 10**12)
    return Fraction(size) ** int(power) * Fraction(str(factor))


def check_quotas(schedule: Read, shares: SimpleNamespace) -> None:
    """Draws of every organ and slide are those of a second computation; what schedule.json says of them is true."""
    spec = schedule.spec
    for number, told in enumerate(schedule.told):
        draws = schedule.draws(number)
        members = defaultdict(list)
        for slide in np.flatnonzero(draws):
            members[schedule.organ[slide]].append(slide)
        organs = sorted(members)
        tiles = {organ: int(schedule.count[members[organ]].sum()) for organ in organs}
        size = tiles if spec["organ_size"] == "tiles" else {organ: len(members[organ]) for organ in organs}
        factors = spec["organ_weights"]
        weights = [weight(size[organ], spec["organ_power"], factors.get(organ, 1.0)) for organ in organs]
        total = spec["positions_per_pseudo_epoch"]
        wanted = shares.whole(total, weights, [0] * len(organs), [total] * len(organs))
        achieved = shares.whole(total, weights, [0] * len(organs), [spec["max_repeats"] * tiles[o] for o in organs])
        found = [int(draws[members[organ]].sum()) for organ in organs]
        assert found == achieved, f"pseudo-epoch {number}: quotas of {organs}"
        assert told == {o: {"wanted": w, "achieved": a} for o, w, a in zip(organs, wanted, achieved)}, number
        for organ, quota in zip(organs, achieved):
            n = [int(schedule.count[slide]) for slide in members[organ]]
            by_slide = [weight(k, spec["slide_power"]) for k in n]
            within = shares.exact(quota, by_slide, [1] * len(n), [spec["max_repeats"] * k for k in n])
            assert is_shared(draws[members[organ]].tolist(), within), f"pseudo-epoch {number}: slides of {organ}"


def test_quotas(schedule, shares):
    check_quotas(schedule, shares)
    capped = sum(q["achieved"] < q["wanted"] for told in schedule.told for q in told.values())
    assert capped > 10, "bounds must bind for this to test anything"


@pytest.mark.parametrize(
    "change",
    [
        {"organ_power": 0.5, "max_repeats": 3},
        {"organ_power": 1.0, "max_repeats": 3},
        {"organ_power": 2.0, "max_repeats": 2, "include": {"organ": ["breast", "colon", "lung"]}},
        {"organ_size": "slides", "organ_power": 1.0, "max_repeats": 8},
        {"organ_size": "slides", "organ_power": 0.5, "max_repeats": 8},
        {"organ_weights": {"breast": 3, "brain": 0.07, "ßtest": 1e-2}, "max_repeats": 2},
        {"organ_weights": {"breast": 0.3, "colon": 1.7}, "organ_power": 0.5},
        {"slide_power": 0.0, "max_repeats": 3},
        {"slide_power": 0.5, "max_repeats": 3},
        {"slide_power": 2.0, "organ_weights": {"lung": 0.05}},
        {"slide_power": 0.0, "organ_size": "slides", "organ_power": 1.0, "max_repeats": 4, "num_groups": 1},
        {"include": {"organ": ["breast"]}},
    ],
    ids=str,
)
def test_quotas_of_other_specs(tmp_path, slides, shares, change):
    spec = ScheduleSpec(num_pseudo_epochs=3, positions_per_pseudo_epoch=1200)
    check_quotas(build_and_read(tmp_path, replace(spec, **change), slides), shares)


def two_organs() -> pd.DataFrame:
    """Three slides of x and two of y."""
    return pd.DataFrame({"slide_id": list("abcde"), "organ": list("xxxyy"), "num_tiles": [90, 5, 5, 50, 50]})


def test_every_slide_has_at_least_one_draw(tmp_path, shares):
    spec = ScheduleSpec(num_pseudo_epochs=1, num_groups=1, positions_per_pseudo_epoch=12, slide_power=4.0)
    schedule = build_and_read(tmp_path, spec, two_organs())
    assert schedule.draws(0).tolist()[:3] == [4, 1, 1]
    check_quotas(schedule, shares)


def test_an_organ_whose_slides_have_no_room_is_named(tmp_path):
    spec = ScheduleSpec(num_pseudo_epochs=1, num_groups=1, positions_per_pseudo_epoch=6)
    build_and_read(tmp_path / "just enough", spec, two_organs())
    for change in ({"positions_per_pseudo_epoch": 5, "organ_weights": {"y": 1.01}}, {"organ_weights": {"x": 0.5}}):
        with pytest.raises(ScheduleError, match="3 slides of x in its group need a position each, but its quota is 2"):
            build_schedule(replace(spec, **change), two_organs(), tmp_path / "sched")
    assert not (tmp_path / "sched").exists()


def check_ties_take_turns(draws: np.ndarray) -> None:
    """Rows are passes, columns slides that are alike: who has the draw that is left over is uniform over the passes."""
    more = (draws == draws.max(axis=1, keepdims=True)).sum(axis=0)
    assert stats.chisquare(more).pvalue > THRESHOLD, f"draws more than others: {more}"


def test_of_slides_that_are_alike_another_has_the_draw_that_is_left_over(tmp_path):
    slides = pd.DataFrame({"slide_id": [f"s{i}" for i in range(8)], "organ": "x", "num_tiles": 5})
    spec = ScheduleSpec(num_pseudo_epochs=200, num_groups=1, positions_per_pseudo_epoch=17)
    schedule = build_and_read(tmp_path, spec, slides)
    draws = np.array([schedule.draws(number) for number in range(200)])
    assert (np.sort(draws, axis=1) == [2] * 7 + [3]).all()
    check_ties_take_turns(draws)
    with pytest.raises(AssertionError, match="more than others"):
        check_ties_take_turns(-np.sort(-draws, axis=1))


def test_the_check_catches_shares_by_nature_and_a_moved_draw(schedule, shares):
    def of(**change: Any) -> Read:
        return replace(schedule, spec=schedule.spec | change)

    file = schedule.files[2].copy()
    slides = schedule.slide_of(file)
    places = np.flatnonzero(schedule.organ[slides] == "breast")
    file[places[0]] = file[places[slides[places] != slides[places[0]]][0]]
    for broken, told in (
        (of(organ_power=1.0), "quotas of"),
        (of(max_repeats=1000), "quotas of"),
        (of(organ_size="slides", organ_power=0.5), "quotas of"),
        (of(organ_weights={"colon": 1.1}), "quotas of"),
        (of(slide_power=0.0), "slides of"),
        (of(slide_power=0.5), "slides of"),
        (schedule.changed(2, file), "pseudo-epoch 2: slides of"),
        (schedule.changed(2, schedule.files[2][:-1]), "pseudo-epoch 2: quotas of"),
    ):
        with pytest.raises(AssertionError, match=told):
            check_quotas(broken, shares)


# 3. draws of a slide's tiles


def check_even_draws(schedule: Read) -> None:
    """After every pseudo-epoch, the draw counts of a slide's tiles differ by at most one."""
    drawn = np.zeros(schedule.count.sum(), np.int64)
    for number, tiles in enumerate(schedule.files):
        drawn += np.bincount(tiles, minlength=len(drawn))
        for slide, (first, count) in enumerate(zip(schedule.first, schedule.count)):
            counts = drawn[first : first + count]
            assert counts.max() - counts.min() <= 1, f"slide {slide} after pseudo-epoch {number}: {counts}"


def test_tiles_of_a_slide_take_turns(schedule):
    check_even_draws(schedule)
    drawn = np.bincount(np.concatenate(schedule.files), minlength=schedule.count.sum())
    assert drawn.min() >= 1, "each tile must be drawn for this to test anything"
    assert len(np.unique(drawn)) > 3


def test_the_turns_of_two_slides_and_two_rounds_differ(tmp_path):
    # a slide of 6 tiles, 3 draws a pseudo-epoch: which 3 come first in each round
    slides = pd.DataFrame({"slide_id": [f"s{i}" for i in range(40)], "organ": "x", "num_tiles": 6})
    spec = ScheduleSpec(num_pseudo_epochs=8, num_groups=1, positions_per_pseudo_epoch=120)
    schedule = build_and_read(tmp_path, spec, slides)
    check_even_draws(schedule)
    halves = {
        (slide, number): tuple(np.sort(file[schedule.slide_of(file) == slide] - schedule.first[slide]))
        for number, file in enumerate(schedule.files)
        for slide in range(40)
    }
    first_halves = [halves[slide, number] for slide in range(40) for number in range(0, 8, 2)]
    rounds = [halves[slide, number] + halves[slide, number + 1] for slide in range(40) for number in range(0, 8, 2)]
    assert all(sorted(both) == list(range(6)) for both in rounds), "two pseudo-epochs are a round"
    _, counts = np.unique(first_halves, axis=0, return_counts=True)
    assert len(counts) == 20, "each choice of 3 out of 6 comes up"
    assert stats.chisquare(counts).pvalue > THRESHOLD


def test_the_check_catches_draws_with_replacement(schedule):
    random = np.random.default_rng(0)
    slides = schedule.slide_of(schedule.files[0])
    replaced = (schedule.first[slides] + random.integers(0, schedule.count[slides])).astype(np.uint32)
    with pytest.raises(AssertionError, match="after pseudo-epoch 0"):
        check_even_draws(schedule.changed(0, replaced))


def test_a_tile_may_come_once_more_than_max_repeats_where_a_pass_begins_within_a_permutation(tmp_path):
    slides = pd.DataFrame({"slide_id": ["a"], "organ": ["x"], "num_tiles": [10]})
    spec = ScheduleSpec(num_pseudo_epochs=3, num_groups=1, positions_per_pseudo_epoch=7, max_repeats=1)
    read_all = [build_and_read(tmp_path / str(seed), replace(spec, seed=seed), slides) for seed in range(5)]
    most = [[int(np.bincount(file).max()) for file in schedule.files] for schedule in read_all]
    assert np.max(most, axis=0).tolist() == [1, 2, 2]
    for schedule in read_all:
        check_even_draws(schedule)
