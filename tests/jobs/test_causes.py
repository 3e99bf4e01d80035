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


SAID = "slurmstepd: error: *** STEP 42.0 ON node1 CANCELLED AT 2026-11-21T15:37:51{} ***\n"


@pytest.mark.parametrize(
    ("said", "why", "is_failure"),
    [
        (SAID.format(" DUE TO TIME LIMIT"), causes.TIME_LIMIT, True),
        (SAID.format(" DUE TO PREEMPTION"), causes.PREEMPTED, False),
        (SAID.format(" DUE TO JOB REQUEUE"), causes.REQUEUED, False),
        (
            SAID.format(" DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS"),
            "a node failed: SLURM does not say which",
            True,
        ),
        (SAID.format(" DUE TO task-launch failure (2)"), "task-launch failure (2)", False),
        (SAID.format(""), causes.REQUEUED, False),  # the job is back
        # the batch script asks for another start at the limit
        (f"{OUT_OF_TIME}\n{SAID.format(' DUE TO JOB REQUEUE')}", causes.TIME_LIMIT, True),
        # a reason outweighs words without one
        (SAID.format("") + SAID.format(" DUE TO PREEMPTION").replace("STEP 42.0", "JOB 42"), causes.PREEMPTED, False),
    ],
)
def test_slurms_last_words_in_the_log(run, said, why, is_failure):
    _write(run, said)
    assert why_ended(run, START, by_slurm=True) == (why, is_failure)


def test_cancelled_and_then_submitted_again(run):
    _write(run, SAID.format(""))
    assert why_ended(run, START, by_slurm=False) == (causes.CANCELLED, False)


def test_nodes_that_failed_are_named(run, monkeypatch):
    _write(run, "")
    monkeypatch.setattr(causes, "failed_nodes", lambda nodes, since: [nodes[1]])
    assert why_ended(run, START, by_slurm=True) == ("a node failed: node2", True)


def test_without_any_word(run):
    assert why_ended(run, START, by_slurm=True) == (causes.REQUEUED, False)
    assert why_ended(run, START, by_slurm=False) == (causes.WITHOUT_A_WORD, True)
    assert why_ended(run, {**START, "job": None}, by_slurm=False) == (causes.WITHOUT_A_WORD, True)


def test_the_rank_that_was_killed_first_is_the_cause(run):
    """The others fail because of it, or are killed with it."""
    _write(
        run,
        "srun: error: node1: task 1: Exited with exit code 1\n"
        "srun: error: node2: task 2: Killed\n"
        "srun: error: node1: tasks 0,3: Terminated",
    )
    _word(run, 1, "RuntimeError('Connection closed by peer')")
    assert why_died(run, "t-1", JOB) == "rank 2 died on node2: Killed"


def test_what_a_rank_tells_its_user_comes_first(run):
    _write(run, "srun: error: node2: task 2: Killed")
    _word(run, 3, "RuntimeError('Connection closed by peer')", time=1)
    _word(run, 0, "tile.jpg cannot be read", told=True, time=2)
    assert why_died(run, "t-1", JOB) == "rank 0: tile.jpg cannot be read"


def test_the_first_error_of_several(run):
    _write(run, "srun: error: node1: tasks 0-1: Exited with exit code 1")
    _word(run, 0, "RuntimeError('Connection closed by peer')", time=2)
    _word(run, 1, "KeyError('data')", time=1)
    assert why_died(run, "t-1", JOB) == f"rank 1 failed: KeyError('data'); see {log_file(run, JOB)}"


def test_exit_codes_where_there_is_nothing_better(run):
    _write(run, "srun: error: node1: task 1: Exited with exit code 120")
    assert why_died(run, "t-1", JOB) == "rank 1 died on node1: Exited with exit code 120"
    _write(run, "")
    assert why_died(run, "t-1", JOB) == f"a process ended without a word; see {log_file(run, JOB)}"


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
