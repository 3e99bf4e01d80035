"""`hpcssl schedule`: build and verify the precomputed order of tiles."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "build and verify an organ-balanced pseudo-epoch schedule"
EXAMPLE = "hpcssl schedule build --store STORE --spec opal-3b --out SCHED --set seed=1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    build = actions.add_parser("build", help="write a schedule", epilog=f"example: {EXAMPLE}")
    source = build.add_mutually_exclusive_group(required=True)
    source.add_argument("--store", type=Path, help="tile store to draw from")
    source.add_argument("--slides", type=Path, metavar="TABLE", help="slide table to draw from")
    build.add_argument("--spec", required=True, help="a spec that ships, or a YAML file")
    build.add_argument(
        "--out", type=Path, required=True, metavar="SCHED", help="folder of the schedule; must not exist"
    )
    build.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the spec")
    build.set_defaults(run=_build)
    verify = actions.add_parser(
        "verify", help="check every guarantee and checksum", epilog="example: hpcssl schedule verify SCHED"
    )
    verify.add_argument("schedule", type=Path, metavar="SCHED")
    verify.set_defaults(run=_verify)


def run(args: argparse.Namespace) -> int:
    """Never called: the parser demands an action."""
    raise AssertionError(args)


def _build(args: argparse.Namespace) -> int:
    from hpcssl.cli.progress import progress
    from hpcssl.schedule.build import build_schedule
    from hpcssl.schedule.spec import load_spec
    from hpcssl.tiles.slides import read_slides
    from hpcssl.tiles.store import Store

    spec = load_spec(args.spec, args.set)
    slides = Store.open(args.store).slides if args.store else read_slides(args.slides)
    total = spec.num_pseudo_epochs * spec.positions_per_pseudo_epoch
    with progress("building the schedule", total=total, unit="positions") as advance:
        build_schedule(spec, slides, args.out, on_progress=advance)
    print(f"{args.out}: {spec.num_pseudo_epochs} pseudo-epochs of {spec.positions_per_pseudo_epoch} positions")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from hpcssl.cli.progress import progress
    from hpcssl.schedule.file import Schedule
    from hpcssl.schedule.verify import verify_schedule

    schedule = Schedule.open(args.schedule)
    with progress("verifying", total=schedule.num_positions, unit="positions") as advance:
        verify_schedule(args.schedule, on_progress=advance)
    print(f"{args.schedule}: all four guarantees hold")
    return 0
