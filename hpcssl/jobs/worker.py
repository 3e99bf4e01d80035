"""What runs on every rank: joins the others, trains, leaves word of how it ended.

On this machine submitit calls a `PretrainJob`; on SLURM the batch script does, through `hpcssl.jobs.rank`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from hpcssl.core.errors import UserError, describe_os_error
from hpcssl.jobs.causes import failure_file
from hpcssl.jobs.cluster import Place, start_name
from hpcssl.jobs.follow import following
from hpcssl.jobs.lifecycle import claim, finish, stop
from hpcssl.jobs.rank import catch_stop_signals
from hpcssl.jobs.rendezvous import all_reduce_sum, process_group
from hpcssl.jobs.submission import read_submission

WORDS = "[rank 0] "  # begins what a run tells through rank 0


@dataclass(frozen=True)
class PretrainJob:
    """A start of a run; called once on every rank.

    Attributes
    ----------
    run : the prepared run folder: all that a start needs
    token : names this submission among those of the run
    launcher_pid : ranks stop when this local process is gone; None = they outlive it
    visible_gpus : the launcher's CUDA_VISIBLE_DEVICES, which the local executor overwrites; None = unset
    """

    run: str
    token: str
    launcher_pid: int | None = None
    visible_gpus: str | None = None

    def __call__(self) -> str:
        """Train; returns `finished` or `stopped`, and raises what ended it otherwise."""
        # after submitit's own handlers, which would save in the middle of a step
        return self.on_rank(catch_stop_signals())

    def on_rank(self, asked: list[int]) -> str:
        """Train until the end or until `asked` is no longer empty."""
        place = Place.here()
        if self.visible_gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.visible_gpus
        try:
            return self._train(place, asked)
        except BaseException as error:
            self._leave_word(place, error)
            raise

    def _train(self, place: Place, asked: list[int]) -> str:
        run = Path(self.run)
        entry = importlib.import_module("hpcssl.train.entry")
        stopped = importlib.import_module("hpcssl.train.loop").Stopped
        start = start_name(self.token)

        def say(text: str) -> None:
            print(f"[rank {place.world.rank}] {text}", file=sys.stderr, flush=True)  # noqa: T201

        if self._lacks_gpus():
            say("WARNING: its GPU was asked for, and PyTorch sees none here: it trains on the CPU; see hpcssl doctor")
        alone, one_node = place.world.size == 1, len(place.nodes) == 1
        group = nullcontext() if alone else process_group(run / "generations", start, place.world, one_node=one_node)
        generation = None
        with group:
            try:
                if not self._launcher_lives():  # or it would take the run over from a start that came after it
                    raise stopped("its launcher is gone")
                generation = claim(run, start, place) if place.world.rank == 0 else None
                with following(run, say) if generation else nullcontext():
                    entry.pretrain(
                        run,
                        world=place.world,
                        all_reduce_sum=(lambda tensor: None) if alone else all_reduce_sum,
                        local_rank=place.local_rank,
                        ranks_per_node=max(1, place.world.size // len(place.nodes)),
                        cores=place.cores,
                        surroundings=entry.Surroundings(
                            generation=generation,
                            asked_to_stop=lambda: bool(asked) or not self._launcher_lives(),
                            say=say,
                        ),
                    )
            except stopped:
                if generation and not generation.is_stale():
                    stop(run, start, place, "stopped by a signal" if self._launcher_lives() else "its launcher is gone")
                return "stopped"
        if generation and not generation.is_stale():
            finish(run, start, place)
        return "finished"

    def _lacks_gpus(self) -> bool:
        """Return whether GPUs were asked for and none is to be seen."""
        with suppress(UserError):  # a damaged file is for others to tell
            asked = read_submission(Path(self.run))
            wanted = asked is not None and asked.resources.profile.gpus_per_node > 0
            return wanted and not importlib.import_module("torch").cuda.is_available()
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

    def _leave_word(self, place: Place, error: BaseException) -> None:
        """Write why this rank ended, for the launcher; on a full disk the launcher finds that out itself."""
        told = isinstance(error, (UserError, OSError))
        message = describe_os_error(error) if isinstance(error, OSError) else f"{error}" if told else repr(error)
        with suppress(OSError):
            word = {"time": time.time(), "rank": place.world.rank, "told": told, "message": message}
            file = failure_file(Path(self.run), start_name(self.token), place.world.rank)
            file.write_text(json.dumps(word), encoding="utf-8")
