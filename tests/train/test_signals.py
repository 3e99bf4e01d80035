"""A run in this process that gets a signal: the step ends, a checkpoint is written, and the same command goes on."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

import hpcssl.jobs.launch
import hpcssl.train.loop
from hpcssl.jobs.launch import launch
from hpcssl.jobs.profile import Resources
from hpcssl.pipelines.pretrain_rank import train_rank
from hpcssl.runs.checkpoint import checkpoint_steps, load_latest
from hpcssl.runs.trace import last_record, read_metrics

pytestmark = [pytest.mark.usefixtures("one_thread", "own_process"), pytest.mark.timeout(120)]


@pytest.fixture
def longer(small, tmp_path):
    """A run of 200 steps."""
    return small.make_run(tmp_path / "run", small.make_data(tmp_path, pseudo_epochs=60), small.mae_recipe())


def _after_step(small, run, step, work):
    """Do something in another thread once a run has done a step."""

    def wait() -> None:
        small.wait_until(lambda: (last_record(run) or {"step": 0})["step"] >= step, 60, f"step {step}")
        work()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_run_goes_on(small, longer, number):
    sender = _after_step(small, longer, 5, lambda: os.kill(os.getpid(), number))
    assert launch(longer, Resources(), "none", work=train_rank, on_step=lambda step: None) == "stopped"
    sender.join()
    stopped_at = last_record(longer)["step"]
    assert 5 <= stopped_at < 200
    assert checkpoint_steps(longer)[-1] == stopped_at, "nothing that was computed is lost"
    assert load_latest(longer, lambda told: pytest.fail(told))[1]["step"] == stopped_at
    assert launch(longer, Resources(), "none", work=train_rank, on_step=lambda step: None) == "finished"
    assert read_metrics(longer)["step"].tolist() == list(range(1, 201))


def test_the_first_ctrl_c_saves_and_says_so(small, longer, monkeypatch):
    monkeypatch.setattr(hpcssl.jobs.launch, "_REPORT_S", 0.001)
    before, words = signal.getsignal(signal.SIGINT), []
    sender = _after_step(small, longer, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        launch(longer, Resources(), "none", work=train_rank, on_step=lambda step: None, on_words=words.append)
    sender.join()
    assert 5 <= last_record(longer)["step"] < 200
    assert checkpoint_steps(longer)[-1] == last_record(longer)["step"], "nothing that was computed is lost"
    assert words == ["asked to stop: ends the step, writes a checkpoint; Ctrl-C ends it at once"]
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_ctrl_c_ends_a_step_that_hangs(small, longer, monkeypatch):
    step = hpcssl.train.loop.train_step

    def hanging(state, *rest):
        time.sleep(60 if state.step == 5 else 0)
        return step(state, *rest)

    def send() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        small.wait_until(lambda: signal.getsignal(signal.SIGINT) is signal.default_int_handler, 5, "the first is heard")
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(hpcssl.train.loop, "train_step", hanging)
    sender = _after_step(small, longer, 5, send)
    with small.within(40), pytest.raises(KeyboardInterrupt):
        launch(longer, Resources(), "none", work=train_rank, on_step=lambda step: None)
    sender.join()
    assert last_record(longer)["step"] == 5


def test_a_run_in_this_process_tells_how_far_it_is(longer, monkeypatch):
    monkeypatch.setattr(hpcssl.jobs.launch, "_REPORT_S", 0.05)
    steps: list[int] = []
    assert launch(longer, Resources(), "none", work=train_rank, on_step=steps.append) == "finished"
    assert steps == sorted(steps)
    assert len(set(steps)) > 3, steps
    assert steps[-1] == 200
