"""kill -9 at many moments, a restart after each: the bits of the undisturbed run, for 2 and for 3 ranks."""

from __future__ import annotations

import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpcssl.runs.trace import last_record

PSEUDO_EPOCHS = 90
STEPS = PSEUDO_EPOCHS * 40 // 12
# put before everything that a rank imports: it dies when it has written and synced its nth checkpoint, unnamed as yet
DIES_BEFORE_RENAME = """
import os, pathlib, signal
real, left = os.replace, int(os.environ["DIE_AT_CHECKPOINT"])
def replace(source, target, **more):
    global left
    if pathlib.Path(target).name.startswith("step-"):
        left -= 1
        if left == 0:
            pathlib.Path(os.environ["DIED"]).write_text(str(source))
            os.kill(os.getpid(), signal.SIGKILL)
    real(source, target, **more)
os.replace = replace
"""

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]


class _Run:
    """Starts `hpcssl pretrain` as a user does, and kills all of it."""

    def __init__(self, small, data, folder: Path, size: int):
        self.small, self.run, self.size, self.log = small, folder / "run", size, folder / "log"
        recipe = small.dino_recipe()
        checkpoint = replace(recipe.checkpoint, every_min=0.2 / 60, keep_last=3)
        file = small.write_recipe(folder / "recipe.yaml", replace(recipe, checkpoint=checkpoint))
        self.command = small.commandline(
            *("pretrain", file, "--store", data.store_path, "--schedule", data.schedule_path),
            *("--out", self.run, "--gpus-per-node", size),
        )

    def start(self, **more: str) -> subprocess.Popen:
        with self.log.open("ab") as log:
            environment = {**self.small.environment(), **more}
            return subprocess.Popen(self.command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def kill(self, process: subprocess.Popen) -> None:
        self.small.kill_all([process.pid, *self.small.descendants(process.pid)])
        process.wait(30)

    def finish(self) -> None:
        assert self.start().wait(600) == 0, self.log.read_text()[-3000:]

    @property
    def step(self) -> int:
        return (last_record(self.run) or {"step": 0})["step"] if self.run.exists() else 0


@pytest.fixture(scope="module")
def long_data(small, tmp_path_factory):
    return small.make_data(tmp_path_factory.mktemp("killed"), pseudo_epochs=PSEUDO_EPOCHS)


@pytest.mark.parametrize(("size", "kills"), [(2, 20), (3, 8)])
def test_killed_many_times_it_ends_in_the_same_bits(small, long_data, tmp_path, size, kills):
    rng = np.random.default_rng(size)
    (tmp_path / "whole").mkdir()
    whole, killed = _Run(small, long_data, tmp_path / "whole", size), _Run(small, long_data, tmp_path, size)
    whole.finish()
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(DIES_BEFORE_RENAME)
    unnamed = 0
    for number in range(kills):
        before = killed.step
        if number % 4 == 0:  # anywhere in starting
            process = killed.start()
            time.sleep(float(rng.uniform(0.3, 6)))
        elif number % 4 == 1:  # between write and rename
            died = tmp_path / f"died-{number}"
            process = killed.start(
                PYTHONPATH=str(tmp_path / "path"), DIE_AT_CHECKPOINT=str(rng.integers(1, 4)), DIED=str(died)
            )
            small.wait_until(lambda at=died, of=process: at.exists() or of.poll() is not None, 120, "a checkpoint")
            unnamed += died.exists()
            assert not died.exists() or Path(died.read_text()).exists(), "written, not renamed"
        else:  # at any moment of training
            process, target = killed.start(), min(before + int(rng.integers(1, 12)), STEPS - 5)
            small.wait_until(lambda at=target: killed.step >= at, 120, f"step {target}")
            time.sleep(float(rng.uniform(0, 0.3)))
        killed.kill(process)
    killed.finish()
    assert unnamed == kills // 4
    assert len((killed.run / "restarts.jsonl").read_text().splitlines()) > kills // 2
    small.assert_same_run(killed.run, whole.run, STEPS)
    assert not list((killed.run / "checkpoints").glob(".*")), "nothing half-written is left"
