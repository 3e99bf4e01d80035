"""Steps whose loss or gradients are not finite: passed over within an allowance, else saved and told."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hpcssl.core.errors import RunError
from hpcssl.core.world import World
from hpcssl.objectives.dino.dino_objective import Dino
from hpcssl.objectives.mae.mae_objective import Mae
from hpcssl.plan.draw import draw_plan
from hpcssl.runs.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint, save_checkpoint
from hpcssl.runs.trace import read_metrics
from hpcssl.train.failure import failed_step_folder, load_batch, repeat_failed_step
from hpcssl.train.reduce import Collectives
from hpcssl.train.state import TrainState
from hpcssl.train.step import NotFiniteError

CPU = torch.device("cpu")
POISON = (24, 30, 100)  # positions, one in step 2 (both ranks' shares hold some), one in step 8

pytestmark = pytest.mark.usefixtures("one_thread")


def _recipe(small, objective: str, allowed: int, **changes):
    recipe = small.RECIPES[objective](**changes)
    return replace(recipe, train=replace(recipe.train, max_skipped_steps=allowed))


def _train(small, run, recipe, data, **more):
    data.schedule.tiles_at(0, data.schedule.num_positions)  # all files are open before there are threads
    small.train_here(run, recipe, data, **more)


def _train_ranks(small, run, recipe, data, size: int):
    """Train as several ranks, each in its thread."""
    ranks = small.VirtualRanks(size)

    def work(rank: int) -> None:
        collectives = Collectives(world=World(rank=rank, size=size), all_reduce_sum=ranks.all_reduce_sum(rank))
        _train(small, run, recipe, data, collectives=collectives, claim=None if rank == 0 else False)

    ranks.run(work)


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss of some positions not a number, whichever rank computes them."""

    def put(positions=POISON, value=math.nan) -> None:
        for kind in (Dino, Mae):

            def poisoned(self, tiles, values, real=kind.loss):
                return real(self, tiles, values) * (value if np.isin(tiles.positions, positions).any() else 1.0)

            monkeypatch.setattr(kind, "loss", poisoned)

    return put


@pytest.mark.parametrize("objective", ["dino", "mae"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_step_counts_on_and_changes_nothing(small, data, tmp_path, poison, objective, value):
    poison(value=value)
    recipe = _recipe(small, objective, 2, checkpoint=replace(small.dino_recipe().checkpoint, every_min=0, keep_last=20))
    run = small.make_run(tmp_path / "run", data, recipe)
    _train(small, run, recipe, data)
    trace = read_metrics(run)
    assert trace["step"].tolist() == list(range(1, small.STEPS + 1))
    assert trace["skipped_steps"].tolist() == [0, 0, *[1] * 6, *[2] * (small.STEPS - 8)]
    assert trace["loss"].isna().tolist() == [step in (3, 9) for step in range(1, small.STEPS + 1)]
    assert "NaN" not in (run / "metrics.jsonl").read_text(), "valid JSON"
    for before in (2, 8):
        (old, _), (new, state) = (load_checkpoint(checkpoint_path(run, step)) for step in (before, before + 1))
        assert all(torch.equal(tensor, new[name]) for name, tensor in old.items()), "weights, moments, centre, teacher"
        assert state["samples_seen"] == (before + 1) * recipe.global_batch
    assert not list(run.glob("failed-step-*"))


def test_a_resumed_run_knows_what_was_skipped_before(small, data, tmp_path, poison):
    poison()
    recipe = _recipe(small, "dino", 2)
    whole, parts = (small.make_run(tmp_path / name, data, recipe) for name in ("whole", "parts"))
    _train(small, whole, recipe, data)
    stops = iter([False] * 4 + [True])
    with pytest.raises(Exception, match="asked to stop"):
        _train(small, parts, recipe, data, asked_to_stop=lambda: next(stops))
    assert load_checkpoint(checkpoint_path(parts, 5))[1]["skipped_steps"] == 1
    with pytest.raises(RunError, match=r"step 8: .*1 steps having been skipped before"):
        _train(small, parts, _recipe(small, "dino", 1), data)
    _train(small, parts, recipe, data)
    small.assert_same_run(parts, whole, small.STEPS)


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_skip_the_same_steps(small, data, tmp_path, poison, size):
    """Position 30 belongs to rank 1 alone of two, and of three; the other ranks' losses are finite."""
    poison((30,))
    recipe = _recipe(small, "dino", 1)
    run, alone = (small.make_run(tmp_path / name, data, recipe) for name in ("run", "alone"))
    save_checkpoint(run, 0, *TrainState(recipe, CPU).to_checkpoint())  # torch's generator is one for all threads
    _train_ranks(small, run, recipe, data, size)
    _train(small, alone, recipe, data)
    traces = [read_metrics(r) for r in (run, alone)]
    assert traces[0]["skipped_steps"].tolist() == [0, 0, *[1] * (small.STEPS - 2)]
    np.testing.assert_allclose(traces[0]["loss"], traces[1]["loss"], rtol=1e-5)


@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_beyond_the_allowance_the_step_is_saved_and_can_be_repeated(small, data, tmp_path, objective):
    recipe = _recipe(small, objective, 0)
    run = small.make_run(tmp_path / "run", data, recipe)
    stops = iter([False, False, True, True])
    with pytest.raises(Exception, match="asked to stop"):
        _train(small, run, recipe, data, asked_to_stop=lambda: next(stops))
    tensors, state = load_checkpoint(checkpoint_path(run, 3))
    broken = next(name for name in tensors if name.endswith("encoder.vit.norm.weight") and "optimizer" not in name)
    tensors[broken][:] = 3e38  # a state that overflows in the forward pass
    save_checkpoint(run, 3, tensors, state)
    with pytest.raises(RunError) as caught:
        _train_ranks(small, run, recipe, data, 2)
    folder = failed_step_folder(run, 3)
    assert folder == run / "failed-step-000000003"
    told = str(caught.value)
    assert "\n" not in told
    for part in ("step 3: loss", "not finite", str(folder), "raise train.max_skipped_steps"):
        assert part in told, part
    assert checkpoint_steps(run)[-1] == 3, "nothing was published after it"

    about = json.loads((folder / "step.json").read_text())
    assert (about["step"], about["first_position"], about["world_size"]) == (3, 36, 2)
    assert about["gradients_not_finite"]
    batch = load_batch(folder)
    assert batch.positions.tolist() == list(range(36, 48))
    assert [view.shape[1] for view in batch.views] == [12] * len(batch.views)
    saved, values = load_checkpoint(folder / "state.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in tensors.items()), "the state before the step"
    assert values["step"] == 3
    _, share = load_checkpoint(folder / "batch-rank1of2.safetensors")
    patches = TrainState(recipe, CPU).objective.needs.num_patches
    plan = draw_plan(recipe.augment, recipe.seed, np.arange(42, 48), num_patches=patches)
    assert share["plan_digest"] == plan.digest()

    with pytest.raises(NotFiniteError, match="step 3: loss"):
        repeat_failed_step(folder, data.schedule, CPU)


def test_a_saved_step_without_a_share_is_told(small, data, tmp_path, poison):
    poison()
    recipe = _recipe(small, "dino", 0)
    run = small.make_run(tmp_path / "run", data, recipe)
    with pytest.raises(RunError, match="failed-step-000000002"):
        _train(small, run, recipe, data)
    assert checkpoint_steps(run) == [0]
    (failed_step_folder(run, 2) / "batch-rank0of1.safetensors").unlink()
    with pytest.raises(RunError, match=r"batch-rank0of1\.safetensors: no such checkpoint"):
        load_batch(failed_step_folder(run, 2))


def test_overflows_of_fp16_lower_the_scale_and_are_not_counted(small, data, tmp_path):
    recipe = _recipe(small, "dino", 0)
    recipe = replace(recipe, train=replace(recipe.train, precision="fp16"))
    state = TrainState(recipe, CPU)
    assert state.is_overflow_normal()
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 0.5})
    assert not state.is_overflow_normal(), "a scale that has fallen below 1 helps no more"
    run = small.make_run(tmp_path / "run", data, recipe)
    state = TrainState(recipe, CPU)
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 2.0**40})
    save_checkpoint(run, 0, *state.to_checkpoint())
    _train(small, run, recipe, data)
    trace = read_metrics(run)
    assert trace["grad_norm"].isna().any(), "some steps overflowed"
    assert trace["skipped_steps"].eq(0).all()
    assert not trace["loss"].isna().any()
    assert load_checkpoint(checkpoint_path(run, small.STEPS))[1]["scaler"]["scale"] < 2.0**40
