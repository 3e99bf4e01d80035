"""The main job, end to end: complete, the same twice, and the same when killed on the way."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]

HPCSSL = Path(sys.executable).with_name("hpcssl")
KILLS = 6


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob(pattern)) if p.is_file()}


def test_everything_is_there(demo_folder: Path) -> None:
    out = demo_folder / "demo-out"
    slides = pd.read_csv(out / "tiles" / "slides.csv")
    features = sorted((out / "features").iterdir())
    assert len(features) >= 3
    for folder in features:
        assert sorted(p.stem for p in folder.glob("*.h5")) == sorted(slides["slide_id"])
    results = pd.read_csv(out / "results" / "results.csv", dtype={"checkpoint": str})
    runs = results[results["metric"] == "auc"].groupby(["task", "checkpoint", "epoch"])
    assert set(results["task"]) == set(slides["organ"])
    assert {(len(rows), rows["split"].nunique(), rows["replica"].nunique()) for _, rows in runs} == {(40, 20, 2)}
    assert results["checkpoint"].nunique() == len(features)


def test_the_report_is_whole_and_asks_no_other_host(demo_folder: Path) -> None:
    page = (demo_folder / "demo-out" / "report.html").read_text(encoding="utf-8")
    images = re.findall(r'<img[^>]+src="([^"]{0,30})', page)
    assert len(images) >= 5
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)
    terminal = (demo_folder / "terminal.txt").read_text(encoding="utf-8")
    assert "untrained" in terminal
    assert "checkpoint" in terminal


def test_a_demo_killed_on_the_way_ends_the_same(small: ModuleType, demo_folder: Path, tmp_path: Path) -> None:
    moments = random.Random(20)
    command = [HPCSSL, "demo"]
    for number in range(KILLS):
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        time.sleep(moments.uniform(2, 45))
        if process.poll() is not None:
            break
        # the launcher alone, whose ranks live on for a moment, and the launcher with all its processes
        (os.kill if number % 2 else os.killpg)(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    whole, killed = demo_folder / "demo-out", tmp_path / "demo-out"
    for pattern in ("tiles/**/*", "schedule/*.npy", "splits/*", "results/*.csv", "summary.csv", "verdict.txt"):
        assert contents(whole, pattern) == contents(killed, pattern), pattern
        assert contents(whole, pattern), pattern
    metrics = [folder / "dino-demo" / "metrics.jsonl" for folder in (whole, killed)]
    traces = [read_trace(file).drop(columns=small.TIMES) for file in metrics]
    pd.testing.assert_frame_equal(*traces, check_exact=True)
    restarts = (killed / "dino-demo" / "restarts.jsonl").read_text(encoding="utf-8").splitlines()
    generations = [json.loads(line)["generation"] for line in restarts]
    assert generations == sorted(set(generations)) != []


def read_trace(path: Path) -> pd.DataFrame:
    trace = pd.DataFrame([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    assert (np.diff(trace["step"]) == 1).all(), "a step is missing or stands twice"
    return trace


@pytest.mark.timeout(900)
def test_real_tiles_to_store_schedule_and_splits(real_data: Path, tmp_path: Path) -> None:
    """Real tiles through the data side; the demo on them takes minutes and is run by hand before a release."""
    tiles = real_data / "tiles"
    for arguments in (
        ["store", "build", tiles, "--out", "store"],
        ["store", "verify", "store"],
        ["schedule", "build", "--store", "store", "--spec", "demo", "--out", "schedule"],
        ["schedule", "verify", "schedule"],
        ["splits", "--slides", tiles / "slides.csv", "--organ", "breast", "--target", "label", "--out", "breast.csv"],
        ["splits", "check", "breast.csv"],
    ):
        done = subprocess.run([HPCSSL, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
    slides = pd.read_csv(tiles / "slides.csv")
    assert json.loads((tmp_path / "store" / "store.json").read_text())["num_slides"] == len(slides)
