"""Why a start ended, from its part of a job's log; what SLURM, srun and ranks wrote there, word by word."""

from __future__ import annotations

import json

import pytest

from hpcssl.core.errors import RunError
from hpcssl.jobs import causes
from hpcssl.jobs.batch_script import OUT_OF_TIME
from hpcssl.jobs.causes import failure_file, log_file, why_died, why_ended, why_warned

JOB = "42"
BEFORE = """[hpcssl] start t-0 on node[1-2]
[rank 0] begins at step 0 of 120 with 4 processes
srun: error: node1: task 0: Segmentation fault
slurmstepd: error: *** STEP 42.0 ON node1 CANCELLED AT 2026-11-21T15:30:00 DUE TO TIME LIMIT ***
[hpcssl] start t-1 on node[1-2]
"""
AFTER = "\n[hpcssl] start t-2 on node[1-2]\nsrun: error: node9: task 9: Bus error\n"
START = {"start": "t-1", "job": JOB, "time": "2026-11-21T15:36:00+0000", "nodes": ["node1", "node2"]}


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(causes, "failed_nodes", lambda nodes, since: [])
    return tmp_path


def _write(run, text: str) -> None:
    log_file(run, JOB).write_text(BEFORE + text + AFTER)


def _word(run, rank: int, message: str, *, told: bool = False, time: float = 0.0) -> None:
    word = {"time": time, "rank": rank, "told": told, "message": message}
    failure_file(run, "t-1", rank).write_text(json.dumps(word))


FAILED = "a node failed"
NODE_FAILURE = " DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS"
PEER = "RuntimeError('Connection closed by peer')"
SAID = "slurmstepd: error: *** STEP 42.0 ON node1 CANCELLED AT 2026-11-21T15:37:51{} ***\n"
EXITED, KILLED = "node1: task 1: Exited with exit code 120", "node2: task 2: Killed"


@pytest.mark.parametrize(
    ("said", "by_slurm", "why", "is_failure"),
    [
        (SAID.format(" DUE TO TIME LIMIT"), True, causes.TIME_LIMIT, True),
        (SAID.format(" DUE TO PREEMPTION"), True, causes.PREEMPTED, False),
        (SAID.format(" DUE TO JOB REQUEUE"), True, causes.REQUEUED, False),
        (SAID.format(NODE_FAILURE), True, f"{FAILED}: SLURM does not say which", True),
        (SAID.format(" DUE TO task-launch failure (2)"), True, "task-launch failure (2)", False),
        (SAID.format(""), True, causes.REQUEUED, False),  # the job is back
        (SAID.format(""), False, causes.CANCELLED, False),  # and then submitted again
        # the batch script asks for another start at the limit
        (f"{OUT_OF_TIME}\n{SAID.format(' DUE TO JOB REQUEUE')}", True, causes.TIME_LIMIT, True),
        # a reason outweighs words without one
        (SAID.format("") + SAID.format(" DUE TO PREEMPTION").replace("STEP 42.0", "JOB 42"), True, "preempted", False),
        ("", True, causes.REQUEUED, False),
        ("", False, causes.WITHOUT_A_WORD, True),
    ],
)
def test_slurms_last_words_in_the_log(run, said, by_slurm, why, is_failure):
    _write(run, said)
    assert why_ended(run, START, by_slurm=by_slurm) == (why, is_failure)


def test_nodes_that_failed_are_named(run, monkeypatch):
    _write(run, "")
    monkeypatch.setattr(causes, "failed_nodes", lambda nodes, since: [nodes[1]])
    assert why_ended(run, START, by_slurm=True) == (f"{FAILED}: node2", True)


def test_without_slurm_there_is_no_word(run):
    assert why_ended(run, {**START, "job": None}, by_slurm=False) == (causes.WITHOUT_A_WORD, True)


@pytest.mark.parametrize(
    ("said", "words", "why"),
    [
        # the rank that was killed first: the others fail because of it, or are killed with it
        ([EXITED, KILLED, "node1: tasks 0,3: Terminated"], [(1, PEER, False)], "rank 2 died on node2: Killed"),
        # what a rank tells its user
        ([KILLED], [(3, PEER, False), (0, "a.jpg: unreadable", True)], "rank 0: a.jpg: unreadable"),
        # the first error of several
        ([EXITED], [(1, "KeyError('a')", False), (0, PEER, False)], "rank 1 failed: KeyError('a'); see {}"),
        # an exit code where there is nothing better
        ([EXITED], [], "rank 1 died on node1: Exited with exit code 120"),
        ([], [], "a process ended without a word; see {}"),
    ],
)
def test_the_cause_of_a_death_in_one_line(run, said, words, why):
    _write(run, "".join(f"srun: error: {line}\n" for line in said))
    for time, (rank, message, is_told) in enumerate(words):
        _word(run, rank, message, told=is_told, time=time)
    assert why_died(run, "t-1", JOB) == why.format(log_file(run, JOB))


@pytest.mark.parametrize(
    "said",
    [
        "srun: error: Node failure on node2",
        "srun: error: Task launch for StepId=42.0 failed on node node2: Communication connection failure",
    ],
)
def test_a_node_that_srun_names_has_failed(run, said):
    _write(run, f"{said}\nsrun: error: node1: task 0: Killed")
    _word(run, 0, "another process has not answered", told=True)
    failure_file(run, "t-1", 1).write_text('{"torn')
    assert why_died(run, "t-1", JOB) == "a node failed: node2"
    assert why_ended(run, START, by_slurm=True) == ("a node failed: node2", True)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"PreemptTime": "2026-11-21T15:37:51"}, causes.PREEMPTED),
        ({"PreemptTime": "None", "EndTime": "2026-11-21T15:37:51"}, causes.TIME_LIMIT),
        ({"EndTime": "Unknown"}, causes.WARNED),
    ],
)
def test_why_slurm_warns(run, monkeypatch, facts, why):
    monkeypatch.setattr(causes, "job_facts", lambda job: facts)
    assert why_warned(run, JOB) == why


def test_a_warning_that_slurm_does_not_explain(run, monkeypatch):
    def silent(job):
        raise RunError("Unable to contact slurm controller")

    monkeypatch.setattr(causes, "job_facts", silent)
    assert why_warned(run, JOB) == causes.WARNED
    monkeypatch.setattr(causes, "job_facts", lambda job: {})
    (run / "submission.json").write_text("{")
    assert why_warned(run, JOB) == causes.WARNED, "a damaged file keeps no run from going on"
