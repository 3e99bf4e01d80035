"""The tiling benchmark at toy size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_the_tiling_benchmark_runs_and_prints_its_figures_last(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repository / "tools" / "bench_tiling.py"), "--folder", str(tmp_path)]
    command += ["--width", "1024", "--height", "1024", "--tiles", "8", "--threads", "2", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["tile_vs_openslide"] > 0
    assert told["online_vs_jpeg"] > 0
    for kind in ("native", "half", "resampled", "jpeg2000"):
        for figure in ("slides_per_s", "tiles_per_s", "mb_per_s", "openslide_tiles_per_s", "online_tiles_per_s"):
            assert told[f"{figure}_{kind}_2_threads"] > 0
    assert list(tmp_path.iterdir()) == [], "it removes what it wrote"
