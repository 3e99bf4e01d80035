"""One step, and the loop around it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpcssl.core.errors import RunError
from hpcssl.loader.stream import Batch, TileStream
from hpcssl.optim.parameters import clip_each
from hpcssl.runs.checkpoint import load_latest, prune_checkpoints, save_checkpoint
from hpcssl.runs.folder import BAD_TILES, Generation
from hpcssl.runs.metrics import MetricsWriter
from hpcssl.schedule.file import Schedule
from hpcssl.tiles.store import Store
from hpcssl.train.config import PretrainConfig, Timeline
from hpcssl.train.reduce import Collectives
from hpcssl.train.state import TrainState, resolve_precision


class Stopped(Exception):
    """Training was asked to stop before its end; the state was saved unless a later start owns the run."""


def train_step(
    state: TrainState,
    batch: Batch,
    recipe: PretrainConfig,
    timeline: Timeline,
    collectives: Collectives,
    device: torch.device,
) -> dict[str, float]:
    """Compute one optimiser step from this rank's share of the batch, and return what is worth logging.

    Raises
    ------
    RunError
        If the loss or a gradient is not finite (with fp16's loss scaling: if the loss is not).
    """
    values = timeline.values(state.step)
    state.set_values(values)
    state.gradients.zero()
    precision = resolve_precision(recipe.train.precision, device)
    share = len(batch.positions)
    loss = torch.zeros((), device=device)
    for part in _micro_batches(share, recipe.train.micro_batch):
        views = tuple(v[:, part].to(device, non_blocking=True) for v in batch.views)
        mask = None if batch.mask is None else batch.mask[part]
        with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
            part_loss = state.objective.loss(views, batch.positions[part], mask) * (views[0].shape[1] / share)
        state.scaler.scale(part_loss).backward()
        loss += part_loss.detach()
    state.gradients.mean_over_ranks(collectives)
    collectives.all_reduce_sum(loss)
    loss /= collectives.world.size
    state.objective.before_update(values)
    state.scaler.unscale_(state.optimizer)
    norm = clip_each(state.parameters, recipe.optim.clip or math.inf)
    finite = math.isfinite(float(loss)) and (math.isfinite(norm) or state.scaler.is_enabled())
    if not finite:
        raise RunError(
            f"step {state.step}: loss {float(loss)}, gradient norm {norm}: not finite; lower optim.lr_per_256,"
            " or set train.precision=fp32 and run again from the last checkpoint"
        )
    state.scaler.step(state.optimizer)
    state.scaler.update()
    watched = state.objective.after_update(values, share, collectives)
    state.step += 1
    return {"loss": float(loss), "lr": values.lr, "weight_decay": values.weight_decay, "grad_norm": norm, **watched}


def train(
    run: Path,
    recipe: PretrainConfig,
    *,
    store: Store,
    schedule: Schedule,
    collectives: Collectives,
    device: torch.device,
    generation: Generation | None,
    asked_to_stop: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Train until `stop_after`, from the newest whole checkpoint of the run.

    Rank 0, which holds a `generation`, writes the run folder; the others pass None. `asked_to_stop` is polled by every
    rank after each step and agreed on, so that all stop at the same step.

    Raises
    ------
    Stopped
        If asked to stop, or a later start took the run over.
    RunError
        If the loss is not finite.
    """
    timeline = Timeline(recipe, schedule)
    state = TrainState(recipe, device)
    found = load_latest(run, on_damaged=say)
    if found:
        state.from_checkpoint(*found)
    _check_same_step(state.step, collectives, device)
    say(f"begins at step {state.step} of {timeline.stop_step} with {collectives.world.size} processes")
    stream = _stream(state, recipe, timeline, store, schedule, collectives, run)
    writer = _Writer(run, recipe, timeline, generation, state) if generation else None
    try:
        _run_steps(state, recipe, timeline, stream, collectives, device, writer, asked_to_stop)
    finally:
        if writer:
            writer.close()


def _run_steps(
    state: TrainState,
    recipe: PretrainConfig,
    timeline: Timeline,
    stream: TileStream,
    collectives: Collectives,
    device: torch.device,
    writer: _Writer | None,
    asked_to_stop: Callable[[], bool],
) -> None:
    if writer and state.step == 0:
        writer.save(state)
    begun, waited = time.perf_counter(), 0.0
    for batch in stream:
        assert batch.step == state.step, (batch.step, state.step)
        record = train_step(state, batch, recipe, timeline, collectives, device)
        now = time.perf_counter()
        seconds, begun = now - begun, now
        wait, waited = stream.stats.read_wait_s - waited, stream.stats.read_wait_s
        # what ranks must agree on: stop (asked of any), superseded (seen by rank 0), save now (rank 0's clock)
        stale = writer is not None and writer.is_stale()
        due = writer is not None and writer.is_due(state.step)
        stop, stale, due = _agree(collectives, device, asked_to_stop(), stale, due)
        if stale:
            raise Stopped("a later start took the run over")
        if writer:
            writer.write(state, record, seconds=seconds, read_wait_s=wait)
            if stop or due or state.step == timeline.stop_step:
                writer.save(state)
        if stop and state.step < timeline.stop_step:
            raise Stopped("asked to stop")


class _Writer:
    """What rank 0 writes into the run folder."""

    def __init__(
        self, run: Path, recipe: PretrainConfig, timeline: Timeline, generation: Generation, state: TrainState
    ):
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._recipe, self._timeline, self._generation = run, recipe, timeline, generation
        self._metrics = MetricsWriter(run, next_step=state.step + 1)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=state.step + 1)
        self._saved = time.monotonic()

    def is_stale(self) -> bool:
        """Return whether a later start owns the run."""
        return self._generation.is_stale()

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is to be written after so many steps."""
        minutes = (time.monotonic() - self._saved) / 60
        return minutes >= self._recipe.checkpoint.every_min or self._timeline.ends_pseudo_epoch(step)

    def write(self, state: TrainState, record: dict[str, Any], *, seconds: float, read_wait_s: float) -> None:
        """Append a step's record."""
        samples = state.step * self._recipe.global_batch
        line = {
            "step": state.step,
            "samples_seen": samples,
            "pseudo_epoch": self._timeline.pseudo_epoch_at(state.step),
            **record,
            "tiles_per_s": self._recipe.global_batch / seconds,
            "read_wait_s": read_wait_s,
            "time": time.time(),
        }
        self._metrics.write(line)
        for key in (
            "loss",
            "lr",
            "weight_decay",
            "momentum",
            "grad_norm",
            "teacher_entropy",
            "tiles_per_s",
            "read_wait_s",
        ):
            if key in line:
                self._board.add_scalar(key, line[key], state.step)

    def save(self, state: TrainState) -> None:
        """Write a checkpoint and remove those that need not stay."""
        if self.is_stale():
            raise Stopped("a later start took the run over")
        self._metrics.sync()
        save_checkpoint(self._run, state.step, *state.to_checkpoint())
        keep = self._recipe.checkpoint.keep_last
        prune_checkpoints(self._run, state.step, keep_last=keep, keep_steps=self._timeline.ends_pseudo_epoch)
        self._saved = time.monotonic()

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._board.close()


def _stream(
    state: TrainState,
    recipe: PretrainConfig,
    timeline: Timeline,
    store: Store,
    schedule: Schedule,
    collectives: Collectives,
    run: Path,
) -> TileStream:
    return TileStream(
        store=store,
        schedule=schedule,
        recipe=recipe.augment,
        seed=recipe.seed,
        global_batch=recipe.global_batch,
        world=collectives.world,
        start_step=state.step,
        stop_step=timeline.stop_step,
        num_patches=state.objective.num_patches,
        config=recipe.loader,
        bad_tiles=run / BAD_TILES,
    )


def _agree(collectives: Collectives, device: torch.device, *flags: bool) -> list[bool]:
    """Return every flag as raised by any rank."""
    votes: Tensor = torch.tensor([float(f) for f in flags], device=device)
    collectives.all_reduce_sum(votes)
    return [bool(v > 0) for v in votes.tolist()]


def _check_same_step(step: int, collectives: Collectives, device: torch.device) -> None:
    """Refuse to begin where ranks found different checkpoints, which a shared folder that lags can cause."""
    total = torch.tensor([step, step * step], dtype=torch.float64, device=device)
    collectives.all_reduce_sum(total)
    if total.tolist() != [step * collectives.world.size, step * step * collectives.world.size]:
        raise RunError(f"the ranks found different checkpoints (this one step {step}); run the same command again")


def _micro_batches(share: int, size: int | None) -> Iterator[slice]:
    size = size or share
    return (slice(start, min(start + size, share)) for start in range(0, share, size))
