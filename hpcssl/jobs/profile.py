"""Cluster profiles (what a cluster calls things, what its nodes have), and what a start asks of such nodes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import field

from hpcssl.core import config, resources
from hpcssl.core.config import Above0, AtLeast0, AtLeast1, settings
from hpcssl.core.errors import ConfigError

_INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


@settings
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
    environment : variables that the processes get, by name
    network_interface : that processes on several nodes talk through, such as ib0; None = NCCL and gloo choose
    """

    partition: str | None = None
    account: str | None = None
    constraint: str | None = None
    gpus_per_node: AtLeast0 = 1
    cpus_per_gpu: AtLeast1 = 8
    mem_gb_per_gpu: Above0 | None = None
    timeout_min: AtLeast1 = 24 * 60
    signal_lead_s: AtLeast1 = 120
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    network_interface: str | None = None

    def __post_init__(self) -> None:
        if self.signal_lead_s >= 60 * self.timeout_min:
            limit = f"timeout_min = {self.timeout_min}, which are {60 * self.timeout_min} s"
            raise ConfigError(f"profile: signal_lead_s = {self.signal_lead_s}; expected less than {limit}")
        unfit = next((name for name in self.environment if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)), None)
        if unfit is not None:
            raise ConfigError(f"profile: environment names {unfit!r}; expected letters, digits and _")

    @property
    def batch_setup(self) -> list[str]:
        """Lines of the batch script in front of the processes: `setup`, then what sets `environment` and the interface.

        >>> Profile(setup=("module load cuda",), environment={"A": "b c"}, network_interface="ib0").batch_setup
        ['module load cuda', 'export NCCL_SOCKET_IFNAME=ib0', 'export GLOO_SOCKET_IFNAME=ib0', "export A='b c'"]
        """
        variables = dict.fromkeys(_INTERFACE_VARIABLES, self.network_interface) if self.network_interface else {}
        variables |= self.environment
        return [*self.setup, *(f"export {name}={shlex.quote(value)}" for name, value in variables.items())]


@settings
class Resources:
    """What a start asks for.

    Attributes
    ----------
    nodes : machines
    fewer_nodes : other numbers of machines, all smaller, that will do when there are not so many (SLURM)
    processes_per_node : ranks on each
    profile : what the machines are; its `gpus_per_node` of 0 means ranks without GPUs, else each rank gets one
    """

    nodes: AtLeast1 = 1
    fewer_nodes: tuple[int, ...] = ()
    processes_per_node: AtLeast1 = 1
    profile: Profile = field(default_factory=lambda: Profile(gpus_per_node=0))


def load_profile(name_or_path: str) -> Profile:
    """Load a profile that ships (`a100`, `h100`, `v100`, `local`) or a YAML file.

    ConfigError for anything unknown in it, naming the nearest, or a value that cannot be.
    """
    path = resources.locate("profile", name_or_path)
    return config.build(Profile, config.read_yaml(path), where=f"profile {path.stem}")
