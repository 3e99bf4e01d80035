"""One optimiser step from a rank's share of the batch."""

from __future__ import annotations

import math

import torch

from hpcssl.core.errors import RunError
from hpcssl.loader.stream import Batch
from hpcssl.objectives.contract import Tiles
from hpcssl.optim.parameters import clip_each
from hpcssl.train.execution import resolve_precision
from hpcssl.train.pretrain_config import PretrainConfig, Timeline
from hpcssl.train.reduce import Collectives
from hpcssl.train.state import TrainState


class NotFiniteError(RunError):
    """The loss or a gradient of a step is not finite, and no more steps may be skipped; nothing was updated."""

    def __init__(self, state: TrainState, loss: float, norm: float):
        self.loss, self.norm, self.gradients = loss, norm, state.gradients_not_finite()
        first = f" ({len(self.gradients)} gradients, first {self.gradients[0]})" if self.gradients else ""
        super().__init__(
            f"step {state.step}: loss {loss:g}, gradient norm {norm:g}{first}: not finite,"
            f" {state.skipped_steps} steps having been skipped before"
        )


def train_step(
    state: TrainState,
    batch: Batch,
    recipe: PretrainConfig,
    timeline: Timeline,
    collectives: Collectives,
    device: torch.device,
) -> dict[str, float]:
    """Compute one optimiser step from this rank's share of the batch, and return what is worth logging.

    Where the loss or a gradient is not finite, the step counts on and nothing else changes, up to
    `train.max_skipped_steps` times in a run; then NotFiniteError leaves the state as before the step. All ranks decide
    alike: what they look at is reduced over them.
    """
    values = timeline.values(state.step)
    state.set_values(values)
    state.gradients.zero()
    precision = resolve_precision(recipe.train.precision, device)
    share = len(batch.positions)
    loss = torch.zeros((), device=device)
    size = recipe.train.micro_batch or share
    for start in range(0, share, size):
        part = slice(start, start + size)
        tiles = Tiles(
            positions=batch.positions[part],
            views=tuple(view[:, part].to(device, non_blocking=True) for view in batch.views),
            mask=None if batch.mask is None else batch.mask[part],
            drop_path=tuple(kept[:, part] for kept in batch.drop_path),
        )
        with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
            part_loss = state.objective.loss(tiles, values.objective) * (len(tiles.positions) / share)
        state.scaler.scale(part_loss).backward()
        loss += part_loss.detach()
    state.gradients.mean_over_ranks(collectives)
    collectives.all_reduce_sum(loss)
    loss /= collectives.world.size
    state.objective.before_update(values.objective)
    state.scaler.unscale_(state.optimizer)
    norm = clip_each(state.parameters, recipe.optim.clip or math.inf)
    record = {"loss": float(loss), "lr": values.lr, "weight_decay": values.weight_decay, "grad_norm": norm}
    if math.isfinite(record["loss"]) and (math.isfinite(norm) or state.is_overflow_normal()):
        state.scaler.step(state.optimizer)
        tiles_of_all = share * collectives.world.size
        record |= state.objective.after_update(values.objective, tiles_of_all, collectives.all_reduce_sum)
    else:
        state.objective.forget()
        if state.skipped_steps >= recipe.train.max_skipped_steps:
            raise NotFiniteError(state, record["loss"], norm)
        state.skipped_steps += 1
    state.scaler.update()
    state.step += 1
    return {**record, "skipped_steps": state.skipped_steps}
