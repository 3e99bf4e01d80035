"""Fifty steps whose loss falls, drop-path on: the same losses for 1 to 4 ranks, also where their number changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hpcssl.core.errors import ConfigError
from hpcssl.core.world import World, check_divides
from hpcssl.loader import stream as stream_module
from hpcssl.train.loop import _stream
from hpcssl.train.objective import Dino
from hpcssl.train.pretrain_config import Timeline
from hpcssl.train.reduce import Collectives
from hpcssl.train.state import TrainState
from hpcssl.train.step import train_step

CPU = torch.device("cpu")
STEPS = 50
TOLERANCE = 1e-5  # relative, of every step's loss
FALL = {"dino": 0.75, "mae": 0.92}  # the mean loss of the last five steps over that of the first five is below

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(600)]


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
    return replace(recipe, dino=replace(recipe.dino, momentum=0.996, center_momentum=0.99))


def _advance(small, data, recipe, states: list[TrainState], stop: int, saved: list | None = None) -> list[float]:
    """Train some states, one a rank, up to a step; returns the losses and appends the state before each to `saved`."""
    size, schedule, store = len(states), data.schedule, data.store
    schedule.tiles_at(0, schedule.num_positions)  # all files are open before there are threads
    timeline, ranks = Timeline(recipe, schedule), small.VirtualRanks(size)

    def work(rank: int) -> list[float]:
        collectives = Collectives(world=World(rank=rank, size=size), all_reduce_sum=ranks.all_reduce_sum(rank))
        folder = data.store_path.parent
        stream = iter(_stream(states[rank], recipe, timeline, store, schedule, collectives, folder, CPU))
        losses = []
        while states[rank].step < stop:
            if saved is not None:
                tensors, values = states[rank].to_checkpoint()
                step = {"step": states[rank].step}
                saved.append(({name: tensor.clone() for name, tensor in tensors.items()}, {**values, **step}))
            losses.append(train_step(states[rank], next(stream), recipe, timeline, collectives, CPU)["loss"])
        stream.close()
        return losses

    return ranks.run(work)[0]


def _states(recipe, size: int, found=None) -> list[TrainState]:
    states = [TrainState(recipe, CPU) for _ in range(size)]
    for state in states:
        if found:  # a copy for each: loaded moments are kept, not copied
            tensors, values = found
            state.from_checkpoint({name: tensor.clone() for name, tensor in tensors.items()}, values)
    return states


@pytest.fixture(scope="module")
def alone(small, long_data):
    """Of each objective, the losses of one rank and the state before every step."""
    torch.set_num_threads(1)
    found = {}
    for objective in ("dino", "mae"):
        recipe, saved = _recipe(small, objective), []
        losses = _advance(small, long_data, recipe, _states(recipe, 1), STEPS, saved)
        found[objective] = np.array(losses), saved
    return found


def _difference(losses: list[float], wanted: np.ndarray) -> float:
    return float(np.abs(np.array(losses) / wanted - 1).max())


@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_the_losses_really_fall(alone, objective):
    losses = alone[objective][0]
    assert losses[-5:].mean() < FALL[objective] * losses[:5].mean()


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_any_number_of_ranks_gives_the_losses_of_one(small, long_data, alone, objective, size):
    recipe = _recipe(small, objective)
    losses = _advance(small, long_data, recipe, _states(recipe, size), STEPS)
    assert _difference(losses, alone[objective][0]) < TOLERANCE


@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_from_every_step_another_number_of_ranks_goes_on_alike(small, long_data, alone, objective):
    """One step from each of the fifty, with 2, 3 and 4 ranks in turn; the whole rest is in the long test."""
    recipe, (wanted, saved) = _recipe(small, objective), alone[objective]
    for step in range(STEPS):
        states = _states(recipe, 2 + step % 3, saved[step])
        losses = _advance(small, long_data, recipe, states, step + 1)
        assert _difference(losses, wanted[step : step + 1]) < TOLERANCE, step


@pytest.mark.long
@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_from_some_steps_another_number_of_ranks_trains_the_rest_alike(small, long_data, alone, objective):
    recipe, (wanted, saved) = _recipe(small, objective), alone[objective]
    for step in range(1, STEPS, 10):
        states = _states(recipe, 2 + step % 3, saved[step])
        assert _difference(_advance(small, long_data, recipe, states, STEPS), wanted[step:]) < TOLERANCE, step


@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_micro_batches_give_the_losses_of_the_whole_batch(small, long_data, alone, objective):
    recipe = _recipe(small, objective)
    recipe = replace(recipe, train=replace(recipe.train, micro_batch=5))  # parts of 5, 5 and 2 tiles
    losses = _advance(small, long_data, recipe, _states(recipe, 1), STEPS)
    assert _difference(losses, alone[objective][0]) < TOLERANCE


def test_a_rank_seeded_plan_fails_this_test(small, long_data, alone, monkeypatch):
    draw, share = stream_module.draw_plan, small.GLOBAL_BATCH // 2

    def broken(recipe, seed, positions, **more):
        return draw(recipe, seed + int(positions[0] // share) % 2, positions, **more)

    monkeypatch.setattr(stream_module, "draw_plan", broken)
    recipe = _recipe(small, "dino")
    losses = _advance(small, long_data, recipe, _states(recipe, 2), 5)
    assert _difference(losses, alone["dino"][0][:5]) > 100 * TOLERANCE


def test_an_unreduced_centre_fails_this_test(small, long_data, alone, monkeypatch):
    after = Dino.after_update
    monkeypatch.setattr(Dino, "after_update", lambda self, values, count, _: after(self, values, count, Collectives()))
    recipe = _recipe(small, "dino")
    losses = _advance(small, long_data, recipe, _states(recipe, 2), 10)
    assert _difference(losses, alone["dino"][0][:10]) > 10 * TOLERANCE


def test_ranks_that_cannot_share_the_batch_are_told_who_can():
    with pytest.raises(ConfigError, match=r"5 processes cannot share .* 12 equally; 1, 2, 3, 4, 6 or 12 can"):
        check_divides(5, 12)
