"""What rank 0 writes into the run folder: the training trace and, in the background, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from hpcssl.core.atomic import remove_temporary
from hpcssl.runs.background import BackgroundWriter
from hpcssl.runs.checkpoint import prune_checkpoints, save_checkpoint
from hpcssl.runs.run_folder import Generation
from hpcssl.runs.trace import MetricsWriter
from hpcssl.train.pretrain_config import PretrainConfig, Timeline
from hpcssl.train.state import TrainState

_NOT_DRAWN = ("step", "samples_seen", "pseudo_epoch", "time")


class _Superseded(Exception):
    """A later start owns the run; nothing is published any more."""


class RunWriter:
    """Publishes a run as long as no later start has taken it over."""

    def __init__(
        self, run: Path, recipe: PretrainConfig, timeline: Timeline, generation: Generation, state: TrainState
    ):
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._recipe, self._timeline, self._generation = run, recipe, timeline, generation
        self._metrics = MetricsWriter(run, next_step=state.step + 1)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=state.step + 1)
        self._background = BackgroundWriter()
        self._saved = time.monotonic()
        remove_temporary(run / "checkpoints")  # what killed starts left

    def is_stale(self) -> bool:
        """Return whether a later start owns the run."""
        return self._generation.is_stale()

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is to be written after so many steps."""
        minutes = (time.monotonic() - self._saved) / 60
        return minutes >= self._recipe.checkpoint.every_min or self._timeline.ends_pseudo_epoch(step)

    def write(self, state: TrainState, record: Mapping[str, Any], *, seconds: float) -> None:
        """Append a step's record; raises what a checkpoint in the background has failed with."""
        self._background.check()
        line = {
            "step": state.step,
            "samples_seen": state.step * self._recipe.global_batch,
            "pseudo_epoch": self._timeline.pseudo_epoch_at(state.step),
            **record,
            "tiles_per_s": self._recipe.global_batch / seconds,
            "time": time.time(),
        }
        self._metrics.write(line)
        for key, value in line.items():
            if key not in _NOT_DRAWN and math.isfinite(value):
                self._board.add_scalar(key, value, state.step)

    def save(self, state: TrainState) -> None:
        """Copy the state and write it as a checkpoint in the background; those that need not stay are removed.

        Waits for the checkpoint before, if that is still being written, and raises what it failed with.
        """
        tensors, values = state.to_checkpoint()
        self._background.start(tensors, partial(self._write_checkpoint, state.step, values))
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Wait for the last checkpoint; raises what it failed with."""
        self._background.wait()

    def close(self) -> None:
        """Let a checkpoint under way come to its end, and close the files."""
        self._background.close()
        self._metrics.close()
        self._board.close()

    def _write_checkpoint(self, step: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        try:
            self._check_ours()
            self._metrics.sync()  # no checkpoint is ahead of the trace
            save_checkpoint(self._run, step, tensors, values, before_rename=self._check_ours)
            self._check_ours()
            keep = self._recipe.checkpoint.keep_last
            prune_checkpoints(self._run, step, keep_last=keep, keep_steps=self._timeline.ends_pseudo_epoch)
        except Exception:
            if not self.is_stale():  # or the later start has removed the half-written file: no error of ours
                raise

    def _check_ours(self) -> None:
        if self.is_stale():
            raise _Superseded
