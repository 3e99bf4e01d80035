"""`hpcssl doctor`: what works on this machine, what is missing, and how to mend it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcssl.doctor.machine_checks import Check

SUMMARY = "say what works here, what is missing, and how to fix it"
EXAMPLE = "hpcssl doctor --out /scratch/me\n  hpcssl doctor --profile my-a100.yaml --out /shared/me"
_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--out", type=Path, default=Path(), help="folder whose disk is looked at (default: this one)")
    parser.add_argument(
        "--profile",
        help="check a cluster profile, by name or a YAML file, against the cluster of this machine instead: partition,"
        " limits, account, Python and --out on a node",
    )


def run(args: argparse.Namespace) -> int:
    """Report; 0 when nothing failed, 2 otherwise."""
    from hpcssl.doctor.cluster_facts import diagnose_cluster
    from hpcssl.doctor.machine_checks import FAIL
    from hpcssl.doctor.machine_facts import diagnose
    from hpcssl.jobs.profile import load_profile

    if args.profile:
        checks = diagnose_cluster(load_profile(args.profile), args.profile, args.out)
    else:
        checks = diagnose(args.out)
    show(checks)
    return 2 if any(check.status == FAIL for check in checks) else 0


def show(checks: Sequence[Check]) -> None:
    """Print a table on a terminal, plain lines elsewhere."""
    counts = {status: sum(check.status == status for check in checks) for status in _COLOURS}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    if not sys.stdout.isatty():
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{check.status}  {check.name:<{width}}  {check.detail}{'; fix: ' if check.fix else ''}{check.fix}")
        print(summary)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "what", "found", "fix", title="hpcssl doctor", title_justify="left")
    for check in checks:
        status = Text(check.status, style=_COLOURS[check.status])
        table.add_row(status, Text(check.name), Text(check.detail), Text(check.fix))
    console = Console()
    console.print(table)
    console.print(summary, highlight=False)
