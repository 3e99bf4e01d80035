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
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from hpcssl.core.world import World
from hpcssl.loader.stream import Batch, TileStream
from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.spec import ScheduleSpec
from hpcssl.stores.scan import BuildOptions, build_store
from hpcssl.stores.store import Store
from hpcssl.train.loop import request_of
from hpcssl.train.pretrain_config import PretrainConfig, Timeline, load_recipe
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


def seconds_of(steps: Iterator[object], count: int, device: torch.device) -> float:
    """Return how long some steps take."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    for _ in itertools.islice(steps, count):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def measure(recipe: PretrainConfig, tiles: Path, folder: Path, steps: int, repeats: int) -> dict[str, object]:
    """Return both rates; a warm-up comes before each side's first measurement."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    store, schedule = data_of(tiles, folder, recipe.global_batch)
    state, timeline = TrainState(recipe, device), Timeline(recipe, schedule)
    request = request_of(state, recipe, (repeats + 1) * steps + 1, World())
    stream = TileStream(store, schedule, request, config=recipe.loader, device=device)

    def trained(batches: Iterator[Batch]) -> Iterator[object]:
        for batch in batches:
            yield train_step(state, batch, recipe, timeline, Collectives(), device)

    batches = iter(stream)
    first = next(batches)
    resident = replace(first, views=tuple(view.to(device) for view in first.views))
    sides: dict[str, Callable[[], Iterator[object]]] = {
        "synthetic": lambda: trained(itertools.repeat(resident)),
        "fed": lambda: trained(batches),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            rate = steps * recipe.global_batch / seconds_of(side(), steps, device)
            if repeat:
                rates[name].append(rate)
    ratios = [fed / synthetic for fed, synthetic in zip(rates["fed"], rates["synthetic"], strict=True)]
    told: dict[str, object] = {"fed_vs_synthetic": round(statistics.median(ratios), 3)}
    told["fed_vs_synthetic_spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
    told |= {f"{name}_tiles_per_s": round(statistics.median(values), 1) for name, values in rates.items()}
    if device.type == "cuda":
        told["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return told | {"device": name, "backend": recipe.loader.backend, "global_batch": recipe.global_batch}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=Path, required=True)
    parser.add_argument("--recipe", default="dino-vits16")
    parser.add_argument("--backend", default="dali")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    loader = [f"loader.backend={args.backend}", f"loader.threads={args.threads}"]
    recipe = load_recipe(args.recipe, [*loader, *args.set])
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(recipe, args.tiles, Path(folder), args.steps, args.repeats)))


if __name__ == "__main__":
    main()
