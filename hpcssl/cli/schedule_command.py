"""`hpcssl schedule`: build, check, look at, compare and export the precomputed order of tiles."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hpcssl.cli.actions import Actions

if TYPE_CHECKING:
    from hpcssl.schedule.inspect import Inspection

SUMMARY = "build, verify, inspect, compare and export an organ-balanced pseudo-epoch schedule"
EXAMPLE = "hpcssl schedule build --store STORE --spec opal-3b --out SCHED --set seed=1"
_MOST_JOBS = 4
_MOST_NUMBER = 10**6
_DIFFERENT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    actions = Actions(parser)
    _add_build(actions)
    verify = actions.add(
        "verify", "check every guarantee and checksum", example="hpcssl schedule verify SCHED", run=_verify
    )
    verify.add_argument("schedule", type=Path, metavar="SCHED")
    _add_jobs(verify)
    inspect = actions.add(
        "inspect",
        "organ shares, repeats, passes, coverage",
        example="hpcssl schedule inspect SCHED --out FIGURES",
        run=_inspect,
    )
    inspect.add_argument("schedule", type=Path, metavar="SCHED")
    inspect.add_argument("--out", type=Path, metavar="DIR", help="folder for the figures and their tables")
    diff = actions.add(
        "diff",
        "are two schedules the same, and where they part (exit 1)",
        example="hpcssl schedule diff SCHED OTHER",
        run=_diff,
    )
    diff.add_argument("first", type=Path, metavar="A")
    diff.add_argument("second", type=Path, metavar="B")
    export = actions.add(
        "export",
        "write the order as CSV files, one a pseudo-epoch",
        example="hpcssl schedule export --csv SCHED --store STORE --out CSV",
        run=_export,
    )
    export.add_argument("schedule", type=Path, metavar="SCHED")
    export.add_argument("--csv", action="store_true", required=True, help="as slide_schedule_<number>.csv")
    export.add_argument(
        "--store", type=Path, help="tile store that knows the files (column imgpath); else slide_id and index"
    )
    export.add_argument("--out", type=Path, metavar="DIR", help="folder to write into (default: SCHED-csv)")
    _add_only(export)


def _add_build(actions: Actions) -> None:
    build = actions.add("build", "write a schedule, or what is missing of it", example=EXAMPLE, run=_build)
    source = build.add_mutually_exclusive_group(required=True)
    source.add_argument("--store", type=Path, help="tile store to draw from")
    source.add_argument("--slides", type=Path, metavar="TABLE", help="slide table to draw from")
    build.add_argument("--spec", required=True, help="a spec that ships, or a YAML file")
    build.add_argument("--out", type=Path, required=True, metavar="SCHED", help="folder of the schedule, new or begun")
    build.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the spec")
    _add_only(build)
    _add_jobs(build)


def _add_only(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", type=numbers_of, metavar="3,7-9", help="only these pseudo-epochs, counted from 0")


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    cores = min(len(os.sched_getaffinity(0)), _MOST_JOBS)
    parser.add_argument(
        "--jobs",
        type=_positive,
        default=cores,
        metavar="N",
        help=f"threads; each holds one pseudo-epoch in memory (default: {cores})",
    )


def numbers_of(text: str) -> list[int]:
    """Return the numbers of a list such as `3,7-9`.

    >>> numbers_of("3,7-9")
    [3, 7, 8, 9]
    """
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.strip().isdecimal() or (dash and not last.strip().isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r}; expected numbers and ranges such as 3,7-9")
        if dash and int(last) < int(first):
            raise argparse.ArgumentTypeError(f"{text!r}: the range {part} ends before it begins")
        if int(last or first) > _MOST_NUMBER:
            raise argparse.ArgumentTypeError(f"{text!r}: no schedule has a pseudo-epoch {last or first}")
        numbers.update(range(int(first), int(last if dash else first) + 1))
    return sorted(numbers)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number from 1")
    return int(text)


def _build(args: argparse.Namespace) -> int:
    from hpcssl.cli.progress import progress
    from hpcssl.schedule.build import build_schedule
    from hpcssl.schedule.eligible import HoldOut
    from hpcssl.schedule.spec import load_spec
    from hpcssl.slides.slide_table import read_slides
    from hpcssl.stores.kinds import open_store

    spec = load_spec(args.spec, args.set)
    if args.store:
        slides = open_store(args.store).drawn_by(spec.seed, spec.mpp_weights).slides
    else:
        slides = read_slides(args.slides)
    if spec.hold_out:
        print(HoldOut.read(Path(spec.hold_out)).found(slides))
    count = spec.num_pseudo_epochs if args.only is None else len(args.only)
    with progress("building the schedule", total=count * spec.positions_per_pseudo_epoch, unit="positions") as advance:
        missing = build_schedule(spec, slides, args.out, only=args.only, jobs=args.jobs, on_progress=advance)
    if missing:
        written = spec.num_pseudo_epochs - len(missing)
        print(
            f"{args.out}: {written} of {spec.num_pseudo_epochs} pseudo-epochs are written;"
            " the same command without --only writes the others and finishes the schedule"
        )
    else:
        print(f"{args.out}: {spec.num_pseudo_epochs} pseudo-epochs of {spec.positions_per_pseudo_epoch} positions")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from hpcssl.cli.progress import progress
    from hpcssl.schedule.file import Schedule
    from hpcssl.schedule.verify import verify_schedule

    schedule = Schedule.open(args.schedule)
    with progress("verifying", total=schedule.num_positions, unit="positions") as advance:
        verify_schedule(args.schedule, jobs=args.jobs, on_progress=advance)
    held = "; nothing that is held out is drawn" if schedule.header["spec"]["hold_out"] else ""
    print(f"{args.schedule}: all four guarantees hold{held}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from hpcssl.schedule.inspect import inspect_schedule

    found = inspect_schedule(args.schedule)
    print(inspection_text(found))
    if args.out:
        from hpcssl.report.schedules import write_inspection

        for picture in write_inspection(args.schedule, found, args.out):
            print(picture)
    return 0


def inspection_text(found: Inspection) -> str:
    """Return the summary of a schedule for a terminal."""
    organs, last = found.organs, found.coverage.iloc[-1]
    width = max(len("organ"), *organs["organ"].map(len))
    lines = [f"{'organ':<{width}}{'tiles':>16}{'natural':>10}{'positions':>16}{'scheduled':>11}"]
    lines += [
        f"{row['organ']:<{width}}{row['num_tiles']:>16,}{row['natural_share']:>10.2%}"
        f"{row['positions']:>16,}{row['scheduled_share']:>11.2%}"
        for row in organs.to_dict("records")
    ]
    repeats = found.repeats
    mean = (repeats["draws"] * repeats["tiles"]).sum() / repeats["tiles"].sum()
    never = int(repeats.loc[repeats["draws"] == 0, "tiles"].sum())
    slides = found.passes.groupby("pass")["slides"].sum()
    span = f"{slides.min():,}" if slides.min() == slides.max() else f"{slides.min():,} to {slides.max():,}"
    lines += [
        "",
        f"draws of a tile   {mean:.2f} on average, at most {int(repeats['draws'].max())};"
        f" {never:,} of {int(repeats['tiles'].sum()):,} tiles never",
        f"slides of a pass  {span} in {len(slides)} passes; of a pseudo-epoch {found.passes['slides'].min():,}"
        f" to {found.passes['slides'].max():,}",
        f"coverage          {last['slides_share']:.1%} of the slides and {last['tiles_share']:.1%} of the tiles"
        f" after {int(last['samples_seen']):,} samples",
    ]
    return "\n".join(lines)


def _diff(args: argparse.Namespace) -> int:
    from hpcssl.schedule.schedule_diff import compare_schedules

    lines = compare_schedules(args.first, args.second)
    print("\n".join(lines) if lines else f"{args.first} and {args.second} are the same schedule")
    return _DIFFERENT if lines else 0


def _export(args: argparse.Namespace) -> int:
    from hpcssl.cli.progress import progress
    from hpcssl.core.errors import ScheduleError
    from hpcssl.schedule.csv_export import export_csv
    from hpcssl.schedule.file import Schedule, check_matches
    from hpcssl.stores.kinds import open_store

    schedule = Schedule.open(args.schedule)
    numbers = list(range(schedule.num_pseudo_epochs)) if args.only is None else args.only
    if numbers[-1] >= schedule.num_pseudo_epochs:
        raise ScheduleError(
            f"--only {numbers[-1]}: {args.schedule} ends at pseudo-epoch {schedule.num_pseudo_epochs - 1}"
        )
    store = open_store(args.store) if args.store else None
    if store:
        check_matches(schedule, store.slides, store=args.store)
    folder = args.schedule.resolve()
    out = args.out or folder.with_name(f"{folder.name}-csv")
    total = len(numbers) * schedule.positions_per_pseudo_epoch
    with progress("exporting", total=total, unit="positions") as advance:
        export_csv(schedule, out, paths_of=store.files_of if store else None, numbers=numbers, on_progress=advance)
    print(f"{out}: {len(numbers)} files, slide_schedule_{numbers[0]}.csv to slide_schedule_{numbers[-1]}.csv")
    return 0
