"""All that hpcssl asks of submitit: start processes here, write and submit a batch script, tell a rank its place."""

from __future__ import annotations

import io
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit

from hpcssl.core.config import settings
from hpcssl.core.errors import ConfigError, RunError
from hpcssl.core.world import World
from hpcssl.jobs.profile import Profile

_MARK = "[hpcssl] start {} on "  # begins a line of the log
OUT_OF_TIME = "[hpcssl] at the time limit, and not stopped yet: SLURM is asked to start the job again"
_TIMEOUTS = 1_000_000  # a task of an array may run out of time so often: what it has done stays done
_MISREAD = {"slurm": r"[%\\\n]", "local": "%[jtAa]"}  # in the names of logs: `%j` is a job, and `\` no character
_FAR_MIN = 60 * 24 * 365  # submitit's local executor has a limit of two minutes if none is said


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

    nodes: int = 1
    fewer_nodes: tuple[int, ...] = ()
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
    nodes : names of the job's nodes
    cores : that the ranks of this node share
    slurm_job : SLURM's job id; None elsewhere
    """

    world: World
    local_rank: int = 0
    nodes: tuple[str, ...] = field(default_factory=lambda: (platform.node(),))
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
            nodes=tuple(env.hostnames)[: env.num_nodes],
            cores=cores,
            slurm_job=env.job_id if env.cluster == "slurm" else None,
        )


def check_cluster(cluster: str, resources: Resources, out: Path) -> None:
    """Refuse what cannot be started from here, before anything is written.

    Raises
    ------
    ConfigError
        For several machines without SLURM, SLURM on a machine that has no `srun`, or `out` of a name that is misread.
    """
    if cluster != "slurm" and resources.nodes > 1:
        raise ConfigError(f"--nodes {resources.nodes} needs --cluster slurm; --cluster {cluster} is this machine alone")
    gpus = resources.profile.gpus_per_node
    if cluster == "local" and 0 < gpus < resources.processes_per_node:
        raise ConfigError(f"{resources.processes_per_node} processes need as many GPUs; this machine shows {gpus}")
    if cluster == "slurm" and not shutil.which("srun"):
        raise ConfigError("--cluster slurm: no srun on PATH; run this on a login node, or see hpcssl doctor")
    if cluster != "none":
        _check_name(out, _MISREAD[cluster])


def _check_name(folder: Path, misread: str) -> None:
    """Refuse what is read as something else in the names of logs."""
    found = re.search(misread, str(folder.resolve()))
    if found:
        raise ConfigError(f"{str(folder.resolve())!r}: no logs can go to a path with {found[0]!r}; choose another")


def submit_local(work: Any, folder: Path, resources: Resources, *, name: str) -> Any:
    """Start `work()` on every rank, on this machine, and return submitit's job; logs and pickles go to `folder`."""
    executor = submitit.AutoExecutor(folder=folder.resolve(), cluster="local")
    executor.update_parameters(
        name=name,
        tasks_per_node=resources.processes_per_node,
        gpus_per_node=resources.processes_per_node if resources.profile.gpus_per_node else 0,
        timeout_min=_FAR_MIN,
    )
    with _ignoring_interrupts():
        return executor.submit(work)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch script: a command on every rank, and one on the first node when all ranks have ended.

    The ranks start from these words alone, so that nothing of submitit's needs to be kept until the job starts again.

    Attributes
    ----------
    name : of the job
    token : names the submission
    folder : for script and logs
    resources : see there
    command : what every rank runs
    afterwards : what runs when the ranks have ended; the exit code of `command` is added to it, its own is the job's
    begin_in_s : do not start earlier than in so many seconds
    """

    name: str
    token: str
    folder: Path
    resources: Resources
    command: tuple[str, ...]
    afterwards: tuple[str, ...]
    begin_in_s: float = 0.0

    def script(self) -> str:
        """Return the script as `sbatch` gets it."""
        return str(self._executor()._make_submission_file_text(shlex.join(self.command), ""))

    def submit(self) -> str:
        """Submit it; returns the job's id.

        Raises
        ------
        RunError
            With SLURM's own words where it refuses the job.
        """
        with _submitting(self.resources.profile):
            return str(self._executor()._submit_command(shlex.join(self.command)).job_id)

    def _executor(self) -> Any:
        executor = submitit.SlurmExecutor(folder=self.folder.resolve())
        resources, profile, ranks = self.resources, self.resources.profile, self.resources.processes_per_node
        asked = {
            "job_name": self.name,
            "nodes": resources.nodes,
            "ntasks_per_node": None if resources.fewer_nodes else ranks,
            "gpus_per_node": ranks if profile.gpus_per_node else None,
            "cpus_per_task": profile.cpus_per_gpu,
            "mem": profile.mem_gb_per_gpu and f"{round(profile.mem_gb_per_gpu * ranks * 1024)}M",
            "time": profile.timeout_min,
            "partition": profile.partition,
            "account": profile.account,
            "constraint": profile.constraint,
            "signal_delay_s": profile.signal_lead_s,
        }
        executor.update_parameters(
            **{key: value for key, value in asked.items() if value},
            wckey=None,  # else submitit's own, which a cluster that tracks them refuses
            additional_parameters=self._more(),
            setup=[
                _mark(f"{self.token}-${{SLURM_RESTART_COUNT:-0}}"),
                *_requeue_before_the_limit(profile),
                *profile.batch_setup,
                *_choose_nodes(resources),
            ],
            # the ranks of a step end together; and since SLURM 22.05 a step does not inherit its job's cores
            srun_args=[
                "--kill-on-bad-exit=1",
                f"--ntasks-per-node={ranks}",
                f"--cpus-per-task={profile.cpus_per_gpu}",
            ],
            teardown=[
                f'{shlex.join(self.afterwards)} "$?"',
                "hpcssl_code=$?",
                "kill $hpcssl_timer 2>/dev/null",
                "exit $hpcssl_code",
            ],
        )
        return executor

    def _more(self) -> dict[str, Any]:
        """Return what submitit has no name for."""
        more: dict[str, Any] = {"requeue": True}  # a cluster may refuse it to jobs that did not ask
        resources = self.resources
        if resources.fewer_nodes:
            more["nodes"] = f"{min(resources.fewer_nodes)}-{resources.nodes}"
            # not the number of ranks, of which SLURM then plans the smallest, and so the fewest nodes
            more["mincpus"] = resources.processes_per_node * resources.profile.cpus_per_gpu
        if self.begin_in_s >= 1:
            more["begin"] = f"now+{round(self.begin_in_s)}"
        return more


@contextmanager
def _submitting(profile: Profile) -> Iterator[None]:
    """Submit something meanwhile; RunError with the words of SLURM, or of submitit, where that does not succeed."""
    try:
        # submitit prints SLURM's refusal, too; the error tells it
        with heeding(profile), redirect_stderr(io.StringIO()):
            yield
    except RuntimeError as error:  # what submitit's own errors all are
        raise RunError(" ".join(str(error).split())) from None


def start_name(token: str) -> str:
    """Return the name of this start among those of a submission and of its requeues."""
    return f"{token}-{restart_count()}"


def log_of_start(log: str, start: str) -> str:
    """Return the part of a job's log that was written during a start."""
    _, _, rest = log.partition(_MARK.format(start))
    return rest.partition(_MARK.partition("{")[0])[0]


def _mark(start: str) -> str:
    return f'echo "{_MARK.format(start)}$SLURM_JOB_NODELIST" >&2'


def _requeue_before_the_limit(profile: Profile) -> list[str]:
    """Return lines of the batch script that requeue the job shortly before its time limit, at which SLURM ends it.

    Ranks that were warned requeue it themselves, and earlier. Those that have not got that far, in a long step or with
    a file system that hangs, get SLURM's KillWait to save, and another start in any case.
    """
    after_s = 60 * profile.timeout_min - -(-profile.signal_lead_s // 3)
    ask = 'until scontrol requeue "$SLURM_JOB_ID"; do sleep 5; done'
    wait = f"trap 'kill $! 2>/dev/null; exit' TERM; sleep {after_s} & wait $!"  # nothing is left when it is killed
    # SLURM ends a job by a signal to all processes: a sleep that ends by it has not come to the limit
    return [f'({wait} && {{ echo "{OUT_OF_TIME}"; {ask}; }}) >&2 &', "hpcssl_timer=$!"]


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """Return the command that runs a module of ours with this interpreter."""
    return (sys.executable, "-u", "-m", module, *arguments)


def _choose_nodes(resources: Resources) -> list[str]:
    """Return lines of the batch script that take the largest number of nodes that will do of those that there are."""
    if not resources.fewer_nodes:
        return []
    counts = " ".join(map(str, sorted({resources.nodes, *resources.fewer_nodes}, reverse=True)))
    return [
        f'for nodes in {counts}; do [ "$nodes" -le "$SLURM_JOB_NUM_NODES" ] && break; done',
        "export SLURM_JOB_NUM_NODES=$nodes SLURM_NNODES=$nodes",
        f"export SLURM_NTASKS=$((nodes * {resources.processes_per_node}))",
    ]


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Let what starts meanwhile ignore Ctrl-C, which a terminal sends to all: its launcher then asks it to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def ask_to_stop(job: Any) -> None:
    """Ask the ranks of a job on this machine to save and stop; one that only starts may not hear it, or end at once."""
    job._process.send_signal(signal.SIGTERM)  # submitit's controller hands it to the ranks


def stop_local(job: Any, *, grace_s: float) -> None:
    """Ask the ranks of a job on this machine to save and stop, and end what is left after `grace_s` seconds."""
    ask_to_stop(job)
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


def restart_count() -> int:
    """Return how often SLURM has requeued this job; 0 elsewhere."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


@contextmanager
def outside_of_a_job() -> Iterator[None]:
    """Keep from what is submitted meanwhile the settings of the job that this process is in, if it is in one."""
    of_the_job = ("SLURM_", "SLURMD_", "SUBMITIT_") if "SLURM_JOB_ID" in os.environ else ()
    names = [name for name in os.environ if name.startswith(of_the_job) and name != "SLURM_CONF"]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


# sbatch heeds these before the lines of a script; what the script asks for in any case
_ALWAYS_ASKED = (
    *("TIMELIMIT", "SIGNAL", "JOB_NAME", "OPEN_MODE", "REQUEUE", "NO_REQUEUE", "OUTPUT", "ERROR", "ARRAY_INX"),
    *("GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK", "CPUS_PER_GPU"),
)
_ASKED_WITH = {  # and what it asks for where the profile does
    "partition": ("PARTITION",),
    "account": ("ACCOUNT",),
    "constraint": ("CONSTRAINT",),
    "mem_gb_per_gpu": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
}


@contextmanager
def heeding(profile: Profile) -> Iterator[None]:
    """Keep from `sbatch` meanwhile the environment variables that outrank what a script asks for."""
    asked = [names for setting, names in _ASKED_WITH.items() if getattr(profile, setting) is not None]
    outranking = {f"SBATCH_{name}" for names in (_ALWAYS_ASKED, *asked) for name in names}
    hidden = {name: os.environ.pop(name) for name in outranking & set(os.environ)}
    try:
        with outside_of_a_job():
            yield
    finally:
        os.environ.update(hidden)


def submit_array(
    calls: Sequence[Any], folder: Path, profile: Profile, *, name: str, gpus: int, after: Sequence[str]
) -> str:
    """Submit a job array, one process a call, and return SLURM's id; logs and pickles go to `folder`.

    Parameters
    ----------
    gpus : of each task
    after : ids of jobs that must have ended well before; SLURM drops this one where that can no longer be

    Raises
    ------
    ConfigError
        For a folder of a name that SLURM misreads.
    RunError
        With SLURM's own words where it refuses the job.
    """
    _check_name(folder, _MISREAD["slurm"])
    asked = {
        "mem_gb": profile.mem_gb_per_gpu,
        "slurm_partition": profile.partition,
        "slurm_account": profile.account,
        "slurm_constraint": profile.constraint,
        "slurm_setup": profile.batch_setup,
        "slurm_srun_args": [f"--cpus-per-task={profile.cpus_per_gpu}"],  # see `Batch`
        "slurm_signal_delay_s": profile.signal_lead_s,
        "slurm_dependency": after and f"afterok:{':'.join(after)}",
        "slurm_additional_parameters": {"requeue": True} | ({"kill-on-invalid-dep": "yes"} if after else {}),
    }
    executor = submitit.AutoExecutor(folder=folder.resolve(), cluster="slurm", slurm_max_num_timeout=_TIMEOUTS)
    executor.update_parameters(
        name=name,
        nodes=1,
        tasks_per_node=1,
        gpus_per_node=gpus,
        cpus_per_task=profile.cpus_per_gpu,
        timeout_min=profile.timeout_min,
        **{key: value for key, value in asked.items() if value},
    )
    executor._executor.update_parameters(wckey=None)  # the other one leaves out what is None
    with _submitting(profile), executor.batch():
        jobs = [executor.submit(call) for call in calls]
    return str(jobs[0].job_id).partition("_")[0]
