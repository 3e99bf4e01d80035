"""Checkpoints in the background of real steps: they hold nothing up, and nothing of theirs goes unheard."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from dataclasses import replace

import pytest
import torch

from hpcssl.cli.main import main
from hpcssl.runs.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint
from hpcssl.runs.trace import MetricsWriter, last_record
from hpcssl.train import run_writer as writer_module
from hpcssl.train.loop import Stopped

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def begin(small, data, tmp_path):
    """Trains the run `tmp_path / "run"` with a checkpoint after every step; returns the run."""
    recipe = small.dino_recipe()
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, every_min=0.0, keep_last=20))
    run = small.make_run(tmp_path / "run", data, recipe)

    def go(**more):
        small.train_here(run, recipe, data, **more)

    go.run = run
    return go


def test_steps_go_on_while_a_checkpoint_is_written(small, begin, monkeypatch):
    """The thread may only go on once the step after is recorded: a loop that waits for it would not come there."""
    real, seen = writer_module.save_checkpoint, []

    def slow(run, step, *more, **options):
        small.wait_until(lambda: step in (0, small.STEPS) or last_record(run)["step"] > step, 20, "the next step")
        seen.append(step)
        return real(run, step, *more, **options)

    monkeypatch.setattr(writer_module, "save_checkpoint", slow)
    monkeypatch.setattr(writer_module.RunWriter, "is_due", lambda self, step: step % 4 == 0)
    begin()
    assert seen == [0, 4, 8, 12, 13]
    assert checkpoint_steps(begin.run) == seen


def test_a_later_start_that_comes_while_the_file_is_written_keeps_it_from_its_name(small, begin):
    class Claim(small.Claim):
        """Stale as soon as a checkpoint of step 2 is half-written."""

        stale = False

        def is_stale(self) -> bool:
            self.stale = self.stale or any((begin.run / "checkpoints").glob(".step-000000002*.tmp"))
            return self.stale

    with pytest.raises(Stopped, match="took the run over"):
        begin(claim=Claim())
    assert checkpoint_steps(begin.run) == [0, 1]
    assert last_record(begin.run)["step"] <= 3


@pytest.mark.parametrize("bad_step", [3, 13])
def test_a_full_disk_is_told_at_the_next_step_or_at_the_end(small, begin, monkeypatch, bad_step):
    real = writer_module.save_checkpoint

    def full(run, step, *more, **options):
        if step >= bad_step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(checkpoint_path(run, step)))
        return real(run, step, *more, **options)

    monkeypatch.setattr(writer_module, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        begin()
    assert caught.value.filename == str(checkpoint_path(begin.run, bad_step))
    assert checkpoint_steps(begin.run)[-1] == bad_step - 1, "what was saved stays"
    assert last_record(begin.run)["step"] <= bad_step + 2
    monkeypatch.undo()
    begin()
    assert checkpoint_steps(begin.run)[-1] == small.STEPS


@pytest.mark.usefixtures("own_process")
def test_a_disk_that_is_full_in_the_middle_of_a_run_costs_nothing_that_was_saved(small, data, small_disk, capsys):
    """A real one, through the command: what else lies there takes the room for the fourth checkpoint."""
    recipe = small.dino_recipe()
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, every_min=0.0, keep_last=20))
    file, run, other = small.write_recipe(small_disk / "r.yaml", recipe), small_disk / "run", small_disk / "other"
    where = ("--store", data.store_path, "--schedule", data.schedule_path, "--out", run, "--cluster", "none")
    command = [str(a) for a in ("pretrain", file, *where)]
    assert main([*command, "--set", "stop_after=1"]) == 0
    saved = checkpoint_steps(run)
    assert saved == [0, 1, 2, 3]
    free, size = shutil.disk_usage(small_disk).free, checkpoint_path(run, 3).stat().st_size
    other.write_bytes(bytes(free - size // 2))
    capsys.readouterr()
    assert main(command) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"hpcssl: error: {checkpoint_path(run, 4)}: the disk is full; free some space")
    assert checkpoint_steps(run) == saved
    for step in saved:
        load_checkpoint(checkpoint_path(run, step))
    assert not list((run / "checkpoints").glob(".*"))
    other.unlink()
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    assert main(command) == 0
    assert checkpoint_steps(run) == list(range(small.STEPS + 1))


def test_a_checkpoint_asked_for_by_a_signal_is_there_when_the_loop_ends(begin, monkeypatch):
    real = writer_module.save_checkpoint

    def slow(*more, **options):
        threading.Event().wait(0.2)
        return real(*more, **options)

    monkeypatch.setattr(writer_module, "save_checkpoint", slow)
    stops = iter([False, True])
    with pytest.raises(Stopped, match="asked to stop"):
        begin(asked_to_stop=lambda: next(stops))
    assert checkpoint_steps(begin.run) == [0, 1, 2]
    load_checkpoint(checkpoint_path(begin.run, 2))


def test_no_checkpoint_is_ahead_of_the_trace(begin, monkeypatch):
    order, sync, replace_ = [], MetricsWriter.sync, os.replace

    def synced(self) -> None:
        sync(self)
        order.append("trace")

    def renamed(source, target) -> None:
        replace_(source, target)
        order.append("checkpoint")

    monkeypatch.setattr(MetricsWriter, "sync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    stops = iter([False, True])
    with pytest.raises(Stopped):
        begin(asked_to_stop=lambda: next(stops))
    assert order == ["trace", "checkpoint"] * 3


def test_what_killed_starts_left_is_removed_at_the_start(begin):
    left = begin.run / "checkpoints" / ".step-000000004.safetensors.123.tmp"
    left.write_bytes(b"half")
    with pytest.raises(Stopped):
        begin(asked_to_stop=lambda: True)
    assert not left.exists()
