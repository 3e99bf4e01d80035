"""A plan as lines of text for people: one line a view."""

from __future__ import annotations

from collections.abc import Iterator

from hpcssl.plan.draw import HUE, Q16, Plan, ViewParameters
from hpcssl.plan.recipe import AugmentRecipe

NO = "-"
HEADINGS: tuple[str, ...] = (
    *("position", "view", "left", "top", "width", "height", "flip", "turn"),
    *("stain H, E, D", "jitter, in order", "grey", "blur", "solarise"),
)
LEGEND = (
    f"Operations are done from left to right; {NO}: not done. Crop: pixels of the tile. Flip: h, v. Turn: degrees",
    "counter-clockwise. Stain: factor and shift of haematoxylin, eosin and DAB. Jitter: factors of B brightness,",
    "C contrast, S saturation; shift of H hue in turns. Blur: sigma in pixels of the view.",
)
_NUMBERS = ("position", "left", "top", "width", "height", "turn", "blur")  # set flush right


def view_names(recipe: AugmentRecipe) -> list[str]:
    """Return the names of a tile's views, as `draw_plan` numbers them.

    >>> from hpcssl.plan.recipe import dino_augment
    >>> view_names(dino_augment())[:4]
    ['global 1', 'global 2', 'local 1', 'local 2']
    """
    kinds = zip(("global", "local"), recipe.kinds, strict=False)
    return [f"{name} {v + 1}" for name, kind in kinds for v in range(kind.count)]


def plan_table(plan: Plan, recipe: AugmentRecipe, tile_px: int) -> list[str]:
    """Return a plan for tiles of `tile_px` pixels a side as a table: headings, then one line a view."""
    rows = [HEADINGS, *_rows(plan, recipe, tile_px)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if heading in _NUMBERS else cell.ljust(width)
            for cell, width, heading in zip(row, widths, HEADINGS, strict=True)
        ).rstrip()
        for row in rows
    ]


def _rows(plan: Plan, recipe: AugmentRecipe, tile_px: int) -> Iterator[tuple[str, ...]]:
    windows = [views.windows(tile_px, tile_px) for views in plan.kinds]
    for p, position in enumerate(plan.positions.tolist()):
        names = iter(view_names(recipe))
        for k, views in enumerate(plan.kinds):
            for v in range(views.area.shape[1]):
                crop = map(str, windows[k][p, v].tolist())
                yield (str(position), next(names), *crop, *_operations(views, p, v))


def _operations(views: ViewParameters, p: int, v: int) -> tuple[str, ...]:
    """Return what is done to a view after its crop, a text for each operation."""
    flips = ("h" if views.flip[p, v] else "") + ("v" if views.flip_vertical[p, v] else "")
    turn = int(views.turns[p, v]) * 90
    stains = zip(views.stain_factors[p, v] / Q16, views.stain_shifts[p, v] / Q16, strict=True)
    jitter = (f"{'BCSH'[o]} {amount:{'+' if o == HUE else ''}.3f}" for o, amount in views.jitter_at(p, v))
    return (
        flips or NO,
        str(turn) if turn else NO,
        " ".join(f"{factor:.3f}{shift:+.3f}" for factor, shift in stains) if views.stain[p, v] else NO,
        " ".join(jitter) if views.jitter[p, v] else NO,
        "yes" if views.grey[p, v] else NO,
        f"{views.sigma[p, v] / Q16:.2f}" if views.blur[p, v] else NO,
        "yes" if views.solarize[p, v] else NO,
    )
