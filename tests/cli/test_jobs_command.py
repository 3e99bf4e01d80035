"""`hpcssl jobs` with runs of this machine; those of SLURM are in tests/slurm."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from hpcssl.cli.main import main
from hpcssl.jobs import causes
from hpcssl.jobs import run_states as listing
from hpcssl.jobs.causes import log_file
from hpcssl.jobs.launch import launch
from hpcssl.jobs.profile import Resources
from hpcssl.jobs.run_states import find_runs, list_runs
from hpcssl.jobs.submission import FILE, Submission, read_submission, write_submission
from hpcssl.pipelines.pretrain_rank import train_rank
from hpcssl.runs.checkpoint import checkpoint_steps
from hpcssl.runs.history import read_end, record_end
from hpcssl.runs.run_folder import Generation, record_start
from hpcssl.runs.trace import last_record

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def runs(small, data, tmp_path):
    """Makes runs that were prepared and not started."""

    def make(*names: str) -> list[Path]:
        return [small.make_run(tmp_path / name, data, small.dino_recipe()) for name in names]

    return make


def _state(run: Path):
    (found,) = list_runs([run])
    return found


def _trace(run: Path, steps: int, tiles_per_s: float = 24.0) -> None:
    lines = [{"step": s, "samples_seen": 12 * s, "tiles_per_s": tiles_per_s} for s in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _start(run: Path, **about) -> None:
    record_start(run, generation=Generation.take(run, nodes=["node1"], **about).number, world_size=2)


def test_runs_are_found_to_the_second_level(runs, tmp_path):
    runs("a", "b/c", "b/too/deep", ".hidden/g")
    found = [str(run.relative_to(tmp_path)) for run in find_runs([tmp_path])]
    assert found == ["a", "b/c"]
    assert find_runs([tmp_path / "a"]) == [tmp_path / "a"]
    assert find_runs([tmp_path / "a", tmp_path])[0] == tmp_path / "a"


def test_a_run_that_was_not_started(runs):
    (run,) = runs("a")
    state = _state(run)
    assert (state.state, state.step, state.stop_step, state.starts) == ("not started", 0, 13, 0)
    assert (state.tiles_per_s, state.eta_s, state.job) == (None, None, None)


def test_a_run_whose_config_cannot_be_used_does_not_hide_the_others(runs):
    broken, torn, whole = runs("a", "b", "c")
    (broken / "config.yaml").write_text("objective: dino\n")
    (torn / "config.yaml").write_text("objective: [dino\n")
    states = [(state.run, state.stop_step) for state in list_runs([broken, torn, whole])]
    assert states == [(broken, 0), (torn, 0), (whole, 13)]


def test_a_run_under_way_tells_how_long_it_takes(runs, monkeypatch):
    monkeypatch.setattr(Submission, "is_here", lambda submission: True)
    (run,) = runs("a")
    write_submission(run, "local", Resources())
    _start(run)
    _trace(run, 3)
    state = _state(run)
    assert (state.state, state.step, state.samples_seen, state.processes) == ("running", 3, 36, 2)
    assert (state.tiles_per_s, state.eta_s) == (24.0, (13 - 3) * 12 / 24)


def test_how_the_newest_start_ended(runs):
    (run,) = runs("a")
    _start(run, start="t-0")
    assert _state(run).state == "lost", "it left no word, and nothing runs"
    record_end(run, start="t-0", job=None, state="failed", why="the disk is full", step=0)
    state = _state(run)
    assert (state.state, state.why, state.nodes) == ("failed", "the disk is full", "node1")
    _start(run, start="u-0")
    record_end(run, start="u-0", job=None, state="finished", why="finished", step=13)
    state = _state(run)
    assert (state.state, state.why, state.starts) == ("finished", "", 2)


@pytest.mark.parametrize(
    ("reason", "state", "why"),
    [
        ("", "stopped", "cancelled"),
        (" DUE TO TIME LIMIT", "failed", "time limit"),
        (None, "lost", "its last start left no word; start it again"),
    ],
)
def test_how_slurm_ended_a_job_that_left_no_word(runs, monkeypatch, reason, state, why):
    monkeypatch.setattr(listing, "queued", lambda jobs: {})
    monkeypatch.setattr(causes, "failed_nodes", lambda nodes, since: [])
    (run,) = runs("a")
    write_submission(run, "slurm", Resources(), job="7")
    _start(run, start="t-0", job="7")
    said = "" if reason is None else f"error: *** STEP 7.0 ON node1 CANCELLED AT 2026-11-21T15:37:51{reason} ***\n"
    log_file(run, "7").write_text(f"[hpcssl] start t-0 on node1\n{said}")
    found = _state(run)
    assert (found.state, found.why) == (state, why)


def test_a_run_of_slurm_is_told_where_there_is_no_slurm(runs, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (run,) = runs("a")
    write_submission(run, "slurm", Resources(), job="7")
    _trace(run, 3)
    state = _state(run)
    assert (state.state, state.job, state.step, state.eta_s) == ("unknown", "7", 3, None)
    assert "SLURM" in state.why


def test_a_submission_comes_back_as_it_was(runs):
    (run,) = runs("a")
    assert read_submission(run) is None
    asked = Resources(nodes=6, fewer_nodes=(2, 3), processes_per_node=4)
    write_submission(run, "slurm", asked, wait_min=5, job="7")
    read = read_submission(run)
    assert isinstance(read, Submission)
    assert (read.cluster, read.job, read.wait_min, read.resources) == ("slurm", "7", 5, asked)


def test_the_table(runs, tmp_path, monkeypatch, capsys):
    run, other = runs("a", "b")
    _start(run, start="t-0")
    _trace(run, 3)
    record_end(run, start="t-0", job=None, state="failed", why="[bold]the disk is full", step=0)
    monkeypatch.chdir(tmp_path)
    assert main(["jobs"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"a +failed +– +3 of 13 +36 +24 +– +node1 +2 +0", said), said
    assert re.search(r"b +not started +– +0 of 13", said), said
    assert "a: failed: [bold]the disk is full" in said
    assert main(["jobs", "list", "b"]) == 0
    assert "not started" in capsys.readouterr().out


def test_where_there_are_no_runs(tmp_path, capsys, refused):
    assert main(["jobs", "list", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("no runs in ")
    assert "nowhere: no such folder" in refused("jobs", "list", tmp_path / "nowhere")


@pytest.mark.parametrize("action", ["logs", "cancel", "requeue"])
def test_what_cannot_be_done_is_told_in_one_line(runs, tmp_path, refused, action):
    (run,) = runs("a")
    assert "no run" in refused("jobs", action, tmp_path)
    assert ("no log of rank 0" if action == "logs" else "was never started") in refused("jobs", action, run)
    write_submission(run, "local", Resources())
    asked = json.loads((run / FILE).read_text())
    (run / FILE).write_text(json.dumps({**asked, "pid": 1 << 22}))
    if action != "logs":
        assert ("nothing of it runs" if action == "cancel" else "again") in refused("jobs", action, run)


def test_a_local_run_is_listed_and_its_log_shown(small, runs, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (run,) = runs("a")
    assert launch(run, Resources(), "local", work=train_rank, on_step=lambda step: None) == "finished"
    assert read_end(run).state == "finished"
    assert main(["jobs", "logs", str(run), "--lines", "5"]) == 0
    said = capsys.readouterr()
    assert "[rank 0] begins at step 0 of 13" in said.out
    assert str(run / "logs") in said.err
    assert _state(run).state == "finished"


def test_a_local_run_that_is_cancelled_saves_and_says_why_it_begins_again(small, tmp_path):
    data = small.make_data(tmp_path, pseudo_epochs=60)
    recipe = small.write_recipe(tmp_path / "recipe.yaml", small.dino_recipe())
    run = tmp_path / "run"
    where = ("--store", data.store_path, "--schedule", data.schedule_path, "--out", run)
    command = small.commandline("pretrain", recipe, *where, "--gpus-per-node", 1)
    process = subprocess.Popen(command, env=small.environment(), stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        small.wait_until(lambda: (last_record(run) or {"step": 0})["step"] >= 3, 90, "step 3")
        assert _state(run).state == "running"
        assert _state(run).eta_s > 0
        assert main(["jobs", "cancel", str(run)]) == 0
        assert process.wait(60) == 130
    finally:
        small.kill_all([process.pid, *small.descendants(process.pid)])
        process.wait(30)
    end = read_end(run)
    assert (end.state, end.why, end.step) == ("stopped", "stopped by a signal", checkpoint_steps(run)[-1])
