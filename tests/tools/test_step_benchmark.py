"""The step benchmark at toy size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture
def bench(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "tools"))
    import bench_step

    return bench_step


def test_the_step_benchmark_runs_and_prints_its_figures_last(figures_of: Callable[..., dict[str, Any]]) -> None:
    figures = figures_of("bench_step.py", "--size", "toy", "--repeats", 2)
    assert figures["device"]
    assert figures["fp32_peak_tflops"] > 0
    for case in ("dino_fp32", "dino_bf16", "mae_fp32", "mae_bf16"):
        low, high = figures[f"{case}_vs_plain_spread"]
        assert 0 < low <= figures[f"{case}_vs_plain"] <= high
        for name in ("steps_per_s", "tiles_per_s", "tflops"):
            assert figures[f"{case}_{name}"] > 0
            assert figures[f"{case}_plain_{name}"] > 0
    assert max(figures["dino_fp32_trace_difference"], figures["mae_fp32_trace_difference"]) < 1e-4


def test_a_side_that_computes_something_else_is_found(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench.Case(bench.dino_recipe("toy", 4), torch.device("cpu"))
    published = bench.PlainDino._loss
    monkeypatch.setattr(bench.PlainDino, "_loss", lambda self, *args: 1.01 * published(self, *args))
    with pytest.raises(SystemExit, match="the losses part"):
        bench.measure(case, "dino_fp32", repeats=1, steps=1, peak=1.0)


def test_an_unknown_setting_is_refused(run_tool: Callable[..., Any]) -> None:
    done = run_tool("bench_step.py", "--size", "toy", "--set", "train.compil=true")
    assert done.returncode != 0
    assert "did you mean compile?" in done.stderr


@pytest.mark.parametrize(("objective", "gflop"), [("dino", 9.2), ("mae", 123.2)])
def test_the_papers_encoders_cost_what_is_known(bench: ModuleType, objective: str, gflop: float) -> None:
    """ViT-S/16 and ViT-L/16 forwards of 224 px, counted as twice their published multiply-adds."""
    from plain_step import Vit

    from hpcssl.models.encoder import build_encoder

    recipe = {"dino": bench.dino_recipe, "mae": bench.mae_recipe}[objective]("paper", 2)
    with torch.device("meta"):
        encoder = build_encoder(recipe.encoder)
        vit, images = Vit(encoder, [0.0] * len(encoder.vit.blocks)), torch.zeros(1, 3, 224, 224)
        assert bench.flop_of_a_step(lambda: vit(vit.patches(images))) / 1e9 == pytest.approx(gflop, rel=0.02)
