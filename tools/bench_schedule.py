#!/usr/bin/env python3
"""Times building, verifying and reading a schedule against what the machine's disk and numpy's shuffle take.

`python tools/bench_schedule.py [--size paper|toy] [--repeats N] [--folder DIR]`: `paper` is 423,563 slides of 70 organs
and 50 pseudo-epochs of 65 million positions (13 GB on the disk, twice for a while); `toy` checks in seconds that all of
it runs, its ratios mean nothing. Prints one JSON object last; both sides of a ratio are taken in turns in one run, the
ratio is the median over the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from hpcssl.schedule.builder import Builder
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.spec import load_spec

SIZES = {  # slides, organs, tiles, --set of the spec opal-3b
    "paper": (423_563, 70, 3_250_000_000, []),
    "toy": (2_000, 7, 2_000_000, ["positions_per_pseudo_epoch=100_000", "num_pseudo_epochs=10"]),
}
# runs a command of its own and tells its seconds and its peak resident memory
_TIMED = """
import json, resource, sys, time
from hpcssl.cli.main import main
begun = time.perf_counter()
code = main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"code": code, "seconds": time.perf_counter() - begun, "peak_gib": peak / 2**20}))
"""


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
    """Run `hpcssl` with these arguments in a process of its own."""
    command = [sys.executable, "-c", _TIMED, *map(str, arguments)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    told: dict[str, float] = json.loads(lines[-1])
    assert told["code"] == 0, lines
    return told


def seconds(work: Callable[[], object]) -> float:
    """Return how long it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


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


# opens the schedule anew for every read, once to warm the pages, once to time it
_READ = """
import json, resource, sys, time
from pathlib import Path
from hpcssl.schedule.file import Schedule
path, starts = Path(sys.argv[1]), json.loads(sys.argv[2])
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6
before = resident()
for turn in range(2):
    took = []
    for start in starts:
        begun = time.perf_counter()
        schedule = Schedule.open(path)
        schedule.tiles_at(start, start + 1080)
        took.append(1e3 * (time.perf_counter() - begun))
print(json.dumps({"ms": took, "growth_mb": resident() - before}))
"""


def read_anywhere(path: Path, repeats: int) -> tuple[list[float], float]:
    """Return the milliseconds of opening and reading 1,080 positions, pages warm, and the growth of memory in MB."""
    last = Schedule.open(path).num_positions - 1080
    starts = [int(start) for start in np.linspace(0, last, max(5, repeats))]
    command = [sys.executable, "-c", _READ, str(path), json.dumps(starts)]
    told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return told["ms"], told["growth_mb"]


def spread(values: list[float]) -> list[float]:
    """Return the least and the largest value."""
    return [round(min(values), 4), round(max(values), 4)]


def measure(size: str, repeats: int, folder: Path) -> dict[str, object]:
    """Build, verify and read a schedule of that size in `folder`, `repeats` times; returns what was measured."""
    *shape, settings = SIZES[size]
    spec = load_spec("opal-3b", settings)
    slides = slide_table(*shape)
    slides.to_parquet(folder / "slides.parquet", index=False)
    builder = Builder(spec, slides)
    positions, files = spec.positions_per_pseudo_epoch, spec.num_pseudo_epochs
    array = np.arange(positions, dtype=np.uint32)
    random = np.random.default_rng(0)
    sched = folder / "schedule"
    build = [
        "schedule",
        "build",
        "--slides",
        folder / "slides.parquet",
        "--spec",
        "opal-3b",
        "--out",
        sched,
        "--jobs",
        2,
    ]
    build += [argument for setting in settings for argument in ("--set", setting)]
    sum(len(chunk) for chunk in builder.chunks(0))  # warm-up: compiles
    found: dict[str, list[float]] = {}

    def note(**values: float) -> None:
        for name, value in values.items():
            found.setdefault(name, []).append(value)
        print("  ".join(f"{name} {value:.3f}" for name, value in values.items()), file=sys.stderr, flush=True)

    for repeat in range(repeats):
        shutil.rmtree(sched, ignore_errors=True)
        shuffle = statistics.median(seconds(lambda: random.shuffle(array)) for _ in range(3))
        one = seconds(lambda number=repeat % files: sum(len(chunk) for chunk in builder.chunks(number)))
        write = write_synced(folder / "write", array, files)
        built = timed_command(*build)
        verified = timed_command("schedule", "verify", sched, "--jobs", 2)
        note(
            build_vs_bound=built["seconds"] / (write + files * shuffle / 2),
            verify_vs_build=verified["seconds"] / built["seconds"],
            pseudo_epoch_vs_shuffle=one / shuffle,
            build_s=built["seconds"],
            write_s=write,
            shuffle_s=shuffle,
            verify_s=verified["seconds"],
            build_peak_rss_gib=built["peak_gib"],
            verify_peak_rss_gib=verified["peak_gib"],
        )
    milliseconds, growth = read_anywhere(sched, repeats)
    told: dict[str, object] = {"size": size, "repeats": repeats}
    for name, values in found.items():
        value = max(values) if "peak" in name else statistics.median(values)
        told |= {name: round(value, 4), f"{name}_spread": spread(values)}
    told |= {"read_1080_ms": round(statistics.median(milliseconds), 3), "read_1080_ms_spread": spread(milliseconds)}
    told |= {"read_rss_growth_mb": round(growth, 2), "cores": len(os.sched_getaffinity(0))}
    return told | {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="paper")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where the disk is that is to be measured (default: a temporary one)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print(json.dumps(measure(args.size, args.repeats, Path(folder))))


if __name__ == "__main__":
    main()
