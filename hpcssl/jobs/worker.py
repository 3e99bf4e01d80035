"""What submitit runs on every rank: joins the others, trains, leaves word of how it ended."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcssl.core.errors import UserError, describe_os_error
from hpcssl.jobs.cluster import Place, as_it_is, requeue, restart_count
from hpcssl.jobs.rendezvous import all_reduce_sum, process_group
from hpcssl.runs.folder import Generation

_STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


@dataclass(frozen=True)
class PretrainJob:
    """A start of a run; pickled by submitit, called once on every rank.

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
        place = Place.here()
        if self.visible_gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.visible_gpus
        try:
            return self._train(place)
        except BaseException as error:
            self._leave_word(place, error)
            raise

    def checkpoint(self) -> Any:
        """Tell submitit, whose own handler is replaced by ours, that a requeued job goes on as it is."""
        return as_it_is(self)

    def _train(self, place: Place) -> str:
        run = Path(self.run)
        asked: list[int] = []
        for number in _STOP_SIGNALS:  # after submitit's own handlers, which would save in the middle of a step
            signal.signal(number, lambda received, frame: asked.append(received))
        entry = importlib.import_module("hpcssl.train.entry")
        stopped = importlib.import_module("hpcssl.train.loop").Stopped
        token = f"{self.token}-{restart_count()}"
        alone = place.world.size == 1
        group = (
            nullcontext()
            if alone
            else process_group(run / "generations", token, place.world, one_node=place.num_nodes == 1)
        )
        generation = None
        with group:
            try:
                if not self._launcher_lives():  # or it would take the run over from a start that came after it
                    raise stopped("its launcher is gone")
                generation = Generation.take(run) if place.world.rank == 0 else None
                entry.pretrain(
                    run,
                    world=place.world,
                    all_reduce_sum=(lambda tensor: None) if alone else all_reduce_sum,
                    local_rank=place.local_rank,
                    ranks_per_node=max(1, place.world.size // place.num_nodes),
                    cores=place.cores,
                    generation=generation,
                    asked_to_stop=lambda: bool(asked) or not self._launcher_lives(),
                    say=lambda text: print(f"[rank {place.world.rank}] {text}", file=sys.stderr, flush=True),  # noqa: T201
                )
            except stopped:
                superseded = generation is not None and generation.is_stale()
                if place.slurm_job and generation is not None and not superseded:
                    requeue(place.slurm_job)
                return "stopped"
        return "finished"

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
            failure_file(Path(self.run), self.token, place.world.rank).write_text(json.dumps(word), encoding="utf-8")


def failure_file(run: Path, token: str, rank: int | str) -> Path:
    """Return where a rank leaves word of its failure."""
    return run / "logs" / f"failure-{token}-rank{rank}.json"
