"""Several ranks equal one: each rank in a thread, real steps, an exact sum. Every breakage turns the check red."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hpcssl.core.world import World
from hpcssl.loader import stream as stream_module
from hpcssl.loader.stream import TileStream
from hpcssl.train.objective import Dino
from hpcssl.train.pretrain_config import Timeline
from hpcssl.train.reduce import Collectives
from hpcssl.train.state import TrainState
from hpcssl.train.step import train_step

CPU = torch.device("cpu")
STEPS = 12
TOLERANCE = 1e-5  # relative, of every step's loss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trace(small, data):
    """Returns the loss and the gradient norm of every step as rank 0 tells them, trained by `size` ranks."""

    def run(recipe, size: int, steps: int = STEPS) -> np.ndarray:
        timeline = Timeline(recipe, data.schedule)
        states = [TrainState(recipe, CPU) for _ in range(size)]  # one after the other: torch's generator is global
        ranks = small.VirtualRanks(size)

        def work(rank: int) -> list[tuple[float, float]]:
            world, state = World(rank=rank, size=size), states[rank]
            collectives = Collectives(world=world, all_reduce_sum=ranks.all_reduce_sum(rank))
            stream = TileStream(
                store=data.store,
                schedule=data.schedule,
                recipe=recipe.augment,
                seed=recipe.seed,
                global_batch=recipe.global_batch,
                world=world,
                start_step=0,
                stop_step=steps,
                num_patches=state.objective.num_patches,
                config=recipe.loader,
            )
            told = [train_step(state, batch, recipe, timeline, collectives, CPU) for batch in stream]
            return [(t["loss"], t["grad_norm"]) for t in told]

        told = ranks.run(work)
        assert all(t == told[0] for t in told), "every rank tells the same loss and gradient norm"
        for state in states[1:]:
            for name, tensor in states[0].objective.module.state_dict().items():
                assert torch.equal(tensor, state.objective.module.state_dict()[name]), f"{name} differs between ranks"
        return np.array(told[0])

    return run


def _difference(one: np.ndarray, several: np.ndarray) -> float:
    """Return the largest relative difference of a step's loss."""
    return float(np.abs(several[:, 0] / one[:, 0] - 1).max())


@pytest.fixture
def one(small, trace):
    return {name: trace(small.RECIPES[name](), 1) for name in ("dino", "mae")}


@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_any_number_of_ranks_gives_the_losses_of_one(small, trace, one, objective):
    assert len(set(one[objective][:, 0])) == STEPS, "the losses move, so that equal ones say something"
    for size in (2, 3, 4):
        assert _difference(one[objective], trace(small.RECIPES[objective](), size)) < TOLERANCE, size


@pytest.mark.parametrize("objective", ["dino", "mae"])
@pytest.mark.parametrize(("size", "micro_batch"), [(1, 5), (2, 4), (3, 1)])
def test_micro_batches_give_the_losses_of_one_whole_batch(small, trace, one, objective, size, micro_batch):
    recipe = small.RECIPES[objective]()
    recipe = replace(recipe, train=replace(recipe.train, micro_batch=micro_batch))  # also unequal parts: 5, 5, 2
    assert _difference(one[objective], trace(recipe, size)) < TOLERANCE


@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_a_plan_seeded_by_the_rank_is_noticed(small, trace, one, objective, monkeypatch):
    draw, share = stream_module.draw_plan, small.GLOBAL_BATCH // 2

    def broken(recipe, seed, positions, **more):
        return draw(recipe, seed + int(positions[0] // share) % 2, positions, **more)

    monkeypatch.setattr(stream_module, "draw_plan", broken)
    assert _difference(one[objective], trace(small.RECIPES[objective](), 2)) > 100 * TOLERANCE


def test_drop_path_seeded_by_the_rank_is_noticed(small, trace, one, monkeypatch):
    from hpcssl.train import objective

    draw, share = objective.draw_drop_path, small.GLOBAL_BATCH // 2

    def broken(seed, positions, views, rates):
        return draw(seed + int(positions[0] // share) % 2, positions, views, rates)

    monkeypatch.setattr(objective, "draw_drop_path", broken)
    assert _difference(one["dino"], trace(small.dino_recipe(), 2)) > 100 * TOLERANCE


def test_a_centre_that_is_not_reduced_is_noticed(small, trace, one, monkeypatch):
    after = Dino.after_update

    def broken(self, values, count, collectives):
        alone = Collectives(world=World())
        return after(self, values, count, alone)

    monkeypatch.setattr(Dino, "after_update", broken)
    with pytest.raises(AssertionError, match="center differs between ranks"):
        trace(small.dino_recipe(), 2)


def test_a_centre_of_one_rank_alone_changes_the_loss(small, trace, one, monkeypatch):
    """Also where all ranks agree on it, a centre of half of the batch is noticed."""
    after = Dino.after_update

    def broken(self, values, count, collectives):
        if collectives.world.rank:
            self._sum.zero_()
        return after(self, values, count, collectives)

    monkeypatch.setattr(Dino, "after_update", broken)
    assert _difference(one["dino"], trace(small.dino_recipe(), 2)) > 100 * TOLERANCE


def test_gradients_that_are_not_reduced_are_noticed(small, trace, monkeypatch):
    from hpcssl.train.reduce import GradientBuffer

    monkeypatch.setattr(GradientBuffer, "mean_over_ranks", lambda self, collectives: None)
    with pytest.raises(AssertionError, match="every rank tells the same"):
        trace(small.dino_recipe(), 2)


def test_drop_path_is_on_in_these_checks(small, trace, one):
    recipe = small.dino_recipe()
    without = trace(replace(recipe, encoder=replace(recipe.encoder, drop_path=0.0)), 1)
    assert _difference(one["dino"], without) > 100 * TOLERANCE
