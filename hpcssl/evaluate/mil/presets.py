"""Named ways to train a head, and the heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from hpcssl.core.config import AtLeast0, AtLeast1, NotNegative, nearest, settings
from hpcssl.core.errors import ConfigError


@settings
class MccvPreset:
    """Head and training of the benchmark; the defaults are the paper's."""

    name: str
    epochs: AtLeast1 = 50
    """Passes over the training slides of a fit, one whole slide a step."""
    warmup_epochs: AtLeast0 = 10
    """Linear, from 0 to `lr`."""
    lr: NotNegative = 5e-4
    final_lr: NotNegative = 1e-6
    """Cosine from `lr`, by step."""
    weight_decay: NotNegative = 0.04
    final_weight_decay: NotNegative = 0.4
    """Cosine from `weight_decay`, by step; none on biases."""
    head: str = "gma"
    """The head's name in the results."""
    hidden: tuple[AtLeast1, ...] = (512, 512)
    attention: AtLeast1 = 384
    pooling: Literal["attention", "mean", "max"] = "attention"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """After the hidden layers and both attention branches; rounded to 1/256."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the tiles' layers; weights and AdamW stay in fp32."""


HEAD_SETTINGS = ("head", "hidden", "attention", "pooling", "dropout")
PRESETS = {
    preset.name: preset
    for preset in (
        MccvPreset(name="gma-50"),
        MccvPreset(name="gma-40", epochs=40, lr=1e-4),  # the authors' public code and its example
        # small enough for a laptop's CPU
        MccvPreset(name="mccv-demo", epochs=10, warmup_epochs=2, lr=1e-3, hidden=(64, 64), attention=32),
    )
}
# what differs from the preset's own gated attention; all are trained as the preset says
HEADS: dict[str, dict[str, Any]] = {
    "gma": {},
    "mean": {"pooling": "mean"},
    "max": {"pooling": "max"},
    # Ilse et al. (ICML 2018), gated: one hidden layer of 500 there, branches of 128, no dropout
    "abmil": {"hidden": (512,), "attention": 128, "dropout": 0.0},
}


def preset_named(name: str, epochs: int | None = None) -> MccvPreset:
    """Return a preset, with another length if `epochs` is given; the warm-up is then at most a quarter of it.

    ConfigError for an unknown name or a length below one epoch.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name}: no such preset; {nearest(name, list(PRESETS))}")
    preset = PRESETS[name]
    if epochs is None:
        return preset
    if epochs < 1:
        raise ConfigError(f"{epochs} epochs: expected at least 1")
    return replace(preset, epochs=epochs, warmup_epochs=min(preset.warmup_epochs, epochs // 4))
