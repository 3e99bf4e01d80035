"""Everything that a pretraining run is: one complete configuration, resolved before step 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hpcssl.core import config, resources
from hpcssl.core.config import settings
from hpcssl.core.errors import ConfigError
from hpcssl.loader.stream import LoaderConfig
from hpcssl.models.decoder import MaeDecoderConfig
from hpcssl.models.encoder import EncoderConfig
from hpcssl.models.heads import DinoHeadConfig
from hpcssl.optim.values import cosine
from hpcssl.plan.recipe import AugmentRecipe
from hpcssl.schedule.file import Schedule

_LONGEST_WAIT_S = 86_400


@settings
class OptimConfig:
    """AdamW and its values over the steps.

    Attributes
    ----------
    lr_per_256 : peak learning rate for a global batch of 256, scaled linearly
    final_lr : learning rate at the schedule's end
    warmup_pseudo_epochs : linear warm-up from 0
    weight_decay, final_weight_decay : at the first and the last step, cosine between; none on biases and 1-D parameters
    betas : of AdamW
    clip : norm that each parameter's gradient is clipped to; None = not clipped
    """

    lr_per_256: float
    final_lr: float = 1e-6
    warmup_pseudo_epochs: float = 1.0
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None

    def __post_init__(self) -> None:
        for name in ("lr_per_256", "final_lr", "warmup_pseudo_epochs", "weight_decay", "final_weight_decay"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"optim.{name} = {getattr(self, name)}; expected at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas = {list(self.betas)}; expected two numbers from 0 to below 1")
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"optim.clip = {self.clip}; expected above 0, or null for no clipping")


@settings
class DinoConfig:
    """DINO's own settings (Caron et al. 2021); the defaults are the paper's.

    Attributes
    ----------
    head : sizes of the projection head
    student_temperature, teacher_temperature : of the softmax
    warmup_teacher_temperature : the teacher's in the first pseudo-epoch, if there is a warm-up
    teacher_temperature_warmup_pseudo_epochs : how many rise to `teacher_temperature`, evenly; constant within each, as
        published. 0 = no warm-up, the default; the published "boosted" runs rise to 0.07 in 30
    center_momentum : of the running mean of the teacher's logits
    momentum : of the teacher at step 0; rises to 1 by a cosine
    freeze_last_layer_pseudo_epochs : how long the head's last layer gets no gradient
    """

    head: DinoHeadConfig = field(default_factory=DinoHeadConfig)
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    warmup_teacher_temperature: float = 0.04
    teacher_temperature_warmup_pseudo_epochs: int = 0
    center_momentum: float = 0.9
    momentum: float = 0.996
    freeze_last_layer_pseudo_epochs: float = 1.0

    def __post_init__(self) -> None:
        for name in ("student_temperature", "teacher_temperature", "warmup_teacher_temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"dino.{name} = {getattr(self, name)}; expected above 0")
        for name in ("center_momentum", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"dino.{name} = {getattr(self, name)}; expected 0 to 1")
        for name in ("freeze_last_layer_pseudo_epochs", "teacher_temperature_warmup_pseudo_epochs"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"dino.{name} = {getattr(self, name)}; expected 0 or more")


@settings
class TrainConfig:
    """How, not what, is computed.

    Attributes
    ----------
    precision : fp32, bf16, fp16 (with loss scaling), or auto: bf16 where the GPU has it, else fp16; fp32 on the CPU
    micro_batch : most tiles of a rank in one forward pass; None = the rank's whole share
    threads : CPU threads of a rank; None = the node's cores shared by its ranks
    deterministic : only deterministic kernels on GPUs, so that weights repeat bitwise
    compile : torch.compile of the transformer blocks; auto: on GPUs, where a compiler works
    checkpoint_activations : keep less for the backward pass and compute each block twice: less memory, more time.
        Off, also for ViT-L: train.micro_batch saves memory, too, and computes nothing twice
    max_skipped_steps : of the whole run, how many steps may be passed over because their loss or a gradient is not
        finite: the step counts on, the weights stay. fp16's overflows, which lower the loss scale, do not count
    watch_every_steps : how often features of the same few hundred tiles are looked at for collapse; 0 = never
    hang_s : seconds that ranks wait for one that hangs before they end the run; in the first step, ten minutes
    """

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    micro_batch: int | None = None
    threads: int | None = None
    deterministic: bool = False
    compile: Literal["auto"] | bool = "auto"
    checkpoint_activations: bool = False
    max_skipped_steps: int = 20
    watch_every_steps: int = 500
    hang_s: float = 45.0

    def __post_init__(self) -> None:
        for name in ("max_skipped_steps", "watch_every_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name} = {getattr(self, name)}; expected at least 0")
        if not 0 < self.hang_s <= _LONGEST_WAIT_S:
            raise ConfigError(f"train.hang_s = {self.hang_s:g}; expected above 0, at most {_LONGEST_WAIT_S}, a day")
        for name in ("micro_batch", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"train.{name} = {value}; expected at least 1")


@settings
class CheckpointConfig:
    """When checkpoints are written and kept; the first (untrained) and every pseudo-epoch's are always both.

    Attributes
    ----------
    every_min : minutes between two
    keep_last : of the others, how many stay
    """

    every_min: float = 15.0
    keep_last: int = 2

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ConfigError(f"checkpoint.keep_last = {self.keep_last}; expected at least 1")
        if not self.every_min >= 0:
            raise ConfigError(f"checkpoint.every_min = {self.every_min}; expected at least 0, as often as every step")


@settings
class PretrainConfig:
    """A pretraining run.

    Attributes
    ----------
    objective : what is learnt
    seed : of weights, plans and masks
    global_batch : tiles of one optimiser step over all ranks; constant for a run
    schedule_pseudo_epochs : length of every schedule of values; None = the tile schedule's
    stop_after : pseudo-epochs to train; None = all; free to change
    initial_weights : file that the encoder starts from, of timm or of an official DINO or MAE checkpoint; None = fresh
    """

    objective: Literal["dino", "mae"]
    global_batch: int
    encoder: EncoderConfig
    augment: AugmentRecipe
    optim: OptimConfig
    seed: int = 0
    schedule_pseudo_epochs: int | None = None
    stop_after: float | None = None
    initial_weights: str | None = None
    dino: DinoConfig = field(default_factory=DinoConfig)
    decoder: MaeDecoderConfig = field(default_factory=MaeDecoderConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise ConfigError(f"recipe: global_batch = {self.global_batch}; expected at least 1")
        for name in ("schedule_pseudo_epochs", "stop_after"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"recipe: {name} = {value}; expected above 0")
        views, hides = self.augment.num_views, self.augment.mask_ratio > 0
        if self.augment.global_views.count < 1:
            raise ConfigError("recipe: augment.global_views.count = 0; expected at least 1")
        if self.objective == "dino" and views < 2:
            raise ConfigError("recipe: objective dino needs two views or more; add to augment.global_views.count")
        if self.objective == "mae" and views != 1:
            raise ConfigError(f"recipe: objective mae takes one view, augment has {views}; leave one global view")
        if hides != (self.objective == "mae"):
            expected = "above 0" if self.objective == "mae" else "0: it hides no patches"
            raise ConfigError(f"recipe: objective {self.objective} needs augment.mask_ratio {expected}")


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Load a recipe that ships or a YAML file, with `--set` applied; ConfigError for anything unknown in it."""
    path = resources.locate("recipe", name_or_path)
    values = config.with_overrides(config.read_yaml(path), overrides)
    return config.build(PretrainConfig, values, where=f"recipe {path.stem}")


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """What changes with the step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float
    last_layer_frozen: bool


class Timeline:
    """A run's values as functions of the step and of the schedule's length, never of where the run stops."""

    def __init__(self, recipe: PretrainConfig, schedule: Schedule):
        self._recipe = recipe
        self._positions = schedule.positions_per_pseudo_epoch
        length = recipe.schedule_pseudo_epochs or schedule.num_pseudo_epochs
        self.total_steps = self.step_at(length)
        stop_after = length if recipe.stop_after is None else recipe.stop_after
        self.stop_step = self.step_at(stop_after)
        if self.stop_step * recipe.global_batch > schedule.num_positions or stop_after > length:
            raise ConfigError(
                f"recipe: stop_after = {stop_after:g} pseudo-epochs, but {schedule.path} has"
                f" {schedule.num_pseudo_epochs} and schedule_pseudo_epochs is {length}"
            )
        if self.stop_step < 1:
            raise ConfigError(
                f"recipe: no step to train: stop_after = {stop_after:g} pseudo-epochs of {self._positions} positions"
                f" ({schedule.path}) are less than global_batch = {recipe.global_batch}; lower it, or raise stop_after"
            )
        self.warmup_steps = self.step_at(recipe.optim.warmup_pseudo_epochs)
        self.frozen_steps = self.step_at(recipe.dino.freeze_last_layer_pseudo_epochs)
        self.peak_lr = recipe.optim.lr_per_256 * recipe.global_batch / 256

    def step_at(self, pseudo_epochs: float) -> int:
        """Return the number of whole steps in so many pseudo-epochs."""
        return round(pseudo_epochs * self._positions) // self._recipe.global_batch

    def pseudo_epoch_at(self, step: int) -> float:
        """Return how many pseudo-epochs the first `step` steps have consumed."""
        return step * self._recipe.global_batch / self._positions

    def ends_pseudo_epoch(self, step: int) -> bool:
        """Return whether `step` is the last whole step of a pseudo-epoch; 0, the beginning, counts as one."""
        number = -(-step * self._recipe.global_batch // self._positions)
        return self.step_at(number) == step

    def values(self, step: int) -> StepValues:
        """Return the learning rate, weight decay and momentum of a step."""
        optim, total = self._recipe.optim, self.total_steps
        peak_step = self.warmup_steps if self._recipe.objective == "mae" else None
        return StepValues(
            lr=cosine(
                step,
                base=self.peak_lr,
                final=optim.final_lr,
                total_steps=total,
                warmup_steps=self.warmup_steps,
                peak_step=peak_step,
            ),
            weight_decay=cosine(step, base=optim.weight_decay, final=optim.final_weight_decay, total_steps=total),
            momentum=cosine(step, base=self._recipe.dino.momentum, final=1.0, total_steps=total),
            teacher_temperature=self._teacher_temperature(step),
            last_layer_frozen=step < self.frozen_steps,
        )

    def _teacher_temperature(self, step: int) -> float:
        dino, number = self._recipe.dino, step * self._recipe.global_batch // self._positions
        warm = dino.teacher_temperature_warmup_pseudo_epochs
        if number >= warm:
            return dino.teacher_temperature
        rise = dino.teacher_temperature - dino.warmup_teacher_temperature
        return dino.warmup_teacher_temperature + rise * number / max(warm - 1, 1)

    def derived(self) -> Mapping[str, Any]:
        """Return the derived values for the run folder's reader."""
        return {
            "total_steps": self.total_steps,
            "stop_step": self.stop_step,
            "warmup_steps": self.warmup_steps,
            "peak_lr": self.peak_lr,
            "positions_per_pseudo_epoch": self._positions,
            "samples": self.stop_step * self._recipe.global_batch,
        }
