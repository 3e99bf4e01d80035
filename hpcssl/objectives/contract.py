"""The contract of an objective: all that training, export and embedding know of what is learnt.

An objective is two classes: its settings, a subclass of `ObjectiveConfig` with a `kind`, and what computes, a subclass
of `Objective`. `hpcssl.objectives.registry.register` makes both known; nothing else names an objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hpcssl.core.config import fixed, settings
from hpcssl.core.errors import ConfigError
from hpcssl.models.encoder import Encoder
from hpcssl.plan.draw import PlanNeeds
from hpcssl.plan.recipe import AugmentRecipe


class Clock(Protocol):
    """How steps and pseudo-epochs of a run go together; the values of an objective are functions of it."""

    total_steps: int

    def step_at(self, pseudo_epochs: float) -> int:
        """Return the number of whole steps in so many pseudo-epochs."""

    def pseudo_epoch_at(self, step: int) -> float:
        """Return how many pseudo-epochs the first `step` steps have consumed."""


@settings
class ObjectiveConfig:
    """Settings of an objective; a subclass gives `kind` its one value: `kind: Literal["dino"] = fixed("dino")`.

    registered_kinds : every registered objective by its settings (see `hpcssl.core.config.groups_in`)
    hides_patches : whether it learns from views of which patches are hidden, and only from such
    peaks_after_warmup : whether the learning rate reaches its peak on the step after the warm-up, not on its last one
    """

    registered_kinds: ClassVar[dict[type, type]] = {}
    hides_patches: ClassVar[bool] = False
    peaks_after_warmup: ClassVar[bool] = False

    kind: str = fixed()

    def check_views(self, augment: AugmentRecipe) -> None:
        """Raise ConfigError for views and masks that cannot be learnt from."""
        if (augment.mask_ratio > 0) != self.hides_patches:
            expected = "above 0" if self.hides_patches else "0: it hides no patches"
            raise ConfigError(f"recipe: objective {self.kind} needs augment.mask_ratio {expected}")

    def values(self, step: int, clock: Clock) -> Any:
        """Return what of the objective changes with the step; its `Objective` is given it back."""
        return None


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Some tiles of a step, as their plan says: B of them.

    Attributes
    ----------
    positions : (B,) int64
    views : for each kind of view uint8 (V, B, px, px, 3), on the device of the model
    mask : (B, patches) bool, True = hidden; None where the recipe masks none. May lie on the CPU
    drop_path : for each kind of view bool (V, B, residual branches), True = kept; () where none is dropped. May lie on
        the CPU
    """

    positions: np.ndarray
    views: tuple[Tensor, ...]
    mask: Tensor | None = None
    drop_path: tuple[Tensor, ...] = ()


class Objective(ABC):
    """Modules and their loss, made from (settings, encoder, recipe of the views, device).

    The weights of a new one are drawn from torch's default generator alone. A constructor raises ConfigError for an
    encoder or views that it cannot train with; it is also called on torch's meta device, before a job waits in a queue.

    Attributes
    ----------
    title : what the objective is called in a model card
    encoders : name of each encoder, and where in `module` its weights stand; features are made with the first one
    advice : ends the line on collapsed features, beginning with a comma: what else to try
    module : all that is saved
    trained : the part of `module` that the optimiser sees
    needs : what the plan draws for it beside the views
    """

    title: ClassVar[str]
    encoders: ClassVar[Mapping[str, str]] = {"encoder": "encoder."}
    advice: ClassVar[str] = ""
    module: nn.Module
    trained: nn.Module
    needs: PlanNeeds = PlanNeeds()

    @abstractmethod
    def __init__(self, config: Any, encoder: Encoder, augment: AugmentRecipe, device: torch.device): ...

    @property
    def encoder_prefix(self) -> str:
        """Where in `module` the weights stand that features are made with."""
        return next(iter(self.encoders.values()))

    @abstractmethod
    def loss(self, tiles: Tiles, values: Any) -> Tensor:
        """Return the mean loss of some tiles; `values` are those that the settings give for the step."""

    def before_update(self, values: Any) -> None:  # noqa: B027 - nothing to do is the default
        """Change gradients after they were reduced."""

    def after_update(
        self, values: Any, global_batch: int, all_reduce_sum: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """Follow an update of the weights by a step of `global_batch` tiles; returns what is worth logging.

        `all_reduce_sum` sums a tensor over the ranks, in place.
        """
        return {}

    def forget(self) -> None:  # noqa: B027 - nothing to do is the default
        """Drop what the losses of a step gathered that is not followed by an update."""

    def measure(self, features_ND: Tensor) -> dict[str, float]:
        """Return what is watched beside the features (of a fixed set of tiles) themselves."""
        return {}

    def complaints(self, measurements: Mapping[str, float]) -> dict[str, str]:
        """Return, for each measurement beyond its limit, what that means and what to try."""
        return {}
