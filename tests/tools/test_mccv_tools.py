"""The benchmark of the benchmark at toy size, and its stand-alone entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_the_benchmark_prints_its_figures_last(repository: Path) -> None:
    command = [sys.executable, repository / "tools/bench_mccv.py", "--size", "toy", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for name in ("small_bags_speedup", "large_bags_speedup", "peak_rss_gib"):
        assert told[name] > 0, name
    assert told["max_auc_difference"] <= 1e-3
    assert told["device"]


def test_the_stand_alone_entry_point_is_the_command(repository: Path) -> None:
    command = [sys.executable, repository / "tools/run_mccv.py", "--features", "gone", "--splits", "x", "--out", "y"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "gone: no such folder of features" in done.stderr
