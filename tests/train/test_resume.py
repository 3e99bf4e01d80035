"""The state of a run at a step is whole: to a file and back, from any step, bitwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hpcssl.core.errors import RunError
from hpcssl.core.world import World
from hpcssl.runs.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint, save_checkpoint
from hpcssl.runs.trace import read_metrics
from hpcssl.train.loop import Stopped
from hpcssl.train.pretrain_config import Timeline
from hpcssl.train.reduce import Collectives, GradientBuffer
from hpcssl.train.state import TrainState

CPU = torch.device("cpu")
STEPS = 8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def advance(data):
    """Trains some states, one a rank, up to a step; returns the losses."""

    def run(small, recipe, states: list[TrainState], stop: int) -> list[float]:
        return [record["loss"] for record in small.advance(data, recipe, states, stop)[0]]

    return run


def _tensors(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in state.to_checkpoint()[0].items()}


def _assert_same(state: TrainState, wanted: dict[str, torch.Tensor]) -> None:
    found = _tensors(state)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("objective", ["dino", "mae"])
@pytest.mark.parametrize("size", [1, 3])
def test_resuming_from_every_step_is_bitwise_the_uninterrupted_run(small, tmp_path, advance, objective, size):
    recipe = small.RECIPES[objective]()
    (tmp_path / "checkpoints").mkdir()
    states = [TrainState(recipe, CPU) for _ in range(size)]
    losses = []
    for step in range(STEPS):
        save_checkpoint(tmp_path, step, *states[0].to_checkpoint())
        losses += advance(small, recipe, states, step + 1)
    uninterrupted = [TrainState(recipe, CPU) for _ in range(size)]
    assert advance(small, recipe, uninterrupted, STEPS) == losses
    wanted = _tensors(uninterrupted[0])
    assert any(name.startswith("optimizer.") for name in wanted)
    for step in range(STEPS):
        resumed = [TrainState(replace(recipe, seed=recipe.seed), CPU) for _ in range(size)]
        for state in resumed:
            state.from_checkpoint(*load_checkpoint(checkpoint_path(tmp_path, step)))
        assert resumed[0].step == step
        assert advance(small, recipe, resumed, STEPS) == losses[step:], f"resumed at step {step}"
        _assert_same(resumed[0], wanted)


def test_a_resume_that_forgets_the_optimiser_or_a_step_is_noticed(small, advance):
    """The check above can fail: without the moments, or one step off, the losses part."""
    recipe = small.dino_recipe()
    whole = TrainState(recipe, CPU)
    advance(small, recipe, [whole], 4)
    tensors, state = _tensors(whole), whole.to_checkpoint()[1]
    wanted = advance(small, recipe, [whole], STEPS)
    for broken in ({**state, "updates": {}, "step": 4}, {**state, "step": 5}):
        resumed = TrainState(recipe, CPU)
        resumed.from_checkpoint(tensors, broken)
        found = advance(small, recipe, [resumed], STEPS)
        assert found != wanted[-len(found) :]


def test_fp16_keeps_its_loss_scale(small, tmp_path):
    recipe = small.dino_recipe()
    recipe = replace(recipe, train=replace(recipe.train, precision="fp16"))
    state = TrainState(recipe, CPU)
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 512.0, "_growth_tracker": 7})
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint(tmp_path, 0, *state.to_checkpoint())
    found = load_checkpoint(checkpoint_path(tmp_path, 0))
    resumed = TrainState(recipe, CPU)
    resumed.from_checkpoint(*found)
    assert resumed.scaler.state_dict()["scale"] == 512.0
    assert resumed.scaler.state_dict()["_growth_tracker"] == 7
    plain = TrainState(small.dino_recipe(), CPU)  # on newer GPUs `auto` needs no scale
    plain.from_checkpoint(*found)
    assert not plain.scaler.is_enabled()
    tensors, values = plain.to_checkpoint()
    back = TrainState(recipe, CPU)
    back.from_checkpoint(dict(tensors), {**values, "step": 0})
    assert back.scaler.get_scale() == 2.0**16, "as at the beginning"


def test_the_checkpoint_of_another_model_is_refused(small):
    tensors, values = TrainState(small.dino_recipe(), CPU).to_checkpoint()
    recipe = small.dino_recipe()
    other = TrainState(replace(recipe, encoder=replace(recipe.encoder, depth=3)), CPU)
    with pytest.raises(RunError, match="step 4 holds another model"):
        other.from_checkpoint(dict(tensors), {**values, "step": 4})


@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_weights_depend_on_the_seed_alone(small, objective):
    recipe = small.RECIPES[objective]()
    torch.manual_seed(1)
    first = _tensors(TrainState(recipe, CPU))
    torch.manual_seed(2)
    drawn = torch.random.get_rng_state()
    _assert_same(TrainState(recipe, CPU), first)
    assert torch.equal(torch.random.get_rng_state(), drawn), "the caller's generator is left alone"
    other = _tensors(TrainState(replace(recipe, seed=1), CPU))
    same = [n for n, t in first.items() if torch.equal(t, other[n])]
    assert all(first[n].unique().numel() == 1 or "pos_embed" in n for n in same), "all drawn weights differ"


def test_gradients_lie_in_one_buffer_in_the_order_given():
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    buffer = GradientBuffer(parameters)
    buffer.zero()
    (parameters[0].sum() + 2 * parameters[1].sum()).backward()
    seen = []

    def add_other_rank(flat: torch.Tensor) -> None:
        seen.append(flat.clone())
        flat += torch.arange(10.0)

    buffer.mean_over_ranks(Collectives(world=World(rank=0, size=2), all_reduce_sum=add_other_rank))
    assert len(seen) == 1, "one collective for all gradients"
    assert seen[0].tolist() == [1.0] * 6 + [2.0] * 4
    assert parameters[0].grad.tolist() == [[0.5, 1.0, 1.5], [2.0, 2.5, 3.0]]
    assert parameters[1].grad.tolist() == [4.0, 4.5, 5.0, 5.5]


def test_gradients_return_to_the_buffer_after_they_were_dropped():
    parameter = torch.nn.Parameter(torch.ones(3))
    buffer = GradientBuffer([parameter])
    buffer.zero()
    parameter.grad = None
    buffer.zero()
    (3 * parameter).sum().backward()
    buffer.mean_over_ranks(Collectives())
    assert parameter.grad.tolist() == [3.0, 3.0, 3.0]


def test_the_loop_stops_when_asked_saves_and_goes_on(small, data, tmp_path):
    recipe = small.dino_recipe()
    whole, parts = (small.make_run(tmp_path / name, data, recipe) for name in ("whole", "parts"))
    small.train_here(whole, recipe, data)
    stops = iter([False, False, False, False, True])
    with pytest.raises(Stopped):
        small.train_here(parts, recipe, data, asked_to_stop=lambda: next(stops))
    assert checkpoint_steps(parts)[-1] == 5
    said = small.train_here(parts, recipe, data)
    assert "begins at step 5 of 13" in said[0]
    assert checkpoint_steps(parts)[-1] == small.STEPS == 13
    ends = [step for step in range(14) if Timeline(recipe, data.schedule).ends_pseudo_epoch(step)]
    assert checkpoint_steps(whole) == ends == [0, 3, 6, 10, 13]
    small.assert_same_run(parts, whole, 13)
    assert read_metrics(whole)["step"].tolist() == list(range(1, 14))


def test_where_the_run_stops_may_change_and_changes_nothing_else(small, data, tmp_path):
    """Stopped within and at the end of pseudo-epochs, then sooner than it has come, then trained to the end."""
    whole = small.make_run(tmp_path / "whole", data, small.dino_recipe())
    small.train_here(whole, small.dino_recipe(), data)
    run = tmp_path / "run"
    for stop_after, step in ((1.3, 4), (0.5, 4), (2, 6), (None, 13)):
        recipe = small.dino_recipe(stop_after=stop_after)
        small.make_run(run, data, recipe)
        small.train_here(run, recipe, data)
        assert checkpoint_steps(run)[-1] == step
    one, other = (load_checkpoint(checkpoint_path(r, 13))[0] for r in (run, whole))
    assert all(torch.equal(tensor, one[name]) for name, tensor in other.items())
    columns = ["step", "loss", "lr", "weight_decay", "momentum", "grad_norm"]
    assert read_metrics(run)[columns].equals(read_metrics(whole)[columns])


def test_a_gpu_that_is_too_small_is_told_with_what_helps(small, data, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("hpcssl.train.loop.train_step", full)
    for micro_batch, told in (
        (
            None,
            "step 0: 12 tiles at a time do not fit into the memory of cpu; --set train.micro_batch=6 or train.check",
        ),
        (5, "step 0: 5 tiles at a time .* --set train.micro_batch=2 or train.check"),
        (1, "step 0: 1 tiles at a time .* --set train.checkpoint_activations=true"),
    ):
        recipe = small.mae_recipe()
        recipe = replace(recipe, train=replace(recipe.train, micro_batch=micro_batch))
        with pytest.raises(RunError, match=told) as caught:
            small.train_here(small.make_run(tmp_path / f"run{micro_batch}", data, recipe), recipe, data)
        assert "\n" not in str(caught.value)


def test_a_stale_start_publishes_nothing_more(small, data, tmp_path):
    recipe = small.dino_recipe()
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, every_min=0.0, keep_last=20))
    run, claim, asked = small.make_run(tmp_path / "run", data, recipe), small.Claim(), []

    def after_third_step() -> bool:
        asked.append(1)
        if len(asked) == 3:
            small.wait_until(lambda: checkpoint_steps(run)[-1:] == [2], 60, "the checkpoints of the steps before")
        claim.stale = len(asked) == 3  # between the look at the claim and the checkpoint of step 3
        return False

    with pytest.raises(Stopped, match="took the run over"):
        small.train_here(run, recipe, data, claim=claim, asked_to_stop=after_third_step)
    assert checkpoint_steps(run) == [0, 1, 2]
    assert len(asked) == 3
