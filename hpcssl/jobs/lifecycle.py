"""The life of a run in starts: why each began, what is recorded of its end, and whether it begins again.

On SLURM a start ends in one of four ways. It finishes. SLURM warns it (preemption, time limit): it saves and requeues
itself, as often as it takes. SLURM ends it without a warning (an administrator's requeue, a node that fails) and starts
it again by itself. Or a rank dies: then the batch script asks here, and the job is requeued, unless it has failed
`MOST_FAILURES` times without a newer checkpoint.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hpcssl.core.errors import RunError
from hpcssl.jobs.causes import why_died, why_ended, why_warned
from hpcssl.jobs.rank_place import RankPlace, restart_count, start_name
from hpcssl.jobs.slurm import is_still, requeue
from hpcssl.runs.checkpoint import checkpoint_steps
from hpcssl.runs.history import End, fail_end, read_end, read_starts, record_end
from hpcssl.runs.run_folder import Generation

MOST_FAILURES = 3
_STOP_RETRY_S = 60.0  # for a controller that is away; SLURM, which has warned, will not wait much longer
_END_RETRY_S = 900.0
_REFUSED = "; SLURM has not started it again: "


def claim(run: Path, start: str, place: RankPlace) -> Generation:
    """Take the run over for a start, which the restart history will explain by the end of the one before.

    RunError where SLURM starts a job again that has failed too often without progress.
    """
    starts, end = read_starts(run), read_end(run)
    if end is None and starts:
        last = starts[-1]
        job = last.get("job")
        why, is_failure = why_ended(run, last, by_slurm=job is not None and job == place.slurm_job)
        state, step, before = "failed" if is_failure else "stopped", newest_step(run), last.get("start", "")
        end = record_end(run, start=before, job=job, state=state, why=why, step=step, is_failure=is_failure)
    if end and end.job and end.job == place.slurm_job and end.failures >= MOST_FAILURES:
        raise RunError(_in_vain(run, end))
    why = end.why if end else "first start"
    return Generation.take(run, start=start, job=place.slurm_job, nodes=list(place.nodes), why=why)


def finish(run: Path, start: str, place: RankPlace) -> None:
    """Record that a start has come to the end of the run."""
    record_end(run, start=start, job=place.slurm_job, state="finished", why="finished", step=newest_step(run))


def stop(run: Path, start: str, place: RankPlace, why: str) -> None:
    """Record that a start has stopped, and why; on SLURM let it start again, unless SLURM is ending it already.

    RunError where SLURM does not start it again.
    """
    job = place.slurm_job
    if job is None:
        record_end(run, start=start, job=None, state="stopped", why=why, step=newest_step(run))
    # else it is cancelled, or requeued from outside; the next start finds out
    elif is_still(job, restart_count(), retry_s=_STOP_RETRY_S):
        # before it is asked for, which ends this process
        end = record_end(run, start=start, job=job, state="requeued", why=why_warned(run, job), step=newest_step(run))
        _requeue(run, end, job, retry_s=_STOP_RETRY_S)


def afterwards(run: Path, start: str, job: str) -> str:
    """Requeue a job whose ranks have not all ended well, and return what to tell; called by its batch script.

    Empty where there is nothing to be done: the run is finished after all, or SLURM ends the job already. RunError with
    the cause where the job has failed too often without progress, or SLURM does not requeue it.
    """
    if not is_still(job, restart_count(), retry_s=_END_RETRY_S):
        return ""
    step = newest_step(run)
    why = why_died(run, start, job)
    end = record_end(run, start=start, job=job, state="failed", why=why, step=step, is_failure=True)
    if end.state == "finished":
        return ""
    if end.failures >= MOST_FAILURES:
        raise RunError(_in_vain(run, end))
    _requeue(run, end, job, retry_s=_END_RETRY_S)
    return f"{end.why}; requeued from step {step} (failure {end.failures} of at most {MOST_FAILURES} without progress)"


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint; 0 before the first."""
    return max(checkpoint_steps(run), default=0)


def _requeue(run: Path, end: End, job: str, *, retry_s: float) -> None:
    """Let a job start again; where SLURM refuses that, the end that is recorded says so."""
    try:
        requeue(job, retry_s=retry_s)
    except RunError as error:
        fail_end(run, f"{end.why.partition(_REFUSED)[0]}{_REFUSED}{error}")  # the batch script tries it once more
        raise


def _in_vain(run: Path, end: End) -> str:
    return (
        f"{run}: failed {end.failures} times without getting beyond step {end.step}; the last time: {end.why};"
        f" mend that, then hpcssl jobs requeue {run}"
    )


def main(run: str, token: str, exit_code: str) -> int:
    """Do what a batch script asks for at its end; returns its exit code."""
    if exit_code == "0":
        return 0
    try:
        message = afterwards(Path(run), start_name(token), os.environ["SLURM_JOB_ID"])
    except RunError as error:
        sys.stderr.write(f"[hpcssl] error: {error}\n")
        return int(exit_code)
    sys.stderr.write(f"[hpcssl] {message}\n" if message else "")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
