"""The store benchmark at toy size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_the_store_benchmark_runs_and_prints_its_figures_last(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repository / "tools" / "bench_store.py"), "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for name in ("files_per_s_no_check", "files_per_s_check", "files_per_cpu_s_no_check_1_thread"):
        assert told[name] > 0, name
    for name in ("pack_vs_tar", "pack_s", "tar_s", "open_s"):
        assert told[name] > 0, name
    assert list(tmp_path.iterdir()) == [], "it removes what it wrote"
