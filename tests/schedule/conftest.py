"""A slide table of seven imbalanced organs, a schedule of it, and sharing out in exact rationals."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.spec import ScheduleSpec

ORGANS = {"breast": 150, "colon": 80, "lung": 40, "Prostate": 20, "skin": 6, "ßtest": 3, "brain": 1}


@pytest.fixture(scope="session")
def slides() -> pd.DataFrame:
    """300 slides of 1 to 40 tiles; the organs' slides stand in mixed order."""
    random = np.random.default_rng(0)
    organs = random.permutation([organ for organ, count in ORGANS.items() for _ in range(count)])
    counts = random.integers(1, 41, len(organs))
    ids = [f"{organ} {i}" for i, organ in enumerate(organs)]
    return pd.DataFrame({"slide_id": ids, "organ": organs.astype(object), "num_tiles": counts.astype(np.int64)})


@pytest.fixture(scope="session")
def spec() -> ScheduleSpec:
    """Two passes and a half; the small organs hit their bounds."""
    return ScheduleSpec(
        seed=1, num_pseudo_epochs=12, positions_per_pseudo_epoch=2500, num_groups=5, organ_power=0.0, max_repeats=6
    )


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, spec: ScheduleSpec, slides: pd.DataFrame) -> Path:
    """The schedule of both; not to be changed."""
    out = tmp_path_factory.mktemp("schedule") / "sched"
    build_schedule(spec, slides, out)
    return out


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Reads the files of a folder."""
    return lambda folder: {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def exact_shares(total: int, weights: list[Fraction], low: list[int], high: list[int]) -> list[Fraction]:
    """Water-filling by definition: the one level at which level · weight, held within the bounds, sums to the total."""

    def held(level: Fraction) -> list[Fraction]:
        return [min(max(level * w, Fraction(lo)), Fraction(hi)) for w, lo, hi in zip(weights, low, high)]

    totals = {turn: sum(held(turn)) for turn in {Fraction(b, w) for w, *ends in zip(weights, low, high) for b in ends}}
    totals[Fraction(0)] = sum(low)
    below = max(turn for turn in totals if totals[turn] <= total)
    above = min((turn for turn in totals if totals[turn] >= total), default=below)
    if totals[below] == total:
        return held(below)
    # the sum is linear between two neighbouring turns
    return held(below + (above - below) * Fraction(total - totals[below], totals[above] - totals[below]))


def whole_shares(total: int, weights: list[Fraction], low: list[int], high: list[int]) -> list[int]:
    """The exact shares with the largest remainders rounded up, ties to the earlier entry."""
    exact = exact_shares(total, weights, low, high)
    assert sum(exact) == total
    shares = [share.numerator // share.denominator for share in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


@pytest.fixture(scope="session")
def shares() -> SimpleNamespace:
    """How a total is shared within bounds, `exact` in rationals and `whole`; nothing of it is the builder's."""
    return SimpleNamespace(exact=exact_shares, whole=whole_shares)
