"""Inputs of the report in the formats of the rooms that write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hpcssl.evaluate.results import COLUMNS
from hpcssl.report.page import Inputs


@pytest.fixture
def make_results() -> Callable[..., pd.DataFrame]:
    """Results whose last-epoch AUC is `level + split effect`, the level given for each (task, encoder, checkpoint)."""

    def make(levels: dict[tuple[str, str, str], float], splits=20, replicas=2, epochs=5, noise=0.004) -> pd.DataFrame:
        g = np.random.default_rng(5)
        shifts = {task: g.normal(0, 0.03, splits) for task, _, _ in levels}
        rows = []
        for (arm, level), split, replica, epoch in product(
            levels.items(), range(splits), range(replicas), range(1, epochs + 1)
        ):
            done = epoch / epochs
            auc = 0.5 + (level - 0.5 + shifts[arm[0]][split]) * done + g.normal(0, noise)
            values = {"auc": auc, "train_loss": 0.7 - 0.4 * done, "val_loss": 0.7 - 0.2 * done}
            rows += [(*arm, split + 1, replica + 1, epoch, *measured) for measured in values.items()]
        return pd.DataFrame(rows, columns=list(COLUMNS))

    return make


@pytest.fixture
def write_results(tmp_path: Path) -> Callable[[pd.DataFrame], Path]:
    def write(frame: pd.DataFrame, name: str = "results") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        frame.to_csv(folder / "results.csv", index=False)
        return folder

    return write


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name="run", steps=60, batch=64, per_pseudo_epoch=1920, drop: Sequence[str] = ()) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = []
        for step in range(1, steps + 1):
            record = {
                "step": step,
                "samples_seen": step * batch,
                "pseudo_epoch": step * batch / per_pseudo_epoch,
                "loss": 9.0 - step / steps + 0.1 * (-1) ** step,
                "lr": 1e-3 * step / steps,
                "weight_decay": 0.04,
                "momentum": 0.996,
                "time": float(step),
            }
            lines.append(json.dumps({key: value for key, value in record.items() if key not in drop}))
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    return make


@pytest.fixture
def schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A schedule folder of which only the organ shares are asked."""
    from hpcssl.report import schedules as module

    columns = ["organ", "num_tiles", "natural_share", "positions", "scheduled_share"]
    shares = pd.DataFrame([("breast", 9000, 0.9, 600, 0.6), ("lung <left>", 1000, 0.1, 400, 0.4)], columns=columns)
    monkeypatch.setattr(module, "organ_shares", lambda path: shares)
    folder = tmp_path / "sched"
    folder.mkdir()
    (folder / "schedule.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def demo_levels() -> dict[tuple[str, str, str], float]:
    """Lung gains from training, breast does not."""
    steps = ("0", "100", "200")
    lung, breast = (0.70, 0.76, 0.80), (0.65, 0.65, 0.65)
    return {
        (task, "vit", step): level
        for task, levels in (("lung", lung), ("breast", breast))
        for step, level in zip(steps, levels)
    }


@pytest.fixture
def inputs(make_results, write_results, make_run, schedule, demo_levels) -> Inputs:
    """Results, a run and a schedule."""
    return Inputs(results=write_results(make_results(demo_levels)), runs=(make_run(),), schedule=schedule)
