"""The loop: from the newest checkpoint to where the run stops."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hpcssl.core.errors import RunError
from hpcssl.core.world import World
from hpcssl.loader.stream import Batch, StreamRequest, TileStream
from hpcssl.runs.checkpoint import load_latest
from hpcssl.runs.run_folder import BAD_TILES, Generation
from hpcssl.schedule.file import Schedule
from hpcssl.stores.store import Store
from hpcssl.train.execution import describe_execution
from hpcssl.train.failure import save_failed_step
from hpcssl.train.objective import load_initial_weights
from hpcssl.train.pretrain_config import PretrainConfig, Timeline
from hpcssl.train.reduce import Collectives
from hpcssl.train.run_writer import RunWriter
from hpcssl.train.state import TrainState
from hpcssl.train.step import NotFiniteError, train_step
from hpcssl.train.watch import CollapseWatch


class Stopped(Exception):
    """Training was asked to stop before its end; the state was saved unless a later start owns the run."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a process of a run is given by those that started it.

    Attributes
    ----------
    generation : this start's claim to the run folder; rank 0 holds it and writes the folder, the others have None
    asked_to_stop : polled after each step by every rank and agreed on, so that all stop at the same step
    say : takes lines for people
    collectives : this process among the others, and what it does together with them
    local_rank, ranks_per_node, cores : place on the node, for choosing its GPU and its share of the cores
    """

    generation: Generation | None
    asked_to_stop: Callable[[], bool]
    say: Callable[[str], None]
    collectives: Collectives = field(default_factory=Collectives)
    local_rank: int = 0
    ranks_per_node: int = 1
    cores: int = 1


def train(
    run: Path,
    recipe: PretrainConfig,
    *,
    store: Store,
    schedule: Schedule,
    device: torch.device,
    surroundings: Surroundings,
) -> None:
    """Train until `stop_after`, from the newest whole checkpoint of the run.

    Stopped where it is asked to stop, or a later start took the run over; RunError where too many steps had to be
    skipped because something in them was not finite, the last of which is saved.
    """
    say, generation, collectives = surroundings.say, surroundings.generation, surroundings.collectives
    timeline = Timeline(recipe, schedule)
    state = TrainState(recipe, device)
    checkpoint = load_latest(run, on_damaged=say)
    if checkpoint:
        state.from_checkpoint(*checkpoint)
    elif recipe.initial_weights:
        say(load_initial_weights(state.objective, Path(recipe.initial_weights)))
    _check_same_step(state.step, collectives, device)
    how = describe_execution(recipe.train, device)
    say(f"begins at step {state.step} of {timeline.stop_step} with {collectives.world.size} processes, {how}")
    request = request_of(state, recipe, timeline.stop_step, collectives.world)
    stream = TileStream(store, schedule, request, config=recipe.loader, bad_tiles=run / BAD_TILES, device=device)
    watch = CollapseWatch(recipe, store, schedule, device, say=say) if generation else None
    writer = RunWriter(run, recipe, timeline, generation, state) if generation else None
    loop = _Loop(run, state, recipe, timeline, collectives, device, writer, watch, surroundings.asked_to_stop)
    stopped = None
    with closing(writer) if writer else nullcontext():
        try:
            loop.run_steps(stream)
        except Stopped as reason:
            stopped = reason
        if writer:
            writer.finish()
    if stopped:
        raise stopped


def request_of(state: TrainState, recipe: PretrainConfig, stop_step: int, world: World) -> StreamRequest:
    """Return what a rank asks of its stream: its share of the steps from the state's to another."""
    return StreamRequest(
        recipe=recipe.augment,
        seed=recipe.seed,
        global_batch=recipe.global_batch,
        steps=range(state.step, stop_step),
        needs=state.objective.needs,
        world=world,
    )


@dataclass(frozen=True)
class _Loop:
    """The steps of one process."""

    run: Path
    state: TrainState
    recipe: PretrainConfig
    timeline: Timeline
    collectives: Collectives
    device: torch.device
    writer: RunWriter | None
    watch: CollapseWatch | None
    asked_to_stop: Callable[[], bool]

    def run_steps(self, stream: TileStream) -> None:
        """Train on everything that the stream gives; ends by an exception where it is to stop earlier."""
        state, writer = self.state, self.writer
        if writer and state.step == 0:
            writer.save(state)
        started, before, first = time.perf_counter(), _loader_times(stream), state.step
        for batch in stream:
            assert batch.step == state.step, (batch.step, state.step)
            record = self._step(batch)
            is_last = state.step == self.timeline.stop_step
            now = time.perf_counter()
            seconds, started = now - started, now
            after = _loader_times(stream)
            record |= {name: after[name] - before[name] for name in after}
            before = after
            # what ranks must agree on: stop (asked of any), save now (rank 0's clock)
            stop, due = self._agreed(self.asked_to_stop(), writer is not None and writer.is_due(state.step))
            if writer:
                if self.watch:
                    record |= self.watch.look(state, last=is_last)
                record |= {"processes": self.collectives.world.size, "memory_gib": _memory_gib(self.device)}
                writer.write(state, record, seconds=seconds)
                if stop or due or is_last:
                    writer.save(state)
            if stop and not is_last:
                raise Stopped("asked to stop")
            if batch.step == first:  # which may have compiled, and waited for a file system that wakes up
                self.collectives.limit_waiting(self.recipe.train.hang_s)

    def _step(self, batch: Batch) -> dict[str, float]:
        """Train one step; where it may not be skipped, save it; where the GPU is too small, say what helps."""
        try:
            return train_step(self.state, batch, self.recipe, self.timeline, self.collectives, self.device)
        except torch.OutOfMemoryError:
            tiles = min(self.recipe.train.micro_batch or len(batch.positions), len(batch.positions))
            smaller = f"train.micro_batch={tiles // 2} or " if tiles > 1 else ""
            raise RunError(
                f"step {batch.step}: {tiles} tiles at a time do not fit into the memory of {self.device}; --set"
                f" {smaller}train.checkpoint_activations=true trains the same with less"
            ) from None
        except NotFiniteError as error:
            self._agreed()
            folder = save_failed_step(self.run, self.state, batch, self.recipe, error, world=self.collectives.world)
            raise RunError(
                f"{error}; {folder} holds all of this step (hpcssl.train.failure repeats it); to pass over it raise"
                " train.max_skipped_steps, else begin another run with a lower optim.lr_per_256"
            ) from None

    def _agreed(self, *flags: bool) -> list[bool]:
        """Return every flag as raised by any rank; Stopped where rank 0 sees that a later start owns the run."""
        stale = self.writer is not None and self.writer.is_stale()
        votes: Tensor = torch.tensor([float(flag) for flag in (stale, *flags)], device=self.device)
        self.collectives.all_reduce_sum(votes)
        superseded, *agreed = [bool(vote > 0) for vote in votes.tolist()]
        if superseded:
            raise Stopped("a later start took the run over")
        return agreed


def _loader_times(stream: TileStream) -> dict[str, float]:
    """Return the seconds that the loader's threads have worked, and that this process has waited for it, so far."""
    return {name: getattr(stream.stats, name) for name in ("read_s", "decode_s", "augment_s", "read_wait_s")}


def _memory_gib(device: torch.device) -> float:
    """Return the most memory that was in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _check_same_step(step: int, collectives: Collectives, device: torch.device) -> None:
    """Refuse to begin where ranks found different checkpoints, which a shared folder that lags can cause."""
    total = torch.tensor([step, step * step], dtype=torch.float64, device=device)
    collectives.all_reduce_sum(total)
    if total.tolist() != [step * collectives.world.size, step * step * collectives.world.size]:
        raise RunError(f"the ranks found different checkpoints (this one step {step}); run the same command again")
