"""DINO: student, teacher and centre (Caron et al., ICCV 2021)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from hpcssl.core.config import Above0, AtLeast0, NotNegative, Share, fixed, settings
from hpcssl.core.errors import ConfigError
from hpcssl.models.encoder import Encoder, drop_path_rates, normalised, residual_scale
from hpcssl.models.heads import DinoHead, DinoHeadConfig
from hpcssl.objectives.contract import Clock, Objective, ObjectiveConfig, Tiles
from hpcssl.objectives.dino.dino_loss import dino_loss, entropy, teacher_entropy, update_center
from hpcssl.optim.parameters import update_average
from hpcssl.optim.values import cosine
from hpcssl.plan.draw import PlanNeeds
from hpcssl.plan.recipe import AugmentRecipe

_CHUNK = 32
# what is called a collapse, once the warm-up is over
LEAST_OUTPUTS = 2.0  # of the teacher's outputs, how many the tiles share out among them, effectively
MOST_ENTROPY = 0.99  # of the teacher, as a share of log K; 1 = its outputs are all equal, whatever the tile


@dataclass(frozen=True, kw_only=True)
class DinoValues:
    """What changes with the step (see `DinoConfig`)."""

    momentum: float
    teacher_temperature: float
    last_layer_frozen: bool


@settings
class DinoConfig(ObjectiveConfig):
    """Settings of DINO; the defaults are the paper's.

    head : sizes of the projection head
    student_temperature, teacher_temperature : of the softmax
    warmup_teacher_temperature : the teacher's in the first pseudo-epoch, if there is a warm-up
    teacher_temperature_warmup_pseudo_epochs : how many rise to `teacher_temperature`, evenly; constant within each, as
        published. 0 = no warm-up, the default; the published "boosted" runs rise to 0.07 in 30
    center_momentum : of the running mean of the teacher's logits
    momentum : of the teacher at step 0; rises to 1 by a cosine
    freeze_last_layer_pseudo_epochs : how long the head's last layer gets no gradient
    """

    kind: Literal["dino"] = fixed("dino")
    head: DinoHeadConfig = field(default_factory=DinoHeadConfig)
    student_temperature: Above0 = fixed(0.1)
    teacher_temperature: Above0 = fixed(0.04)
    warmup_teacher_temperature: Above0 = fixed(0.04)
    teacher_temperature_warmup_pseudo_epochs: AtLeast0 = fixed(0)
    center_momentum: Share = fixed(0.9)
    momentum: Share = fixed(0.996)
    freeze_last_layer_pseudo_epochs: NotNegative = fixed(1.0)

    def check_views(self, augment: AugmentRecipe) -> None:
        """Raise ConfigError unless there are two views or more, of which nothing is hidden."""
        if augment.num_views < 2:
            raise ConfigError("recipe: objective dino needs two views or more; add to augment.global_views.count")
        super().check_views(augment)

    def values(self, step: int, clock: Clock) -> DinoValues:
        """Return momentum, temperature and whether the last layer is frozen."""
        return DinoValues(
            momentum=cosine(step, base=self.momentum, final=1.0, total_steps=clock.total_steps),
            teacher_temperature=self._teacher_temperature(int(clock.pseudo_epoch_at(step))),
            last_layer_frozen=step < clock.step_at(self.freeze_last_layer_pseudo_epochs),
        )

    def _teacher_temperature(self, pseudo_epoch: int) -> float:
        warm = self.teacher_temperature_warmup_pseudo_epochs
        if pseudo_epoch >= warm:
            return self.teacher_temperature
        rise = self.teacher_temperature - self.warmup_teacher_temperature
        return self.warmup_teacher_temperature + rise * pseudo_epoch / max(warm - 1, 1)


class Dino(Objective):
    """Student, teacher and centre; the teacher makes the features."""

    title = "DINO"
    encoders = {"teacher": "teacher.encoder.", "student": "student.encoder."}  # noqa: RUF012
    advice = ", and a lower objective.teacher_temperature"

    def __init__(self, config: DinoConfig, encoder: Encoder, augment: AugmentRecipe, device: torch.device):
        self._config, self._global_views = config, augment.global_views.count
        student = nn.ModuleDict({"encoder": encoder, "head": DinoHead(encoder.embed_dim, config.head)})
        teacher = copy.deepcopy(student).requires_grad_(False)
        self.module: nn.Module = nn.ModuleDict({"student": student, "teacher": teacher}).to(device)
        self.module.register_buffer("center", torch.zeros(config.head.out_dim, device=device))
        self.trained: nn.Module = student
        self._student, self._teacher = student, teacher
        if encoder.config.drop_path:
            self.needs = PlanNeeds(drop_path=tuple(drop_path_rates(encoder.config)))
        self._sum = torch.zeros_like(self._center)
        self._entropy = torch.zeros((), device=device)

    @property
    def _center(self) -> Tensor:
        return self.module.get_buffer("center")

    def loss(self, tiles: Tiles, values: DinoValues) -> Tensor:
        """Return the mean cross-entropy of the tiles and add the teacher's logits to the step's sum."""
        with torch.no_grad():
            teacher = self._teacher["head"](_features(self._teacher, tiles.views[0]))
        kept = tiles.drop_path or (None,) * len(tiles.views)
        scales = (None if kind is None else residual_scale(kind.flatten(0, 1), self.needs.drop_path) for kind in kept)
        features = [_features(self._student, views, scale) for views, scale in zip(tiles.views, scales, strict=True)]
        with torch.no_grad():
            self._sum += teacher.sum((0, 1), dtype=self._sum.dtype)
            mean = teacher_entropy(teacher, self._center, values.teacher_temperature)
            self._entropy += mean * teacher.shape[1]
        return dino_loss(
            self._student["head"](torch.cat(features)),  # one pass, its weights normed once
            teacher,
            self._center,
            student_temperature=self._config.student_temperature,
            teacher_temperature=values.teacher_temperature,
        )

    def before_update(self, values: DinoValues) -> None:
        """Drop the gradient of the head's last layer while it is frozen, so that weight decay leaves it, too."""
        if values.last_layer_frozen:
            for name, parameter in self._student["head"].named_parameters():
                if name.startswith("last_"):
                    parameter.grad = None

    def after_update(
        self, values: DinoValues, global_batch: int, all_reduce_sum: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """Move the teacher, and the centre by the mean over the global batch."""
        update_average(self._teacher.parameters(), self._student.parameters(), values.momentum)
        all_reduce_sum(self._sum)
        all_reduce_sum(self._entropy)
        mean_entropy = float(self._entropy) / global_batch
        vectors = self._global_views * global_batch
        self._center.copy_(update_center(self._center, self._sum, vectors, self._config.center_momentum))
        self.forget()
        return {"teacher_entropy": mean_entropy, "momentum": values.momentum}

    def forget(self) -> None:
        """Drop the sums over the step's tiles."""
        self._sum.zero_()
        self._entropy.zero_()

    def measure(self, features_ND: Tensor) -> dict[str, float]:
        """Return the centre's length, the teacher's mean entropy, and how many of its outputs are in use."""
        # the temperature of the schedule's end: a function of the weights alone
        temperature = self._config.teacher_temperature
        logits = (self._teacher["head"](chunk) - self._center for chunk in features_ND.split(_CHUNK))
        outputs_NK = torch.cat([(chunk / temperature).softmax(-1) for chunk in logits])
        return {
            "center_norm": float(self._center.norm()),
            "watched_entropy": float(entropy(outputs_NK).mean()),
            "outputs_used": math.exp(entropy(outputs_NK.mean(0))),
        }

    def complaints(self, measurements: Mapping[str, float]) -> dict[str, str]:
        """Complain of a teacher whose outputs are the same for all tiles, or all equal."""
        messages = {}
        share = measurements["watched_entropy"] / math.log(self._config.head.out_dim)
        if measurements["outputs_used"] < LEAST_OUTPUTS:
            messages["outputs"] = (
                f"the teacher gives all tiles the same output: {measurements['outputs_used']:.3g} in use (limit"
                f" {LEAST_OUTPUTS:g}); try a lower objective.center_momentum or a higher objective.teacher_temperature"
            )
        if share > MOST_ENTROPY:
            messages["entropy"] = (
                f"the teacher's outputs are all equal: entropy {share:.2%} of log K (limit {MOST_ENTROPY:.0%});"
                " try a lower objective.teacher_temperature"
            )
        return messages


def _features(model: nn.ModuleDict, views: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return the encoder's features of views (V, B, px, px, 3), as (V, B, D)."""
    scale = None if scale is None else scale.to(views.device)
    features: Tensor = model["encoder"](normalised(views.flatten(0, 1)), scale)
    return features.unflatten(0, views.shape[:2])
