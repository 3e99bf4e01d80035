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
from hpcssl.jobs.cluster import Resources, submit
from hpcssl.jobs.worker import PretrainJob, failure_file
from hpcssl.runs.metrics import last_record

_POLL_S = 0.2
_FULL_BYTES = 1 << 20


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
        return PretrainJob(str(run), token)()
    work = PretrainJob(str(run.resolve()), token, os.getpid() if cluster == "local" else None)
    job = submit(work, run / "logs", resources, cluster, name=f"hpcssl-{run.name}")
    if cluster == "slurm":
        return str(job.job_id)
    return _wait(job, run, token, on_step)


def _wait(job: Any, run: Path, token: str, on_step: Callable[[int], None]) -> str:
    try:
        while not job.done():
            record = last_record(run)
            if record:
                on_step(record["step"])
            time.sleep(_POLL_S)
    except BaseException:
        job.cancel()
        raise
    if record := last_record(run):
        on_step(record["step"])
    results = [sub for sub in (job._sub_jobs or [job]) if sub.paths.result_pickle.exists()]
    if len(results) == len(job._sub_jobs or [job]) and all(sub.exception() is None for sub in results):
        return "finished" if all(sub.result() == "finished" for sub in results) else "stopped"
    raise RunError(_cause(run, token, job))


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
