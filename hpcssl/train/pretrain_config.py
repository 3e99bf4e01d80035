"""Everything that a pretraining run is: one complete configuration, resolved before step 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from hpcssl.core import config, resources
from hpcssl.core.config import Above0, AtLeast0, AtLeast1, Below1, NotNegative, fixed, free, settings
from hpcssl.core.errors import ConfigError
from hpcssl.loader.stream import LoaderConfig
from hpcssl.models.encoder import EncoderConfig
from hpcssl.objectives.registry import RegisteredConfig, present_layout
from hpcssl.optim.values import cosine
from hpcssl.plan.recipe import AugmentRecipe
from hpcssl.schedule.file import Schedule

_DAY_S = 86_400


@settings
class OptimConfig:
    """AdamW and its values over the steps.

    lr_per_256 : peak learning rate for a global batch of 256, scaled linearly
    final_lr : learning rate at the schedule's end
    warmup_pseudo_epochs : linear warm-up from 0
    weight_decay, final_weight_decay : at the first and the last step, cosine between; none on biases and 1-D parameters
    betas : of AdamW
    clip : norm that each parameter's gradient is clipped to; None = not clipped
    """

    lr_per_256: NotNegative = fixed()
    final_lr: NotNegative = fixed(1e-6)
    warmup_pseudo_epochs: NotNegative = fixed(1.0)
    weight_decay: NotNegative = fixed(0.04)
    final_weight_decay: NotNegative = fixed(0.4)
    betas: tuple[Below1, Below1] = fixed((0.9, 0.999))
    clip: Above0 | None = fixed(None)


@settings
class TrainConfig:
    """How, not what, is computed.

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

    precision: Literal["auto", "fp32", "bf16", "fp16"] = fixed("auto")
    micro_batch: AtLeast1 | None = free(None)
    threads: AtLeast1 | None = free(None)
    deterministic: bool = free(False)
    compile: Literal["auto"] | bool = free("auto")
    checkpoint_activations: bool = free(False)
    max_skipped_steps: AtLeast0 = free(20)
    watch_every_steps: AtLeast0 = free(500)
    hang_s: Annotated[float, Field(gt=0, le=_DAY_S)] = free(45.0)


@settings
class CheckpointConfig:
    """When checkpoints are written and kept; the first (untrained) and every pseudo-epoch's are always both.

    every_min : minutes between two; 0 = one after every step
    keep_last : of the others, how many stay
    """

    every_min: NotNegative = free(15.0)
    keep_last: AtLeast1 = free(2)


@settings
class PretrainConfig:
    """A pretraining run.

    objective : what is learnt: a `kind` and its settings
    seed : of weights, plans and masks
    global_batch : tiles of one optimiser step over all ranks; constant for a run
    schedule_pseudo_epochs : length of every schedule of values; None = the tile schedule's
    stop_after : pseudo-epochs to train; None = all; free to change
    initial_weights : file that the encoder starts from, of timm or an official checkpoint; None = fresh. Where it lies
        is free; what it is, a digest among the run's data, is not
    """

    present_layout: ClassVar[Any] = staticmethod(present_layout)

    objective: RegisteredConfig
    global_batch: AtLeast1 = fixed()
    encoder: EncoderConfig
    augment: AugmentRecipe
    optim: OptimConfig
    seed: int = fixed(0)
    schedule_pseudo_epochs: AtLeast1 | None = fixed(None)
    stop_after: Above0 | None = free(None)
    initial_weights: str | None = free(None)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if self.augment.global_views.count < 1:
            raise ConfigError("recipe: augment.global_views.count = 0; expected at least 1")
        self.objective.check_views(self.augment)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Load a recipe that ships or a YAML file, with `--set` applied; ConfigError for anything unknown in it."""
    path = resources.locate("recipe", name_or_path)
    where = f"recipe {path.stem}"
    return config.build(PretrainConfig, present_layout(config.read_yaml(path), where, overrides), where=where)


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """What changes with the step; `objective` is what the objective's settings make of it."""

    lr: float
    weight_decay: float
    objective: Any


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
        """Return the learning rate, the weight decay and the objective's values of a step."""
        optim, objective, total = self._recipe.optim, self._recipe.objective, self.total_steps
        return StepValues(
            lr=cosine(
                step,
                base=self.peak_lr,
                final=optim.final_lr,
                total_steps=total,
                warmup_steps=self.warmup_steps,
                peak_step=self.warmup_steps if objective.peaks_after_warmup else None,
            ),
            weight_decay=cosine(step, base=optim.weight_decay, final=optim.final_weight_decay, total_steps=total),
            objective=objective.values(step, self),
        )

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
