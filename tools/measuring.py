"""What the benchmarks share: options, repeats in turns, medians with their spread, where it was measured."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Rows = dict[str, list[float]]  # of every figure, its value in each repeat


def options(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with an option for each default.

    A value makes an option of its type, None one of a path that may be left out, a type one that must be given, a tuple
    one of these words, the first by default, and a list one that may be repeated.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        how: dict[str, Any] = {"type": type(default), "default": default, "help": f"({default})"}
        if isinstance(default, tuple):
            how = {"choices": default, "default": default[0], "help": f"({default[0]})"}
        elif isinstance(default, list):
            how = {"action": "append", "default": default, "metavar": "KEY=VALUE"}
        elif default is None or isinstance(default, type):
            how = {"type": default or Path, "required": default is not None}
        parser.add_argument(f"--{name.replace('_', '-')}", **how)
    return parser


def in_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Return what a function returns in a new process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def clocks(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of some work by the clock, and of the processor time of all threads."""
    start, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - used


def seconds(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Return the seconds of some work by the clock, that of a GPU included."""
    if device is None or device.type != "cuda":
        return clocks(work)[0]
    import torch

    torch.cuda.synchronize(device)
    return clocks(lambda: (work(), torch.cuda.synchronize(device)))[0]


def device_name(device: torch.device, otherwise: str = "cpu") -> str:
    """Return a GPU's name, and another word for the processor."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else otherwise


def repeated(take: Callable[[], Mapping[str, float]], repeats: int, *, label: str = "", warm_ups: int = 1) -> Rows:
    """Take figures so many times, both sides of a ratio in turns, after warming up; shows each on stderr."""
    rows: Rows = defaultdict(list)
    for repeat in range(-warm_ups, repeats):
        row = take()
        print(label, *(f"{name} {value:.4g}" for name, value in row.items()), file=sys.stderr, flush=True)
        for name, value in row.items() if repeat >= 0 else ():
            rows[name].append(value)
    return rows


def short(value: float) -> float:
    """Return a figure with four digits."""
    return float(f"{value:.4g}")


def median(values: Sequence[float]) -> float:
    """Return the median with four digits."""
    return short(statistics.median(values))


def with_spread(name: str, values: Sequence[float]) -> dict[str, object]:
    """Return a figure's median, and the least and the largest under its name and `_spread`."""
    return {name: median(values), f"{name}_spread": [short(min(values)), short(max(values))]}


def summary(rows: Rows) -> dict[str, object]:
    """Return the median and the spread of every figure."""
    return {key: value for name, values in rows.items() for key, value in with_spread(name, values).items()}


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return the ratio of two figures in each repeat."""
    return [a / b for a, b in zip(over, under, strict=True)]


def machine(*packages: str) -> dict[str, object]:
    """Return where it was measured: cores, processor, Python, and the versions of packages (None: not installed)."""
    about: dict[str, object] = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine()}
    about["python"] = platform.python_version()
    for package in packages:
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            about[package] = None
    return about


def print_figures(measure: Callable[[Path, argparse.Namespace], dict[str, Any]], args: argparse.Namespace) -> None:
    """Print what is measured in a temporary folder, on the disk of `args.folder`, as one JSON object."""
    with tempfile.TemporaryDirectory(dir=vars(args).get("folder")) as folder:
        print(json.dumps(measure(Path(folder), args)))
