"""SLURM's own commands, played by a script: what is asked again, and what is not."""

from __future__ import annotations

import os

import pytest

from hpcssl.core.errors import RunError
from hpcssl.jobs import slurm
from hpcssl.jobs.slurm import Queued, is_still, job_facts, queued, requeue

AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


@pytest.fixture
def scontrol(tmp_path, commands, monkeypatch):
    """An scontrol that says the given words in error, each once, and then answers; returns how often it was asked."""

    def begin(*complaints: str, answer: str = "JobState=RUNNING Restarts=2"):
        lines = [f"echo x >>{tmp_path}/asked"]
        for number, words in enumerate(complaints, 1):
            lines.append(f"[ $(wc -l <{tmp_path}/asked) = {number} ] && {{ echo '{words}' >&2; exit 1; }}")
        commands(scontrol="\n".join([*lines, f"echo '{answer}'"]))
        return lambda: len((tmp_path / "asked").read_text().split())

    monkeypatch.setattr(slurm, "_PAUSE_S", 0.05)
    return begin


def test_a_controller_that_is_away_is_asked_again(scontrol):
    asked = scontrol(AWAY, "Socket timed out on send/recv operation")
    assert is_still("7", 2, retry_s=20)
    assert asked() == 3


def test_only_for_so_long(scontrol):
    asked = scontrol(*[AWAY] * 100)
    with pytest.raises(RunError, match=r"scontrol requeue 7: .*Unable to contact"):
        requeue("7", retry_s=0.5)
    assert 2 < asked() < 10, "with longer and longer pauses"
    with pytest.raises(RunError, match="Unable to contact"):
        is_still("7", 2)


def test_what_slurm_refuses_for_good_is_not_asked_again(scontrol):
    asked = scontrol("Invalid job id specified", "Invalid job id specified")
    with pytest.raises(RunError, match="Invalid job id"):
        is_still("7", 2, retry_s=20)
    assert asked() == 1


def test_a_requeue_whose_answer_was_lost_is_done(scontrol):
    asked = scontrol("Socket timed out on send/recv operation", "Job is pending execution for job 7")
    requeue("7", retry_s=20)
    assert asked() == 2


def test_without_slurm_nothing_is_waited_for(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: pytest.fail("there is nothing to wait for"))
    with pytest.raises(RunError, match="squeue"):
        queued(["7"])
    with pytest.raises(RunError, match="scontrol"):
        is_still("7", 0, retry_s=60)


def test_ones_own_jobs_are_asked_for_as_every_slurm_knows_it(tmp_path, commands):
    """Some older ones have no `--me`."""
    commands(squeue=f'echo "$@" >{tmp_path}/asked; echo "7|RUNNING|None|node1"')
    assert queued(["7", "8"]) == {"7": Queued(state="RUNNING", reason="None", nodes="node1")}
    words = (tmp_path / "asked").read_text().split()
    assert f"--user={os.getuid()}" in words
    assert "--me" not in words


def test_times_are_asked_for_as_they_are_read(commands, monkeypatch):
    commands(scontrol='echo "EndTime=$SLURM_TIME_FORMAT"')
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    assert job_facts("7") == {"EndTime": "standard"}
