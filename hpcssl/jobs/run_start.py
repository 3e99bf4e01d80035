"""A start of a run on one rank: it joins the other ranks, works, and leaves word of how it ended.

What is done on a rank is a function, `Work`. On this machine submitit calls a `RunStart` that holds it; on SLURM the
batch script runs the module of the function, which makes one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpcssl.core.errors import UserError, describe_os_error
from hpcssl.jobs.causes import failure_file
from hpcssl.jobs.lifecycle import claim, finish, stop
from hpcssl.jobs.rank_place import RankPlace, start_name
from hpcssl.jobs.rendezvous import all_reduce_sum, process_group
from hpcssl.jobs.stop_signals import catch_stop_signals
from hpcssl.jobs.submission import read_submission
from hpcssl.runs.run_folder import Generation

WORDS = "[rank 0] "  # begins what a run says through rank 0
Outcome = Literal["finished", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What work on a rank of a prepared run is given."""

    run: Path
    place: RankPlace
    generation: Generation | None  # the claim on the run folder; rank 0 alone has one
    all_reduce_sum: Callable[[Any], None]  # sums a tensor over the ranks, in place
    asked_to_stop: Callable[[], bool]  # returns whether the work is to save and stop
    say: Callable[[str], None]  # tells something in the log, and through rank 0 to whoever waits for the run


Work = Callable[[Rank], bool]
"""What a run does on a rank: a function of a module, which `python -m MODULE RUN TOKEN` runs on SLURM.

It returns True at the end of the run, and False where it has stopped before because it was asked to.
"""


@dataclass(frozen=True)
class RunStart:
    """A start of a run, whose prepared folder holds all that it needs; called once on every rank.

    `token` names this submission among those of the run. Ranks stop when the local process `launcher_pid` is gone;
    None = they outlive it. The local executor overwrites `visible_gpus`, the launcher's CUDA_VISIBLE_DEVICES.
    """

    run: str
    work: Work
    token: str
    launcher_pid: int | None = None
    visible_gpus: str | None = None

    def __call__(self) -> Outcome:
        """Work, and return how it ended; errors end it otherwise."""
        # after submitit's own handlers, which would save in the middle of a step
        return self.on_rank(catch_stop_signals())

    def on_rank(self, received: list[int]) -> Outcome:
        """Work until the end or until a signal is `received`."""
        place = RankPlace.here()
        if self.visible_gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.visible_gpus
        try:
            return self._work(place, received)
        except BaseException as error:
            self._leave_word(place, error)
            raise

    def _work(self, place: RankPlace, received: list[int]) -> Outcome:
        run, start = Path(self.run), start_name(self.token)

        def say(text: str) -> None:
            print(f"[rank {place.world.rank}] {text}", file=sys.stderr, flush=True)  # noqa: T201

        if self._lacks_gpus():
            say("WARNING: its GPU was asked for, and PyTorch sees none here: it trains on the CPU; see hpcssl doctor")
        alone, one_node = place.world.size == 1, len(place.nodes) == 1
        with nullcontext() if alone else process_group(run / "generations", start, place.world, one_node=one_node):
            if not self._launcher_lives():  # or it would take the run over from a start that came after it
                return "stopped"
            generation = claim(run, start, place) if place.world.rank == 0 else None
            rank = Rank(
                run=run,
                place=place,
                generation=generation,
                all_reduce_sum=(lambda tensor: None) if alone else all_reduce_sum,
                asked_to_stop=lambda: bool(received) or not self._launcher_lives(),
                say=say,
            )
            if not self.work(rank):
                if generation and not generation.is_stale():
                    stop(run, start, place, "stopped by a signal" if self._launcher_lives() else "its launcher is gone")
                return "stopped"
        if generation and not generation.is_stale():
            finish(run, start, place)
        return "finished"

    def _lacks_gpus(self) -> bool:
        """Return whether GPUs were asked for and none is to be seen."""
        with suppress(UserError):  # a damaged file is for others to tell
            submission = read_submission(Path(self.run))
            if submission and submission.resources.profile.gpus_per_node:
                import torch

                return not torch.cuda.is_available()
        return False

    def _launcher_lives(self) -> bool:
        if self.launcher_pid is None:
            return True
        try:
            os.kill(self.launcher_pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it lives, as somebody else
            return True
        status = Path(f"/proc/{self.launcher_pid}/stat")
        # ended, but not yet reaped by its parent: the state stands behind the command's closing parenthesis
        return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")

    def _leave_word(self, place: RankPlace, error: BaseException) -> None:
        """Write why this rank ended, for the launcher; on a full disk the launcher finds that out itself."""
        is_message = isinstance(error, (UserError, OSError))
        message = describe_os_error(error) if isinstance(error, OSError) else f"{error}" if is_message else repr(error)
        with suppress(OSError):
            word = {"time": time.time(), "rank": place.world.rank, "told": is_message, "message": message}
            file = failure_file(Path(self.run), start_name(self.token), place.world.rank)
            file.write_text(json.dumps(word), encoding="utf-8")
