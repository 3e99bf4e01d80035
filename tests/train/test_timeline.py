from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from hpcssl.core.errors import ConfigError
from hpcssl.models.decoder import MaeDecoderConfig
from hpcssl.models.encoder import EncoderConfig
from hpcssl.models.heads import DinoHeadConfig
from hpcssl.objectives.dino.dino_objective import DinoConfig
from hpcssl.objectives.mae.mae_objective import MaeConfig
from hpcssl.plan.recipe import dino_augment, mae_augment
from hpcssl.train.pretrain_config import OptimConfig, Timeline, load_recipe

SIZES = {"image_px": 224, "patch_px": None, "embed_dim": None, "depth": None, "num_heads": None}  # None: timm's
DINO = DinoConfig(
    head=DinoHeadConfig(out_dim=65536, hidden_dim=2048, bottleneck_dim=256, norm_last_layer=True),
    student_temperature=0.1,
    teacher_temperature=0.04,
    teacher_temperature_warmup_pseudo_epochs=0,
    center_momentum=0.9,
    momentum=0.996,
    freeze_last_layer_pseudo_epochs=1,
)
DINO_OPTIM = OptimConfig(
    lr_per_256=5e-4,
    final_lr=1e-6,
    warmup_pseudo_epochs=10,
    weight_decay=0.04,
    final_weight_decay=0.4,
    betas=(0.9, 0.999),
    clip=3.0,
)
OPAL_DINO_OPTIM = replace(DINO_OPTIM, lr_per_256=5e-5, warmup_pseudo_epochs=1, clip=1.0)
MAE = MaeConfig(decoder=MaeDecoderConfig(embed_dim=512, depth=8, num_heads=16))
MAE_OPTIM = OptimConfig(
    lr_per_256=1.5e-4,
    final_lr=0.0,
    warmup_pseudo_epochs=40,
    weight_decay=0.05,
    final_weight_decay=0.05,
    betas=(0.9, 0.95),
    clip=None,
)
OPAL_MAE_OPTIM = replace(MAE_OPTIM, lr_per_256=1e-4, warmup_pseudo_epochs=5)
PUBLISHED = {  # objective, encoder, optimiser, batch; pseudo-epochs of the values, and to train; precision
    "dino-vits16-opal": (DINO, "vit_small_patch16_224", OPAL_DINO_OPTIM, 12 * 90, 50, 25, "fp32"),
    "mae-vitl16-opal": (MAE, "vit_large_patch16_224", OPAL_MAE_OPTIM, 8 * 180, 50, None, "auto"),
    "dino-vits16": (DINO, "vit_small_patch16_224", DINO_OPTIM, 1024, None, None, "auto"),
    "dino-vitb16": (DINO, "vit_base_patch16_224", DINO_OPTIM, 1024, None, None, "auto"),
    "mae-vitb16": (MAE, "vit_base_patch16_224", MAE_OPTIM, 4096, None, None, "auto"),
}


@dataclass
class PaperSchedule:
    """The paper's: 50 pseudo-epochs of 65 million tiles."""

    positions_per_pseudo_epoch: int = 65_000_000
    num_pseudo_epochs: int = 50
    path: Path = Path("opal")

    @property
    def num_positions(self) -> int:
        return self.positions_per_pseudo_epoch * self.num_pseudo_epochs


@pytest.fixture
def opal():
    return load_recipe("dino-vits16-opal")


def test_the_published_dino_run(opal):
    timeline = Timeline(opal, PaperSchedule())
    assert timeline.total_steps == 3_250_000_000 // 1080 == 3_009_259
    assert timeline.stop_step == 1_625_000_000 // 1080 == 1_504_629
    assert timeline.warmup_steps == 65_000_000 // 1080 == 60_185
    assert timeline.peak_lr == pytest.approx(5e-5 * 1080 / 256, rel=1e-12)
    assert timeline.derived()["samples"] == 1_504_629 * 1080
    first, warm = timeline.values(0), timeline.values(60_184)
    assert first.lr == 0.0
    assert (first.weight_decay, first.objective.momentum) == pytest.approx((0.04, 0.996), rel=1e-12)
    assert warm.lr == pytest.approx(2.109375e-4, rel=1e-12)
    assert first.objective.last_layer_frozen
    assert warm.objective.last_layer_frozen
    assert not timeline.values(60_185).objective.last_layer_frozen


def test_the_published_mae_run():
    timeline = Timeline(load_recipe("mae-vitl16-opal"), PaperSchedule())
    assert timeline.total_steps == timeline.stop_step == 3_250_000_000 // 1440 == 2_256_944
    assert timeline.warmup_steps == 5 * 65_000_000 // 1440 == 225_694
    assert timeline.peak_lr == pytest.approx(1e-4 * 1440 / 256, rel=1e-12)
    assert timeline.values(0).lr == 0.0
    assert timeline.values(225_693).lr == pytest.approx(timeline.peak_lr * 225_693 / 225_694, rel=1e-12)
    assert timeline.values(225_694).lr == timeline.peak_lr, "the peak is reached on the step after the warm-up's last"
    assert timeline.values(2_256_943).lr == pytest.approx(0.0, abs=1e-9)
    assert {timeline.values(step).weight_decay for step in (0, 10**6, 2 * 10**6)} == {0.05}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_settings_and_augmentations_ship(name):
    recipe, (objective, model, *others) = load_recipe(name), PUBLISHED[name]
    is_mae = objective is MAE
    assert (recipe.objective, recipe.initial_weights) == (objective, None)
    assert recipe.encoder == EncoderConfig(name=model, drop_path=0.0 if is_mae else 0.1, **SIZES)
    values = [recipe.optim, recipe.global_batch, recipe.schedule_pseudo_epochs, recipe.stop_after]
    assert [*values, recipe.train.precision] == others
    assert recipe.augment == (mae_augment() if is_mae else dino_augment())
    assert recipe.augment.mask_ratio == (0.75 if is_mae else 0.0)
    assert (recipe.augment.local_views is None) == is_mae


def test_values_halfway_are_those_of_the_whole_schedule(opal):
    """The run stops at 25 of 50 pseudo-epochs: there everything is half-way, not at its end."""
    halfway = Timeline(opal, PaperSchedule()).values(1_504_629)
    progress = (1_504_629 - 60_185) / (3_009_259 - 60_185)
    assert halfway.lr == pytest.approx(1e-6 + (2.109375e-4 - 1e-6) * (1 + math.cos(math.pi * progress)) / 2, rel=1e-9)
    assert halfway.weight_decay == pytest.approx(0.22, abs=1e-6)
    assert halfway.objective.momentum == pytest.approx(0.998, abs=1e-6)


def test_the_teachers_temperature_rises_pseudo_epoch_by_pseudo_epoch(opal):
    """As published for longer runs: 0.04 to 0.07 in 30 epochs, constant within each, then 0.07."""
    boosted = replace(
        opal.objective,
        teacher_temperature=0.07,
        warmup_teacher_temperature=0.04,
        teacher_temperature_warmup_pseudo_epochs=30,
    )
    timeline = Timeline(replace(opal, objective=boosted), PaperSchedule())
    published = [*np.linspace(0.04, 0.07, 30), *[0.07] * 20]
    for number, wanted in enumerate(published):
        first = -(-number * 65_000_000 // 1080)
        for step in (first, first + 30_000):
            assert timeline.values(step).objective.teacher_temperature == pytest.approx(wanted, rel=1e-12), step
    constant = Timeline(opal, PaperSchedule())
    assert {constant.values(step).objective.teacher_temperature for step in (0, 70_000, 3_000_000)} == {0.04}


def test_the_ends_of_all_values(opal):
    timeline = Timeline(replace(opal, stop_after=None), PaperSchedule())
    last = timeline.values(timeline.total_steps - 1)
    assert last.lr == pytest.approx(1e-6, rel=1e-3)
    assert last.weight_decay == pytest.approx(0.4, rel=1e-6)
    assert last.objective.momentum == pytest.approx(1.0, rel=1e-9)


def test_values_do_not_depend_on_where_the_run_stops(opal):
    whole, half = (Timeline(replace(opal, stop_after=s), PaperSchedule()) for s in (None, 3))
    assert half.stop_step < whole.stop_step
    for step in (0, 1, 60_000, 180_000):
        assert whole.values(step) == half.values(step)


def test_values_depend_on_the_length_of_the_schedule_of_values(opal):
    whole, half = (Timeline(replace(opal, schedule_pseudo_epochs=n), PaperSchedule()) for n in (50, 25))
    assert half.total_steps < whole.total_steps
    assert half.values(1_000_000).lr < whole.values(1_000_000).lr


@pytest.mark.parametrize(
    "change",
    [
        {"stop_after": 51},
        {"stop_after": 30, "schedule_pseudo_epochs": 25},
        {"stop_after": None, "schedule_pseudo_epochs": 60},
    ],
)
def test_a_stop_beyond_the_schedule_is_refused(opal, change):
    with pytest.raises(ConfigError, match="stop_after"):
        Timeline(replace(opal, **change), PaperSchedule())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"global_batch": 161}, "stop_after = 4 pseudo-epochs of 40 positions .* global_batch = 161"),
        ({"stop_after": 0.28}, "stop_after = 0.28 pseudo-epochs of 40 positions .* global_batch = 12"),
    ],
)
def test_a_run_of_no_steps_is_refused(small, change, told):
    schedule = PaperSchedule(positions_per_pseudo_epoch=40, num_pseudo_epochs=4)
    for least in ({"global_batch": 160}, {"stop_after": 0.3}):
        assert Timeline(small.dino_recipe(**least), schedule).stop_step == 1
    with pytest.raises(ConfigError, match=told):
        Timeline(small.dino_recipe(**change), schedule)


@pytest.mark.parametrize(("positions", "batch"), [(40, 12), (65, 10), (36, 12), (10, 12), (7, 3)])
def test_pseudo_epochs_end_at_their_last_whole_step(small, positions, batch):
    schedule = PaperSchedule(positions_per_pseudo_epoch=positions, num_pseudo_epochs=6)
    timeline = Timeline(small.dino_recipe(global_batch=batch), schedule)
    ends = [step for step in range(timeline.total_steps + 1) if timeline.ends_pseudo_epoch(step)]
    assert ends == sorted({n * positions // batch for n in range(7)})


@pytest.mark.parametrize(("pseudo_epochs", "step"), [(0.29, 29), (0.57, 57), (1.1, 110), (2, 200), (0.295, 29)])
def test_fractions_of_a_pseudo_epoch_lose_no_step_to_floats(small, pseudo_epochs, step):
    """0.29 · 100 is 28.999999999999996."""
    schedule = PaperSchedule(positions_per_pseudo_epoch=100 * 12, num_pseudo_epochs=6)
    assert Timeline(small.dino_recipe(), schedule).step_at(pseudo_epochs) == step


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("optim.lr_per_265=1", "did you mean lr_per_256"),
        ("globl_batch=3", "did you mean global_batch"),
        ("dino.head.outdim=3", "unknown setting objective.head.outdim; did you mean out_dim"),
        ("objective=byol", "objective.kind = byol; known: dino, mae"),
        ("objective.kind=meo", "objective.kind = meo; did you mean mae"),
        ("objective.momentum=2", "objective.momentum = 2; expected at most 1$"),
        ("decoder.depht=1", "did you mean depth"),  # also where the recipe is no MAE's
        ("global_batch=zero", "global_batch"),
        ("global_batch=0", "global_batch"),
        ("objective=mae", "objective mae takes one view, augment has 4"),
        ("augment.mask_ratio=0.75", "objective dino needs augment.mask_ratio 0"),
        ("augment.global_views.count=0", "global_views.count = 0"),
        ("loader.backend=pilow", "known: auto, cpu, pillow"),
        ("loader.threads=0", "at least 1"),
        ("augment.global_views.scale=[0.5, 0.1]", "scale"),
        ("stop_after=.inf", "stop_after = inf; expected a finite number"),
        ("dino.freeze_last_layer_pseudo_epochs=.inf", "expected a finite number"),
        ("global_batch=true", "global_batch = True; expected a finite number"),
        ("train.hang_s=1e300", "train.hang_s = 1e300; expected at most 86400"),
        ("checkpoint.every_min=-1", "every_min = -1; expected at least 0"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(setting, told):
    with pytest.raises(ConfigError, match=told) as caught:
        load_recipe("dino-demo", [setting])
    assert "\n" not in str(caught.value)
