"""Files that the first format's version wrote, in tests/format1: this version reads them, and goes on to the same bits.

`tests/format1/make.py` says how they were made. Everything is done by the command line.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file

from hpcssl.cli.main import main

FIXTURE = Path(__file__).with_name("format1")
EXPECTED = json.loads((FIXTURE / "expected" / "expected.json").read_text())
WRITTEN = 1_700_000_000  # when the features were; results tell
SAME_MACHINE = (torch.backends.cpu.get_cpu_capability(), torch.__version__) == (
    EXPECTED["cpu_capability"],
    EXPECTED["torch"],
)
SIZES = "--set num_pseudo_epochs=3 --set positions_per_pseudo_epoch=40 --set max_repeats=200"
CLOSE = 1e-5  # on another kind of processor, or with another PyTorch
Command = Callable[..., str]

pytestmark = [pytest.mark.usefixtures("one_thread", "own_process"), pytest.mark.timeout(120)]


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """The files in another folder; what holds whole paths names the old one."""
    here = tmp_path / "moved"
    shutil.copytree(FIXTURE, here)
    for file in here.rglob("*.h5"):
        os.utime(file, (WRITTEN, WRITTEN))
    return here


@pytest.fixture
def here(moved: Path) -> Path:
    """The files where they were made."""
    for file in ("loose/store.json", "dino/config.yaml", "dino/benchmark/bench.yaml"):
        text = (moved / file).read_text()
        assert "/HERE" in text
        (moved / file).write_text(text.replace("/HERE", str(moved)))
    return moved


@pytest.fixture
def hpcssl(moved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in the folder of the files, and returns what it prints."""
    monkeypatch.chdir(moved)

    def run(line: str) -> str:
        code = main(line.split())
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out

    return run


def digest_tensors(file: Path) -> str:
    tensors = sorted(load_file(file).items())
    parts = (f"{name} {tensor.dtype} {tensor.shape} ".encode() + tensor.tobytes() for name, tensor in tensors)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def assert_same(found: object, expected: object) -> None:
    """Check for the same bits on the same kind of machine, else for closeness."""
    one, other = np.asarray(found), np.asarray(expected)
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    if SAME_MACHINE:
        assert one.tobytes() == other.tobytes()
    np.testing.assert_allclose(one, other, rtol=CLOSE, atol=CLOSE)


def assert_same_features(file: Path, expected: Path) -> None:
    with h5py.File(file) as one, h5py.File(expected) as other:
        assert_same(one["features"][()], other["features"][()])
        assert np.array_equal(one["coords"][()], other["coords"][()])


@pytest.mark.parametrize("recipe", ["dino", "mae"])
def test_a_run_that_moved_goes_on_to_the_same_bits(moved: Path, hpcssl: Command, recipe: str) -> None:
    shutil.rmtree(moved / recipe / "benchmark", ignore_errors=True)  # which would ask SLURM
    before = (moved / recipe / "metrics.jsonl").read_text()
    hpcssl(f"pretrain {recipe}.yaml --store packed --schedule schedule --out {recipe} --cluster none")
    after = (moved / recipe / "metrics.jsonl").read_text()
    assert after.startswith(before)
    losses = [json.loads(line)["loss"] for line in after.splitlines()]
    expected = [float.fromhex(loss) for loss in EXPECTED[recipe]["loss"]]
    assert (len(before.splitlines()), len(losses)) == (5, 10)
    assert_same(losses, expected)
    hpcssl(f"export {recipe} --out encoder.safetensors")
    weights, others = load_file("encoder.safetensors"), load_file(f"expected/{recipe}.safetensors")
    assert weights.keys() == others.keys()
    for name, tensor in others.items():
        assert_same(weights[name], tensor)
    newest = max((moved / recipe / "checkpoints").iterdir())
    assert not SAME_MACHINE or digest_tensors(newest) == EXPECTED[recipe]["tensors"]


def test_a_run_goes_on_with_its_own_data_and_settings_alone(
    here: Path, hpcssl: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "pretrain dino.yaml --store packed --schedule schedule --out dino --cluster none"
    assert main([*command.split(), "--set", "seed=1"]) == 2
    assert "this run has seed = 0, asked for is 1" in capsys.readouterr().err
    hpcssl(f"schedule build --store packed --spec demo --out other --set num_groups=2 --set seed=1 {SIZES}")
    assert main(command.replace("--schedule schedule", "--schedule other").split()) == 2
    assert "schedule_digest" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["dino", "mae"])
def test_an_old_checkpoint_is_exported(moved: Path, hpcssl: Command, recipe: str) -> None:
    hpcssl(f"export {recipe}@5 --out encoder.safetensors")
    assert digest_tensors(moved / "encoder.safetensors") == EXPECTED[recipe]["exported"]


def test_stores_and_schedules_are_read_and_would_be_built_the_same(here: Path, hpcssl: Command) -> None:
    for store in ("loose", "packed"):
        assert "all" in hpcssl(f"store verify {store} --deep")
    hpcssl("store build tiles --out built --pack")
    digests = [
        json.loads((here / store / "store.json").read_text())["digest"] for store in ("loose", "packed", "built")
    ]
    assert len(set(digests)) == 1
    for store, schedule, groups in (("built", "schedule", 2), ("online", "online-schedule", 1)):
        assert "all four guarantees hold" in hpcssl(f"schedule verify {schedule}")
        hpcssl(f"schedule build --store {store} --spec demo --out new-{schedule} --set num_groups={groups} {SIZES}")
        assert "are the same schedule" in hpcssl(f"schedule diff {schedule} new-{schedule}")


def test_a_store_of_slides_is_read(here: Path, hpcssl: Command) -> None:
    """Its slides are below /proc/self/cwd, the one whole path that moves with the folder."""
    assert "all 1 slides there" in hpcssl("store verify online")
    hpcssl("embed --store online --encoder dino@5 --out new --threads 1")
    assert_same_features(here / "new" / "w0.h5", here / "features" / "online" / "w0.h5")
    data = "--recipe dino.yaml --store online --schedule online-schedule"
    assert "4 positions, 4 views each" in hpcssl(f"plan draw --positions 0:4 {data} --out sheet.png")


def test_features_are_completed(here: Path, hpcssl: Command) -> None:
    (here / "features" / "dino" / "s3.h5").unlink()
    hpcssl("embed --store loose --encoder dino@5 --out features/dino --threads 1")
    assert_same_features(here / "features" / "dino" / "s3.h5", FIXTURE / "features" / "dino" / "s3.h5")
    untouched = [file.stem for file in (here / "features" / "dino").glob("*.h5") if file.stat().st_mtime == WRITTEN]
    assert sorted(untouched) == [f"s{number}" for number in range(10) if number != 3]


def test_results_count_and_would_be_measured_the_same(here: Path, hpcssl: Command) -> None:
    checked = hpcssl("splits check splits/label.csv --features features/dino --slides tiles/slides.csv --target label")
    assert "2 splits of 10 slides (a 6, b 4), 8 in train" in checked
    measure = "mccv --features features/dino --splits splits/label.csv --preset mccv-demo --threads 1 --out"
    part = here / "results" / "parts" / "label__dino__5.csv"
    os.utime(part, (WRITTEN, WRITTEN))
    hpcssl(f"{measure} results")
    assert part.stat().st_mtime == WRITTEN
    assert (here / "results" / "results.csv").read_bytes() == (FIXTURE / "results" / "results.csv").read_bytes()
    hpcssl(f"{measure} measured")
    one, other = (pd.read_csv(here / name / "results.csv") for name in ("measured", "results"))
    pd.testing.assert_frame_equal(one.drop(columns="value"), other.drop(columns="value"))
    assert_same(one["value"], other["value"])


def test_the_report_says_the_same(here: Path, hpcssl: Command) -> None:
    hpcssl("report results dino --out report")
    for table in ("curves_label", "summary", "times", "training"):
        one, other = (pd.read_csv(here / folder / f"{table}.csv") for folder in ("report", "expected"))
        pd.testing.assert_frame_equal(one, other, rtol=1e-9)


def test_jobs_lists_the_runs_and_what_follows_them(
    here: Path, hpcssl: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line.split() for line in hpcssl("jobs list .").splitlines()]
    listed = {line[0]: " ".join(line[1:6]) for line in lines if line and line[0] in ("dino", "mae")}
    assert listed == {"dino": "finished – 5 of 5", "mae": "finished – 5 of 5"}
    (here / "bin").mkdir()
    (here / "bin" / "squeue").write_text("#!/bin/sh\n")
    (here / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(here / "bin"), prepend=os.pathsep)
    assert "nothing to submit" in hpcssl("jobs benchmark dino")
