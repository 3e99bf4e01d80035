"""What plans look like in bulk: against torchvision, against the recipe's numbers, and free of correlation.

Seeds are fixed; a test fails where p is below THRESHOLD or a correlation beyond 4.5 standard errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from hpcssl.plan import tables
from hpcssl.plan.draw import Q16, Plan, Stream, ViewParameters, draw_drop_path, draw_mask, draw_plan
from hpcssl.plan.recipe import AugmentRecipe, ViewRecipe, dino_augment, mae_augment

THRESHOLD = 1e-3
COUNT = 20_000
TILE = 2000  # pixels a side: large, so that whole pixels blur nothing


@pytest.fixture(scope="module")
def dino() -> Plan:
    """20,000 positions of the published multi-crop."""
    return draw_plan(dino_augment(), 0, np.arange(COUNT))


@pytest.fixture(scope="module")
def tissue() -> Plan:
    """As many positions of a recipe that flips vertically, turns and stains."""
    return draw_tissue(0, np.arange(COUNT))


def draw_tissue(seed: int, positions: np.ndarray) -> Plan:
    kinds = [
        ViewRecipe(count=2, view_px=px, scale=scale, jitter=0.5, flip_vertical=0.5, quarter_turns=True, stain=0.8)
        for px, scale in ((64, (0.4, 1.0)), (32, (0.1, 0.4)))
    ]
    return draw_plan(AugmentRecipe(global_views=kinds[0], local_views=kinds[1]), seed, positions)


def limit(count: int) -> float:
    return 4.5 / np.sqrt(count)


# crops


def torchvision_windows(scale: tuple[float, float], width: int, height: int, count: int) -> np.ndarray:
    """Windows that torchvision draws, (count, 4): left, top, width, height.

    Without the whole tiles that it falls back to after ten rejected tries; a plan needs no tries.
    """
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    drawn = [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)]
    return np.array([(left, top, w, h) for top, left, h, w in drawn if (w, h) != (width, height)])


def describe(windows: np.ndarray, width: int, height: int) -> dict[str, np.ndarray]:
    left, top, w, h = (windows[:, i].astype(float) for i in range(4))
    tie = np.random.default_rng(0).uniform(-0.5, 0.5, (4, len(windows)))  # spreads whole pixels
    return {
        "area": (w + tie[0]) * (h + tie[1]) / (width * height),
        "log ratio": np.log((w + tie[0]) / (h + tie[1])),
        "left": left + tie[2],
        "top": top + tie[3],
        "right": left + w + tie[2],
        "bottom": top + h + tie[3],
    }


def check_as_torchvision(windows: np.ndarray, reference: np.ndarray) -> None:
    ours, theirs = describe(windows, TILE, TILE), describe(reference, TILE, TILE)
    for name in ours:
        p = stats.ks_2samp(ours[name], theirs[name]).pvalue
        assert p > THRESHOLD, f"{name}: p = {p:.2g}"
    for a, b in (("area", "log ratio"), ("area", "left"), ("log ratio", "top"), ("left", "top")):
        difference = np.corrcoef(ours[a], ours[b])[0, 1] - np.corrcoef(theirs[a], theirs[b])[0, 1]
        assert abs(difference) < 2**0.5 * limit(len(windows)), f"{a} with {b}"
    # the ratio's spread depends on the area; compare it where windows are large
    big = [d["log ratio"][d["area"] > np.quantile(theirs["area"], 0.9)] for d in (ours, theirs)]
    assert stats.ks_2samp(*big).pvalue > THRESHOLD, "the ratio of large windows"


def planned_windows(scale: tuple[float, float], seed: int = 0) -> np.ndarray:
    recipe = AugmentRecipe(global_views=ViewRecipe(count=1, view_px=224, scale=scale))
    return draw_plan(recipe, seed, np.arange(COUNT)).kinds[0].windows(TILE, TILE)[:, 0]


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4), (0.2, 1.0), (0.9, 1.0)])
def test_windows_are_distributed_as_torchvisions(scale: tuple[float, float]) -> None:
    check_as_torchvision(planned_windows(scale), torchvision_windows(scale, TILE, TILE, COUNT))


def test_the_check_catches_another_scale_a_uniform_area_and_centred_windows() -> None:
    reference = torchvision_windows((0.4, 1.0), TILE, TILE, COUNT)
    windows = planned_windows((0.4, 1.0))
    with pytest.raises(AssertionError, match="area"):
        check_as_torchvision(planned_windows((0.38, 1.0)), reference)
    random = np.random.default_rng(0)
    side = np.sqrt(random.uniform(0.4, 1.0, COUNT)) * TILE  # no rejection: too many large ones
    stretch = np.exp(random.uniform(-0.5, 0.5, COUNT) * np.log(4 / 3))
    uniform = np.stack([side * 0, side * 0, side * stretch, side / stretch], axis=1).clip(0, TILE).round()
    with pytest.raises(AssertionError, match="area"):
        check_as_torchvision(uniform, reference)
    centred = windows.copy()
    centred[:, :2] = (TILE - windows[:, 2:]) // 2
    with pytest.raises(AssertionError, match="left"):
        check_as_torchvision(centred, reference)


@pytest.mark.parametrize(("kind", "scale"), [(0, (0.4, 1.0)), (1, (0.05, 0.4))])
def test_areas_and_ratios_keep_their_limits(dino: Plan, kind: int, scale: tuple[float, float]) -> None:
    views = dino.kinds[kind]
    assert views.area.min() >= scale[0] * tables.ONE - 1
    assert views.area.max() <= scale[1] * tables.ONE
    assert views.area.min() < (scale[0] + 0.001) * tables.ONE
    ratio = (views.ratio_half / tables.ONE) ** 2
    assert ratio.min() >= 3 / 4 - 1e-6
    assert ratio.max() <= 4 / 3 + 1e-6
    window = views.windows(TILE, TILE)
    assert np.abs(window[..., 2] * window[..., 3] / TILE**2 - views.area / tables.ONE).max() < 2e-3


@pytest.mark.parametrize(
    ("width", "height"), [(224, 224), (96, 224), (224, 96), (7, 9), (1, 1), (1, 500), (65535, 65535)]
)
def test_windows_lie_inside_the_tile(dino: Plan, width: int, height: int) -> None:
    for recipe_plan in (dino, draw_plan(mae_augment(), 1, np.arange(2000), num_patches=4)):
        for views in recipe_plan.kinds:
            left, top, w, h = np.moveaxis(views.windows(width, height), -1, 0)
            assert min(w.min(), h.min()) >= 1
            assert min(left.min(), top.min()) >= 0
            assert (left + w).max() <= width
            assert (top + h).max() <= height
            if min(width, height) > 50:
                assert (left + w).max() == width, "the last column is reached"
                assert left.min() == 0


def test_a_whole_tile_may_be_asked_for() -> None:
    recipe = AugmentRecipe(global_views=ViewRecipe(count=1, view_px=8, scale=(1.0, 1.0)))
    plan = draw_plan(recipe, 0, np.arange(1000))
    assert (plan.kinds[0].windows(224, 224) == [0, 0, 224, 224]).all()


# tables


def test_tables_hold_the_functions_they_name() -> None:
    at = np.linspace(0, 1, 1025)
    half_width = np.log(4 / 3)
    with np.errstate(divide="ignore"):
        assert np.abs(tables.ratio_limit_table() / tables.ONE - np.minimum(half_width, -np.log(at))).max() < 1e-9
    assert np.abs(tables.half_exp_table() / tables.ONE - np.exp((2 * at - 1) * half_width / 2)).max() < 2e-9
    low, high = 0.4, 1.0
    area = tables.area_table(low, high) / tables.ONE
    fine = np.linspace(low, high, 200_001)
    density = np.minimum(half_width, -np.log(fine))
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    exact = np.interp(at, cumulative / cumulative[-1], fine)
    assert np.abs(area - exact).max() < 1e-4
    assert (np.diff(area) > 0).all()


def test_interpolation_meets_the_knots_and_lies_between() -> None:
    table = np.arange(1025, dtype=np.int64) ** 2
    knots = np.arange(1025, dtype=np.int64) << 20
    assert (tables.interpolate(table, knots) == table).all()
    halfway = tables.interpolate(table, knots[:-1] + (1 << 19))
    assert (halfway == (table[1:] + table[:-1]) // 2).all()


# colour


def check_frequency(events: np.ndarray, probability: float, name: str) -> None:
    if probability in (0, 1):
        assert (events == probability).all(), name
    else:
        p = stats.binomtest(int(events.sum()), events.size, probability).pvalue
        assert p > THRESHOLD, f"{name}: {events.mean():.4f} instead of {probability}"


def test_events_happen_as_often_as_the_recipe_says(dino: Plan) -> None:
    for views, recipe in zip(dino.kinds, dino_augment().kinds, strict=True):
        for v in range(recipe.count):
            for name in ("flip", "jitter", "grey"):
                check_frequency(getattr(views, name)[:, v], getattr(recipe, name), f"{name} of view {v}")
            check_frequency(views.blur[:, v], recipe.blur[v], f"blur of view {v}")
            check_frequency(views.solarize[:, v], recipe.solarize[v] if recipe.solarize else 0, f"solarize {v}")
    with pytest.raises(AssertionError, match="instead of"):
        check_frequency(dino.kinds[0].flip, 0.51, "flip")


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
        ("sigma", 0.1, 2.0),
        ("stain_factors", 0.95, 1.05),
        ("stain_shifts", -0.05, 0.05),
    ],
)
def test_factors_are_uniform_between_their_limits(dino: Plan, tissue: Plan, name: str, low: float, high: float) -> None:
    for views in (tissue if "stain" in name else dino).kinds:
        drawn = getattr(views, name) / Q16
        for values in np.moveaxis(drawn, 2, 0) if drawn.ndim == 3 else [drawn]:  # each stain
            assert low - 1e-5 <= values.min() < low + 0.01 * (high - low)
            assert high - 0.01 * (high - low) < values.max() <= high + 1e-5
            assert stats.kstest(values.ravel(), "uniform", args=(low, high - low)).pvalue > THRESHOLD
            assert stats.kstest(values.ravel(), "uniform", args=(low, 0.97 * (high - low))).pvalue < THRESHOLD


def test_turns_are_uniform_and_tissue_is_flipped_and_stained_as_often_as_said(tissue: Plan) -> None:
    for views in tissue.kinds:
        assert views.turns.dtype == np.uint8
        for v in range(2):
            assert stats.chisquare(np.bincount(views.turns[:, v], minlength=4)).pvalue > THRESHOLD
            check_frequency(views.flip_vertical[:, v], 0.5, "vertical flip")
            check_frequency(views.stain[:, v], 0.8, "stain")
            # the eight ways to lay a square come up alike
            symmetry = views.turns[:, v] + 4 * (views.flip[:, v] ^ views.flip_vertical[:, v])
            assert stats.chisquare(np.bincount(symmetry, minlength=8)).pvalue > THRESHOLD


def test_all_24_orders_come_up_equally_often(dino: Plan) -> None:
    for views in dino.kinds:
        for v in range(views.order.shape[1]):
            counts = np.bincount(views.order[:, v], minlength=24)
            assert len(counts) == 24
            assert stats.chisquare(counts).pvalue > THRESHOLD


# masks and drop-path


@pytest.mark.parametrize(
    ("patches", "ratio", "hidden"), [(196, 0.75, 147), (36, 0.75, 27), (16, 0.5, 8), (49, 0.6, 30)]
)
def test_masks_hide_the_same_number_and_every_patch_alike(patches: int, ratio: float, hidden: int) -> None:
    masks = draw_mask(0, np.arange(COUNT), patches, ratio)
    assert masks.shape == (COUNT, patches)
    assert (masks.sum(axis=1) == hidden).all()
    check_patches(masks)


def check_patches(masks: np.ndarray) -> None:
    """Every patch is hidden as often, and pairs go together no more than the fixed number makes them."""
    count, patches = masks.shape
    share = masks[0].mean()
    spread = ((masks.sum(axis=0) - count * share) ** 2).sum() / (count * share * (1 - share)) * (patches - 1) / patches
    assert stats.chi2.sf(spread, patches - 1) > THRESHOLD, "some patches are hidden more often"
    together = np.corrcoef(masks.T.astype(float)) - np.eye(patches)
    expected = -1 / (patches - 1) * (1 - np.eye(patches))
    worst = stats.norm.isf(THRESHOLD / patches**2) / np.sqrt(count)
    assert np.abs(together - expected).max() < worst, "some patches go together"
    rows = masks.astype(float) - share
    neighbours = (rows[1:] * rows[:-1]).mean() / (share * (1 - share))
    assert abs(neighbours) < limit(masks.size), "neighbouring positions share their masks"


def test_the_check_catches_blocks_and_repeated_masks() -> None:
    masks = draw_mask(0, np.arange(COUNT), 16, 0.75)
    lucky_patch = masks.copy()
    lucky_patch[:500] = np.sort(lucky_patch[:500], axis=1)
    blocks = np.repeat(draw_mask(0, np.arange(COUNT), 8, 0.75), 2, axis=1)
    repeated = np.repeat(masks[: COUNT // 2], 2, axis=0)
    for broken, told in ((lucky_patch, "more often"), (blocks, "together"), (repeated, "neighbouring")):
        with pytest.raises(AssertionError, match=told):
            check_patches(broken)


def test_drop_path_drops_as_often_as_its_rates_say() -> None:
    rates = [0.0, 0.01, 0.1, 0.5, 1.0]
    keep = draw_drop_path(0, np.arange(COUNT), range(3), rates)
    for b, rate in enumerate(rates):
        for v in range(3):
            check_frequency(~keep[:, v, b], rate, f"branch {b} of view {v}")
    varied = ~keep[:, :, 1:4].reshape(COUNT, -1)
    check_uncorrelated(varied.astype(float))


# correlation


def check_uncorrelated(columns: np.ndarray) -> None:
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    worst = np.unravel_index(np.abs(correlation).argmax(), correlation.shape)
    allowed = max(limit(len(columns)), stats.norm.isf(THRESHOLD / correlation.size) / np.sqrt(len(columns)))
    assert np.abs(correlation).max() < allowed, f"{correlation[worst]:.3f} between {worst}"


def parameters(plan: Plan) -> np.ndarray:
    """Every drawn number of every view, (positions, numbers), a turn as its sine and cosine; not what never varies."""
    columns = []
    for views in plan.kinds:
        for f in fields(ViewParameters):
            array = getattr(views, f.name).astype(float)
            columns += [np.sin(array * np.pi / 2), np.cos(array * np.pi / 2)] if f.name == "turns" else [array]
    table = np.concatenate([column.reshape(len(plan.positions), -1) for column in columns], axis=1)
    return table[:, table.std(axis=0) > 0]


def test_no_two_numbers_of_a_plan_go_together(dino: Plan, tissue: Plan) -> None:
    table = parameters(dino)
    assert table.shape[1] > 130
    check_uncorrelated(table)
    check_uncorrelated(parameters(tissue))


def check_positions(plan: Plan, *steps: int) -> None:
    table = parameters(replace(plan, kinds=(plan.kinds[0],)))
    for step in steps:
        check_uncorrelated(np.concatenate([table[:-step], table[step:]], axis=1))


def test_positions_do_not_go_together(dino: Plan, tissue: Plan) -> None:
    check_positions(dino, 1, 2, 64, 1024)
    check_positions(tissue, 1, 2, 64)


def check_seeds(draw: Callable[[int, np.ndarray], Plan]) -> None:
    """Two seeds have nothing to do with each other, at the same position and at neighbouring ones."""
    positions = np.arange(8000)
    a, b = parameters(draw(0, positions)), parameters(draw(1, positions))
    for shift in (0, 1):
        check_uncorrelated(np.concatenate([a[shift:], b[: len(b) - shift]], axis=1))


def draw_globals(seed: int, positions: np.ndarray) -> Plan:
    return draw_plan(replace(dino_augment(), local_views=None), seed, positions)


def test_seeds_do_not_go_together() -> None:
    check_seeds(draw_globals)
    check_seeds(draw_tissue)


def test_the_checks_catch_added_seeds_and_shared_draws(
    dino: Plan, tissue: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match="between"):
        check_seeds(lambda seed, positions: draw_globals(0, positions + seed))
    views = dino.kinds[0]
    shared = replace(views, hue=np.repeat(views.hue[:, :1], 2, axis=1))
    with pytest.raises(AssertionError, match="between"):
        check_uncorrelated(parameters(replace(dino, kinds=(shared,))))
    with pytest.raises(AssertionError, match="between"):
        check_positions(draw_tissue(0, np.arange(COUNT) // 2), 1)
    of_another = property(lambda stream: int(Stream.FLIP if stream == Stream.FLIP_VERTICAL else stream) << 16)
    monkeypatch.setattr(Stream, "first_block", of_another)
    with pytest.raises(AssertionError, match="between"):
        check_uncorrelated(parameters(draw_tissue(0, np.arange(2000))))
