"""Starting a run's processes: in this process, on this machine, or on SLURM, through submitit; and waiting for them."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from hpcssl.core.errors import RunError
from hpcssl.jobs.cluster import Resources, live_ranks, stop_local, submit
from hpcssl.jobs.worker import PretrainJob, failure_file
from hpcssl.runs.metrics import last_record

_POLL_S = 0.2
_FULL_BYTES = 1 << 20
_MISSING_S = 5.0  # how long a rank may be gone without a word while others run; the first seconds are its start
_GRACE_S = 30.0  # for a step and a checkpoint


def launch(
    run: Path, resources: Resources, cluster: Literal["none", "local", "slurm"], *, on_step: Callable[[int], None]
) -> str:
    """Start a prepared run; on this machine also wait for its end.

    Parameters
    ----------
    on_step : called while waiting with the number of steps done so far

    Returns
    -------
    On this machine `finished` or `stopped`, on SLURM the job's id.

    Raises
    ------
    RunError
        With the cause in one line where it is known, else with the log to read.
    """
    token = uuid.uuid4().hex[:12]
    if cluster == "none":
        outcome = PretrainJob(str(run), token)()
        _report(run, on_step)
        return outcome
    local = cluster == "local"
    work = PretrainJob(
        str(run.resolve()),
        token,
        launcher_pid=os.getpid() if local else None,
        visible_gpus=os.environ.get("CUDA_VISIBLE_DEVICES") if local else None,
    )
    job = submit(work, run / "logs", resources, cluster, name=f"hpcssl-{run.name}")
    if cluster == "slurm":
        return str(job.job_id)
    try:
        return _wait(job, run, token, on_step)
    except RunError:  # the other ranks wait for one that is gone
        stop_local(job, grace_s=0)
        raise
    except BaseException:
        stop_local(job, grace_s=_GRACE_S)
        raise


def _wait(job: Any, run: Path, token: str, on_step: Callable[[int], None]) -> str:
    """Wait for a local job; RunError when a rank has failed, without waiting for those that wait for it."""
    ranks = job._sub_jobs or [job]
    missing_since = None
    while not job.done():
        _report(run, on_step)
        ended = sum(rank.paths.result_pickle.exists() for rank in ranks)
        live = live_ranks(job)
        missing = live is not None and len(live) + ended < len(ranks)
        missing_since = (missing_since or time.monotonic()) if missing else None
        if missing_since and time.monotonic() - missing_since > _MISSING_S:
            raise RunError(_cause(run, token, job))
        time.sleep(_POLL_S)
    _report(run, on_step)
    if all(rank.paths.result_pickle.exists() and rank.exception() is None for rank in ranks):
        return "finished" if all(rank.result() == "finished" for rank in ranks) else "stopped"
    raise RunError(_cause(run, token, job))


def _report(run: Path, on_step: Callable[[int], None]) -> None:
    if record := last_record(run):
        on_step(record["step"])


def _cause(run: Path, token: str, job: Any) -> str:
    """Return why a start failed: what a rank told, else a full disk, else where the log is."""
    words = [json.loads(f.read_text(encoding="utf-8")) for f in run.glob(f"logs/{failure_file(run, token, '*').name}")]
    words.sort(key=lambda word: (not word["told"], word["time"]))
    if words and words[0]["told"]:
        return str(words[0]["message"])
    if shutil.disk_usage(run).free < _FULL_BYTES:
        return f"{run}: the disk is full; free some space, then run the same command again"
    reason = f"{words[0]['message']} on rank {words[0]['rank']}" if words else "a process ended without a word"
    return f"{run}: training failed ({reason}); the log is {job.paths.stderr}; the same command goes on where it was"
