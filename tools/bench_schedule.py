#!/usr/bin/env python3
"""Times building, verifying and reading a schedule against what the machine's disk and numpy's shuffle take.

`python tools/bench_schedule.py [--size paper|toy] [--repeats N] [--folder DIR]`: `paper` is 423,563 slides of 70 organs
and 50 pseudo-epochs of 65 million positions (13 GB on the disk, twice for a while); `toy` checks in seconds that all of
it runs, its ratios mean nothing. Prints one JSON object last; both sides of a ratio are taken in turns in one run, the
ratio is the median over the repeats.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from measuring import in_process, machine, options, print_figures, repeated, seconds, short, summary, with_spread

from hpcssl.cli.main import main as main_of_hpcssl
from hpcssl.schedule.builder import Builder
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.spec import load_spec

SIZES = {  # slides, organs, tiles, --set of the spec opal-3b
    "paper": (423_563, 70, 3_250_000_000, []),
    "toy": (2_000, 7, 2_000_000, ["positions_per_pseudo_epoch=100_000", "num_pseudo_epochs=10"]),
}


def slide_table(num_slides: int, num_organs: int, num_tiles: int) -> pd.DataFrame:
    """Return a table with the imbalance of a hospital's archive: organs by a power law, tiles of a slide log-normal."""
    random = np.random.default_rng(0)
    share = np.arange(1, num_organs + 1) ** -1.2
    organ = random.choice(num_organs, num_slides, p=share / share.sum())
    tiles = random.lognormal(0, 0.9, num_slides)
    tiles = np.maximum(1, tiles / tiles.sum() * num_tiles).astype(np.int64)
    tiles[0] += num_tiles - tiles.sum()
    return pd.DataFrame(
        {
            "slide_id": [f"slide-{i:06d}" for i in range(num_slides)],
            "organ": [f"organ-{i:02d}" for i in organ],
            "num_tiles": tiles,
            "patient_id": [f"patient-{i // 5:06d}" for i in range(num_slides)],
        }
    )


def timed_command(*arguments: object) -> dict[str, float]:
    """Run `hpcssl` with these arguments; in a process of its own this tells its peak memory."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        assert main_of_hpcssl([str(argument) for argument in arguments]) == 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": time.perf_counter() - start, "peak_gib": peak / 2**20}


def write_synced(folder: Path, array: np.ndarray, count: int) -> float:
    """Return the seconds of writing `count` files of these bytes, each synced; they are removed again."""

    def write() -> None:
        for number in range(count):
            with (folder / f"{number}.bin").open("wb") as stream:
                stream.write(array.data)
                stream.flush()
                os.fsync(stream.fileno())

    folder.mkdir()
    took = seconds(write)
    shutil.rmtree(folder)
    return took


def read_anywhere(path: Path, repeats: int) -> tuple[list[float], float]:
    """Return the milliseconds of opening and reading 1,080 positions, pages warm, and the growth of memory in MB."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    before = resident()
    starts = np.linspace(0, Schedule.open(path).num_positions - 1080, max(5, repeats)).astype(int).tolist()
    for _ in range(2):  # once to warm the pages
        taken = [1e3 * seconds(lambda at=at: Schedule.open(path).tiles_at(at, at + 1080)) for at in starts]
    return taken, resident() - before


def measure(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Build, verify and read a schedule of a size `repeats` times; returns what was measured."""
    *shape, settings = SIZES[args.size]
    spec = load_spec("opal-3b", settings)
    slides = slide_table(*shape)
    slides.to_parquet(folder / "slides.parquet", index=False)
    builder = Builder(spec, slides)
    positions, files = spec.positions_per_pseudo_epoch, spec.num_pseudo_epochs
    array = np.arange(positions, dtype=np.uint32)
    random = np.random.default_rng(0)
    sched = folder / "schedule"
    build = ["schedule", "build", "--slides", folder / "slides.parquet", "--spec", "opal-3b", "--out", sched]
    build += ["--jobs", 2, *(argument for setting in settings for argument in ("--set", setting))]
    sum(len(chunk) for chunk in builder.chunks(0))  # warm-up: compiles
    numbers = itertools.cycle(range(files))

    def take() -> dict[str, float]:
        shutil.rmtree(sched, ignore_errors=True)
        shuffle = statistics.median(seconds(lambda: random.shuffle(array)) for _ in range(3))
        one = seconds(lambda: sum(len(chunk) for chunk in builder.chunks(next(numbers))))
        write = write_synced(folder / "write", array, files)
        built = in_process(timed_command, *build)
        verified = in_process(timed_command, "schedule", "verify", sched, "--jobs", 2)
        return {
            "build_vs_bound": built["seconds"] / (write + files * shuffle / 2),
            "verify_vs_build": verified["seconds"] / built["seconds"],
            "pseudo_epoch_vs_shuffle": one / shuffle,
            "build_s": built["seconds"],
            "write_s": write,
            "shuffle_s": shuffle,
            "verify_s": verified["seconds"],
            "build_peak_rss_gib": built["peak_gib"],
            "verify_peak_rss_gib": verified["peak_gib"],
        }

    rows = repeated(take, args.repeats, warm_ups=0)
    milliseconds, growth = in_process(read_anywhere, sched, args.repeats)
    peaks = {name: short(max(values)) for name, values in rows.items() if "peak" in name}
    figures = summary(rows) | peaks | with_spread("read_1080_ms", milliseconds) | {"read_rss_growth_mb": short(growth)}
    return {"size": args.size, "repeats": args.repeats, **figures, **machine("numpy")}


if __name__ == "__main__":
    print_figures(measure, options(__doc__, size=tuple(SIZES), repeats=5, folder=None).parse_args())
