"""Quotas and coverage at the paper's full size, against a brute-force allocation; nothing is written."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

from hpcssl.schedule.builder import Builder
from hpcssl.schedule.spec import ScheduleSpec

NUM_SLIDES, NUM_ORGANS, NUM_TILES = 423_563, 70, 3_250_000_000


@pytest.fixture(scope="module")
def slides() -> pd.DataFrame:
    """423,563 slides of 3.25 billion tiles; the largest organ has a hundred times the slides of the rarest."""
    random = np.random.default_rng(7)
    share = np.arange(1, NUM_ORGANS + 1) ** -1.3
    tiles = random.lognormal(0, 1, NUM_SLIDES)
    tiles = np.maximum(1, tiles / tiles.sum() * NUM_TILES).astype(np.int64)
    tiles[0] += NUM_TILES - tiles.sum()
    organ = random.choice(NUM_ORGANS, NUM_SLIDES, p=share / share.sum())
    ids = [f"s{i}" for i in range(NUM_SLIDES)]
    return pd.DataFrame({"slide_id": ids, "organ": [f"organ {i}" for i in organ], "num_tiles": tiles})


def brute_force(total: int, weights: dict[str, Fraction], caps: dict[str, int]) -> dict[str, int]:
    """Share a total in proportion by largest remainder; who exceeds its cap gets that, the rest is shared anew."""
    quota: dict[str, int] = {}
    while True:
        free = sorted(set(weights) - set(quota))
        rest, whole = total - sum(quota.values()), sum(weights[organ] for organ in free)
        share = {organ: rest * weights[organ] / whole for organ in free}
        over = [organ for organ in free if share[organ] > caps[organ]]
        if not over:
            break
        quota |= {organ: caps[organ] for organ in over}
    quota |= {organ: share[organ].numerator // share[organ].denominator for organ in free}
    by_remainder = sorted(free, key=lambda organ: (quota[organ] - share[organ], organ))
    for organ in by_remainder[: total - sum(quota.values())]:
        quota[organ] += 1
    return quota


@pytest.mark.parametrize(("power", "max_repeats"), [(0, 20), (0, 1), (1, 20)])
def test_quotas_and_coverage_of_the_papers_schedule(slides, power, max_repeats):
    spec = ScheduleSpec(organ_power=power, max_repeats=max_repeats)
    builder = Builder(spec, slides)
    organ, tiles = slides["organ"].to_numpy(object), slides["num_tiles"].to_numpy()
    capped = 0
    for number, quotas in enumerate(builder.quotas):
        drawn = pd.Series(quotas.draws).groupby(organ[quotas.slides]).sum()
        size = pd.Series(tiles[quotas.slides]).groupby(organ[quotas.slides]).sum()
        weights = {name: Fraction(int(n)) ** power for name, n in size.items()}
        expected = brute_force(65_000_000, weights, {name: max_repeats * int(n) for name, n in size.items()})
        assert drawn.to_dict() == expected == quotas.achieved, f"pseudo-epoch {number}"
        assert (quotas.draws <= max_repeats * tiles[quotas.slides]).all()
        capped += sum(quotas.achieved[name] < quotas.wanted[name] for name in expected)
    for first in range(0, 50, 5):
        used = np.concatenate([quotas.slides for quotas in builder.quotas[first : first + 5]])
        assert (np.sort(used) == np.arange(NUM_SLIDES)).all(), f"the pass that begins at pseudo-epoch {first}"
    assert (capped > 50) == (max_repeats == 1), "caps bind where they are meant to"
