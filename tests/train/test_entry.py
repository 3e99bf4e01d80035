"""A start from the run folder alone, as a requeued job makes it: it goes on with the same data, or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from hpcssl.core.atomic import digest_file
from hpcssl.core.errors import RunError, ScheduleError
from hpcssl.core.world import World
from hpcssl.models.encoder import build_encoder
from hpcssl.runs.checkpoint import checkpoint_steps
from hpcssl.runs.run_folder import Generation
from hpcssl.runs.trace import read_metrics
from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.spec import ScheduleSpec
from hpcssl.stores.scan import build_store
from hpcssl.train.entry import patient, pretrain
from hpcssl.train.loop import Stopped, Surroundings
from hpcssl.train.reduce import Collectives

pytestmark = pytest.mark.usefixtures("own_process")


@pytest.fixture
def own(small, tmp_path):
    """Data that a test may spoil."""
    return small.make_data(tmp_path / "own")


def _start(run, *, steps: int | None = None) -> list[str]:
    """Start a run in this process, and stop it after so many steps; returns what it said."""
    said: list[str] = []
    left = iter(range(10**9) if steps is None else range(steps))
    stop = lambda: next(left) + 1 == steps  # noqa: E731
    pretrain(run, Surroundings(generation=Generation.take(run), asked_to_stop=stop, say=said.append))
    return said


def _rebuild(small, data, what: str) -> None:
    shutil.rmtree(getattr(data, f"{what}_path"))
    if what == "store":
        (data.tiles / "lung" / "lung-0" / "tile_x0_y0.jpg").write_bytes(small.jpeg(99, quality=50))
        build_store(data.tiles, data.store_path)
    else:
        spec = ScheduleSpec(seed=7, num_pseudo_epochs=4, positions_per_pseudo_epoch=40, num_groups=2, max_repeats=200)
        build_schedule(spec, data.store.slides, data.schedule_path)


@pytest.mark.parametrize("what", ["schedule", "store"])
@pytest.mark.parametrize("begun", [True, False])
def test_swapped_data_are_refused_with_both_digests_and_nothing_is_lost(small, own, tmp_path, what, begun):
    """Also where nothing was trained yet: a job that waits in a queue for days."""
    run = small.make_run(tmp_path / "run", own, small.mae_recipe())
    if begun:
        with pytest.raises(Stopped):
            _start(run, steps=5)
    before = own.identity[f"{what}_digest"]
    _rebuild(small, own, what)
    after = own.identity[f"{what}_digest"]
    assert before != after
    with pytest.raises(RunError) as caught:
        _start(run)
    told = str(caught.value)
    assert f"{what}_digest = {before} in config.yaml, {after} found" in told
    assert "\n" not in told
    assert checkpoint_steps(run) == ([0, 3, 5] if begun else [])
    assert not begun or read_metrics(run)["step"].tolist() == [1, 2, 3, 4, 5]


def test_data_that_are_gone_are_told(small, own, tmp_path):
    run = small.make_run(tmp_path / "run", own, small.mae_recipe())
    shutil.rmtree(own.schedule_path)
    with pytest.raises(ScheduleError, match="no schedule"):
        _start(run)


def test_swapped_initial_weights_are_refused_before_the_first_step_only(small, data, tmp_path):
    recipe, file = small.dino_recipe(initial_weights=str(tmp_path / "w.safetensors")), tmp_path / "w.safetensors"
    weights = build_encoder(recipe.encoder).vit.state_dict()
    save_file(weights, file)
    run = small.make_run(tmp_path / "run", data, recipe, initial_weights_digest=digest_file(file))
    save_file({name: tensor + 1 for name, tensor in weights.items()}, file)
    with pytest.raises(RunError, match=r"initial_weights_digest = \w+ in config.yaml, \w+ found"):
        _start(run, steps=1)
    save_file(weights, file)
    with pytest.raises(Stopped):
        _start(run, steps=1)
    file.unlink()
    with pytest.raises(Stopped):
        _start(run, steps=1)
    assert checkpoint_steps(run)[-1] == 2


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(small, data, tmp_path):
    run = small.make_run(tmp_path / "run", data, small.mae_recipe())
    with pytest.raises(Stopped):
        _start(run, steps=5)
    for file in (run / "checkpoints").iterdir():
        os.truncate(file, 1000)
    trace = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="none of its 3 checkpoints can be read"):
        _start(run)
    assert (run / "metrics.jsonl").read_bytes() == trace
    assert checkpoint_steps(run) == [0, 3, 5]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("Timed out waiting 3000ms for recv operation to complete", True),
        ("[Rank 0] Watchdog caught collective operation timeout: ran for 45012 milliseconds before timing out.", True),
        ("Connection closed by peer", False),
    ],
)
def test_waiting_in_vain_is_told_apart_from_other_errors(message, told):
    def sum_(tensor) -> None:
        raise RuntimeError(message)

    patience = patient(Collectives(world=World(rank=1, size=2), all_reduce_sum=sum_))
    with pytest.raises(RuntimeError, match=re.escape(message)):
        patience.all_reduce_sum(torch.zeros(1))  # no limit as yet
    patience.limit_waiting(3)
    with pytest.raises(RunError if told else RuntimeError, match="for 3 s" if told else re.escape(message)):
        patience.all_reduce_sum(torch.zeros(1))


@pytest.mark.parametrize(("precision", "said"), [("auto", "in fp32 (auto) on the CPU"), ("bf16", "in bf16 on the CPU")])
def test_the_precision_is_said_and_recorded(small, data, tmp_path, precision, said):
    recipe = small.mae_recipe(stop_after=0.3)
    run = small.make_run(tmp_path / "run", data, replace(recipe, train=replace(recipe.train, precision=precision)))
    assert said in _start(run)[0]
    assert json.loads((run / "restarts.jsonl").read_text())["precision"] == said.split()[1]


def test_deterministic_kernels_have_the_workspace_that_they_need(small, data, tmp_path, monkeypatch):
    """cuBLAS refuses to compute deterministically without it."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    recipe = small.mae_recipe(stop_after=0.3)
    for deterministic in (False, True):
        train = replace(recipe.train, deterministic=deterministic)
        run = small.make_run(tmp_path / str(deterministic), data, replace(recipe, train=train))
        try:
            _start(run)
            assert torch.are_deterministic_algorithms_enabled() == deterministic
        finally:
            torch.use_deterministic_algorithms(False)
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
