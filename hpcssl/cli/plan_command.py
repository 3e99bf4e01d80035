"""`hpcssl plan`: what a run does to the tiles at some positions, as a table and as pictures."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from hpcssl.cli.actions import Actions

if TYPE_CHECKING:
    from hpcssl.plan.draw import Plan
    from hpcssl.train.pretrain_config import PretrainConfig

SUMMARY = "show what a run does to the tiles at some positions, as a table or as pictures"
EXAMPLE = "hpcssl plan show --positions 0:4 --recipe dino-vits16-opal"
_DRAW_EXAMPLE = "hpcssl plan draw --positions 0:8 --store STORE --schedule SCHED --out sheet.png"
_MOST_SHOWN = 10_000
_MOST_TILE_PX = 65_535  # a JPEG has no more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    actions = Actions(parser)
    text = "print the drawn parameters, one line a view, and the plan's digest"
    show = actions.add("show", _show, text, EXAMPLE)
    text = "draw a contact sheet: every tile and the views made of it"
    draw = actions.add("draw", _draw, text, _DRAW_EXAMPLE)
    for add in (show.add_argument, draw.add_argument):
        add("--positions", type=range_of, required=True, metavar="A:B", help="global positions from A to below B")
        add("--recipe", default="dino-vits16-opal", help="a training recipe that ships, or a YAML file (%(default)s)")
        add("--seed", type=int, help="of the run (default: the recipe's)")
        add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the recipe")
    show.add_argument(
        "--tile-px", type=_tile_px, default=224, metavar="N", help="side of the tiles in pixels (%(default)s)"
    )
    draw.add_argument("--store", type=Path, required=True, help="tile store")
    draw.add_argument("--schedule", type=Path, required=True, metavar="SCHED", help="schedule built for that store")
    draw.add_argument("--out", type=Path, required=True, metavar="SHEET.png", help="picture to write")


def range_of(text: str) -> range:
    """Return the positions of a text such as `64:80`.

    >>> range_of("64:80")
    range(64, 80)
    """
    found = re.fullmatch(r"(\d{1,18}):(\d{1,18})", text, re.ASCII)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r}; expected A:B such as 64:80, A below B, for positions A to B - 1")
    return range(int(found[1]), int(found[2]))


def _tile_px(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_TILE_PX:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number from 1 to {_MOST_TILE_PX}")
    return int(text)


def _show(args: argparse.Namespace) -> int:
    from hpcssl.plan.describe import LEGEND, plan_table

    _check_count(args.positions, _MOST_SHOWN)
    recipe, seed, plan = _drawn(args)
    print("\n".join(plan_table(plan, recipe.augment, args.tile_px)))
    print("", *LEGEND, f"Tile: {args.tile_px} x {args.tile_px} px.", sep="\n")
    if plan.mask is not None:
        hidden, patches = int(plan.mask[0].sum()), plan.mask.shape[1]
        print(f"Mask: {hidden} of {patches} patches are hidden; the digest covers which.")
    print(f"\n{_title(args, seed)}\nplan digest {plan.digest()}")
    return 0


def _draw(args: argparse.Namespace) -> int:
    from hpcssl.core.atomic import atomic_file
    from hpcssl.core.errors import ConfigError
    from hpcssl.loader.sheet import MOST_ROWS, contact_sheet
    from hpcssl.schedule.file import Schedule, check_matches
    from hpcssl.stores.kinds import open_store

    _check_count(args.positions, MOST_ROWS)
    if args.out.suffix.lower() != ".png":
        raise ConfigError(f"--out {args.out}: a contact sheet is a PNG; expected a name that ends in .png")
    store, schedule = open_store(args.store), Schedule.open(args.schedule)
    check_matches(schedule, store.slides, store=args.store)
    tiles = schedule.tiles_at(args.positions.start, args.positions.stop).tolist()
    places = list(zip(args.positions, tiles, strict=True))
    recipe, seed, plan = _drawn(args)
    store = store.drawn_by(schedule.seed, schedule.mpp_weights)
    files = [str(store.file_of(tile)) for tile in tiles]
    captions = [f"position {p}  ·  tile {tile}  ·  {store.name_of(p, tile)}" for p, tile in places]
    data = [store.fetch(p, tile) for p, tile in places]
    title = f"{_title(args, seed)}  ·  plan digest {plan.digest()[:16]} …"
    sheet = contact_sheet(title, captions, data, files, recipe.augment, plan)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(args.out) as temporary:
        sheet.save(temporary, "PNG")
    views, size = recipe.augment.num_views, f"{sheet.width} x {sheet.height} px"
    print(f"{args.out}: {len(tiles)} positions, {views} views each, {size}")
    return 0


def _check_count(positions: range, most: int) -> None:
    from hpcssl.core.errors import ConfigError

    first, count = positions.start, len(positions)
    if count > most:
        where = f"--positions {first}:{positions.stop}: {count} positions"
        raise ConfigError(f"{where}; at most {most} at a time, such as {first}:{first + most}")


def _drawn(args: argparse.Namespace) -> tuple[PretrainConfig, int, Plan]:
    """Return the recipe, the seed and the plan of the positions."""
    import numpy as np

    from hpcssl.plan.draw import draw_plan
    from hpcssl.train.pretrain_config import load_recipe

    recipe = load_recipe(args.recipe, args.set)
    seed = recipe.seed if args.seed is None else args.seed
    num_patches = _num_patches(recipe) if recipe.augment.mask_ratio else 0
    positions = np.arange(args.positions.start, args.positions.stop)
    return recipe, seed, draw_plan(recipe.augment, seed, positions, num_patches=num_patches)


def _num_patches(recipe: PretrainConfig) -> int:
    """Return the patches of the encoder's image, as training masks them."""
    import torch

    from hpcssl.models.encoder import build_encoder

    with torch.device("meta"):  # shapes alone, no weights
        height, width = build_encoder(recipe.encoder).grid_size
    return height * width


def _title(args: argparse.Namespace, seed: int) -> str:
    changed = "".join(f" {setting}" for setting in args.set)
    return f"recipe {args.recipe}{changed}, seed {seed}, positions {args.positions.start}:{args.positions.stop}"
