"""What tissue allows and photographs do not: vertical flips, quarter turns and stain jitter, in the plan.

That they are a function of the position is checked with all other draws in test_plan_identity.py, how they are
distributed in test_plan_distribution.py.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from hpcssl.plan.describe import plan_table
from hpcssl.plan.draw import Q16, Plan, ViewParameters, draw_plan
from hpcssl.plan.recipe import AugmentRecipe, ViewRecipe, dino_augment, mae_augment

NEW = ("flip_vertical", "turns", "stain", "stain_factors", "stain_shifts")
OLD = [f.name for f in fields(ViewParameters) if f.name not in NEW]


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
def test_the_published_recipes_do_none_of_it_and_switching_it_on_keeps_every_old_draw(recipe: AugmentRecipe) -> None:
    positions = np.concatenate([np.arange(100), 2**40 + np.arange(100)])
    off = draw_plan(recipe, 3, positions, num_patches=196)
    on = draw_plan(histology(recipe), 3, positions, num_patches=196)
    for before, after in zip(off.kinds, on.kinds, strict=True):
        assert not any(getattr(before, name).any() for name in ("flip_vertical", "turns", "stain", "stain_shifts"))
        assert (before.stain_factors == Q16).all()
        for name in OLD:
            assert (getattr(before, name) == getattr(after, name)).all(), name
        assert all((getattr(before, name) != getattr(after, name)).any() for name in NEW)
    assert off.mask is None or (off.mask == on.mask).all()  # type: ignore[operator]


# as text


def test_the_table_says_what_is_drawn() -> None:
    recipe = histology()
    table = plan_table(draw(0, np.array([7, 10**9])), recipe, 224)
    assert len(table) == 1 + 2 * recipe.num_views
    assert [line.split("  ")[0].strip() for line in table[1:]] == [""] * 4 + ["1000000000"] * 4
    edges = [table[0].index(heading) for heading in ("view", "stain H, E, D")]
    views = draw(0, np.array([7])).kinds[1]
    line = next(line for line in table if "local 1" in line)
    assert line[edges[0] :].startswith("local 1")
    left, top, width, height = views.windows(224, 224)[0, 0].tolist()
    assert line[edges[0] :].split()[2:6] == [str(n) for n in (left, top, width, height)]
    factor, shift = views.stain_factors[0, 0, 0] / Q16, views.stain_shifts[0, 0, 0] / Q16
    assert line[edges[1] :].startswith(f"{factor:.3f}{shift:+.3f} " if views.stain[0, 0] else "-")
