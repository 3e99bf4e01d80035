"""The check that pretraining teaches something, at toy size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Figures = Callable[..., dict[str, Any]]


@pytest.mark.timeout(300)
def test_the_learning_check_runs_and_prints_its_figures_last(small: Any, figures_of: Figures, tmp_path: Path) -> None:
    tiles = small.make_tiles(tmp_path / "tiles", slides=8)
    slides = [(organ, s) for organ in ("breast", "lung") for s in range(8)]
    rows = [f"{o}-{s},{o},{'benign' if s % 2 else 'malignant'},p{s},{4 + s}" for o, s in slides]
    (tiles / "slides.csv").write_text("\n".join(["slide_id,organ,label,patient_id,num_tiles", *rows]) + "\n")
    recipe = small.write_recipe(tmp_path / "recipe.yaml", small.dino_recipe(stop_after=0.1))
    figures = figures_of("check_learning.py", tiles, "--recipe", recipe, "--pseudo-epochs", 10)
    assert figures["steps"] > 5
    assert figures["tiles_seen"] == 12 * figures["steps"]
    for organ in ("breast", "lung"):
        found = figures[organ]
        for name in ("untrained", "trained", "colour"):
            assert all(0 <= found[name][metric] <= 1 for metric in ("auc", "accuracy", "tile_auc", "tile_accuracy"))
        gained = found["trained"]["tile_auc"] - found["untrained"]["tile_auc"]
        assert found["gained"]["tile_auc"] == pytest.approx(gained, abs=2e-4)
        assert 0 <= found["splits_that_gained"]["auc"] <= found["splits"] == 20


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_pretraining_on_real_tiles_makes_better_neighbours(figures_of: Figures, real_data: Path) -> None:
    """LC25000's lung classes, by source photograph: a thousand steps on a CPU gain in most of the splits."""
    size = ("--pseudo-epochs", 20, "--minutes", 20)
    figures = figures_of("check_learning.py", real_data / "tiles", *size, timeout=1700)
    assert figures["steps"] == 1000, "not cut short"
    lung = figures["lung"]
    assert lung["gained"]["tile_accuracy"] > 0.02
    assert lung["gained"]["tile_auc"] > 0.005
    assert lung["splits_that_gained"]["tile_accuracy"] >= 14
