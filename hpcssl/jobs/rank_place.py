"""Where a process stands among the ranks of its job, and which start of the job it belongs to."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field

from hpcssl.core.world import World
from hpcssl.jobs.cluster import job_environment


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """The place of this process among the ranks of its job, and of this node among the job's nodes."""

    world: World
    local_rank: int = 0
    nodes: tuple[str, ...] = field(default_factory=lambda: (platform.node(),))
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))  # that the ranks of this node share
    slurm_job: str | None = None

    @classmethod
    def here(cls) -> RankPlace:
        """Read the environment; outside a job, this process is alone."""
        env = job_environment()
        if env is None:
            return cls(world=World())
        cores = len(os.sched_getaffinity(0))
        if env.cluster == "slurm":  # which may have bound this rank to its own cores
            cores = int(os.environ.get("SLURM_CPUS_PER_TASK", "1")) * max(1, env.num_tasks // env.num_nodes)
        return cls(
            world=World(rank=env.global_rank, size=env.num_tasks),
            local_rank=env.local_rank,
            nodes=tuple(env.hostnames)[: env.num_nodes],
            cores=cores,
            slurm_job=env.job_id if env.cluster == "slurm" else None,
        )


def start_name(token: str) -> str:
    """Return the name of this start among those of a submission and of its requeues."""
    return f"{token}-{restart_count()}"


def restart_count() -> int:
    """Return how often SLURM has requeued this job; 0 elsewhere."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
