"""Real runs of two processes through submitit's local executor."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpcssl.core.errors import RunError
from hpcssl.jobs.launch import launch
from hpcssl.jobs.profile import Resources
from hpcssl.jobs.run_start import RunStart
from hpcssl.pipelines.pretrain_rank import train_rank
from hpcssl.runs.checkpoint import checkpoint_path, checkpoint_steps
from hpcssl.runs.history import read_starts
from hpcssl.runs.trace import last_record, read_metrics

PSEUDO_EPOCHS = 30
STEPS = PSEUDO_EPOCHS * 40 // 12
TWO = Resources(processes_per_node=2)

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module", autouse=True)
def no_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


def _train(run: Path, resources: Resources = TWO) -> str:
    return launch(run, resources, "local", work=train_rank, on_step=lambda step: None)


@pytest.fixture(scope="module")
def longer(small, tmp_path_factory):
    """A schedule of 100 steps: some seconds of training."""
    return small.make_data(tmp_path_factory.mktemp("longer"), pseudo_epochs=PSEUDO_EPOCHS)


@pytest.fixture(scope="module")
def recipe(small):
    """A checkpoint every half second, so that restarts do not all begin at 0; ranks wait long for one that is held."""
    plain = small.dino_recipe()
    often = replace(plain.checkpoint, every_min=0.5 / 60, keep_last=3)
    return replace(plain, checkpoint=often, train=replace(plain.train, hang_s=600.0))


@pytest.mark.usefixtures("own_process")
def test_two_ranks_finish_and_equal_one(small, data, tmp_path):
    recipe = small.dino_recipe()
    runs = [small.make_run(tmp_path / f"w{size}", data, recipe) for size in (1, 2)]
    steps: list[int] = []
    assert launch(runs[0], Resources(), "none", work=train_rank, on_step=steps.append) == "finished"
    # a finished run that is started again trains nothing and says so
    finished = checkpoint_path(runs[0], 13).stat().st_mtime_ns
    assert launch(runs[0], Resources(), "none", work=train_rank, on_step=steps.append) == "finished"
    assert checkpoint_path(runs[0], 13).stat().st_mtime_ns == finished
    assert steps[-1] == small.STEPS
    assert steps == sorted(steps)
    steps.clear()
    words: list[str] = []
    assert launch(runs[1], TWO, "local", work=train_rank, on_step=steps.append, on_words=words.append) == "finished"
    assert words == ["begins at step 0 of 13 with 2 processes, in fp32 (auto) on the CPU"]
    assert steps[-1] == small.STEPS
    assert steps == sorted(steps)
    traces = [read_metrics(run) for run in runs]
    assert traces[1]["step"].tolist() == list(range(1, 14))
    np.testing.assert_allclose(traces[1]["loss"], traces[0]["loss"], rtol=1e-5)
    assert [start["world_size"] for start in read_starts(runs[1])] == [2]
    assert (runs[1] / "tensorboard").is_dir()
    assert not small.ranks_below(os.getpid())


def test_a_rank_that_raises_ends_the_job_with_its_cause_in_one_line(small, tmp_path):
    """A tile of rank 1's share cannot be read; rank 0, which waits for the sum, ends as well."""
    own = small.make_data(tmp_path, pseudo_epochs=60)
    tiles = own.schedule.tiles_at(0, 60 * 40)
    firsts = {int(tile): int(np.flatnonzero(tiles == tile)[0]) for tile in np.unique(tiles)}
    tile, position = min((item for item in firsts.items() if item[1] % 12 >= 6 and item[1] > 12), key=lambda i: i[1])
    gone = own.store.file_of(tile)
    gone.unlink()
    gone.mkdir()
    recipe = small.dino_recipe()
    unwatched = replace(recipe, train=replace(recipe.train, watch_every_steps=0))
    run = small.make_run(tmp_path / "run", own, unwatched)
    with small.within(60), pytest.raises(RunError) as caught:
        _train(run)
    assert str(gone) in str(caught.value)
    assert "cannot be read, tried 4 times" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(read_metrics(run)) <= position // 12
    assert not small.ranks_below(os.getpid())


def test_an_error_that_is_no_users_names_the_log(small, data, tmp_path):
    run = small.make_run(tmp_path / "run", data, small.dino_recipe())
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("store_digest:", "store_digst:"))
    with pytest.raises(RunError, match=r"training failed \(KeyError.*on rank 0\); the log is") as caught:
        _train(run, Resources())
    assert "\n" not in str(caught.value)
    log = Path(str(caught.value).partition("the log is ")[2].partition(";")[0])
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_living_and_a_gone_launcher_are_told_apart(small, is_reaped):
    for pid in (os.getpid(), None, 1):
        assert RunStart("run", train_rank, "t", pid)._launcher_lives()
    process = subprocess.Popen(["true"])
    if is_reaped:
        process.wait(30)
    small.wait_until(lambda: not small.alive(process.pid), 30, "it is gone, or a zombie")
    assert not RunStart("run", train_rank, "t", process.pid)._launcher_lives()
    process.wait(30)


@pytest.fixture
def start(small, longer, recipe, tmp_path):
    """Starts `hpcssl pretrain` as a user does, in a process of its own; ends everything below it at the end."""
    started: list[tuple[subprocess.Popen, set[int]]] = []
    file = small.write_recipe(tmp_path / "recipe.yaml", recipe)

    def begin(run: Path) -> subprocess.Popen:
        command = small.commandline(
            *("pretrain", file, "--store", longer.store_path, "--schedule", longer.schedule_path),
            *("--out", run, "--gpus-per-node", 2),
        )
        log = (tmp_path / "launcher.log").open("ab")
        process = subprocess.Popen(command, env=small.environment(), stdout=log, stderr=log, start_new_session=True)
        started.append((process, set()))
        return process

    def until(run: Path, *, step: int) -> tuple[subprocess.Popen, list[int]]:
        """Start, and wait for a step; return the launcher and the ranks' processes."""
        process = begin(run)

        def reached() -> bool:
            assert process.poll() is None, (tmp_path / "launcher.log").read_text()
            return (last_record(run) or {"step": 0})["step"] >= step

        small.wait_until(reached, 90, f"step {step}")
        started[-1][1].update(small.descendants(process.pid))
        ranks = small.ranks_below(process.pid)
        assert len(ranks) == 2
        return process, ranks

    begin.until = until
    yield begin
    for process, below in started:
        small.kill_all([*small.descendants(process.pid), *below])
        process.kill()
        process.wait(30)


@pytest.fixture(scope="module")
def reference(small, longer, recipe, tmp_path_factory):
    """An uninterrupted run."""
    run = small.make_run(tmp_path_factory.mktemp("reference") / "run", longer, recipe)
    assert _train(run) == "finished"
    return run


@pytest.mark.long
def test_the_same_seed_twice_gives_the_same_bits_and_another_does_not(small, longer, recipe, reference, tmp_path):
    run = small.make_run(tmp_path / "again", longer, recipe)
    assert _train(run) == "finished"
    small.assert_same_run(run, reference, STEPS)
    other = small.make_run(tmp_path / "other", longer, replace(recipe, seed=1, stop_after=1))
    assert _train(other) == "finished"
    assert not set(read_metrics(other)["loss"]) & set(read_metrics(reference)["loss"])


@pytest.mark.long
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR2])
def test_stopped_by_a_signal_to_a_rank_it_goes_on_bitwise(small, start, reference, tmp_path, sent):
    run = tmp_path / "run"
    process, ranks = start.until(run, step=5)
    os.kill(ranks[1], sent)  # one is enough: ranks agree
    assert process.wait(60) == 2
    last = last_record(run)["step"]
    assert 5 <= last < STEPS
    assert checkpoint_steps(run)[-1] == last, "nothing that was computed is lost"
    assert not any(map(small.alive, ranks))
    assert start(run).wait(120) == 0
    small.assert_same_run(run, reference, STEPS)
    assert [start["generation"] for start in read_starts(run)] == [1, 2]


@pytest.mark.parametrize(
    "sent",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.long) for number in (signal.SIGUSR1, signal.SIGUSR2))],
)
def test_a_signal_to_the_command_itself_saves_and_stops(small, start, tmp_path, sent):
    run = tmp_path / "run"
    process, ranks = start.until(run, step=5)
    process.send_signal(sent)
    assert process.wait(60) == 2
    assert not any(map(small.alive, ranks)), "it has waited for them"
    last = last_record(run)["step"]
    assert 5 <= last < STEPS
    assert checkpoint_steps(run)[-1] == last, "nothing that was computed is lost"
    said = (tmp_path / "launcher.log").read_text().splitlines()
    assert "asked to stop: ends the step, writes a checkpoint" in said
    assert said[-1] == f"stopped: {run}"


@pytest.mark.long
@pytest.mark.parametrize("moment", range(6))
def test_a_signal_while_the_ranks_start_stops_them(small, start, tmp_path, moment):
    """Some do not listen yet: they end at once, or are asked again."""
    run = tmp_path / "run"
    process = start(run)
    small.wait_until((run / "submission.json").exists, 60, "the launcher starts ranks")
    time.sleep(0.6 * moment)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 2
    assert (tmp_path / "launcher.log").read_text().splitlines()[-1] == f"stopped: {run}"
    assert not small.descendants(process.pid)


@pytest.mark.long
def test_a_killed_rank_ends_the_job_within_seconds(small, start, tmp_path):
    run = tmp_path / "run"
    process, ranks = start.until(run, step=3)
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(60) == 2
    assert not any(map(small.alive, ranks))
    said = (tmp_path / "launcher.log").read_text().splitlines()[-1]
    assert said.startswith("hpcssl: error: ")
    assert "the same command goes on where it was" in said


@pytest.mark.long
def test_ranks_of_a_killed_launcher_end_by_themselves(small, start, tmp_path):
    run = tmp_path / "run"
    process, ranks = start.until(run, step=3)
    process.kill()
    process.wait(30)
    small.wait_until(lambda: not any(map(small.alive, ranks)), 15, "ranks end")
    assert last_record(run)["step"] < STEPS
    assert checkpoint_steps(run)[-1] == last_record(run)["step"], "they saved before they went"


@pytest.mark.long
def test_a_second_start_fences_off_the_first(small, start, reference, tmp_path):
    """The first hangs, the second does the work, the first wakes up: it publishes nothing more."""
    run = tmp_path / "run"
    first, ranks = start.until(run, step=2)
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    second = start(run)
    assert second.wait(120) == 0, (tmp_path / "launcher.log").read_text()
    small.assert_same_run(run, reference, STEPS)
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file() and f.parent.name not in ("logs", "tensorboard")}
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    assert first.wait(30) == 2
    assert not any(map(small.alive, ranks))
    assert {f: f.read_bytes() for f in before} == before
    assert checkpoint_steps(run)[-1] == STEPS
    assert sorted(f.name for f in (run / "generations").glob("0*")) == ["000001", "000002"]


@pytest.mark.long
def test_ctrl_c_ends_all_ranks_and_exits_130_without_a_traceback(small, start, tmp_path):
    process, ranks = start.until(tmp_path / "run", step=3)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    small.wait_until(lambda: not any(map(small.alive, ranks)), 15, "all processes end")
    said = (tmp_path / "launcher.log").read_text()
    assert "hpcssl: stopped; the same command goes on where it was" in said.splitlines()
    assert "Traceback" not in said


@pytest.mark.long
def test_a_rank_that_dies_before_it_joins_ends_the_job_within_half_a_minute(small, start, tmp_path):
    process = start(tmp_path / "run")
    small.wait_until(lambda: len(small.ranks_below(process.pid)) == 2, 60, "two ranks")
    os.kill(small.ranks_below(process.pid)[1], signal.SIGKILL)
    assert process.wait(30) == 2
