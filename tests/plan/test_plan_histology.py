"""What tissue allows and photographs do not: vertical flips, quarter turns and stain jitter, in the plan.

Seeds are fixed; a test fails where p is below THRESHOLD, of correlations the largest's of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hpcssl.plan import draw as draw_module
from hpcssl.plan.describe import HEADINGS, plan_table
from hpcssl.plan.draw import Q16, Plan, Stream, ViewParameters, draw_plan
from hpcssl.plan.recipe import AugmentRecipe, ViewRecipe, dino_augment, mae_augment

THRESHOLD = 1e-3
COUNT = 20_000
NEW = ("flip_vertical", "turns", "stain", "stain_factors", "stain_shifts")
OLD = [f.name for f in fields(ViewParameters) if f.name not in NEW]
DrawPlan = Callable[[int, np.ndarray], Plan]


def histology(base: AugmentRecipe | None = None, **kind: Any) -> AugmentRecipe:
    """A recipe with everything on, in two kinds of view."""
    changes = {"flip_vertical": 0.5, "quarter_turns": True, "stain": 0.8, **kind}
    recipe = base or AugmentRecipe(
        global_views=ViewRecipe(count=2, view_px=64, scale=(0.4, 1.0), jitter=0.5),
        local_views=ViewRecipe(count=2, view_px=32, scale=(0.1, 0.4)),
    )
    local = None if recipe.local_views is None else replace(recipe.local_views, **changes)
    return replace(recipe, global_views=replace(recipe.global_views, **changes), local_views=local)


def draw(seed: int, positions: np.ndarray) -> Plan:
    return draw_plan(histology(), seed, positions)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return draw(0, np.arange(COUNT))


# golden: (position, view): vertical flip, turns, stain, factors, shifts in 1/65536

GOLDEN_ROWS = {
    (0, 0): "stain turns=1 63339 62699 68012 1924 1028 -1705",
    (0, 1): "flip_vertical stain turns=2 67986 68149 67659 3004 2034 1156",
    (0, 2): "stain turns=2 66097 63543 66137 228 557 -1924",
    (0, 3): "stain turns=3 65598 67038 64706 -2998 2618 338",
    (1, 0): "stain turns=1 62430 66892 67614 -857 3222 2267",
    (3_000_000_000, 2): "flip_vertical stain turns=0 66324 62448 65343 890 1324 38",
    (4_294_967_296, 0): "flip_vertical stain turns=0 65216 68313 68148 2116 -2923 -1306",
}


def row(position: int, view: int) -> str:
    views = draw(0, np.array([position])).kinds[view // 2]
    numbers = [*views.stain_factors[0, view % 2].tolist(), *views.stain_shifts[0, view % 2].tolist()]
    words = [name for name in ("flip_vertical", "stain") if getattr(views, name)[0, view % 2]]
    return " ".join([*words, f"turns={views.turns[0, view % 2]}", *map(str, numbers)])


def test_golden_rows() -> None:
    assert {at: row(*at) for at in GOLDEN_ROWS} == GOLDEN_ROWS


# off by default


@pytest.mark.parametrize("recipe", [dino_augment(), mae_augment()], ids=["dino", "mae"])
def test_the_published_recipes_do_none_of_it(recipe: AugmentRecipe) -> None:
    for views in draw_plan(recipe, 0, np.arange(100), num_patches=196).kinds:
        assert not views.flip_vertical.any()
        assert not views.turns.any()
        assert not views.stain.any()
        assert (views.stain_factors == Q16).all()
        assert (views.stain_shifts == 0).all()


@pytest.mark.parametrize("recipe", [dino_augment(), mae_augment()], ids=["dino", "mae"])
def test_switching_it_on_keeps_every_old_draw(recipe: AugmentRecipe) -> None:
    positions = np.concatenate([np.arange(100), 2**40 + np.arange(100)])
    off = draw_plan(recipe, 3, positions, num_patches=196)
    on = draw_plan(histology(recipe), 3, positions, num_patches=196)
    for before, after in zip(off.kinds, on.kinds, strict=True):
        for name in OLD:
            assert (getattr(before, name) == getattr(after, name)).all(), name
        assert all((getattr(before, name) != getattr(after, name)).any() for name in NEW)
    assert off.mask is None or (off.mask == on.mask).all()  # type: ignore[operator]


def test_one_setting_shifts_no_other() -> None:
    positions, recipe = np.arange(200), histology()
    base = draw_plan(recipe, 0, positions).kinds[0]
    changes = {
        "flip_vertical": histology(flip_vertical=0.9),
        "turns": histology(quarter_turns=False),
        "stain": histology(stain=0.2),
        "stain_factors": replace(recipe, stain_alpha=0.3),
        "stain_shifts": replace(recipe, stain_beta=0.3),
    }
    for name, changed_recipe in changes.items():
        changed = draw_plan(changed_recipe, 0, positions).kinds[0]
        for f in fields(ViewParameters):
            same = (getattr(changed, f.name) == getattr(base, f.name)).all()
            assert same == (f.name != name), f"{f.name} when {name} is set otherwise"


# any batch


def check_ranks_agree(draw_share: Callable[[np.ndarray, int], Plan]) -> None:
    """The plans that W ranks draw of their slices are the plan of the whole batch, for each W."""
    whole = draw_share(np.arange(1000, 1024), 0)
    for size in (1, 2, 3, 4, 8):
        share = 24 // size
        parts = [draw_share(np.arange(1000 + r * share, 1000 + (r + 1) * share), r) for r in range(size)]
        for k, views in enumerate(whole.kinds):
            for f in fields(ViewParameters):
                joined = np.concatenate([getattr(part.kinds[k], f.name) for part in parts])
                assert (joined == getattr(views, f.name)).all(), f"{f.name} with {size} ranks"
                assert joined.dtype == getattr(views, f.name).dtype


def test_any_world() -> None:
    check_ranks_agree(lambda positions, rank: draw(0, positions))
    with pytest.raises(AssertionError, match="with 2 ranks"):
        check_ranks_agree(lambda positions, rank: draw(rank, positions))


# distribution


def check_turns(turns: np.ndarray) -> None:
    counts = np.bincount(turns.ravel(), minlength=4)
    assert len(counts) == 4, "more than three quarter turns"
    assert stats.chisquare(counts).pvalue > THRESHOLD, f"{counts} instead of a quarter each"


def test_turns_are_uniform_in_every_view(plan: Plan) -> None:
    for views in plan.kinds:
        assert views.turns.dtype == np.uint8
        for v in range(2):
            check_turns(views.turns[:, v])
    slanted = plan.kinds[0].turns.copy()
    slanted[:500] = 0
    with pytest.raises(AssertionError, match="a quarter each"):
        check_turns(slanted)


def check_frequency(events: np.ndarray, probability: float) -> None:
    p = stats.binomtest(int(events.sum()), events.size, probability).pvalue
    assert p > THRESHOLD, f"{events.mean():.4f} instead of {probability}"


def test_flips_and_stains_happen_as_often_as_the_recipe_says(plan: Plan) -> None:
    for views in plan.kinds:
        for v in range(2):
            check_frequency(views.flip_vertical[:, v], 0.5)
            check_frequency(views.stain[:, v], 0.8)
            # the eight ways to lay a square come up alike
            symmetry = views.turns[:, v] + 4 * (views.flip[:, v] ^ views.flip_vertical[:, v])
            assert stats.chisquare(np.bincount(symmetry, minlength=8)).pvalue > THRESHOLD
    with pytest.raises(AssertionError, match="instead of"):
        check_frequency(plan.kinds[0].flip_vertical, 0.48)


@pytest.mark.parametrize(("name", "low", "high"), [("stain_factors", 0.95, 1.05), ("stain_shifts", -0.05, 0.05)])
def test_factors_and_shifts_are_uniform(plan: Plan, name: str, low: float, high: float) -> None:
    for views in plan.kinds:
        for stain in range(3):
            values = getattr(views, name)[..., stain].ravel() / Q16
            assert low - 1e-5 <= values.min() < low + 0.01 * (high - low)
            assert high - 0.01 * (high - low) < values.max() <= high + 1e-5
            assert stats.kstest(values, "uniform", args=(low, high - low)).pvalue > THRESHOLD
            assert stats.kstest(values, "uniform", args=(low, 0.97 * (high - low))).pvalue < THRESHOLD


def test_the_default_strengths_are_tellez_light() -> None:
    assert (dino_augment().stain_alpha, dino_augment().stain_beta) == (0.05, 0.05)


# correlation


def check_uncorrelated(columns: np.ndarray) -> None:
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    worst = np.unravel_index(np.abs(correlation).argmax(), correlation.shape)
    allowed = stats.norm.isf(THRESHOLD / correlation.size) / np.sqrt(len(columns))
    assert np.abs(correlation).max() < allowed, f"{correlation[worst]:.3f} between {worst}"


def parameters(drawn: Plan) -> np.ndarray:
    """Every drawn number of every view, (positions, numbers); a turn as its sine and cosine."""
    columns = []
    for views in drawn.kinds:
        for f in fields(ViewParameters):
            array = getattr(views, f.name).astype(float)
            columns += [np.sin(array * np.pi / 2), np.cos(array * np.pi / 2)] if f.name == "turns" else [array]
    table = np.concatenate([column.reshape(len(drawn.positions), -1) for column in columns], axis=1)
    return table[:, table.std(axis=0) > 0]


def check_views(drawn: Plan) -> None:
    check_uncorrelated(parameters(drawn))


def check_positions(draw_one: DrawPlan) -> None:
    table = parameters(draw_one(0, np.arange(8000)))
    for step in (1, 2, 64):
        check_uncorrelated(np.concatenate([table[:-step], table[step:]], axis=1))


def check_seeds(draw_one: DrawPlan) -> None:
    a, b = (parameters(draw_one(seed, np.arange(8000))) for seed in (0, 1))
    for shift in (0, 1):
        check_uncorrelated(np.concatenate([a[shift:], b[: len(b) - shift]], axis=1))


def test_views_positions_and_seeds_do_not_go_together(plan: Plan) -> None:
    check_views(plan)
    check_positions(draw)
    check_seeds(draw)


def test_the_checks_catch_shared_draws(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    views = plan.kinds[0]
    one_for_both = replace(views, turns=np.repeat(views.turns[:, :1], 2, axis=1))
    with pytest.raises(AssertionError, match="between"):
        check_views(replace(plan, kinds=(one_for_both,)))
    with pytest.raises(AssertionError, match="between"):
        check_positions(lambda seed, positions: draw(seed, positions // 2))
    with pytest.raises(AssertionError, match="between"):
        check_seeds(lambda seed, positions: draw(0, positions + seed))

    def flips_of_another_stream(stream: Stream) -> int:
        return int(Stream.FLIP if stream == Stream.FLIP_VERTICAL else stream) << 16

    monkeypatch.setattr(draw_module.Stream, "first_block", property(flips_of_another_stream))
    with pytest.raises(AssertionError, match="between"):
        check_views(draw(0, np.arange(2000)))


# as text


def test_the_table_says_what_is_drawn() -> None:
    recipe = histology()
    table = plan_table(draw(0, np.array([7, 10**9])), recipe, 224)
    assert len(table) == 1 + 2 * recipe.num_views
    assert [line.split("  ")[0].strip() for line in table[1:]] == [""] * 4 + ["1000000000"] * 4
    edges = [
        table[0].index(heading) for heading in HEADINGS if heading in ("view", "stain H, E, D", "jitter, in order")
    ]
    views = draw(0, np.array([7])).kinds[1]
    line = next(line for line in table if "local 1" in line)
    assert line[edges[0] :].startswith("local 1")
    left, top, width, height = views.windows(224, 224)[0, 0].tolist()
    assert line[edges[0] :].split()[2:6] == [str(n) for n in (left, top, width, height)]
    factor, shift = views.stain_factors[0, 0, 0] / Q16, views.stain_shifts[0, 0, 0] / Q16
    assert line[edges[1] :].startswith(f"{factor:.3f}{shift:+.3f} " if views.stain[0, 0] else "-")
