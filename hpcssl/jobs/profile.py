"""What a cluster calls things and what its nodes have: cluster profiles, by name or as a file."""

from __future__ import annotations

from dataclasses import dataclass

from hpcssl.core import config, resources


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A kind of node of a SLURM cluster.

    Attributes
    ----------
    partition, account, constraint : as `sbatch` takes them; None = the cluster's default
    gpus_per_node : GPUs reserved on each node, one process each; 0 = processes without GPUs
    cpus_per_gpu : cores reserved for each process
    mem_gb_per_gpu : memory reserved for each process, in GB; None = the cluster's default
    timeout_min : time limit of a job, in minutes
    signal_lead_s : how long before the limit SLURM warns the run, in seconds
    setup : shell lines to run before the processes start
    """

    partition: str | None = None
    account: str | None = None
    constraint: str | None = None
    gpus_per_node: int = 1
    cpus_per_gpu: int = 8
    mem_gb_per_gpu: float | None = None
    timeout_min: int = 24 * 60
    signal_lead_s: int = 120
    setup: tuple[str, ...] = ()


def load_profile(name_or_path: str) -> Profile:
    """Load a profile that ships (`a100`, `v100`, `cpu`) or a YAML file; ConfigError for anything unknown in it."""
    path = resources.locate("profile", name_or_path)
    return config.build(Profile, config.read_yaml(path), where=f"profile {path.stem}")
