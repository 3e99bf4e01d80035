"""Job arrays: work that falls into independent parts, which a re-run completes.

What is missing is read from the output folder, and what is under way from SLURM's queue, by the job's name, which holds
the folder; so nothing has to be kept in between, and a re-run submits only what is neither there nor under way.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from hpcssl.core.atomic import digest_bytes
from hpcssl.core.errors import ConfigError, RunError
from hpcssl.jobs.cluster import as_it_is, submit_array
from hpcssl.jobs.profile import Profile

_UNDER_WAY = "PENDING,RUNNING,SUSPENDED"  # not COMPLETING: its processes are gone or going
_SQUEUE_S = 60.0


@dataclass(frozen=True)
class Call:
    """What a task of an array calls: a function of a module, pickled by its name, and arguments, pickled as well."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> None:
        """Do the work."""
        self.function(**self.arguments)

    def checkpoint(self) -> Any:
        """Tell submitit that a task which is preempted or out of time goes on as it is: what is there stays."""
        return as_it_is(self)


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What came of a submission: SLURM's id of the array, and its tasks, 0 where the job was under way already."""

    job: str
    tasks: int


def submit_calls(
    calls: Sequence[Call], out: Path, profile: Profile, *, kind: str, gpus: int = 0, after: Sequence[str] = ()
) -> Submitted:
    """Submit a job array, one call a task, unless one of this kind and folder is under way.

    Two submissions at the very same moment may not see each other; their tasks write the same files, whole, twice.
    RunError with SLURM's own words where it refuses the job, or does not answer.

    Parameters
    ----------
    out : what the calls fill; logs go to `out/logs`
    kind : one word for what is done; with `out` it names the job
    gpus : of each task
    after : jobs that must have ended well before; where one fails, this one is taken out of the queue
    """
    name = job_name(kind, out)
    if under_way := jobs_under_way(name):
        return Submitted(job=under_way[0], tasks=0)
    job = submit_array(calls, out / "logs", profile, name=name, gpus=gpus, after=after)
    return Submitted(job=job, tasks=len(calls))


def job_name(kind: str, out: Path) -> str:
    """Return the name of the job that fills a folder.

    >>> job_name("embed", Path("/features/a"))
    'hpcssl-embed-a-79938f22'
    """
    readable = "".join(c if c.isalnum() or c in "-_." else "-" for c in out.resolve().name)
    return f"hpcssl-{kind}-{readable}-{digest_bytes(str(out.resolve()).encode())[:8]}"


def jobs_under_way(name: str) -> list[str]:
    """Return the ids of the jobs of a name that wait or run; RunError where SLURM does not answer."""
    ask = ["squeue", "--noheader", f"--name={name}", f"--states={_UNDER_WAY}", "--format=%F"]
    try:
        answer = subprocess.run(ask, check=True, capture_output=True, text=True, timeout=_SQUEUE_S)
    except FileNotFoundError:
        raise ConfigError("no squeue on PATH; run this on a login node, or see hpcssl doctor") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"squeue gave no answer within {_SQUEUE_S:.0f} s; try again when SLURM does") from None
    except subprocess.CalledProcessError as error:
        raise RunError(f"squeue failed: {' '.join(error.stderr.split())}") from None
    return sorted(set(answer.stdout.split()))


def shares(weights: Sequence[int], num_tasks: int) -> list[list[int]]:
    """Share items out to at most `num_tasks` tasks, heaviest first; return each task's items, in order, none empty.

    >>> shares([5, 1, 1, 1, 4], 2)
    [[0, 2], [1, 3, 4]]
    """
    if num_tasks < 1:
        raise ConfigError(f"--array {num_tasks}; expected at least 1")
    lightest = [(0, task) for task in range(min(num_tasks, len(weights)))]
    items: list[list[int]] = [[] for _ in lightest]
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        weight, task = heappop(lightest)
        items[task].append(item)
        heappush(lightest, (weight + weights[item], task))
    return [sorted(share) for share in items]
