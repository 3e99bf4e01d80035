"""The watch for collapse measures what its names say, tells collapses, and leaves training alone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax

from hpcssl.plan.recipe import AugmentRecipe, ViewRecipe
from hpcssl.runs.checkpoint import checkpoint_path, load_checkpoint
from hpcssl.runs.trace import read_metrics
from hpcssl.train.objective import build_objective
from hpcssl.train.pretrain_config import Timeline
from hpcssl.train.state import TrainState
from hpcssl.train.watch import MOST_TILES, CollapseWatch, complaints, feature_deviation, rank_me

CPU = torch.device("cpu")
HEALTHY = {"rank_me": 30.0, "feature_deviation": 0.6, "watched_entropy": 1.0, "outputs_used": 20.0, "center_norm": 3.0}

pytestmark = pytest.mark.usefixtures("one_thread")


def _every(recipe, steps: int):
    return replace(recipe, train=replace(recipe.train, watch_every_steps=steps))


@pytest.fixture
def watch(data):
    return lambda recipe, said=None: CollapseWatch(
        recipe, data.store, data.schedule, CPU, say=(said if said is not None else []).append
    )


def test_rank_me_is_the_effective_number_of_dimensions():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 12)) * np.geomspace(1, 1e-3, 12)
    values = np.linalg.svd(features, compute_uv=False)
    shares = values / values.sum() + 1e-7
    assert rank_me(torch.from_numpy(features)) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-10)
    orthogonal = np.linalg.qr(rng.normal(size=(40, 12)))[0]
    assert rank_me(torch.from_numpy(orthogonal)) == pytest.approx(12, rel=1e-4)
    one = np.outer(rng.uniform(1, 2, 40), rng.normal(size=12))
    assert rank_me(torch.from_numpy(one)) == pytest.approx(1, rel=1e-4)


def test_deviation_is_1_on_the_sphere_and_0_in_a_point():
    rng = np.random.default_rng(0)
    sphere = torch.from_numpy(rng.normal(size=(2000, 24)) * rng.uniform(0.1, 9, (2000, 1)))
    assert feature_deviation(sphere) == pytest.approx(1, rel=0.02)
    point = torch.from_numpy(rng.normal(size=24) * rng.uniform(0.1, 9, (2000, 1)))
    assert feature_deviation(point) == pytest.approx(0, abs=1e-6)


def test_measurements_are_those_of_the_equations(small, data, watch):
    """Of the teacher's class tokens of the schedule's first tiles, whole and not augmented, each tile once."""
    recipe = small.dino_recipe()
    state = TrainState(recipe, CPU)
    state.objective.module.get_buffer("center").copy_(torch.linspace(-0.2, 0.2, 64))
    tiles = watch(recipe)._tiles
    assert tiles.shape == (len(np.unique(data.schedule.tiles_at(0, 160))), 32, 32, 3)
    assert len({tile.numpy().tobytes() for tile in tiles}) == len(tiles) <= MOST_TILES
    teacher = state.objective.module.get_submodule("teacher")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        features = teacher["encoder"](((tiles / 255.0 - mean) / std).permute(0, 3, 1, 2))
        logits = teacher["head"](features).double().numpy()
    q = softmax((logits - np.linspace(-0.2, 0.2, 64)) / 0.04, axis=1)
    mean_q = q.mean(0)
    found = watch(recipe).measure(state)
    assert found == {
        "rank_me": pytest.approx(rank_me(features.double()), rel=1e-5),
        "feature_deviation": pytest.approx(feature_deviation(features.double()), rel=1e-4),
        "center_norm": pytest.approx(np.linalg.norm(np.linspace(-0.2, 0.2, 64)), rel=1e-6),
        "watched_entropy": pytest.approx(-(q * np.log(q + 1e-300)).sum(1).mean(), rel=1e-4),
        "outputs_used": pytest.approx(math.exp(-(mean_q * np.log(mean_q + 1e-300)).sum()), rel=1e-4),
    }


def test_mae_is_watched_by_its_features_alone(small, watch):
    recipe = small.mae_recipe()
    assert watch(recipe).measure(TrainState(recipe, CPU)).keys() == {"rank_me", "feature_deviation"}


@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_watching_changes_nothing_of_training(small, data, tmp_path, objective):
    recipe = small.RECIPES[objective]()
    runs = {every: small.make_run(tmp_path / str(every), data, _every(recipe, every)) for every in (0, 1, 5)}
    drawn = torch.random.get_rng_state()
    for every, run in runs.items():
        small.train_here(run, _every(recipe, every), data)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    plain = load_checkpoint(checkpoint_path(runs[0], small.STEPS))[0]
    for every in (1, 5):
        watched = load_checkpoint(checkpoint_path(runs[every], small.STEPS))[0]
        assert all(torch.equal(tensor, watched[name]) for name, tensor in plain.items()), every
    traces = {every: read_metrics(run) for every, run in runs.items()}
    assert "rank_me" not in traces[0]
    assert traces[5]["step"][traces[5]["rank_me"].notna()].tolist() == [5, 10, 13], "and the last step"
    both = traces[5]["rank_me"].notna()
    assert traces[1]["rank_me"][both].tolist() == traces[5]["rank_me"][both].tolist(), "a function of the state alone"


def test_a_warning_is_said_once_and_names_limit_and_remedy(small, data, watch):
    """All features equal: the last norm's weights are 0, and no gradient mends that in one step."""
    recipe = _every(small.dino_recipe(), 1)
    state = TrainState(recipe, CPU)
    with torch.no_grad():
        for part in ("student", "teacher"):
            norm = state.objective.module.get_submodule(f"{part}.encoder.vit.norm")
            norm.weight.zero_()
            norm.bias.fill_(1.0)
    said: list[str] = []
    watched = watch(recipe, said)
    watched.look(state)
    assert not said, "not before the warm-up is over"
    state.step = Timeline(recipe, data.schedule).warmup_steps + 1
    for _ in range(2):
        watched.look(state)
    (features,) = [text for text in said if "features" in text]
    assert features.startswith("step 4: the features collapse: deviation ")
    assert "(limit 0.1)" in features
    assert "RankMe 1 (limit 3)" in features
    assert "try a lower optim.lr_per_256" in features
    assert len(said) == len(set(said))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"rank_me": 2.5}, "RankMe 2.5"),
        ({"feature_deviation": 0.05}, "deviation 0.05"),
        ({"outputs_used": 1.2}, "the same output: 1.2 in use"),
        ({"watched_entropy": 0.995 * math.log(64)}, "all equal: entropy 99.50% of log K"),
        ({"watched_entropy": 0.0}, None),  # certain, of each tile something else: no collapse
    ],
)
def test_each_limit_has_its_complaint(small, change, told):
    measurements = {**HEALTHY, **change}
    found = complaints(measurements) | build_objective(small.dino_recipe(), CPU).complaints(measurements)
    assert len(found) == (told is not None)
    if told:
        assert told in "".join(found.values())
        assert "try " in "".join(found.values())


@pytest.mark.parametrize(
    ("change", "told"),
    [({"center_momentum": 1.0}, "same output"), ({"teacher_temperature": 1.0}, "all equal"), ({}, None)],
)
def test_real_collapses_are_told_and_health_is_not(small, tmp_path, change, told):
    """Without the centre one output wins; without a sharp teacher all outputs become equal."""
    data = small.make_data(tmp_path, pseudo_epochs=15)
    plain = small.dino_recipe()
    dino = replace(
        plain.objective, **({"teacher_temperature": 0.01, "center_momentum": 0.8, "momentum": 0.99} | change)
    )
    mild = AugmentRecipe(
        global_views=ViewRecipe(count=2, view_px=32, scale=(0.6, 1.0)),
        local_views=ViewRecipe(count=2, view_px=16, scale=(0.3, 0.6)),
    )
    recipe = _every(replace(plain, objective=dino, augment=mild), 10)
    said = small.train_here(small.make_run(tmp_path / "run", data, recipe), recipe, data)
    warned = [text for text in said if "try " in text]
    assert bool(warned) == (told is not None), warned
    assert told is None or any(told in text for text in warned)
