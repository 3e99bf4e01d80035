"""The step benchmark at toy size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


def run_tool(repository: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "tools" / "bench_step.py"), "--size", "toy", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


@pytest.fixture
def bench(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "tools"))
    import bench_step

    return bench_step


def test_the_step_benchmark_runs_and_prints_its_figures_last(repository: Path) -> None:
    done = run_tool(repository, "--repeats", 2)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["device"]
    assert told["fp32_peak_tflops"] > 0
    for case in ("dino_fp32", "dino_bf16", "mae_fp32", "mae_bf16"):
        low, high = told[f"{case}_vs_plain_spread"]
        assert 0 < low <= told[f"{case}_vs_plain"] <= high
        for name in ("steps_per_s", "tiles_per_s", "tflops"):
            assert told[f"{case}_{name}"] > 0
            assert told[f"{case}_plain_{name}"] > 0
    assert max(told["dino_fp32_trace_difference"], told["mae_fp32_trace_difference"]) < 1e-4


def test_a_side_that_computes_something_else_is_found(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench.Case(bench.dino_recipe("toy", 4), torch.device("cpu"))
    published = bench.PlainDino._loss
    monkeypatch.setattr(bench.PlainDino, "_loss", lambda self, *args: 1.01 * published(self, *args))
    with pytest.raises(SystemExit, match="the losses part"):
        bench.measure(case, "dino_fp32", repeats=1, steps=1, peak=1.0)


def test_an_unknown_setting_is_refused(repository: Path) -> None:
    done = run_tool(repository, "--set", "train.compil=true")
    assert done.returncode != 0
    assert "did you mean compile?" in done.stderr


@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_the_operations_counted_are_those_that_run(bench: ModuleType, objective: str) -> None:
    """Against torch's own count over forward and backward pass; it leaves out the bias and what is elementwise."""
    from torch.utils.flop_counter import FlopCounterMode

    recipe = {"dino": bench.dino_recipe, "mae": bench.mae_recipe}[objective]("toy", 2)
    case = bench.Case(recipe, torch.device("cpu"))
    step = case.plain()
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    encoder = case._state().objective.trained.get_submodule("encoder")
    counted = 2 * bench.tflop_of_a_tile(recipe, encoder) * 1e12
    # the patch embedding needs no gradient of the images
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.06)


@pytest.mark.parametrize(("objective", "gflop"), [("dino", 114), ("mae", 124.5)])
def test_the_papers_models_cost_what_is_known(bench: ModuleType, objective: str, gflop: float) -> None:
    from hpcssl.models.encoder import build_encoder

    recipe = {"dino": bench.dino_recipe, "mae": bench.mae_recipe}[objective]("paper", 64)
    with torch.device("meta"):
        encoder = build_encoder(recipe.encoder)
    assert bench.tflop_of_a_tile(recipe, encoder) * 1e3 == pytest.approx(gflop, rel=0.02)
