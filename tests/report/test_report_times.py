from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from hpcssl.cli.main import main
from hpcssl.report.times import step_times, times_chart, wait_share, wait_text
from hpcssl.report.training import training_charts
from hpcssl.runs.trace import read_metrics


@pytest.fixture
def timed_run(make_run: Callable[..., Path]) -> Callable[..., Path]:
    """A run of 100 steps of 64 tiles, half a second each; in `waits` (step to seconds) it waited."""

    def make(name: str = "run", waits: Callable[[int], float] = lambda step: 0.0, **more: float) -> Path:
        run = make_run(name, steps=100)
        path = run / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            record |= {"tiles_per_s": 128.0, "read_wait_s": waits(record["step"]), **more}
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return run

    return make


def _times(run: Path) -> pd.DataFrame:
    times = step_times(read_metrics(run))
    assert times is not None
    return times


def test_hours_are_those_of_the_steps_and_of_all_processes(timed_run) -> None:
    times = _times(timed_run(processes=12))
    assert times["hours"].iloc[-1] == pytest.approx(100 * 0.5 / 3600)
    assert times["process_hours"].iloc[-1] == pytest.approx(12 * 100 * 0.5 / 3600)
    assert "process_hours" not in _times(timed_run("alone"))


def test_waiting_is_called_so_above_five_percent_only(timed_run) -> None:
    below, above = _times(timed_run("a", lambda step: 0.024)), _times(timed_run("b", lambda step: 0.026))
    assert wait_share(below) == pytest.approx(0.048)
    assert wait_text(below) == "waited for tiles 4.8% of the time"
    assert "more than 5%; likely cause: unknown" in wait_text(above)


@pytest.mark.parametrize(
    ("spent", "cause", "share"),
    [
        ({"read_s": 3.0, "decode_s": 1.0, "augment_s": 1.0}, "reading from the storage", 60),
        ({"read_s": 1.0, "decode_s": 1.0, "augment_s": 6.0}, "augmenting", 75),
        ({"read_s": 1.0, "decode_s": 3.0, "augment_s": 1.0}, "decoding", 60),
    ],
)
def test_the_cause_is_what_took_the_loader_longest_but_for_a_slow_beginning(timed_run, spent, cause, share) -> None:
    text = wait_text(_times(timed_run("run", lambda step: 0.1, **spent)))
    assert re.search(rf"{cause}: .* \({share}% of the loader's time\)", text)
    run = timed_run("slow", lambda step: 5.0 if step == 1 else 0.001, read_s=1.0)
    assert "the beginning: most of it fell into the first 2 of 100 steps" in wait_text(_times(run))


def test_the_figure_and_its_table(timed_run) -> None:
    runs = [timed_run("a", processes=2), timed_run("b", lambda step: 0.1, processes=4)]
    loss, times, settings = training_charts(runs)
    assert [part.name for part in (loss, times, settings)] == ["training", "times", "schedules"]
    last = times.table.groupby("run").last()
    assert last.loc["b", "process_hours"] == pytest.approx(2 * last.loc["a", "process_hours"])
    assert last.loc["b", "wait_share"] == pytest.approx(0.2)
    assert last.loc["a", "tiles_per_s"] == pytest.approx(128)
    assert "b: 0.0139 hours (0.0556 process-hours), 128 tiles/s in the median, waited for tiles 20.0%" in times.caption


def test_runs_that_recorded_no_times_have_no_such_figure(make_run, timed_run) -> None:
    assert [part.name for part in training_charts([make_run()])] == ["training", "schedules"]
    part = times_chart({"old": read_metrics(make_run("old")), "new": read_metrics(timed_run("new"))})
    assert part is not None
    assert list(part.table["run"].unique()) == ["new"]


def test_the_command_says_which_run_waits(timed_run, tmp_path: Path, capsys) -> None:
    runs = [timed_run("fed"), timed_run("hungry", lambda step: 0.1, read_s=1.0)]
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert f"{runs[1]}: waited for tiles 20.0% of the time, more than 5%; likely cause: reading" in told
    assert "fed: waited" not in told
    assert (tmp_path / "out" / "times.png").is_file()
