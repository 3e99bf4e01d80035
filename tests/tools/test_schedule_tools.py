"""The stand-alone schedule generator and the schedule benchmark at toy size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd


def run_tool(repository: Path, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_make_schedule_is_schedule_build(repository: Path, tmp_path: Path) -> None:
    slides = pd.DataFrame({"slide_id": list("abcdefgh"), "organ": ["x", "y"] * 4, "num_tiles": 9})
    slides.to_csv(tmp_path / "slides.csv", index=False)
    arguments = ("--slides", tmp_path / "slides.csv", "--spec", "demo", "--set", "positions_per_pseudo_epoch=20")
    made = run_tool(repository, "make_schedule.py", *arguments, "--set", "num_groups=2", "--out", tmp_path / "s")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "s" / "schedule.json").is_file()
    refused = run_tool(repository, "make_schedule.py", *arguments, "--set", "num_group=2", "--out", tmp_path / "t")
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith("did you mean num_groups?")


def test_the_benchmark_runs_and_prints_its_figures_last(repository: Path, tmp_path: Path) -> None:
    done = run_tool(repository, "bench_schedule.py", "--size", "toy", "--repeats", 1, "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for name in (
        "build_vs_bound",
        "write_s",
        "build_peak_rss_gib",
        "pseudo_epoch_vs_shuffle",
        "verify_vs_build",
        "verify_peak_rss_gib",
        "read_1080_ms",
    ):
        assert told[name] > 0, name
    assert told["read_rss_growth_mb"] < 50
    assert max(told["build_peak_rss_gib"], told["verify_peak_rss_gib"]) < 1.5
    assert list(tmp_path.iterdir()) == [], "it removes what it wrote"
