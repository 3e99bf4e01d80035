"""All that hpcssl asks of submitit: start processes here, write and submit batch scripts, read a rank's environment."""

from __future__ import annotations

import io
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from hpcssl.core.errors import ConfigError, RunError
from hpcssl.jobs.batch_script import choose_nodes, heeding, mark_start, requeue_before_the_limit
from hpcssl.jobs.local_processes import ignoring_interrupts
from hpcssl.jobs.profile import Profile, Resources
from hpcssl.jobs.refusal import with_fix

_TIMEOUTS = 1_000_000  # a task of an array may run out of time so often: what it has done stays done
_MISREAD = {"slurm": r"[%\\\n]", "local": "%[jtAa]"}  # in the names of logs: `%j` is a job, and `\` no character
_FAR_MIN = 60 * 24 * 365  # submitit's local executor has a limit of two minutes if none is said


def job_environment() -> Any:
    """Return what submitit reads of the job that this process is a rank of; None outside a job."""
    try:
        return submitit.JobEnvironment()
    except RuntimeError:
        return None


def as_it_is(work: Any) -> Any:
    """Return what submitit needs to run `work` again after a requeue."""
    return submitit.helpers.DelayedSubmission(work)


def check_cluster(cluster: str, resources: Resources, out: Path) -> None:
    """Refuse, before anything is written, what cannot be started from here.

    ConfigError for machines without SLURM, GPUs or `srun` that are lacking, or an `out` of a name that is misread.
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
    if match := re.search(misread, str(folder.resolve())):
        raise ConfigError(f"{str(folder.resolve())!r}: no logs can go to a path with {match[0]!r}; choose another")


def submit_local(work: Any, folder: Path, resources: Resources, *, name: str) -> Any:
    """Start `work()` on every rank, on this machine, and return submitit's job; logs and pickles go to `folder`."""
    executor = submitit.AutoExecutor(folder=folder.resolve(), cluster="local")
    executor.update_parameters(
        name=name,
        tasks_per_node=resources.processes_per_node,
        gpus_per_node=resources.processes_per_node if resources.profile.gpus_per_node else 0,
        timeout_min=_FAR_MIN,
    )
    with ignoring_interrupts():
        return executor.submit(work)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch script: a command on every rank, and one on the first node when all ranks have ended.

    The ranks start from these words alone, so that nothing of submitit's needs to be kept until the job starts again.
    The exit code of `command` is added to `afterwards`, whose own is the job's. `token` names the submission, script
    and logs go to `folder`, and the job starts no earlier than in `begin_in_s` seconds.
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
        """Submit it; returns the job's id."""
        with _submitting(self.resources.profile):
            return str(self._executor()._submit_command(shlex.join(self.command)).job_id)

    def _executor(self) -> Any:
        executor = submitit.SlurmExecutor(folder=self.folder.resolve())
        resources, profile, ranks = self.resources, self.resources.profile, self.resources.processes_per_node
        requested = {
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
        timer = requeue_before_the_limit(profile)
        end = ("hpcssl_code=$?", "kill $hpcssl_timer 2>/dev/null", "exit $hpcssl_code")
        executor.update_parameters(
            **{key: value for key, value in requested.items() if value},
            wckey=None,  # else submitit's own, which a cluster that tracks them refuses
            additional_parameters=self._more(),
            setup=[mark_start(self.token), *timer, *profile.batch_setup, *choose_nodes(resources)],
            # the ranks of a step end together; and since SLURM 22.05 a step does not inherit its job's cores
            srun_args=["--kill-on-bad-exit=1", f"--ntasks-per-node={ranks}", f"--cpus-per-task={profile.cpus_per_gpu}"],
            teardown=[f'{shlex.join(self.afterwards)} "$?"', *end],
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
    """Submit something meanwhile; RunError with SLURM's or submitit's words, and what to do, where that fails."""
    try:
        # submitit prints SLURM's refusal, too; the error tells it
        with heeding(profile), redirect_stderr(io.StringIO()):
            yield
    except RuntimeError as error:  # what submitit's own errors all are
        raise RunError(with_fix(str(error))) from None


def submit_array(
    calls: Sequence[Any], folder: Path, profile: Profile, *, name: str, gpus: int, after: Sequence[str]
) -> str:
    """Submit a job array as `hpcssl.jobs.array.submit_calls` does, and return SLURM's id; all files go to `folder`."""
    _check_name(folder, _MISREAD["slurm"])
    requested = {
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
        **{key: value for key, value in requested.items() if value},
    )
    executor._executor.update_parameters(wckey=None)  # the other one leaves out what is None
    with _submitting(profile), executor.batch():
        jobs = [executor.submit(call) for call in calls]
    return str(jobs[0].job_id).partition("_")[0]
