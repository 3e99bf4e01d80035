"""`hpcssl mccv`: the benchmark of slide features by gated attention over Monte-Carlo splits."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcssl.evaluate.labelled import LabelledFeatures

SUMMARY = "fit gated-attention heads on features over Monte-Carlo splits, AUC after every epoch"
EXAMPLE = "hpcssl mccv --features features/step0 features/step500 --splits breast.csv --out results --preset mccv-demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_inputs(parser, "folders of .h5 (ours, CLAM's, TRIDENT's), .pt or .npy files, or slide_data.csv@ENCODER")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="RESULTS", help="folder of results; continued if there")
    add("--preset", default="gma-50", help="gma-50 (the paper's), gma-40 or mccv-demo (%(default)s)")
    heads = "gma, abmil, mean, max; several are measured beside each other (%(default)s)"
    add("--head", nargs="+", default=["gma"], metavar="HEAD", help=heads)
    add("--replicas", type=int, default=2, help="repeats of every split (%(default)s)")
    add("--epochs", type=int, help="another length than the preset's")
    add("--only", metavar="split=7,replica=1", help="one run alone; it comes out as among all")
    add_leniency(parser)
    threads = "runs fitted at a time on the CPU; changes no result (all cores)"
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help=threads)
    memory = "a task's features beyond this are read from a scratch file in RESULTS, slide by slide (%(default)s)"
    add("--memory-gib", type=float, default=8.0, help=memory)
    precision = "of the tiles' layers; bf16 is for processors with instructions for it (%(default)s)"
    add("--precision", choices=["fp32", "bf16"], default="fp32", help=precision)
    add("--device", default="cpu", help="cpu, or cuda: all runs in one stack (%(default)s)")
    attention = "slides of which the report draws a map: attention by heads that did not train on them"
    add("--attention", nargs="+", default=[], metavar="SLIDE", help=attention)
    add("--seed", type=int, default=0, help="of weights, orders and dropout (%(default)s)")


def add_inputs(parser: argparse.ArgumentParser, features_help: str) -> None:
    """Declare what is evaluated."""
    features, splits = {"metavar": "FEATURES", "help": features_help}, "split files; the name is the task"
    parser.add_argument("--features", type=Path, nargs="+", required=True, **features)
    parser.add_argument("--splits", type=Path, nargs="+", required=True, metavar="SPLITS.csv", help=splits)


def add_leniency(parser: argparse.ArgumentParser) -> None:
    """Declare how inputs that do not say or do not match are taken."""
    parser.add_argument("--kind", choices=["classes", "values"], help="of the target (read from the column)")
    missing = "leave out slides that one of FEATURES lacks, and features without slides"
    parser.add_argument("--allow-missing", action="store_true", help=missing)


def run(args: argparse.Namespace) -> int:
    """Fit what is missing, then print the summary."""
    from dataclasses import replace

    from rich.console import Console

    from hpcssl.cli.progress import progress
    from hpcssl.cli.report_command import format_table
    from hpcssl.core.config import nearest
    from hpcssl.core.errors import ConfigError
    from hpcssl.evaluate.mil.benchmark import Benchmark, Compute, plan_measurements
    from hpcssl.evaluate.mil.presets import preset_named
    from hpcssl.evaluate.results import read_results
    from hpcssl.pipelines.evaluate import fit_missing
    from hpcssl.report.summary import summarise

    if args.threads < 1:
        raise ConfigError(f"--threads {args.threads}: expected at least 1")
    _check_device(args.device)
    benchmark = Benchmark(
        preset=replace(preset_named(args.preset, args.epochs), precision=args.precision),
        heads=args.head,
        replicas=args.replicas,
        only=_only(args.only),
        seed=args.seed,
        kind=args.kind,
        allow_missing=args.allow_missing,
        allow_extra=args.allow_missing,
    )
    measurements = plan_measurements(args.features, args.splits, benchmark)
    report_left_out((one.name, one.data) for one in measurements)
    slides = {slide for one in measurements for slide in one.data.table["slide"]}
    for slide in args.attention:
        if slide not in slides:
            raise ConfigError(f"--attention {slide}: no such slide in the splits; {nearest(slide, sorted(slides))}")
    compute = Compute(threads=args.threads, memory_gib=args.memory_gib, device=args.device)
    total = sum(one.num_epochs for one in measurements)
    with progress("fitting heads", total=total, unit="epochs of runs") as advance:
        fit_missing(measurements, args.out, compute, attention=args.attention, on_progress=advance)
    Console().print(format_table(summarise(read_results(args.out))))
    return 0


def report_left_out(parts: Iterable[tuple[str, LabelledFeatures]]) -> None:
    """Say which slides a part of the results leaves out; the command has allowed it."""
    from hpcssl.evaluate.splits import listed

    for name, data in parts:
        if data.left_out:
            print(f"{name}: leaves out {len(data.left_out)} slides: {listed(data.left_out)}", file=sys.stderr)


def _check_device(name: str) -> None:
    import torch

    from hpcssl.core.errors import ConfigError

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--device {name}: cannot be used here ({reason}); expected cpu, or cuda with a GPU"
        ) from None


def _only(text: str | None) -> tuple[int, int] | None:
    """Return (split, replica) of `split=7,replica=1`."""
    import re

    from hpcssl.core.errors import ConfigError

    if text is None:
        return None
    match = re.fullmatch(r"split=(\d+),replica=(\d+)", text.replace(" ", ""))
    if not match:
        raise ConfigError(f"--only {text}: expected split=K,replica=R, for example split=7,replica=1")
    return int(match[1]), int(match[2])
