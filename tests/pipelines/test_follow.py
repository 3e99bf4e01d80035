"""The benchmark that follows a run does what is missing, and only that; here its jobs run in this process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from hpcssl.cli.main import main
from hpcssl.core.errors import ConfigError, FeatureError, RunError, SplitError
from hpcssl.evaluate import results as mccv
from hpcssl.evaluate.splits import make_splits
from hpcssl.jobs import array
from hpcssl.jobs.array import Call
from hpcssl.pipelines import follow
from hpcssl.pipelines import following as watching
from hpcssl.pipelines.embed import embed_share
from hpcssl.pipelines.follow import attach, load_bench, measure, measured_steps, submit_missing
from hpcssl.pipelines.following import following
from hpcssl.runs.checkpoint import checkpoint_path, save_checkpoint
from hpcssl.train.pretrain_config import Timeline
from hpcssl.train.state import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")


class Queue:
    """A SLURM that runs every call when it is submitted; jobs after one that failed are dropped."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.waiting: list[str] = []
        self.fails: Callable[[Call], bool] = lambda call: False

    def submit(
        self, calls: Sequence[Call], folder: Path, profile: Any, *, name: str, gpus: int, after: Sequence[str]
    ) -> str:
        job = {"id": str(len(self.jobs)), "name": name, "tasks": len(calls), "after": list(after), "gpus": gpus}
        self.jobs.append(job)
        ok = all(other.isdigit() and self.jobs[int(other)]["ok"] for other in after)
        for call in calls if ok else ():
            if self.fails(call):
                ok = False
            else:
                call()
        job["ok"] = ok
        return str(job["id"])

    def kinds(self) -> list[str]:
        """What was submitted since the last time, in order."""
        found = [job["name"].split("-")[1] for job in self.jobs[self._told :]]
        self._told = len(self.jobs)
        return found

    _told = 0


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    found = Queue()
    monkeypatch.setattr(array, "submit_array", found.submit)
    monkeypatch.setattr(array, "jobs_under_way", lambda name: [i for i in found.waiting if name.startswith(i)])
    monkeypatch.setattr(follow, "jobs_under_way", lambda name: [])
    return found


@pytest.fixture
def bench(data, tmp_path) -> Path:
    """bench.yaml beside a split file of all slides, and one of the lung's alone that tells its slides apart."""
    slides = data.store.slides
    make_splits(slides, "organ", 2).to_csv(tmp_path / "organ.csv", index=False)
    settings = {"store": os.path.relpath(data.store_path, tmp_path), "splits": ["organ.csv"], "profile": "local"}
    settings |= {"preset": "mccv-demo", "array": 2, "replicas": 1}
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "bench.yaml"


@pytest.fixture
def run(small, data, tmp_path) -> Path:
    """A run with the checkpoints of two pseudo-epochs, the untrained one, and one in between."""
    folder = small.make_run(tmp_path / "run", data, small.dino_recipe())
    for step in (0, 3, 5, 6):
        add_checkpoint(small, folder, step)
    return folder


def add_checkpoint(small: Any, run: Path, step: int) -> None:
    state = TrainState(small.dino_recipe(), torch.device("cpu"))
    state.step = step
    save_checkpoint(run, step, *state.to_checkpoint())


def _results(run: Path) -> pd.DataFrame:
    return mccv.read_rows(run / "benchmark" / "results" / "results.csv")


def _rewritten(settings: Path, **changes: Any) -> Path:
    settings.write_text(yaml.safe_dump(yaml.safe_load(settings.read_text()) | changes))
    return settings


def test_steps_that_are_measured_are_the_trainers_pseudo_epochs(small, data, run):
    timeline = Timeline(small.dino_recipe(), data.schedule)
    assert measured_steps(run, every=1) == [s for s in (0, 3, 5, 6) if timeline.ends_pseudo_epoch(s)] == [0, 3, 6]
    assert measured_steps(run, every=2) == [0, 6]
    assert measured_steps(run, every=3) == [0]


def test_every_checkpoint_is_embedded_and_measured_once(small, queue, bench, run):
    attach(run, load_bench(bench))
    told = submit_missing(run)
    assert [what for what, _ in told] == [f"{does} step {s}" for s in (0, 3, 6) for does in ("embeds", "measures")]
    assert queue.kinds() == ["embed", "mccv"] * 3
    assert [job["tasks"] for job in queue.jobs] == [2, 1] * 3
    assert [job["after"] for job in queue.jobs] == [[], ["0"], [], ["2"], [], ["4"]]
    table = _results(run)
    assert sorted(table["checkpoint"].unique(), key=int) == ["0", "3", "6"]
    assert set(table["encoder"]) == {"run"}
    assert set(table["task"]) == {"organ"}
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*.h5")}
    assert submit_missing(run) == []
    assert queue.kinds() == []

    checkpoint_path(run, 3).unlink()  # no longer there, but measured
    add_checkpoint(small, run, 10)
    assert submit_missing(run) != []
    assert queue.kinds() == ["embed", "mccv"]
    assert sorted(_results(run)["checkpoint"].unique(), key=int) == ["0", "3", "6", "10"]
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_after_a_failure_only_what_is_missing_is_done(queue, bench, run):
    attach(run, load_bench(bench))
    failing = [0]

    def fails(call: Call) -> bool:
        """The second embedding task of step 3."""
        if call.function is embed_share and call.arguments["request"].encoder.endswith("@3"):
            failing[0] += 1
            return failing[0] == 2
        return False

    queue.fails = fails
    submit_missing(run)
    assert [job["ok"] for job in queue.jobs] == [True, True, False, False, True, True]
    assert sorted(_results(run)["checkpoint"].unique()) == ["0", "6"]
    there = {file: file.stat().st_mtime_ns for file in run.rglob("*.h5")}
    queue.fails = lambda call: False
    queue.kinds()
    assert [what for what, _ in submit_missing(run)] == ["embeds step 3", "measures step 3"]
    assert sorted(_results(run)["checkpoint"].unique()) == ["0", "3", "6"]
    assert {file: file.stat().st_mtime_ns for file in there} == there


def test_by_itself_it_tries_again_only_the_newest_checkpoint(small, queue, bench, run):
    attach(run, load_bench(bench))
    queue.fails = lambda call: call.function is embed_share
    every = [f"{does} step {s}" for s in (0, 3, 6) for does in ("embeds", "measures")]
    assert [what for what, _ in submit_missing(run, again=False)] == every, "each was never tried"
    assert [what for what, _ in submit_missing(run, again=False)] == every[-2:]
    add_checkpoint(small, run, 10)
    assert [what for what, _ in submit_missing(run, again=False)] == ["embeds step 10", "measures step 10"]
    queue.fails = lambda call: False
    assert len(submit_missing(run)) == 8, "hpcssl jobs benchmark"


def test_by_itself_it_tries_what_a_changed_benchmark_asks_for(queue, bench, run):
    attach(run, load_bench(bench))
    submit_missing(run, again=False)
    queue.kinds()
    attach(run, load_bench(bench))
    assert submit_missing(run, again=False) == []
    attach(run, load_bench(_rewritten(bench, head=["gma", "mean"])))
    submit_missing(run, again=False)
    assert queue.kinds() == ["mccv"] * 3


def test_a_target_of_values_is_read_from_its_column(queue, bench, run, data):
    slides = data.store.slides
    table = slides.assign(age=[str(20.5 + i) for i in range(len(slides))])
    make_splits(table, "age", 2).to_csv(bench.parent / "age.csv", index=False)
    attach(run, load_bench(_rewritten(bench, splits=["organ.csv", "age.csv"])))
    submit_missing(run)
    found = _results(run).groupby("task")["metric"].unique()
    assert {"r2", "mae", "spearman"} < set(found["age"])
    assert "auc" in found["organ"]
    assert submit_missing(run) == []


def test_nothing_is_submitted_beside_what_is_under_way(queue, bench, run):
    attach(run, load_bench(bench))
    queue.waiting = ["hpcssl-embed"]
    assert [what for what, _ in submit_missing(run)] == [f"measures step {s}" for s in (0, 3, 6)]
    queue.waiting = ["hpcssl-embed", "hpcssl-mccv"]
    queue.kinds()
    assert submit_missing(run) == []


def test_only_slides_that_the_splits_name_are_embedded(queue, bench, run, data):
    slides = data.store.slides
    four = slides.iloc[[0, 1, 3, 4]].reset_index(drop=True)
    make_splits(four, "organ", 1, 0.5).to_csv(bench.parent / "organ.csv", index=False)
    attach(run, load_bench(bench))
    submit_missing(run)
    found = {file.stem for file in (run / "benchmark" / "features" / "step-000000006").glob("*.h5")}
    assert found == set(four["slide_id"])


def test_a_task_and_a_head_more_are_all_that_is_done(queue, bench, run):
    attach(run, load_bench(bench))
    submit_missing(run)
    queue.kinds()
    table = pd.read_csv(bench.parent / "organ.csv")
    table.to_csv(bench.parent / "again.csv", index=False)
    attach(run, load_bench(_rewritten(bench, splits=["organ.csv", "again.csv"], every=2)))
    submit_missing(run)
    assert queue.kinds() == ["mccv", "mccv"], "of every second checkpoint, from the features that are there"
    attach(run, load_bench(_rewritten(bench, head=["gma", "mean"], every=2)))
    submit_missing(run)
    assert [job["tasks"] for job in queue.jobs[-2:]] == [2, 2]
    assert submit_missing(run) == []
    found = _results(run).query("checkpoint == '6'")
    assert set(zip(found["task"], found["encoder"])) == set(product(("organ", "again"), ("run", "run, mean")))


def test_gpus_are_for_embedding_and_where_asked_for_fitting(queue, bench, run, tmp_path):
    (tmp_path / "gpu.yaml").write_text("gpus_per_node: 4\n")
    attach(run, load_bench(_rewritten(bench, profile="gpu.yaml", every=9)))
    submit_missing(run)
    assert [job["gpus"] for job in queue.jobs] == [1, 0]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"split": ["a"]}, ConfigError, "unknown setting split; did you mean splits?"),
        ({"splits": []}, ConfigError, "splits is empty"),
        ({"splits": ["none.csv"]}, SplitError, "none.csv: no such split file"),
        ({"preset": "gma-5"}, ConfigError, "did you mean gma-50?"),
        ({"head": ["gna"]}, ConfigError, "did you mean gma?"),
        ({"profile": "v10"}, ConfigError, "did you mean v100?"),
        ({"every": 0}, ConfigError, "every = 0; expected at least 1"),
        ({"device": "gpu"}, ConfigError, "device = 'gpu'"),
    ],
)
def test_what_cannot_be_is_refused_before_there_is_a_run(queue, bench, changes, error, words):
    with pytest.raises(error) as caught:
        load_bench(_rewritten(bench, **changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_slide_that_the_store_lacks_is_told_at_once(queue, bench):
    table = pd.read_csv(bench.parent / "organ.csv")
    table.replace("lung-0", "lung-7").to_csv(bench.parent / "organ.csv", index=False)
    with pytest.raises(FeatureError, match="has no slide lung-7"):
        load_bench(bench)


def test_another_benchmark_of_the_same_run_is_refused(queue, bench, run, data):
    attach(run, load_bench(bench))
    with pytest.raises(RunError, match="made with preset = mccv-demo, now gma-40"):
        attach(run, load_bench(_rewritten(bench, preset="gma-40")))
    attach(run, load_bench(_rewritten(bench, preset="mccv-demo", array=5)))
    kept, splits = follow._bench_of(run), (str(bench.parent / "organ.csv"),)
    assert kept == replace(kept, array=5, store=str(data.store_path.resolve()), splits=splits), "whole paths"


def test_results_hold_every_part_though_another_task_adds_one_meanwhile(queue, bench, run, monkeypatch):
    """Two tasks join all parts at once: whoever writes last must have seen all."""
    attach(run, load_bench(bench))
    submit_missing(run)
    results = run / "benchmark" / "results"
    late = {suffix: next((results / "parts").glob(f"*__3.{suffix}")) for suffix in ("csv", "json")}
    contents = {path: path.read_bytes() for path in late.values()}
    for path in contents:
        path.unlink()
    real, written = mccv.write_table, []

    def write_table(path: Path, table: Any) -> None:
        real(path, table)
        written.append(path.name)
        if written.count("results.csv") == 1:  # our first table, in which it is not
            for late_path, content in contents.items():
                late_path.write_bytes(content)

    monkeypatch.setattr(mccv, "write_table", write_table)
    features = run / "benchmark" / "features" / "step-000000006"
    measure(features, str(bench.parent / "organ.csv"), results, load_bench(bench), threads=1)
    assert written.count("results.csv") == 2
    assert sorted(_results(run)["checkpoint"].unique()) == ["0", "3", "6"]


@pytest.fixture
def apart(monkeypatch) -> list[int]:
    """Number of checkpoints at every submission that `following` makes."""
    found: list[int] = []
    monkeypatch.setattr(watching, "_POLL_S", 0.02)
    monkeypatch.setattr(watching, "_submit_apart", lambda run, say: found.append(len(measured_steps(run, every=1))))
    return found


def test_while_a_run_trains_every_new_checkpoint_is_submitted(small, queue, bench, run, apart):
    attach(run, load_bench(bench))
    with following(run, say=print):
        small.wait_until(lambda: apart == [3], 10, "what is there at the start")
        add_checkpoint(small, run, 9)  # ends no pseudo-epoch
        add_checkpoint(small, run, 10)
        small.wait_until(lambda: apart == [3, 4], 10, "the new one")
    assert apart == [3, 4, 4], "and once more at the end"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("follow")]


def test_a_run_that_is_stopped_does_not_wait(small, queue, bench, run, apart):
    attach(run, load_bench(bench))
    with pytest.raises(KeyboardInterrupt), following(run, say=print):
        raise KeyboardInterrupt
    small.wait_until(lambda: "follow" not in [t.name for t in threading.enumerate()], 10, "its thread ends")
    assert len(apart) <= 1


def test_without_a_benchmark_nothing_follows(run, apart):
    with following(run, say=print):
        pass
    assert apart == []


def test_what_fails_is_said_and_hurts_nobody(bench, run, commands, queue):
    """The real process apart, where SLURM does not answer."""
    attach(run, load_bench(bench))
    commands(squeue='echo "no SLURM here" >&2; exit 1')
    said: list[str] = []
    watching._submit_apart(run, said.append)
    (line,) = said
    assert line.startswith(f"benchmark not submitted; hpcssl jobs benchmark {run} tries again: ")
    assert line.endswith("squeue failed: no SLURM here")


@pytest.fixture
def pretraining(small, data, bench, tmp_path) -> list[str]:
    """A pretraining for one pseudo-epoch into `new`, with the benchmark."""
    recipe = small.write_recipe(tmp_path / "recipe.yaml", small.dino_recipe(stop_after=1))
    given = ("--store", data.store_path, "--schedule", data.schedule_path, "--out", tmp_path / "new")
    return ["pretrain", *map(str, (recipe, *given)), "--cluster", "none", "--benchmark-with", str(bench)]


def test_where_there_is_no_slurm_no_run_is_begun(pretraining, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(pretraining) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no squeue on PATH" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("own_process")
def test_a_run_takes_its_benchmark_along(pretraining, tmp_path, queue, apart):
    assert main(pretraining) == 0
    assert apart[-1] == 2, "at the end, untrained and after one pseudo-epoch"
    submit_missing(tmp_path / "new")
    assert set(_results(tmp_path / "new")["checkpoint"]) == {"0", "3"}


def test_the_command_submits_what_is_missing(queue, bench, run, capsys):
    attach(run, load_bench(_rewritten(bench, every=9)))
    assert main(["jobs", "benchmark", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == ["job 0 embeds step 0: 2 tasks", "job 1 measures step 0: 1 task"]
    assert main(["jobs", "benchmark", str(run)]) == 0
    assert "nothing to submit" in capsys.readouterr().out
    (run / "benchmark" / "bench.yaml").unlink()
    assert main(["jobs", "benchmark", str(run)]) == 2
    assert "--benchmark-with bench.yaml" in capsys.readouterr().err
