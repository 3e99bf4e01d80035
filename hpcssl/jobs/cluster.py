"""All that hpcssl asks of submitit: submit a job, tell a rank its place, put a job back as it is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import submitit

from hpcssl.core.errors import RunError
from hpcssl.core.world import World

_FAR_MIN = 60 * 24 * 365  # submitit's local executor has a limit of two minutes if none is said


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


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands among the ranks of its job.

    Attributes
    ----------
    world : rank and number of ranks
    local_rank : rank on this node
    num_nodes : of the job
    slurm_job : SLURM's job id; None elsewhere
    """

    world: World
    local_rank: int = 0
    num_nodes: int = 1
    slurm_job: str | None = None

    @classmethod
    def here(cls) -> Place:
        """Read the environment; outside a job, this process is alone."""
        try:
            env = submitit.JobEnvironment()
        except RuntimeError:
            return cls(world=World())
        return cls(
            world=World(rank=env.global_rank, size=env.num_tasks),
            local_rank=env.local_rank,
            num_nodes=env.num_nodes,
            slurm_job=env.job_id if env.cluster == "slurm" else None,
        )


def submit(work: Any, folder: Path, resources: Resources, cluster: Literal["local", "slurm"], *, name: str) -> Any:
    """Start `work()` on every rank and return submitit's job; its logs and pickles go to `folder`.

    Raises
    ------
    RunError
        With SLURM's own words where it refuses the job.
    """
    executor = submitit.AutoExecutor(folder=folder.resolve(), cluster=cluster)
    executor.update_parameters(
        name=name,
        nodes=resources.nodes,
        tasks_per_node=resources.processes_per_node,
        gpus_per_node=resources.gpus_per_node,
        timeout_min=resources.timeout_min if cluster == "slurm" else _FAR_MIN,
    )
    if cluster == "slurm":
        executor.update_parameters(cpus_per_task=resources.cpus_per_process, slurm_signal_delay_s=120)
        asked = {"slurm_partition": resources.partition, "slurm_account": resources.account}
        executor.update_parameters(**{key: value for key, value in asked.items() if value})
    try:
        return executor.submit(work)
    except submitit.core.utils.FailedJobError as error:
        raise RunError(f"SLURM refused the job: {' '.join(str(error).split())}") from None


def as_it_is(work: Any) -> Any:
    """Return what submitit needs to run `work` again after a requeue."""
    return submitit.helpers.DelayedSubmission(work)


def restart_count() -> int:
    """Return how often SLURM has requeued this job; 0 elsewhere."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
