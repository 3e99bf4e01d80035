"""A run in this process that gets a signal: the step ends, a checkpoint is written, and the same command goes on."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from hpcssl.jobs.launch import Resources, launch
from hpcssl.runs.checkpoint import checkpoint_steps, load_latest
from hpcssl.runs.metrics import last_record, read_metrics

pytestmark = [pytest.mark.usefixtures("one_thread", "own_process"), pytest.mark.timeout(120)]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_run_goes_on(small, tmp_path, number):
    data = small.make_data(tmp_path, pseudo_epochs=60)
    run = small.make_run(tmp_path / "run", data, small.mae_recipe())

    def send() -> None:
        small.wait_until(lambda: (last_record(run) or {"step": 0})["step"] >= 5, 60, "step 5")
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert launch(run, Resources(), "none", on_step=lambda step: None) == "stopped"
    sender.join()
    stopped_at = last_record(run)["step"]
    assert 5 <= stopped_at < 200
    assert checkpoint_steps(run)[-1] == stopped_at, "nothing that was computed is lost"
    assert load_latest(run, lambda told: pytest.fail(told))[1]["step"] == stopped_at
    assert launch(run, Resources(), "none", on_step=lambda step: None) == "finished"
    assert read_metrics(run)["step"].tolist() == list(range(1, 201))
