"""Checkouts of the published code, where the user points to them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Puts the checkout that an environment variable names first on the import path; skips where it is not set."""
    before = set(sys.modules)
    used: list[Path] = []

    def use(variable: str, marker: str) -> Path:
        value = os.environ.get(variable)
        if not value:
            pytest.skip(f"set {variable} to a checkout of the published code to compare with it")
        folder = Path(value).expanduser().resolve()
        assert (folder / marker).is_file(), f"{variable}={value} holds no {marker}"
        monkeypatch.syspath_prepend(str(folder))
        used.append(folder)
        return folder

    yield use
    for name in set(sys.modules) - before:  # its modules have common names: utils, util
        if any(folder in Path(place).parents for folder in used for place in _places(sys.modules[name])):
            del sys.modules[name]


@pytest.fixture
def timeline_of() -> Callable[[Any, int, int], Any]:
    """Return the values of a recipe for so many pseudo-epochs of so many steps."""
    from hpcssl.train.pretrain_config import Timeline

    def build(recipe: Any, pseudo_epochs: int, steps: int) -> Any:
        tiles = recipe.global_batch * steps
        schedule = SimpleNamespace(
            positions_per_pseudo_epoch=tiles,
            num_pseudo_epochs=pseudo_epochs,
            num_positions=tiles * pseudo_epochs,
            path=Path("published"),
        )
        return Timeline(recipe, schedule)

    return build


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models and images in float64: where a gradient is zero in theory, Adam makes steps of float32's rounding."""
    import torch

    from hpcssl.models.encoder import normalised

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    for module in ("dino.dino_objective", "mae.mae_objective"):
        monkeypatch.setattr(f"hpcssl.objectives.{module}.normalised", lambda pixels: normalised(pixels).double())
    yield
    torch.set_default_dtype(before)


def _places(module: ModuleType) -> list[str]:
    """Return a module's file, or the folders of a package that has none."""
    file = getattr(module, "__file__", None)
    return [file] if file else list(getattr(module, "__path__", []))
