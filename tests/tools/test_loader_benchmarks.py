"""The benchmarks of backends and stream at toy size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


def told_by(command: list[object]) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture
def tiles(tmp_path: Path, small: ModuleType) -> Path:
    return small.make_tiles(tmp_path / "tiles")


def test_the_loader_benchmark_prints_its_figures_last(repository: Path, tiles: Path) -> None:
    sampled = sorted(tiles.rglob("*.jpg"))[::7]
    sampled[0].write_bytes(sampled[0].read_bytes()[:200])
    sampled[1].unlink()
    sampled[1].symlink_to("gone.jpg")
    command = [repository / "tools/bench_loader.py", "--tiles", tiles, "--num", 4, "--repeats", 1]
    told = told_by(command)
    assert told["tiles"] == 2
    assert told["tiles_passed_over"] == 2
    assert told["pillow_simd_vs_pillow"] is None
    assert "--simd" in told["pillow_simd_vs_pillow_reason"]
    for name in (
        "dino_cpu_vs_reference",
        "mae_cpu_vs_reference",
        "dino_pillow_vs_reference",
        "decode_only_tiles_per_s",
    ):
        assert told[name] > 0, name
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    assert told["dino_dali_cpu_vs_reference"] > 0


def test_the_benchmark_of_feeding_a_device_prints_its_figures_last(repository: Path, tiles: Path) -> None:
    command = [repository / "tools/bench_fed.py", "--tiles", tiles, "--recipe", "dino-demo", "--backend", "cpu"]
    told = told_by([*command, "--steps", 1, "--repeats", 1, "--threads", 1, "--set", "global_batch=4"])
    assert told["fed_vs_synthetic"] > 0
    assert told["synthetic_tiles_per_s"] > 0


@pytest.mark.long
def test_the_stream_benchmark_prints_its_figures_last(repository: Path, tiles: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    told = told_by([repository / "tools/bench_stream.py", "--tiles", tiles, "--folder", scratch])
    assert told["restart_vs_start"] > 0
    assert abs(told["growth_mb"]) < 200
    assert list(scratch.iterdir()) == [], "it removes what it wrote"
