"""`hpcssl mccv`: the benchmark of slide features by gated attention over Monte-Carlo splits."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "fit gated-attention heads on features over Monte-Carlo splits, AUC after every epoch"
EXAMPLE = "hpcssl mccv --features features/step0 features/step500 --splits breast.csv --out results --preset mccv-demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--features", type=Path, nargs="+", required=True, metavar="FEATURES", help="feature folders")
    parser.add_argument(
        "--splits", type=Path, nargs="+", required=True, metavar="SPLITS.csv", help="split files; the name is the task"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="RESULTS", help="folder of results; continued if there"
    )
    parser.add_argument("--preset", default="gma-50", help="gma-50 (the paper's), gma-40 or mccv-demo (%(default)s)")
    parser.add_argument("--replicas", type=int, default=2, help="repeats of every split (%(default)s)")
    parser.add_argument("--epochs", type=int, help="another length than the preset's")
    parser.add_argument("--only", metavar="split=7,replica=1", help="one run alone; it comes out as among all")
    parser.add_argument("--allow-missing", action="store_true", help="leave out slides that have no features")
    parser.add_argument("--threads", type=int, help="stacks of runs fitted at a time; changes no result (all cores)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, orders and dropout (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Fit what is missing, then print the summary."""
    import torch
    from rich.console import Console

    from hpcssl.cli.progress import progress
    from hpcssl.cli.report import format_table
    from hpcssl.core.errors import ConfigError
    from hpcssl.mccv.presets import preset_named
    from hpcssl.mccv.run import plan_parts, run_parts
    from hpcssl.report.results import read_results
    from hpcssl.report.summary import summarise

    preset = preset_named(args.preset, args.epochs)
    parts = plan_parts(
        args.features,
        args.splits,
        preset,
        replicas=args.replicas,
        only=_only(args.only),
        allow_missing=args.allow_missing,
        seed=args.seed,
    )
    threads = torch.get_num_threads() if args.threads is None else args.threads
    if threads < 1:
        raise ConfigError(f"--threads {threads}: expected at least 1")
    total = preset.epochs * sum(len(part.runs) for part in parts)
    with progress("fitting heads", total=total, unit="epochs of runs") as advance:
        run_parts(parts, preset, args.out, seed=args.seed, threads=threads, on_progress=advance)
    Console().print(format_table(summarise(read_results(args.out))))
    return 0


def _only(text: str | None) -> tuple[int, int] | None:
    """Return (split, replica) of `split=7,replica=1`."""
    import re

    from hpcssl.core.errors import ConfigError

    if text is None:
        return None
    found = re.fullmatch(r"split=(\d+),replica=(\d+)", text.replace(" ", ""))
    if not found:
        raise ConfigError(f"--only {text}: expected split=K,replica=R, for example split=7,replica=1")
    return int(found[1]), int(found[2])
