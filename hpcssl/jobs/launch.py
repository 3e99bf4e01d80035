"""Starting a run's processes: in this process, on this machine, or on SLURM, through submitit; and waiting for them."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpcssl.core.errors import RunError
from hpcssl.jobs.worker import PretrainJob, failure_file
from hpcssl.runs.metrics import last_record

_POLL_S = 0.2
_FULL_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a start asks for.

    Attributes
    ----------
    nodes : machines
    processes_per_node : ranks on each; one GPU a rank where there are GPUs
    gpus_per_node : GPUs to reserve on each; 0 = CPU only
    cpus_per_process : cores to reserve for each rank (SLURM)
    timeout_min : time limit of one job, in minutes (SLURM)
    partition, account : of SLURM; None = the cluster's default
    """

    nodes: int = 1
    processes_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_process: int = 1
    timeout_min: int = 24 * 60
    partition: str | None = None
    account: str | None = None


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
    job = _submit(run, PretrainJob(str(run), token, os.getpid() if cluster == "local" else None), resources, cluster)
    if cluster == "slurm":
        return str(job.job_id)
    return _wait(job, run, token, on_step)


def _submit(run: Path, work: PretrainJob, resources: Resources, cluster: str) -> Any:
    """Hand the work to submitit."""
    import submitit

    executor = submitit.AutoExecutor(folder=run.resolve() / "logs", cluster=cluster)
    executor.update_parameters(
        name=f"hpcssl-{run.name}",
        nodes=resources.nodes,
        tasks_per_node=resources.processes_per_node,
        gpus_per_node=resources.gpus_per_node,
        # the local executor counts its limit in steps of a loop; the run ends by itself, so the limit only must be far
        timeout_min=resources.timeout_min if cluster == "slurm" else 60 * 24 * 365,
    )
    if cluster == "slurm":
        executor.update_parameters(
            cpus_per_task=resources.cpus_per_process,
            slurm_partition=resources.partition,
            slurm_account=resources.account,
            slurm_signal_delay_s=120,
        )
    try:
        return executor.submit(work)
    except submitit.core.utils.FailedJobError as error:
        raise RunError(f"SLURM refused the job: {' '.join(str(error).split())}") from None


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
