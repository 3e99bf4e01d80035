"""Job arrays on a real SLURM: embedding 397 slides and building a store, a task of which is killed; doctor's checks."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from hpcssl.embed.embedding import embed_store
from hpcssl.embed.sources import Source
from hpcssl.evaluate.results import read_rows
from hpcssl.evaluate.splits import make_splits
from hpcssl.features.feature_files import read_slide
from hpcssl.jobs.array import shares
from hpcssl.stores.kinds import open_store
from hpcssl.stores.scan import build_store

SLIDES, TASKS = 397, 3
PROFILE = "gpus_per_node: 0\ncpus_per_gpu: 1\ntimeout_min: 60\nenvironment: {OMP_NUM_THREADS: '1'}\n"
JOB_S = 200  # for an array of this size to come to its end on a busy machine

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def work(small: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiles of 397 slides (one to three each), their store, a run with one checkpoint, and a profile."""
    from hpcssl.runs.checkpoint import save_checkpoint
    from hpcssl.train.state import TrainState

    folder = tmp_path_factory.mktemp("it's an array")
    for s in range(SLIDES):
        slide = folder / "tiles" / ("breast", "lung")[s % 2] / f"slide {s:03d}"
        slide.mkdir(parents=True)
        for t in range(1 + s % 3):
            (slide / f"tile_x{t}_y{s}.jpg").write_bytes(small.jpeg(10 * s + t, px=24))
    build_store(folder / "tiles", folder / "store")
    data = small.make_data(folder / "pretraining")
    run = small.make_run(folder / "run", data, small.dino_recipe())
    save_checkpoint(run, 0, *TrainState(small.dino_recipe(), torch.device("cpu")).to_checkpoint())
    (folder / "profile.yaml").write_text(PROFILE)
    return folder


@pytest.fixture(scope="module")
def hpcssl(hpcssl_in: Callable, work: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command of hpcssl in the work folder, beside the cluster."""
    return partial(hpcssl_in, work)


@pytest.fixture(scope="module")
def tell(slurm: dict[str, str]) -> Callable[..., str]:
    """Runs one of SLURM's commands and returns its words."""
    return lambda *command: (
        subprocess.run(command, env=slurm, check=True, capture_output=True, text=True, timeout=30).stdout
    )


def _wait(happened: Callable[[], object], what: str) -> None:
    until = time.monotonic() + JOB_S
    while not happened():
        assert time.monotonic() < until, f"not within {JOB_S} s: {what}"
        time.sleep(0.2)


def _job_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    found = re.match(r"job (\d+) ", done.stdout)
    assert found, done.stdout
    return found[1]


def _gone(tell: Callable[..., str], *jobs: str) -> Callable[[], bool]:
    """Return whether SLURM has none of the jobs any more."""
    return lambda: not set(jobs) & set(tell("squeue", "--noheader", "--format=%F").split())


def _written(out: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in out.glob("[!.]*.h5")}


def test_397_slides_with_a_task_killed_then_only_what_is_missing(hpcssl, tell, work):
    store, out = open_store(work / "store"), work / "features"
    share = shares(store.slides["num_tiles"].tolist(), TASKS)[1]
    hangs = len(share) // 2  # of the second task's slides, the one at which it waits for ever
    tile = store.file_of(int(store.first_tiles[share[hangs]]))
    content = tile.read_bytes()
    tile.unlink()
    os.mkfifo(tile)
    embed = ("embed", "--store", "store", "--encoder", "run", "--out", "features")
    array = ("--cluster", "slurm", "--array", TASKS, "--profile", "profile.yaml")
    submitted = hpcssl(*embed, *array)
    job = _job_of(submitted)
    assert f"job {job} submitted: {TASKS} tasks embed what is missing" in submitted.stdout
    (script,) = (out / "logs").glob("*_submission.sh")
    assert "export OMP_NUM_THREADS=1" in script.read_text().splitlines(), "what the profile says of the environment"
    missing = {f"{store.slides['slide_id'].iloc[slide]}.h5" for slide in share[hangs:]}
    _wait(lambda: len(_written(out)) == SLIDES - len(missing), f"{SLIDES - len(missing)} slides")
    again = hpcssl(*embed, *array)
    assert f"job {job} is under way already" in again.stdout, again.stderr
    tell("scancel", "--signal=KILL", f"{job}_1")
    _wait(_gone(tell, job), "the array has ended")

    before = _written(out)
    assert set(before) == {f"{name}.h5" for name in store.slides["slide_id"]} - missing
    assert all(len(read_slide(out / name)) for name in before), "whole, every one"
    tile.unlink()
    tile.write_bytes(content)
    rest = hpcssl(*embed, *array)
    assert f"submitted: {TASKS} tasks" in rest.stdout, "what one task has left is shared out among all"
    _wait(_gone(tell, _job_of(rest)), "the second array has ended")
    after = _written(out)
    assert len(after) == SLIDES
    assert {name: after[name] for name in before} == before, "nothing was computed again"
    assert not list(out.glob(".*.tmp"))
    complete = hpcssl(*embed, *array)
    assert (complete.returncode, complete.stdout) == (0, "features of all slides are there: features\n")

    embed_store(store, Source.parse(str(work / "run")), work / "here", threads=1)
    for name in after:
        np.testing.assert_allclose(read_slide(out / name), read_slide(work / "here" / name), rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_a_task_that_slurm_warns_goes_on_by_itself(hpcssl, tell, work):
    """What happens before the time limit and before preemption."""
    store, out = open_store(work / "store"), work / "warned"
    tile = store.file_of(0)
    content = tile.read_bytes()
    tile.unlink()
    os.mkfifo(tile)
    embed = ("embed", "--store", "store", "--encoder", "run", "--out", "warned")
    job = _job_of(hpcssl(*embed, "--cluster", "slurm", "--array", 2, "--profile", "profile.yaml"))
    first = shares(store.slides["num_tiles"].tolist(), 2)[0]
    assert 0 in first
    _wait(lambda: len(_written(out)) == SLIDES - len(first), "the other task is done")
    before = _written(out)
    tile.unlink()
    tile.write_bytes(content)
    tell("scancel", "--signal=USR2", f"{job}_0")
    _wait(_gone(tell, job), "the task has started again and ended")
    after = _written(out)
    assert len(after) == SLIDES
    assert {name: after[name] for name in before} == before


def test_a_store_in_parts_one_of_which_fails_at_first(hpcssl, tell, work):
    tile = next((work / "tiles" / "lung").glob("*/*.jpg"))
    content = tile.read_bytes()
    tile.write_bytes(content[:-2])
    build = ("store", "build", "tiles", "--out", "packed", "--pack", "--shard-gb", "0.00005")
    array = ("--cluster", "slurm", "--array", 3, "--profile", "profile.yaml")
    first = hpcssl(*build, *array)
    jobs = re.findall(r"^job (\d+) ", first.stdout, re.MULTILINE)
    assert len(jobs) == 2, (first.stdout, first.stderr)
    _wait(_gone(tell, *jobs), "the part that cannot be built takes the job that joins with it")
    assert not (work / "packed").exists()
    logs = "".join(log.read_text() for log in (work / ".packed.parts" / "logs").glob(f"{jobs[0]}*_log.err"))
    assert "1 of " in logs
    assert f"{tile.name} (" in logs

    tile.write_bytes(content)
    second = hpcssl(*build, *array)
    assert re.match(r"job \d+ submitted: 1 tasks", second.stdout), (second.stdout, second.stderr)
    _wait(_gone(tell, *re.findall(r"^job (\d+) ", second.stdout, re.MULTILINE)), "the parts are joined")
    store = open_store(work / "packed")
    assert store.digest == open_store(work / "store").digest
    store.verify(deep=True)
    third = hpcssl(*build, *array)
    assert third.returncode == 2
    assert "packed: exists already" in third.stderr


def test_the_benchmark_follows_a_run(small, hpcssl, tell, work):
    """Its own job submits the rest: checkpoints are embedded and measured while it trains, and once it is over."""
    small.write_recipe(work / "recipe.yaml", small.dino_recipe())
    slides = open_store(work / "pretraining" / "store").slides
    make_splits(slides, "organ", 2).to_csv(work / "organ.csv", index=False)
    bench = "store: pretraining/store\nsplits: [organ.csv]\nprofile: profile.yaml\npreset: mccv-demo\n"
    (work / "bench.yaml").write_text(f"{bench}every: 4\narray: 1\n")
    data = ("--store", "pretraining/store", "--schedule", "pretraining/schedule", "--out", "followed")
    slurm = ("--cluster", "slurm", "--profile", "profile.yaml", "--gpus-per-node", 1)
    submitted = hpcssl("pretrain", "recipe.yaml", *data, *slurm, "--benchmark-with", "bench.yaml")
    assert submitted.returncode == 0, submitted.stderr
    results = work / "followed" / "benchmark" / "results" / "results.csv"

    def measured() -> set[str]:
        return set(read_rows(results)["checkpoint"]) if results.exists() else set()

    _wait(lambda: measured() == {"0", "13"}, "what was untrained and what is after four pseudo-epochs")
    _wait(lambda: not tell("squeue", "--noheader").split(), "all jobs have ended")
    logs = "".join(log.read_text() for log in (work / "followed" / "logs").glob("*.err"))
    assert "benchmark not submitted" not in logs, logs
    table = read_rows(results)
    assert len(table.query("epoch == 10 and metric == 'auc'")) == 2 * 2 * 2, "checkpoints, splits, replicas"
    features = work / "followed" / "benchmark" / "features" / "step-000000013"
    assert {file.stem for file in features.glob("*.h5")} == set(slides["slide_id"])


def test_doctor_finds_a_profile_that_fits(hpcssl):
    done = hpcssl("doctor", "--profile", "profile.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line[6:].split("  ")[0]: line for line in done.stdout.splitlines()[:-1]}
    assert " ".join(lines) == "partition time limit nodes account a job python on a node shared folder"
    assert all(line.startswith("pass") for line in lines.values()), done.stdout
    assert "main, the cluster's default" in lines["partition"]
    assert "2 of 2 in main have 1 cores" in lines["nodes"]
    assert re.search(r"node[12]: python 3\.\d+\.\d+, hpcssl ", lines["python on a node"])


@pytest.mark.parametrize(
    ("line", "name", "words"),
    [
        ("partition: mian", "partition", "did you mean main?"),
        ("cpus_per_gpu: 64", "nodes", "none of the 2 nodes of main has 64 cores"),
        ("constraint: a100", "a job", "SLURM would refuse it"),
        ("setup: ['exit 3']", "python on a node", "fix: see that this Python"),
    ],
)
def test_doctor_names_what_does_not_fit(hpcssl, work, line, name, words):
    settings = [kept for kept in PROFILE.splitlines() if kept.split(":")[0] != line.split(":")[0]]
    (work / "unfit.yaml").write_text("\n".join([*settings, line, ""]))
    done = hpcssl("doctor", "--profile", "unfit.yaml")
    assert done.returncode == 2
    (found,) = [told for told in done.stdout.splitlines() if told.startswith(f"fail  {name} ")]
    assert words in found
