"""The benchmark of the benchmark at toy size, and its stand-alone entry point."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-3), ("bf16", 0.02)])
def test_the_benchmark_prints_its_figures_last(repository: Path, precision: str, most: float) -> None:
    command = [sys.executable, repository / "tools/bench_mccv.py", "--size", "toy", "--repeats", "1"]
    command += ["--precision", precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for name in ("small_bags_speedup", "large_bags_speedup", "peak_rss_gib"):
        assert told[name] > 0, name
    assert told["max_auc_difference"] <= most
    assert told["mean_auc_difference"] <= told["max_auc_difference"]
    assert told["precision"] == precision
    assert told["device"]


def test_the_stand_alone_entry_point_is_the_command(repository: Path) -> None:
    command = [sys.executable, repository / "tools/run_mccv.py", "--features", "gone", "--splits", "x", "--out", "y"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "gone: no such folder of features" in done.stderr


def test_a_feature_that_no_training_bag_varies_in_does_not_blow_up_a_test_bag(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location("bench_mil", repository / "tools/bench_mil.py")
    assert spec is not None
    assert spec.loader is not None
    bench_mil = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench_mil)
    x = np.random.default_rng(0).normal(3, 2, size=(50, 3))
    train = np.arange(50) < 40
    x[train, 1] = 0.1  # in the test rows it varies
    found = bench_mil.standardised(x, train)
    assert found[:, 1].tolist() == [0] * 50
    np.testing.assert_allclose(found[train][:, [0, 2]].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(found[train][:, [0, 2]].std(axis=0), 1, atol=1e-6)
    assert abs(found).max() < 10
