"""A build that is killed, at every point where files change and at random moments: the same command finishes it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from hpcssl.core.config import dump_yaml, to_mapping
from hpcssl.core.errors import ScheduleError
from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.spec import ScheduleSpec
from hpcssl.schedule.verify import verify_schedule

KILLED = 9
CHANGING = ("replace", "fsync", "unlink")  # functions of `os` by which a build publishes, syncs and removes files


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory, spec: ScheduleSpec, slides: pd.DataFrame) -> ScheduleSpec:
    """Three pseudo-epochs, a slide held out."""
    table = tmp_path_factory.mktemp("table") / "test.csv"
    table.write_text(f"slide_id\n{slides['slide_id'][0]}\n")
    return replace(spec, num_pseudo_epochs=3, hold_out=str(table))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, contents, held, slides) -> dict[str, bytes]:
    """The files of a build that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "sched"
    build_schedule(held, slides, out)
    return contents(out)


def killed_at(small: ModuleType, moment: int, build: Callable[[], object]) -> bool:
    """Build in a process of its own that ends at the moment-th change of a file; whether it came to that."""

    def run() -> None:
        left = moment

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                if left == 0:
                    os._exit(KILLED)
                left -= 1
                return function(*args, **kwargs)

            return call

        for name in CHANGING:
            setattr(os, name, counted(getattr(os, name)))
        build()

    return small.in_a_fork(run) == KILLED


def test_a_build_killed_before_any_change_of_a_file(small, held, slides, undisturbed, tmp_path, contents):
    moment, refused, opened = 0, 0, 0
    while killed_at(small, moment, partial(build_schedule, held, slides, tmp_path / str(moment))):
        out = tmp_path / str(moment)
        try:
            Schedule.open(out)
        except ScheduleError:
            refused += 1
            assert opened == 0, "once it opens it does so for good"
        else:
            opened += 1
            verify_schedule(out)
        assert build_schedule(held, slides, out) == [], moment
        assert contents(out) == undisturbed, f"killed before change {moment}"
        moment += 1
    assert contents(tmp_path / str(moment)) == undisturbed
    assert refused > 20, "9 files, each synced, renamed, its folder synced"
    assert opened >= 4, "marks and checksums are removed when all is done"


def test_a_command_killed_at_random_moments(small, spec, slides, tmp_path, contents):
    moments = random.Random(0)
    large = replace(spec, num_pseudo_epochs=120, max_repeats=100, positions_per_pseudo_epoch=30_000)
    build_schedule(large, slides, tmp_path / "undisturbed")
    slides.to_csv(tmp_path / "slides.csv", index=False)
    (tmp_path / "spec.yaml").write_text(dump_yaml(to_mapping(large)), encoding="utf-8")
    out = tmp_path / "sched"
    command = small.commandline(
        "schedule", "build", "--slides", tmp_path / "slides.csv", "--spec", tmp_path / "spec.yaml", "--out", out
    )
    whole = 0
    for _ in range(3):
        process = subprocess.Popen(command, env=small.environment(), stdout=subprocess.DEVNULL)
        enough = whole + moments.randint(1, 6)
        small.wait_until(lambda n=enough: len(list(out.glob("pseudo_epoch_*.npy"))) >= n, 60, "more files")
        time.sleep(moments.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the build was over before it was killed"
        with pytest.raises(ScheduleError, match="the schedule is unfinished; run the same hpcssl schedule build again"):
            Schedule.open(out)
        whole = len(list(out.glob("pseudo_epoch_*.sha256")))
    done = subprocess.run(command, env=small.environment(), capture_output=True, text=True, check=True)
    assert "120 pseudo-epochs of 30000 positions" in done.stdout
    assert contents(out) == contents(tmp_path / "undisturbed")
