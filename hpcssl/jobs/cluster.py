"""All that hpcssl asks of submitit: submit a job, tell a rank its place, put a job back as it is."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import submitit

from hpcssl.core.errors import ConfigError, RunError
from hpcssl.core.world import World
from hpcssl.jobs.profile import Profile

_FAR_MIN = 60 * 24 * 365  # submitit's local executor has a limit of two minutes if none is said


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a start asks for.

    Attributes
    ----------
    nodes : machines
    processes_per_node : ranks on each
    profile : what the machines are; its `gpus_per_node` of 0 means ranks without GPUs, else each rank gets one
    """

    nodes: int = 1
    processes_per_node: int = 1
    profile: Profile = field(default_factory=lambda: Profile(gpus_per_node=0))

    def __post_init__(self) -> None:
        for name in ("nodes", "processes_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands among the ranks of its job.

    Attributes
    ----------
    world : rank and number of ranks
    local_rank : rank on this node
    num_nodes : of the job
    cores : that the ranks of this node share
    slurm_job : SLURM's job id; None elsewhere
    """

    world: World
    local_rank: int = 0
    num_nodes: int = 1
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    slurm_job: str | None = None

    @classmethod
    def here(cls) -> Place:
        """Read the environment; outside a job, this process is alone."""
        try:
            env = submitit.JobEnvironment()
        except RuntimeError:
            return cls(world=World())
        cores = len(os.sched_getaffinity(0))
        if env.cluster == "slurm":  # which may have bound this rank to its own cores
            cores = int(os.environ.get("SLURM_CPUS_PER_TASK", "1")) * max(1, env.num_tasks // env.num_nodes)
        return cls(
            world=World(rank=env.global_rank, size=env.num_tasks),
            local_rank=env.local_rank,
            num_nodes=env.num_nodes,
            cores=cores,
            slurm_job=env.job_id if env.cluster == "slurm" else None,
        )


def check_cluster(cluster: str, resources: Resources) -> None:
    """Refuse what cannot be started from here, before anything is written.

    Raises
    ------
    ConfigError
        For several machines without SLURM, or SLURM on a machine that has no `srun`.
    """
    if cluster != "slurm" and resources.nodes > 1:
        raise ConfigError(f"--nodes {resources.nodes} needs --cluster slurm; --cluster {cluster} is this machine alone")
    gpus = resources.profile.gpus_per_node
    if cluster == "local" and 0 < gpus < resources.processes_per_node:
        raise ConfigError(f"{resources.processes_per_node} processes need as many GPUs; this machine shows {gpus}")
    if cluster == "slurm" and not shutil.which("srun"):
        raise ConfigError("--cluster slurm: no srun on PATH; run this on a login node, or see hpcssl doctor")


def submit(work: Any, folder: Path, resources: Resources, cluster: Literal["local", "slurm"], *, name: str) -> Any:
    """Start `work()` on every rank and return submitit's job; its logs and pickles go to `folder`.

    Raises
    ------
    RunError
        With SLURM's own words where it refuses the job.
    """
    executor = submitit.AutoExecutor(folder=folder.resolve(), cluster=cluster)
    profile, ranks = resources.profile, resources.processes_per_node
    executor.update_parameters(
        name=name,
        nodes=resources.nodes,
        tasks_per_node=ranks,
        gpus_per_node=ranks if profile.gpus_per_node else 0,
        timeout_min=profile.timeout_min if cluster == "slurm" else _FAR_MIN,
    )
    if cluster == "slurm":
        asked = {
            "cpus_per_task": profile.cpus_per_gpu,
            "mem_gb": profile.mem_gb_per_gpu and profile.mem_gb_per_gpu * ranks,
            "slurm_partition": profile.partition,
            "slurm_account": profile.account,
            "slurm_constraint": profile.constraint,
            "slurm_setup": list(profile.setup),
            "slurm_signal_delay_s": profile.signal_lead_s,
            "slurm_additional_parameters": {"requeue": True},  # a cluster may refuse it to jobs that did not ask
        }
        executor.update_parameters(**{key: value for key, value in asked.items() if value})
    try:
        # submitit prints SLURM's refusal, too; the error below is what tells it
        with _ignoring_interrupts(cluster == "local"), redirect_stderr(io.StringIO()):
            return executor.submit(work)
    except submitit.core.utils.FailedJobError as error:
        raise RunError(f"SLURM refused the job: {' '.join(str(error).split())}") from None


@contextmanager
def _ignoring_interrupts(wanted: bool) -> Iterator[None]:
    """Let what starts meanwhile ignore Ctrl-C, which a terminal sends to all: its launcher then asks it to stop."""
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def stop_local(job: Any, *, grace_s: float) -> None:
    """Ask the ranks of a job on this machine to save and stop, and end what is left after `grace_s` seconds."""
    job._process.send_signal(signal.SIGTERM)  # submitit's controller hands it to the ranks
    until = time.monotonic() + grace_s
    while not job.done() and time.monotonic() < until:
        time.sleep(0.05)
    if not job.done():
        for pid in live_ranks(job) or []:
            os.kill(pid, signal.SIGKILL)
        job._process.wait()


def live_ranks(job: Any) -> list[int] | None:
    """Return the process ids of a local job's ranks that still run; None where the system does not tell."""
    controller = job._process.pid
    try:
        return [int(pid) for pid in Path(f"/proc/{controller}/task/{controller}/children").read_text().split()]
    except OSError:
        return None


def as_it_is(work: Any) -> Any:
    """Return what submitit needs to run `work` again after a requeue."""
    return submitit.helpers.DelayedSubmission(work)


def requeue(slurm_job: str) -> None:
    """Let SLURM start this job again, unless SLURM is ending it already: cancelled, or requeued from outside."""
    ask = ["squeue", "--noheader", "--jobs", slurm_job, "--format=%T"]
    if subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip() == "RUNNING":
        subprocess.run(["scontrol", "requeue", slurm_job], check=True)


def restart_count() -> int:
    """Return how often SLURM has requeued this job; 0 elsewhere."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
