"""Quotas and coverage at the paper's full size, against an allocation in exact rationals; nothing is written."""

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


@pytest.mark.parametrize(("power", "max_repeats"), [(0, 20), (0, 1), (1, 20)])
def test_quotas_and_coverage_of_the_papers_schedule(slides, shares, power, max_repeats):
    spec = ScheduleSpec(organ_power=power, max_repeats=max_repeats)
    builder = Builder(spec, slides)
    organ, tiles = slides["organ"].to_numpy(object), slides["num_tiles"].to_numpy()
    capped = 0
    for number, quotas in enumerate(builder.quotas):
        drawn = pd.Series(quotas.draws).groupby(organ[quotas.slides]).sum()
        size = pd.Series(tiles[quotas.slides]).groupby(organ[quotas.slides]).sum()
        counts = [int(n) for n in size]  # of the organs in the order of their names
        bounds = [0] * len(counts), [max_repeats * n for n in counts]
        quota = shares.whole(65_000_000, [Fraction(n) ** power for n in counts], *bounds)
        expected = dict(zip(size.index, quota))
        assert drawn.to_dict() == expected == quotas.achieved, f"pseudo-epoch {number}"
        assert (quotas.draws <= max_repeats * tiles[quotas.slides]).all()
        capped += sum(quotas.achieved[name] < quotas.wanted[name] for name in expected)
    for first in range(0, 50, 5):
        used = np.concatenate([quotas.slides for quotas in builder.quotas[first : first + 5]])
        assert (np.sort(used) == np.arange(NUM_SLIDES)).all(), f"the pass that begins at pseudo-epoch {first}"
    assert (capped > 50) == (max_repeats == 1), "caps bind where they are meant to"
