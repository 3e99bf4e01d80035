"""Why a start ended: from what its ranks left, what SLURM wrote into the job's log, and how the nodes are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from hpcssl.core.errors import UserError
from hpcssl.jobs.batch_script import OUT_OF_TIME, log_of_start
from hpcssl.jobs.slurm import failed_nodes, job_facts, seconds_left
from hpcssl.jobs.submission import read_submission

PREEMPTED = "preempted"
TIME_LIMIT = "time limit"
REQUEUED = "requeued by an administrator or by hand"
WARNED = "warned by a signal"
CANCELLED = "cancelled"
WITHOUT_A_WORD = "ended without a word"
_EARLY_S = 90.0  # SLURM looks at limits every 30 s, and may warn up to a minute early
_SLURMS_WORDS = {"TIME LIMIT": TIME_LIMIT, "PREEMPTION": PREEMPTED, "JOB REQUEUE": REQUEUED, "": CANCELLED}
# as slurmd writes them: *** STEP 7.0 ON node1 CANCELLED AT 2026-11-21T15:37:51 DUE TO TIME LIMIT ***
_CANCELLED = re.compile(r"\*\*\* (?:JOB|STEP) .* CANCELLED AT \S+(?: DUE TO (.+?))?(?:,.*)? \*\*\*")
_NODE_FAILURE = "NODE FAILURE"
# as srun writes them: srun: error: node2: tasks 2-3: Killed
_DIED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.+)")
_EXITED = "Exited with exit code"
# srun: error: Node failure on node2; srun: error: Task launch for StepId=7.0 failed on node node2: …
_NODE = re.compile(r"srun: error: (?:Node failure on|Task launch for \S+ failed on node) ([^\s:]+)")


def log_file(run: Path, job: str, rank: int = 0) -> Path:
    """Return where a rank of a job writes; rank 0 shares its file with the batch script, srun and SLURM."""
    return run / "logs" / f"{job}_{rank}_log.err"


def why_warned(run: Path, job: str) -> str:
    """Return why SLURM has warned a job that runs; never an error, so that nothing keeps the job from going on."""
    try:
        facts, submission = job_facts(job), read_submission(run)
    except UserError:
        return WARNED
    if facts.get("PreemptTime", "None") != "None":
        return PREEMPTED
    left = seconds_left(facts)
    lead_s = submission.resources.profile.signal_lead_s if submission else 0
    return TIME_LIMIT if left is not None and left <= lead_s + _EARLY_S else WARNED


def why_ended(run: Path, start: Mapping[str, Any], *, by_slurm: bool) -> tuple[str, bool]:
    """Return why a start that left no word has ended, and whether that is a failure.

    `start` is its line in the restart history; `by_slurm`: SLURM has started the same job again.
    """
    job = start.get("job")
    if not job:
        return WITHOUT_A_WORD, True
    log = _log(run, start["start"], job)
    if node := _NODE.search(log):
        return _failed([node[1]]), True
    if OUT_OF_TIME in log:
        return TIME_LIMIT, True
    # the words of several steps; what gives no reason came along with one that does
    reasons = sorted(_CANCELLED.findall(log), key=lambda reason: not reason)
    if not reasons or reasons[0] == _NODE_FAILURE:
        failed = failed_nodes(start["nodes"], datetime.strptime(start["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp())
        if failed or reasons:
            return _failed(failed), True
        return (REQUEUED, False) if by_slurm else (WITHOUT_A_WORD, True)
    why = _SLURMS_WORDS.get(reasons[0], reasons[0].lower())
    return (REQUEUED if why == CANCELLED and by_slurm else why), why == TIME_LIMIT


def why_died(run: Path, start: str, job: str) -> str:
    """Return why the ranks of a start on SLURM have ended in failure, in one line."""
    words, file, log = read_words(run, start), log_file(run, job), _log(run, start, job)
    if node := _NODE.search(log):
        return _failed([node[1]])
    if words and words[0]["told"]:
        return f"rank {words[0]['rank']}: {words[0]['message']}"
    died = _DIED.findall(log)
    killed = next((one for one in died if not one[2].startswith(_EXITED)), None)
    if killed:
        return "rank {1} died on {0}: {2}".format(*killed)
    if words:
        return f"rank {words[0]['rank']} failed: {words[0]['message']}; see {file}"
    return "rank {1} died on {0}: {2}".format(*died[0]) if died else f"a process ended without a word; see {file}"


def failure_file(run: Path, start: str, rank: int | str) -> Path:
    """Return where a rank leaves word of its failure."""
    return run / "logs" / f"failure-{start}-rank{rank}.json"


def read_words(run: Path, start: str) -> list[dict[str, Any]]:
    """Return what the ranks of a start left: time, rank, message, and whether it is told to a user as it is.

    What is told comes first, then what came first.
    """
    words = []
    for file in run.glob(f"logs/{failure_file(run, start, '*').name}"):
        with suppress(json.JSONDecodeError):  # it was killed while it wrote
            words.append(json.loads(file.read_text(encoding="utf-8")))
    return sorted(words, key=lambda word: (not word["told"], word["time"]))


def _failed(nodes: Sequence[str]) -> str:
    return f"a node failed: {', '.join(nodes) or 'SLURM does not say which'}"


def _log(run: Path, start: str, job: str) -> str:
    """Return what rank 0, the batch script, srun and SLURM wrote during a start."""
    file = log_file(run, job)
    return log_of_start(file.read_text(encoding="utf-8", errors="replace"), start) if file.exists() else ""
