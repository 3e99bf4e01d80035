"""What hpcssl asks of SLURM's own commands: how a job is, when one could start, and to start or end one."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from hpcssl.core.errors import RunError
from hpcssl.jobs.refusal import with_fix

_PATIENCE_S = 60.0  # a controller under load answers late
_PAUSE_S = 5.0
# what asking again does not change; all else, a controller that is away above all, may
_FOR_GOOD = re.compile(r"invalid (?:job|user)|denied|not permitted|disabled|already|is pending", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A job that SLURM has not done with: its state, why it waits, and its nodes, all as SLURM writes them."""

    state: str
    reason: str
    nodes: str


def queued(jobs: Iterable[str]) -> dict[str, Queued]:
    """Return those of some jobs that SLURM has not done with; RunError where SLURM does not answer."""
    ids = set(jobs)
    if not ids:
        return {}
    # all of one's own: squeue refuses a list of jobs if it has forgotten one of them
    lines = _ask("squeue", "--noheader", f"--user={os.getuid()}", "--format=%A|%T|%r|%N").splitlines()
    rows = [line.split("|") for line in lines if line.count("|") == 3]
    return {job: Queued(state=s, reason=reason, nodes=nodes) for job, s, reason, nodes in rows if job in ids}


def job_facts(job: str, *, retry_s: float = 0.0) -> dict[str, str]:
    """Return what `scontrol show job` says, by its names; RunError where SLURM knows no such job or does not answer."""
    words = _ask("scontrol", "--oneliner", "show", "job", job, retry_s=retry_s).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def is_still(job: str, restarts: int, *, retry_s: float = 0.0) -> bool:
    """Return whether a job runs, and is still the start that it was after so many restarts."""
    facts = job_facts(job, retry_s=retry_s)
    # SIGNALING, while SLURM is sending the very warning
    return facts.get("JobState") in ("RUNNING", "SIGNALING") and facts.get("Restarts") == str(restarts)


def seconds_left(facts: dict[str, str]) -> float | None:
    """Return how long a job may still run; None without a limit."""
    return None if "EndTime" not in facts else _seconds_until(facts["EndTime"])


def requeue(job: str, *, retry_s: float = 0.0) -> None:
    """Let a job start again; RunError with SLURM's words where it does not."""
    try:
        _ask("scontrol", "requeue", job, retry_s=retry_s)
    except RunError as error:
        if "is pending" not in str(error):  # else it was done, and only the answer was lost
            raise


def cancel(job: str) -> None:
    """End a job; what runs has SLURM's KillWait, 30 s as a rule, to save first."""
    _ask("scancel", job)


def failed_nodes(nodes: Iterable[str], since: float) -> list[str]:
    """Return those of some nodes that are down, or whose daemon has come up after `since` (seconds of the epoch)."""
    try:
        answer = _ask("scontrol", "--oneliner", "show", "node", ",".join(nodes))
    except RunError:
        return []
    failed = []
    for line in answer.splitlines():
        facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
        started = _seconds_until(facts.get("SlurmdStartTime", ""))
        is_new = started is not None and time.time() + started > since
        if is_new or re.match(r"DOWN|ERROR|FAIL|.*NOT_RESPONDING", facts.get("State", "")):
            failed.append(facts.get("NodeName", "?"))
    return failed


def could_start_in_s(script: str, nodes: int) -> float | None:
    """Return in how many seconds SLURM expects to start a batch script on so many nodes; None if never, as things are.

    Nothing is submitted; RunError with SLURM's words, and what to do, if it would refuse any number of nodes.
    """
    try:
        done = _run(["sbatch", "--test-only", f"--nodes={nodes}"], script)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunError(with_fix(f"sbatch --test-only: {error}")) from None
    if confirmed := re.search(r"to start at (\S+)", done.stderr):
        return max(0.0, _seconds_until(confirmed[1]) or 0.0)
    if "configuration is not available" in done.stderr:
        return None
    words = done.stderr.strip() or f"sbatch --test-only: exit code {done.returncode}, without a word"
    raise RunError(with_fix(words))


def _run(command: Sequence[str], script: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands, which writes times as they are read here."""
    env = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
    return subprocess.run(
        command, input=script, capture_output=True, text=True, timeout=_PATIENCE_S, check=False, env=env
    )


def _seconds_until(moment: str) -> float | None:
    """Return the seconds from now until a time as SLURM writes it; None for `Unknown`, `None` and the like."""
    try:
        return (datetime.fromisoformat(moment) - datetime.now()).total_seconds()
    except ValueError:
        return None


def _ask(*command: str, retry_s: float = 0.0) -> str:
    """Run one of SLURM's commands, for `retry_s` again where SLURM does not answer; RunError with its complaint."""
    until, pause_s = time.monotonic() + retry_s, _PAUSE_S
    while True:
        try:
            done = _run(command)
            why = "" if not done.returncode else " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        except subprocess.TimeoutExpired as error:
            why = str(error)
        except OSError as error:
            raise RunError(f"{shlex.join(command)}: {error}") from None
        if not why:
            return done.stdout
        if _FOR_GOOD.search(why) or time.monotonic() + pause_s > until:
            raise RunError(f"{shlex.join(command)}: {why}")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 60.0)
