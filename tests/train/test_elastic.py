"""Several ranks equal one, each in a thread, by real steps and an exact sum; every breakage turns a check red.

Fifty steps whose loss falls, drop-path on: the same losses for 1 to 4 ranks, also where their number changes.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from hpcssl.loader import stream as stream_module
from hpcssl.objectives.dino.dino_objective import Dino
from hpcssl.plan import draw as draw_module
from hpcssl.train.reduce import GradientBuffer
from hpcssl.train.state import TrainState

CPU = torch.device("cpu")
STEPS = 50
TOLERANCE = 1e-5  # relative, of every step's loss
FALL = {"dino": 0.75, "mae": 0.92}  # the mean loss of the last five steps over that of the first five is below

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(600)]
both = pytest.mark.parametrize("objective", ["dino", "mae"])


@pytest.fixture(scope="module")
def long_data(small, tmp_path_factory):
    """A schedule of 133 steps, so that after 50 the learning rate is still high."""
    return small.make_data(tmp_path_factory.mktemp("elastic"), pseudo_epochs=40)


def _recipe(small, objective: str):
    """Settings with which the toy learns instead of collapsing."""
    recipe = small.RECIPES[objective]()
    if objective == "mae":
        return replace(recipe, optim=replace(recipe.optim, lr_per_256=0.1))
    assert recipe.encoder.drop_path == 0.3
    return replace(recipe, objective=replace(recipe.objective, momentum=0.996, center_momentum=0.99))


def _states(recipe, size: int, checkpoint=None) -> list[TrainState]:
    states = [TrainState(recipe, CPU) for _ in range(size)]
    for state in states:
        if checkpoint:  # a copy for each: loaded moments are kept, not copied
            tensors, values = checkpoint
            state.from_checkpoint({name: tensor.clone() for name, tensor in tensors.items()}, values)
    return states


@pytest.fixture
def losses(small, long_data):
    """Returns the losses of some ranks up to a step, after a look at what all of them must have alike."""

    def run(recipe, size: int, stop: int = STEPS, checkpoint=None) -> list[float]:
        states = _states(recipe, size, checkpoint)
        records = [
            [(r["loss"], r["grad_norm"]) for r in rank] for rank in small.advance(long_data, recipe, states, stop)
        ]
        assert all(rank == records[0] for rank in records), "every rank tells the same loss and gradient norm"
        for state in states[1:]:
            for name, tensor in states[0].objective.module.state_dict().items():
                assert torch.equal(tensor, state.objective.module.state_dict()[name]), f"{name} differs between ranks"
        return [loss for loss, _ in records[0]]

    return run


@pytest.fixture(scope="module")
def alone(small, long_data):
    """Of each objective, the losses of one rank and the state before every step."""
    torch.set_num_threads(1)
    results = {}
    for objective in ("dino", "mae"):
        recipe, saved = _recipe(small, objective), []

        def save(state, saved=saved) -> None:
            tensors, values = state.to_checkpoint()
            saved.append(({name: tensor.clone() for name, tensor in tensors.items()}, {**values, "step": state.step}))

        (records,) = small.advance(long_data, recipe, _states(recipe, 1), STEPS, save)
        results[objective] = np.array([record["loss"] for record in records]), saved
    return results


def _difference(losses: list[float], expected: np.ndarray) -> float:
    """Return the largest relative difference of a step's loss; `losses` may be of the first steps alone."""
    return float(np.abs(np.array(losses) / expected[: len(losses)] - 1).max())


@both
def test_the_losses_really_fall(alone, objective):
    losses = alone[objective][0]
    assert losses[-5:].mean() < FALL[objective] * losses[:5].mean()
    assert len(set(losses.tolist())) == STEPS, "they move, so that equal ones say something"


@both
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_ranks_gives_the_losses_of_one(small, losses, alone, objective, size):
    assert _difference(losses(_recipe(small, objective), size), alone[objective][0]) < TOLERANCE


@both
def test_from_every_step_another_number_of_ranks_goes_on_alike(small, losses, alone, objective):
    """One step from each of the fifty, with 2, 3 and 4 ranks in turn; the whole rest from some is in the long test."""
    recipe, (expected, saved) = _recipe(small, objective), alone[objective]
    for step in range(STEPS):
        assert _difference(losses(recipe, 2 + step % 3, step + 1, saved[step]), expected[step:]) < TOLERANCE, step


@pytest.mark.long
@both
def test_from_some_steps_another_number_of_ranks_trains_the_rest_alike(small, losses, alone, objective):
    recipe, (expected, saved) = _recipe(small, objective), alone[objective]
    for step in range(1, STEPS, 10):
        rest = losses(recipe, 2 + step % 3, STEPS, saved[step])
        assert len(rest) == STEPS - step
        assert _difference(rest, expected[step:]) < TOLERANCE, step


@both
@pytest.mark.parametrize(("size", "micro_batch", "stop"), [(1, 5, STEPS), (2, 4, 12), (3, 1, 12)])
def test_micro_batches_give_the_losses_of_the_whole_batch(small, losses, alone, objective, size, micro_batch, stop):
    recipe = _recipe(small, objective)
    recipe = replace(recipe, train=replace(recipe.train, micro_batch=micro_batch))  # also unequal parts: 5, 5, 2
    assert _difference(losses(recipe, size, stop), alone[objective][0]) < TOLERANCE


@both
def test_a_plan_seeded_by_the_rank_is_noticed(small, losses, alone, objective, monkeypatch):
    draw, share = stream_module.draw_plan, small.GLOBAL_BATCH // 2

    def broken(recipe, seed, positions, **more):
        return draw(recipe, seed + int(positions[0] // share) % 2, positions, **more)

    monkeypatch.setattr(stream_module, "draw_plan", broken)
    assert _difference(losses(_recipe(small, objective), 2, 5), alone[objective][0]) > 100 * TOLERANCE


def test_drop_path_seeded_by_the_rank_is_noticed(small, losses, alone, monkeypatch):
    draw, share = draw_module.draw_drop_path, small.GLOBAL_BATCH // 2

    def broken(seed, positions, views, rates):
        return draw(seed + int(positions[0] // share) % 2, positions, views, rates)

    monkeypatch.setattr(draw_module, "draw_drop_path", broken)
    assert _difference(losses(_recipe(small, "dino"), 2, 12), alone["dino"][0]) > 100 * TOLERANCE


def test_drop_path_is_on_in_these_checks(small, losses, alone):
    recipe = _recipe(small, "dino")
    without = losses(replace(recipe, encoder=replace(recipe.encoder, drop_path=0.0)), 1, 12)
    assert _difference(without, alone["dino"][0]) > 100 * TOLERANCE


def test_a_centre_that_is_not_reduced_is_noticed(small, losses, monkeypatch):
    after = Dino.after_update

    def broken(self, values, global_batch, all_reduce_sum):
        return after(self, values, global_batch // 2, lambda tensor: None)

    monkeypatch.setattr(Dino, "after_update", broken)
    with pytest.raises(AssertionError, match="center differs between ranks"):
        losses(_recipe(small, "dino"), 2, 2)


def test_a_centre_of_one_rank_alone_changes_the_loss(small, losses, alone, monkeypatch):
    """Also where all ranks agree on it, a centre of half of the batch is noticed."""
    after = Dino.after_update

    def broken(self, values, global_batch, all_reduce_sum):
        if threading.current_thread().name == "rank 1":
            self._sum.zero_()
        return after(self, values, global_batch, all_reduce_sum)

    monkeypatch.setattr(Dino, "after_update", broken)
    assert _difference(losses(_recipe(small, "dino"), 2, 12), alone["dino"][0]) > 10 * TOLERANCE


def test_gradients_that_are_not_reduced_are_noticed(small, losses, monkeypatch):
    monkeypatch.setattr(GradientBuffer, "mean_over_ranks", lambda self, collectives: None)
    with pytest.raises(AssertionError, match="every rank tells the same"):
        losses(_recipe(small, "dino"), 2, 12)
