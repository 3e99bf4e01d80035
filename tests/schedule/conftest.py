"""A slide table of seven imbalanced organs, and a schedule of it."""

from __future__ import annotations

from pathlib import Path

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
