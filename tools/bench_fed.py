#!/usr/bin/env python3
"""Does the loader feed the device? Rate of training on tiles over that of training on one batch that stays there.

`python tools/bench_fed.py --tiles DIR [--recipe dino-vits16] [--backend dali] [--threads N] [--steps N] [--repeats N]
[--set KEY=VALUE …]`: a packed store and a schedule are made of the tiles (`<organ>/<slide_id>/*.jpg`), then the same
model trains from the stream and from a batch on the device, in turns. Prints one JSON object last, with
`fed_vs_synthetic`, the tiles per second of both and the device's peak memory.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from measuring import device_name, median, options, print_figures, ratios, repeated, seconds, with_spread

from hpcssl.core.world import World
from hpcssl.loader.stream import Batch, TileStream
from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.spec import ScheduleSpec
from hpcssl.stores.scan import BuildOptions, build_store
from hpcssl.stores.store import Store
from hpcssl.train.loop import request_of
from hpcssl.train.pretrain_config import Timeline, load_recipe
from hpcssl.train.reduce import Collectives
from hpcssl.train.state import TrainState
from hpcssl.train.step import train_step

PSEUDO_EPOCHS, MOST_STEPS = 50, 2000


def data_of(tiles: Path, folder: Path, global_batch: int) -> tuple[Store, Schedule]:
    """Return a store of the tiles and a schedule of many steps."""
    store = build_store(tiles, folder / "store", options=BuildOptions(pack=True))
    positions = max(store.num_tiles, MOST_STEPS * global_batch // PSEUDO_EPOCHS)
    spec = ScheduleSpec(
        num_pseudo_epochs=PSEUDO_EPOCHS, positions_per_pseudo_epoch=positions, num_groups=1, max_repeats=10**6
    )
    build_schedule(spec, store.slides, folder / "schedule")
    return store, Schedule.open(folder / "schedule")


def measure(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Return both rates; a warm-up comes before each side's first measurement."""
    loader = [f"loader.backend={args.backend}", f"loader.threads={args.threads}"]
    recipe, steps, repeats = load_recipe(args.recipe, [*loader, *args.set]), args.steps, args.repeats
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    store, schedule = data_of(args.tiles, folder, recipe.global_batch)
    state, timeline = TrainState(recipe, device), Timeline(recipe, schedule)
    request = request_of(state, recipe, (repeats + 1) * steps + 1, World())
    stream = TileStream(store, schedule, request, config=recipe.loader, device=device)

    def trained(batches: Iterator[Batch]) -> Iterator[object]:
        for batch in batches:
            yield train_step(state, batch, recipe, timeline, Collectives(), device)

    batches = iter(stream)
    first = next(batches)
    resident = replace(first, views=tuple(view.to(device) for view in first.views))
    images = steps * recipe.global_batch

    def rate(batches: Iterator[Batch]) -> float:
        return images / seconds(lambda: list(itertools.islice(trained(batches), steps)), device)

    rates = repeated(lambda: {"synthetic": rate(itertools.repeat(resident)), "fed": rate(batches)}, repeats)
    figures = with_spread("fed_vs_synthetic", ratios(rates["fed"], rates["synthetic"]))
    figures |= {f"{name}_tiles_per_s": median(values) for name, values in rates.items()}
    if device.type == "cuda":
        figures["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    about = {"device": device_name(device), "backend": recipe.loader.backend, "global_batch": recipe.global_batch}
    return figures | about


if __name__ == "__main__":
    arguments = {"recipe": "dino-vits16", "backend": "dali", "threads": 8, "steps": 30, "repeats": 5}
    print_figures(measure, options(__doc__, tiles=Path, **arguments, set=[]).parse_args())
