"""The lines of a batch script that are ours, and the environment in which `sbatch` reads it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from hpcssl.jobs.profile import Profile, Resources

OUT_OF_TIME = "[hpcssl] at the time limit, and not stopped yet: SLURM is asked to start the job again"
_MARK = "[hpcssl] start {} on "  # begins a line of the log
# variables that outrank the lines of a script: of what every script says, and of what it says if the profile does
_OVERRIDING_ALWAYS = (
    *("TIMELIMIT", "SIGNAL", "JOB_NAME", "OPEN_MODE", "REQUEUE", "NO_REQUEUE", "OUTPUT", "ERROR", "ARRAY_INX"),
    *("GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK", "CPUS_PER_GPU"),
)
_OVERRIDING_IF_SET = {
    "partition": ("PARTITION",),
    "account": ("ACCOUNT",),
    "constraint": ("CONSTRAINT",),
    "mem_gb_per_gpu": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
}


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """Return the command that runs a module with this interpreter."""
    return (sys.executable, "-u", "-m", module, *arguments)


def mark_start(token: str) -> str:
    """Return the line that begins the part of the log which a start writes."""
    return f'echo "{_MARK.format(f"{token}-${{SLURM_RESTART_COUNT:-0}}")}$SLURM_JOB_NODELIST" >&2'


def log_of_start(log: str, start: str) -> str:
    """Return the part of a job's log that was written during a start."""
    _, _, rest = log.partition(_MARK.format(start))
    return rest.partition(_MARK.partition("{")[0])[0]


def requeue_before_the_limit(profile: Profile) -> list[str]:
    """Return lines that requeue the job shortly before its time limit, at which SLURM ends it.

    Ranks that were warned requeue it themselves, and earlier. Those that have not got that far, in a long step or with
    a file system that hangs, get SLURM's KillWait to save, and another start in any case.
    """
    after_s = 60 * profile.timeout_min - -(-profile.signal_lead_s // 3)
    ask = 'until scontrol requeue "$SLURM_JOB_ID"; do sleep 5; done'
    wait = f"trap 'kill $! 2>/dev/null; exit' TERM; sleep {after_s} & wait $!"  # nothing is left when it is killed
    # SLURM ends a job by a signal to all processes: a sleep that ends by it has not come to the limit
    return [f'({wait} && {{ echo "{OUT_OF_TIME}"; {ask}; }}) >&2 &', "hpcssl_timer=$!"]


def choose_nodes(resources: Resources) -> list[str]:
    """Return lines that take the largest number of nodes that will do of those that there are."""
    if not resources.fewer_nodes:
        return []
    counts = " ".join(map(str, sorted({resources.nodes, *resources.fewer_nodes}, reverse=True)))
    return [
        f'for nodes in {counts}; do [ "$nodes" -le "$SLURM_JOB_NUM_NODES" ] && break; done',
        "export SLURM_JOB_NUM_NODES=$nodes SLURM_NNODES=$nodes",
        f"export SLURM_NTASKS=$((nodes * {resources.processes_per_node}))",
    ]


def outside_of_a_job() -> AbstractContextManager[None]:
    """Keep from what is submitted meanwhile the settings of the job that this process is in, if it is in one."""
    of_the_job = ("SLURM_", "SLURMD_", "SUBMITIT_") if "SLURM_JOB_ID" in os.environ else ()
    return _hidden({name for name in os.environ if name.startswith(of_the_job) and name != "SLURM_CONF"})


@contextmanager
def heeding(profile: Profile) -> Iterator[None]:
    """Keep from `sbatch` meanwhile the environment variables that outrank what a script says."""
    if_set = [names for setting, names in _OVERRIDING_IF_SET.items() if getattr(profile, setting) is not None]
    names = {f"SBATCH_{name}" for group in (_OVERRIDING_ALWAYS, *if_set) for name in group}
    with _hidden(names & set(os.environ)), outside_of_a_job():
        yield


@contextmanager
def _hidden(names: set[str]) -> Iterator[None]:
    values = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(values)
