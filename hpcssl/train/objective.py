"""What the loop needs of DINO and of MAE: a loss for some tiles, and what follows an update."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hpcssl.core.errors import ConfigError
from hpcssl.core.rng import key_of
from hpcssl.models.decoder import MaskedAutoencoder
from hpcssl.models.encoder import Encoder, build_encoder, drop_path_rates, normalised, residual_scale
from hpcssl.models.heads import DinoHead
from hpcssl.models.weights import read_initial_weights
from hpcssl.objectives.dino_loss import dino_loss, teacher_entropy, update_center
from hpcssl.objectives.mae_loss import mae_loss
from hpcssl.optim.parameters import update_average
from hpcssl.plan.draw import draw_drop_path
from hpcssl.train.execution import resolve_execution
from hpcssl.train.pretrain_config import PretrainConfig, StepValues
from hpcssl.train.reduce import Collectives


class Objective(ABC):
    """A trainable with its loss.

    `module` holds everything that is saved; `trained` names its part that the optimiser sees; `encoder_prefix` is where
    in `module` the weights stand that features are made with; `num_patches` of a global view, 0 where none are masked.
    """

    module: nn.Module
    trained: nn.Module
    encoder_prefix: str
    num_patches: int

    @abstractmethod
    def loss(self, views: tuple[Tensor, ...], positions: np.ndarray, mask: Tensor | None, values: StepValues) -> Tensor:
        """Return the mean loss of some tiles; views are uint8 (V, B, px, px, 3) for each kind."""

    def before_update(self, values: StepValues) -> None:  # noqa: B027 - nothing to do is the default
        """Change gradients after they were reduced."""

    def after_update(self, values: StepValues, count: int, collectives: Collectives) -> dict[str, float]:
        """Follow an update of the weights; `count` tiles were in this rank's share. Returns what is worth logging."""
        return {}

    def forget(self) -> None:  # noqa: B027 - nothing to do is the default
        """Drop what the losses of a step gathered that is not followed by an update."""


def build_objective(recipe: PretrainConfig, device: torch.device) -> Objective:
    """Build the objective with weights that depend on the seed alone, the same on every rank and device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_of(recipe.seed, "weights") >> 1)
        return Dino(recipe, device) if recipe.objective == "dino" else Mae(recipe, device)


def load_initial_weights(objective: Objective, path: Path) -> str:
    """Let every encoder of a fresh objective start from a file, and return what is to be said of it.

    Raises
    ------
    ConfigError
        See `hpcssl.models.weights.read_initial_weights`.
    """
    encoders = [module for module in objective.module.modules() if isinstance(module, Encoder)]
    weights, told = read_initial_weights(path, encoders[0])
    for encoder in encoders:
        encoder.vit.load_state_dict(weights)
    return told


def check_recipe(recipe: PretrainConfig) -> str:
    """Build the model without memory, so that a recipe that cannot train is refused before a job waits in a queue.

    Returns
    -------
    What is to be said of the initial weights; empty without.

    Raises
    ------
    ConfigError
        For an encoder that cannot be built, views that it cannot take, or initial weights that do not fit.
    """
    with torch.device("meta"):
        encoder = build_encoder(recipe.encoder)
        if recipe.objective == "mae":
            MaskedAutoencoder(encoder, recipe.decoder)
    for kind in recipe.augment.kinds:
        if kind.view_px % encoder.patch_px:
            raise ConfigError(
                f"recipe: views of {kind.view_px} px; expected a multiple of the patch of {encoder.patch_px} px"
            )
    view_px = recipe.augment.global_views.view_px
    if recipe.objective == "mae" and view_px != recipe.encoder.image_px:
        raise ConfigError(
            f"recipe: MAE's view of {view_px} px; expected encoder.image_px = {recipe.encoder.image_px} px"
        )
    return read_initial_weights(Path(recipe.initial_weights), encoder)[1] if recipe.initial_weights else ""


class Dino(Objective):
    """Student, teacher and centre (Caron et al. 2021)."""

    encoder_prefix = "teacher.encoder."
    num_patches = 0

    def __init__(self, recipe: PretrainConfig, device: torch.device):
        self._recipe, self._config = recipe, recipe.dino
        encoder = build_encoder(recipe.encoder, resolve_execution(recipe.train, device))
        student = nn.ModuleDict({"encoder": encoder, "head": DinoHead(encoder.embed_dim, recipe.dino.head)})
        teacher = copy.deepcopy(student).requires_grad_(False)
        self.module: nn.Module = nn.ModuleDict({"student": student, "teacher": teacher}).to(device)
        self.module.register_buffer("center", torch.zeros(recipe.dino.head.out_dim, device=device))
        self.trained: nn.Module = student
        self._student, self._teacher = student, teacher
        self._rates = drop_path_rates(recipe.encoder)
        self._sum = torch.zeros_like(self._center)
        self._entropy = torch.zeros((), device=device)

    @property
    def _center(self) -> Tensor:
        return self.module.get_buffer("center")

    def loss(self, views: tuple[Tensor, ...], positions: np.ndarray, mask: Tensor | None, values: StepValues) -> Tensor:
        """Return the mean cross-entropy of the tiles and add the teacher's logits to the step's sum."""
        with torch.no_grad():
            teacher = _logits(self._teacher, [_features(self._teacher, views[0])])
        features, first_view = [], 0
        for kind in views:
            keep = draw_drop_path(self._recipe.seed, positions, range(first_view, first_view + len(kind)), self._rates)
            scale = residual_scale(torch.from_numpy(keep.transpose(1, 0, 2).reshape(-1, len(self._rates))), self._rates)
            features.append(_features(self._student, kind, scale.to(kind.device)))
            first_view += len(kind)
        with torch.no_grad():
            self._sum += teacher.sum((0, 1), dtype=self._sum.dtype)
            entropy = teacher_entropy(teacher, self._center, values.teacher_temperature)
            self._entropy += entropy * teacher.shape[1]
        return dino_loss(
            _logits(self._student, features),
            teacher,
            self._center,
            student_temperature=self._config.student_temperature,
            teacher_temperature=values.teacher_temperature,
        )

    def before_update(self, values: StepValues) -> None:
        """Drop the gradient of the head's last layer while it is frozen, so that weight decay leaves it, too."""
        if values.last_layer_frozen:
            for name, parameter in self._student["head"].named_parameters():
                if name.startswith("last_"):
                    parameter.grad = None

    def after_update(self, values: StepValues, count: int, collectives: Collectives) -> dict[str, float]:
        """Move the teacher, and the centre by the mean over the global batch."""
        update_average(self._teacher.parameters(), self._student.parameters(), values.momentum)
        collectives.all_reduce_sum(self._sum)
        collectives.all_reduce_sum(self._entropy)
        entropy = float(self._entropy) / (count * collectives.world.size)
        vectors = self._recipe.augment.global_views.count * count * collectives.world.size
        self._center.copy_(update_center(self._center, self._sum, vectors, self._config.center_momentum))
        self.forget()
        return {"teacher_entropy": entropy, "momentum": values.momentum}

    def forget(self) -> None:
        """Drop the sums over the step's tiles."""
        self._sum.zero_()
        self._entropy.zero_()


def _features(model: nn.ModuleDict, views: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return the encoder's features of views (V, B, px, px, 3), as (V, B, D)."""
    features: Tensor = model["encoder"](normalised(views.flatten(0, 1)), scale)
    return features.unflatten(0, views.shape[:2])


def _logits(model: nn.ModuleDict, features: list[Tensor]) -> Tensor:
    """Return the head's output for the views of all kinds, (V, B, K); one pass, its weights normed once."""
    logits: Tensor = model["head"](torch.cat(features))
    return logits


class Mae(Objective):
    """The masked autoencoder (He et al. 2022)."""

    encoder_prefix = "encoder."

    def __init__(self, recipe: PretrainConfig, device: torch.device):
        encoder = build_encoder(recipe.encoder, resolve_execution(recipe.train, device))
        self.module: nn.Module = MaskedAutoencoder(encoder, recipe.decoder).to(device)
        self.trained = self.module
        self.num_patches = encoder.grid_size[0] * encoder.grid_size[1]
        self._patch_px = encoder.patch_px

    def loss(self, views: tuple[Tensor, ...], positions: np.ndarray, mask: Tensor | None, values: StepValues) -> Tensor:
        """Return the mean squared error over the hidden patches."""
        assert mask is not None, "the plan of an MAE recipe holds masks"
        images = normalised(views[0][0])
        return mae_loss(self.module(images, mask), images, mask.to(images.device), self._patch_px)
