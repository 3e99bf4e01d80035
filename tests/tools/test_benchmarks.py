"""Every benchmark at toy size, with its figures in the last line; and the stand-alone entry points."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

Figures = Callable[..., dict[str, Any]]


@pytest.fixture
def tiles(tmp_path: Path, small: ModuleType) -> Path:
    return small.make_tiles(tmp_path / "tiles")


@pytest.fixture
def scratch(tmp_path: Path) -> Any:
    """A folder that must be empty again at the end."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == [], "it removes what it wrote"


def test_the_loader_benchmark(figures_of: Figures, tiles: Path) -> None:
    sampled = sorted(tiles.rglob("*.jpg"))[::7]
    sampled[0].write_bytes(sampled[0].read_bytes()[:200])
    sampled[1].unlink()
    sampled[1].symlink_to("gone.jpg")
    figures = figures_of("bench_loader.py", "--tiles", tiles, "--num", 4, "--repeats", 1)
    assert (figures["tiles"], figures["tiles_passed_over"]) == (2, 2)
    assert figures["pillow_simd_vs_pillow"] is None
    assert "--simd" in figures["pillow_simd_vs_pillow_reason"]
    ratios = [f"{name}_vs_reference" for name in ("dino_cpu", "mae_cpu", "dino_pillow")]
    assert all(figures[name] > 0 for name in (*ratios, "decode_only_tiles_per_s"))
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    assert figures["dino_dali_cpu_vs_reference"] > 0


def test_the_benchmark_of_feeding_a_device(figures_of: Figures, tiles: Path) -> None:
    size = ("--steps", 1, "--repeats", 1, "--threads", 1, "--set", "global_batch=4")
    figures = figures_of("bench_fed.py", "--tiles", tiles, "--recipe", "dino-demo", "--backend", "cpu", *size)
    assert figures["fed_vs_synthetic"] > 0
    assert figures["synthetic_tiles_per_s"] > 0


@pytest.mark.long
def test_the_stream_benchmark(figures_of: Figures, tiles: Path, scratch: Path) -> None:
    figures = figures_of("bench_stream.py", "--tiles", tiles, "--folder", scratch)
    assert figures["restart_vs_start"] > 0
    assert abs(figures["growth_mb"]) < 200


def test_the_store_benchmark(figures_of: Figures, scratch: Path) -> None:
    figures = figures_of("bench_store.py", "--folder", scratch)
    for name in ("files_per_s_no_check", "files_per_s_check", "files_per_cpu_s_no_check_1_thread"):
        assert figures[name] > 0, name
    assert all(figures[name] > 0 for name in ("pack_vs_tar", "pack_s", "tar_s", "open_s"))


def test_the_tiling_benchmark(figures_of: Figures, scratch: Path) -> None:
    size = ("--width", 1024, "--height", 1024, "--tiles", 8, "--threads", 2, "--repeats", 1)
    figures = figures_of("bench_tiling.py", "--folder", scratch, *size)
    assert figures["tile_vs_openslide"] > 0
    assert figures["online_vs_jpeg"] > 0
    for kind in ("native", "half", "resampled", "jpeg2000"):
        for name in ("slides_per_s", "tiles_per_s", "mb_per_s", "openslide_tiles_per_s", "online_tiles_per_s"):
            assert figures[f"{name}_{kind}_2_threads"] > 0


def test_the_schedule_benchmark(figures_of: Figures, scratch: Path) -> None:
    figures = figures_of("bench_schedule.py", "--size", "toy", "--repeats", 1, "--folder", scratch)
    names = ("build_vs_bound", "write_s", "pseudo_epoch_vs_shuffle", "verify_vs_build", "read_1080_ms")
    assert all(figures[name] > 0 for name in names)
    assert figures["read_rss_growth_mb"] < 50
    assert 0 < max(figures["build_peak_rss_gib"], figures["verify_peak_rss_gib"]) < 1.5


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-3), ("bf16", 0.02)])
def test_the_mccv_benchmark(figures_of: Figures, precision: str, most: float) -> None:
    figures = figures_of("bench_mccv.py", "--size", "toy", "--repeats", 1, "--precision", precision)
    assert all(figures[name] > 0 for name in ("small_bags_speedup", "large_bags_speedup", "peak_rss_gib"))
    assert figures["mean_auc_difference"] <= figures["max_auc_difference"] <= most
    assert figures["precision"] == precision
    assert figures["device"]


def test_a_feature_that_no_training_bag_varies_in_does_not_blow_up_a_test_bag(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(repository / "tools"))
    import bench_mil

    x = np.random.default_rng(0).normal(3, 2, size=(50, 3))
    train = np.arange(50) < 40
    x[train, 1] = 0.1  # in the test rows it varies
    scaled = bench_mil.standardised(x, train)
    assert scaled[:, 1].tolist() == [0] * 50
    np.testing.assert_allclose(scaled[train][:, [0, 2]].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(scaled[train][:, [0, 2]].std(axis=0), 1, atol=1e-6)
    assert abs(scaled).max() < 10


def test_run_mccv_is_the_command(run_tool: Callable[..., Any]) -> None:
    done = run_tool("run_mccv.py", "--features", "gone", "--splits", "x", "--out", "y")
    assert done.returncode == 2
    assert "gone: no such folder of features" in done.stderr


def test_make_schedule_is_schedule_build(run_tool: Callable[..., Any], tmp_path: Path) -> None:
    slides = pd.DataFrame({"slide_id": list("abcdefgh"), "organ": ["x", "y"] * 4, "num_tiles": 9})
    slides.to_csv(tmp_path / "slides.csv", index=False)
    arguments = ("--slides", tmp_path / "slides.csv", "--spec", "demo", "--set", "positions_per_pseudo_epoch=20")
    made = run_tool("make_schedule.py", *arguments, "--set", "num_groups=2", "--out", tmp_path / "s")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "s" / "schedule.json").is_file()
    refused = run_tool("make_schedule.py", *arguments, "--set", "num_group=2", "--out", tmp_path / "t")
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith("did you mean num_groups?")
