"""A contact sheet: planned tiles beside the views that the reference backend makes of them, for the eye."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hpcssl.loader import pillow
from hpcssl.plan.describe import view_names
from hpcssl.plan.draw import Plan
from hpcssl.plan.recipe import AugmentRecipe
from hpcssl.stores.store import TileData

MOST_ROWS = 64
_INK, _PAPER, _HIDDEN = (40, 40, 40), (255, 255, 255), (150, 150, 150)
_COLOURS = ((200, 80, 0), (0, 90, 178))  # of global and local views: names and outlines
_GAP, _MARGIN = 8, 16
_LINE, _SMALL_LINE = 20, 16  # heights of text in pixels
_LEAST_TILE_PX = 160  # what is smaller is enlarged, so that outlines can be told apart


def contact_sheet(
    title: str,
    captions: Sequence[str],
    tiles: Sequence[TileData],
    names: Sequence[str],
    recipe: AugmentRecipe,
    plan: Plan,
) -> Image.Image:
    """Draw a row for each of the plan's positions: the tile, the tile with its crops outlined, then every view.

    Where the plan masks, what is left of the first view follows. The title is broken into lines as needed; captions,
    tiles and their names for errors are (P,), with P at most `MOST_ROWS`.
    """
    assert len(captions) == len(tiles) == len(names) == len(plan.positions) <= MOST_ROWS
    cells, (row_w, row_h) = _layout(recipe, masked=plan.mask is not None)
    row_w = max(row_w, *(int(_font(13).getlength(caption)) + 1 for caption in captions))
    lines = _wrapped(title, row_w)
    rows_y = _MARGIN + len(lines) * _LINE + _GAP
    sheet = Image.new("RGB", (2 * _MARGIN + row_w, rows_y + len(tiles) * (row_h + _GAP) + _MARGIN), _PAPER)
    for i, line in enumerate(lines):
        ImageDraw.Draw(sheet).text((_MARGIN, _MARGIN + i * _LINE), line, fill=_INK, font=_font(13))
    out = [np.empty((k.count, len(tiles), k.view_px, k.view_px, 3), np.uint8) for k in recipe.kinds]
    for p, (tile, name) in enumerate(zip(tiles, names, strict=True)):
        image = pillow.decode(tile, name=name)
        pillow.augment(image, recipe, plan, p, out)
        pictures = [image, _outlined(image, cells[1].px, plan, p)]
        pictures += [Image.fromarray(view) for kind in out for view in kind[:, p]]
        if plan.mask is not None:
            pictures.append(_masked(out[0][0, p], plan.mask[p]))
        _draw_row(sheet, rows_y + p * (row_h + _GAP), captions[p], cells, pictures)
    return sheet


class _Cell:
    """Where a picture stands in its row: x, y of its corner, its side in pixels, its name and that one's colour."""

    def __init__(self, x: int, y: int, px: int, name: str, colour: tuple[int, int, int]):
        self.x, self.y, self.px, self.name, self.colour = x, y, px, name, colour
        self.width = max(px, int(_font(11).getlength(name)) + 1)


def _layout(recipe: AugmentRecipe, *, masked: bool) -> tuple[list[_Cell], tuple[int, int]]:
    """Return the cells of a row (tile, crops, views, mask) and the row's width and height.

    Views that are small beside the tile stand in several lines.
    """
    tile_px = max([_LEAST_TILE_PX, *(kind.view_px for kind in recipe.kinds if kind.count)])
    first_y = _LINE + _SMALL_LINE
    cells, x = [], 0
    for name in ("tile", "crops"):
        cells.append(_Cell(x, first_y, tile_px, name, _INK))
        x += tile_px + _GAP
    names = iter(view_names(recipe))
    for kind, colour in zip(recipe.kinds, _COLOURS, strict=False):
        step_y = kind.view_px + _SMALL_LINE + _GAP // 2
        rows = max(1, (tile_px + _SMALL_LINE + _GAP // 2) // step_y)
        columns = -(-kind.count // rows)
        for v in range(kind.count):
            cell = _Cell(0, first_y + v // columns * step_y, kind.view_px, next(names), colour)
            cell.x = x + v % columns * (cell.width + _GAP)
            cells.append(cell)
        x = max(cell.x + cell.width for cell in cells) + _GAP
    if masked:
        cells.append(_Cell(x, first_y, recipe.global_views.view_px, "global 1, masked", _COLOURS[0]))
        x += cells[-1].width + _GAP
    return cells, (x - _GAP, first_y + tile_px + _GAP)


def _draw_row(
    sheet: Image.Image, top: int, caption: str, cells: Sequence[_Cell], pictures: Sequence[Image.Image]
) -> None:
    draw = ImageDraw.Draw(sheet)
    draw.line([(_MARGIN, top), (sheet.width - _MARGIN, top)], fill=(210, 210, 210))
    draw.text((_MARGIN, top + 3), caption, fill=_INK, font=_font(13))
    for cell, picture in zip(cells, pictures, strict=True):
        x, y = _MARGIN + cell.x, top + cell.y
        draw.text((x, y - _SMALL_LINE + 1), cell.name, fill=cell.colour, font=_font(11))
        size = (cell.px, cell.px)
        sheet.paste(picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC), (x, y))


def _outlined(tile: Image.Image, px: int, plan: Plan, p: int) -> Image.Image:
    """Return the tile at `px` pixels a side, paler, with the planned crops' outlines and numbers."""
    picture = Image.blend(tile, Image.new("RGB", tile.size, _PAPER), 0.4).resize((px, px), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for views, colour in zip(plan.kinds, _COLOURS, strict=False):
        corners = views.windows(*tile.size)[p].astype(float)
        corners[:, 2:] += corners[:, :2]  # right, bottom
        corners *= px / np.array([*tile.size, *tile.size])
        for v, (left, top, right, bottom) in enumerate(np.rint(corners).astype(int).tolist()):
            draw.rectangle([left, top, right - 1, bottom - 1], outline=colour)
            number = str(v + 1)
            draw.rectangle([left + 1, top + 1, left + 1 + int(_font(11).getlength(number)), top + 12], fill=_PAPER)
            draw.text((left + 1, top), number, fill=colour, font=_font(11))
    return picture


def _masked(view: NDArray[np.uint8], mask: NDArray[np.bool_]) -> Image.Image:
    """Return a view with its hidden patches grey; the mask is of a square grid."""
    side = math.isqrt(len(mask))
    hidden = Image.fromarray(mask.reshape(side, side).astype(np.uint8) * 255)
    hidden = hidden.resize(view.shape[:2], Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", hidden.size, _HIDDEN), Image.fromarray(view), hidden)


def _wrapped(text: str, width: int) -> list[str]:
    """Break a text at its spaces into lines of at most so many pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _font(13).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's own font, which is there wherever matplotlib is."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
