"""Which starts follow on which ends; what SLURM is asked for is recorded here, and done in tests/slurm."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import pytest

from hpcssl.core.errors import RunError
from hpcssl.core.world import World
from hpcssl.jobs import lifecycle, run_start
from hpcssl.jobs.launch import launch
from hpcssl.jobs.lifecycle import MOST_FAILURES, afterwards, claim, finish, main, stop
from hpcssl.jobs.profile import Profile, Resources
from hpcssl.jobs.rank_place import RankPlace
from hpcssl.jobs.run_start import RunStart
from hpcssl.jobs.submission import write_submission
from hpcssl.runs.checkpoint import checkpoint_path
from hpcssl.runs.history import read_end, read_starts, record_end
from hpcssl.runs.run_folder import Generation, record_start

JOB = "7"
PLACE = RankPlace(world=World(), nodes=("node1",), slurm_job=JOB)
HERE = RankPlace(world=World())


@pytest.fixture
def run(tmp_path):
    for name in ("generations", "logs", "checkpoints"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def requeued(monkeypatch):
    """The jobs that were requeued, while SLURM says that the job runs and is the same start."""
    asked: list[str] = []
    monkeypatch.setattr(lifecycle, "is_still", lambda job, restarts, *, retry_s: retry_s > 30)
    monkeypatch.setattr(lifecycle, "why_warned", lambda run, job: "preempted")
    monkeypatch.setattr(lifecycle, "why_died", lambda run, start, job: f"{start} died")
    monkeypatch.setattr(lifecycle, "requeue", lambda job, *, retry_s: asked.append(job))
    return asked


def _begin(run, start: str, place: RankPlace = PLACE) -> str:
    """Begin as a rank 0 does; returns why, as the history has it."""
    record_start(run, generation=claim(run, start, place).number)
    return read_starts(run)[-1]["why"]


def _reach(run, step: int) -> None:
    checkpoint_path(run, step).touch()


def test_a_start_is_explained_by_the_end_before_it(run, requeued):
    assert _begin(run, "a-0") == "first start"
    stop(run, "a-0", PLACE, "not asked for on SLURM")
    assert _begin(run, "a-1") == "preempted"
    afterwards(run, "a-1", JOB)
    assert _begin(run, "a-2") == "a-1 died"
    finish(run, "a-2", PLACE)
    assert _begin(run, "b-0") == "finished"
    assert requeued == [JOB, JOB]


def test_failures_without_progress_end_the_job_with_the_cause(run, requeued):
    for failure in range(1, MOST_FAILURES):
        _begin(run, f"a-{failure}")
        assert f"failure {failure} of at most {MOST_FAILURES}" in afterwards(run, f"a-{failure}", JOB)
    _begin(run, "a-9")
    words = f"failed {MOST_FAILURES} times without getting beyond step 0; the last time: a-9"
    with pytest.raises(RunError, match=words):
        afterwards(run, "a-9", JOB)
    assert len(requeued) == MOST_FAILURES - 1


def test_failures_with_progress_between_them_go_on_for_ever(run, requeued):
    for step in range(3 * MOST_FAILURES):
        _begin(run, f"a-{step}")
        _reach(run, step)
        afterwards(run, f"a-{step}", JOB)
    assert len(requeued) == 3 * MOST_FAILURES


def test_where_slurm_restarts_in_vain_the_start_itself_refuses(run, requeued, monkeypatch):
    monkeypatch.setattr(lifecycle, "why_ended", lambda run, start, *, by_slurm: ("a node failed: node2", by_slurm))
    for restart in range(MOST_FAILURES):
        _begin(run, f"a-{restart}")
    with pytest.raises(RunError, match="the last time: a node failed: node2"):
        _begin(run, "a-9")
    another = RankPlace(world=World(), nodes=("node1",), slurm_job="8")
    assert _begin(run, "b-0", another) == "a node failed: node2", "whoever submits it again has looked into that"
    assert requeued == []


def test_a_run_that_is_finished_is_not_started_again(run, requeued):
    _begin(run, "a-0")
    finish(run, "a-0", PLACE)
    assert afterwards(run, "a-0", JOB) == ""
    assert requeued == []
    assert read_end(run).state == "finished"


def test_what_slurm_is_ending_is_left_to_it(run, requeued, monkeypatch):
    monkeypatch.setattr(lifecycle, "is_still", lambda job, restarts, *, retry_s: False)
    _begin(run, "a-0")
    stop(run, "a-0", PLACE, "asked")
    assert afterwards(run, "a-0", JOB) == ""
    assert requeued == []
    assert read_end(run) is None, "the next start finds out why"


def test_a_requeue_that_slurm_refuses_is_recorded_as_a_failure(run, requeued, monkeypatch):
    def refuse(job, *, retry_s):
        raise RunError("scontrol requeue 7: Requested operation is presently disabled")

    monkeypatch.setattr(lifecycle, "requeue", refuse)
    _begin(run, "a-0")
    with pytest.raises(RunError, match="presently disabled"):
        stop(run, "a-0", PLACE, "asked")
    words = "SLURM has not started it again: scontrol requeue 7: Requested operation is presently disabled"
    assert (read_end(run).state, read_end(run).why) == ("failed", f"preempted; {words}")
    with pytest.raises(RunError, match="presently disabled"):
        afterwards(run, "a-0", JOB)
    assert read_end(run).why == f"preempted; {words}", "said once"
    assert _begin(run, "b-0") == f"preempted; {words}"
    with pytest.raises(RunError, match="presently disabled"):
        afterwards(run, "b-0", JOB)
    end = read_end(run)
    assert (end.state, end.why, end.failures) == ("failed", f"b-0 died; {words}", 1)


def test_the_batch_script_learns_its_exit_code(run, requeued, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    assert main(str(run), "a", "0") == 0
    assert requeued == []
    assert [main(str(run), token, "137") for token in ("a", "b", "c")] == [0, 0, 137]
    assert requeued == [JOB, JOB]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "[hpcssl] a-0 died; requeued from step 0 (failure 1 of at most 3 without progress)"
    assert said[-1].startswith("[hpcssl] error: ")


@pytest.mark.usefixtures("own_process")
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("moment", ["never", "before its claim", "after it"])
def test_a_start_that_another_has_overtaken_does_not_say_how_it_ended(run, monkeypatch, moment, fails):
    def overtake(folder):
        Generation.take(folder, start="later-0")
        record_end(folder, start="later-0", job=None, state="stopped", why="by a signal", step=13)

    def work(rank):
        if moment == "after it":
            overtake(rank.run)
        if fails:
            raise RunError("another start has taken over")
        return True

    if moment == "before its claim":
        monkeypatch.setattr(run_start, "claim", lambda folder, start, place: overtake(folder))
    _begin(run, "earlier-0", HERE)
    with pytest.raises(RunError, match="taken over") if fails else nullcontext():
        assert launch(run, Resources(), "none", work=work, on_step=lambda step: None) == "finished"
    assert read_end(run).state == ("stopped" if moment != "never" else "failed" if fails else "finished")


def test_work_that_is_asked_to_stop_says_so_and_without_slurm_the_end_is_recorded_and_no_more(run, requeued):
    assert RunStart(str(run), lambda rank: not rank.asked_to_stop(), "t").on_rank([15]) == "stopped"
    end = read_end(run)
    assert (end.state, end.why) == ("stopped", "stopped by a signal")
    assert _begin(run, "b-0", HERE) == "stopped by a signal"
    assert requeued == []


@pytest.mark.parametrize(
    ("gpus", "is_there", "warned"), [(4, False, True), (4, True, False), (0, False, False), (None, False, False)]
)
def test_a_rank_that_was_to_have_a_gpu_and_has_none_says_so(run, monkeypatch, capsys, gpus, is_there, warned):
    monkeypatch.setattr("torch.cuda.is_available", lambda: is_there)
    if gpus is not None:
        write_submission(run, "slurm", Resources(profile=Profile(gpus_per_node=gpus)), job=JOB)
    RunStart(str(run), lambda rank: True, "t").on_rank([])
    assert ("[rank 0] WARNING: its GPU was asked for" in capsys.readouterr().err) is warned


def test_what_the_batch_script_runs_at_its_end_does_not_wait_for_torch():
    code = "import sys, hpcssl.jobs.lifecycle; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
