"""One way to hand a stage to SLURM: what is missing becomes a job array, and one job after it ends the stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcssl.jobs.array import Call, Submitted, job_name, jobs_under_way, submit_calls
from hpcssl.jobs.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Work that falls into independent parts, which the same command completes.

    Attributes
    ----------
    kind : one word for what the array does; with `out` it names the job
    out : folder that the calls fill; logs go to `out/logs`
    calls : gives what is missing, one call a task; may prepare `out`, and is called only where `last` is not under way
    last : what is done when all calls have ended well, and one word for it; None = nothing
    gpus : of each task of the array
    """

    kind: str
    out: Path
    calls: Callable[[], Sequence[Call]]
    last: tuple[str, Call] | None = None
    gpus: int = 0


@dataclass(frozen=True, kw_only=True)
class StageJobs:
    """The jobs of a stage.

    Attributes
    ----------
    array : None where nothing was missing, or `last` is under way; its `tasks` are 0 where it was under way already
    last : None where the stage has no end of its own, or its array was under way already
    """

    array: Submitted | None
    last: Submitted | None


def submit_stage(stage: Stage, profile: Profile, *, after: Sequence[str] = ()) -> StageJobs:
    """Submit what is missing of a stage and is not under way, and what ends it, `after` jobs that must have ended well.

    UserError with SLURM's own words where it refuses a job, or does not answer.
    """
    if stage.last:
        ending = jobs_under_way(job_name(stage.last[0], stage.out))
        if ending:
            return StageJobs(array=None, last=Submitted(job=ending[0], tasks=0))
    array, calls = None, stage.calls()
    if calls:
        array = submit_calls(calls, stage.out, profile, kind=stage.kind, gpus=stage.gpus, after=after)
    if stage.last is None or (array and not array.tasks):
        return StageJobs(array=array, last=None)
    kind, call = stage.last
    awaited = [array.job] if array else list(after)
    return StageJobs(array=array, last=submit_calls([call], stage.out, profile, kind=kind, after=awaited))
