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
    actions, command = Actions(parser), "hpcssl schedule"
    build = actions.add("build", _build, "write a schedule, or what is missing of it", EXAMPLE)
    verify = actions.add("verify", _verify, "check every guarantee and checksum", f"{command} verify SCHED")
    example = f"{command} inspect SCHED --out FIGURES"
    inspect = actions.add("inspect", _inspect, "organ shares, repeats, passes, coverage", example)
    text = "are two schedules the same, and where they part (exit 1)"
    diff = actions.add("diff", _diff, text, f"{command} diff SCHED OTHER")
    example = f"{command} export --csv SCHED --store STORE --out CSV"
    export = actions.add("export", _export, "write the order as CSV files, one a pseudo-epoch", example)
    source = build.add_mutually_exclusive_group(required=True)
    source.add_argument("--store", type=Path, help="tile store to draw from")
    source.add_argument("--slides", type=Path, metavar="TABLE", help="slide table to draw from")
    add = build.add_argument
    add("--spec", required=True, help="a spec that ships, or a YAML file")
    add("--out", type=Path, required=True, metavar="SCHED", help="folder of the schedule, new or begun")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the spec")
    for action in (verify, inspect, export):
        action.add_argument("schedule", type=Path, metavar="SCHED")
    inspect.add_argument("--out", type=Path, metavar="DIR", help="folder for the figures and their tables")
    diff.add_argument("first", type=Path, metavar="A")
    diff.add_argument("second", type=Path, metavar="B")
    add = export.add_argument
    add("--csv", action="store_true", required=True, help="as slide_schedule_<number>.csv")
    add("--store", type=Path, help="tile store that knows the files (column imgpath); else slide_id and index")
    add("--out", type=Path, metavar="DIR", help="folder to write into (default: SCHED-csv)")
    for action in (build, export):
        text = "only these pseudo-epochs, counted from 0"
        action.add_argument("--only", type=numbers_of, metavar="3,7-9", help=text)
    cores = min(len(os.sched_getaffinity(0)), _MOST_JOBS)
    text = f"threads; each holds one pseudo-epoch in memory (default: {cores})"
    for action in (build, verify):
        action.add_argument("--jobs", type=_positive, default=cores, metavar="N", help=text)


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
    from hpcssl.pipelines.build_schedule import plan_schedule
    from hpcssl.schedule.build import build_schedule

    source = args.store or args.slides
    spec, slides, hold_out = plan_schedule(args.spec, args.set, source=source, is_store=bool(args.store))
    if hold_out:
        print(hold_out)
    count, positions = spec.num_pseudo_epochs, spec.positions_per_pseudo_epoch
    total = (count if args.only is None else len(args.only)) * positions
    with progress("building the schedule", total=total, unit="positions") as advance:
        missing = build_schedule(spec, slides, args.out, only=args.only, jobs=args.jobs, on_progress=advance)
    written = f"{count - len(missing)} of {count} pseudo-epochs are written"
    advice = "the same command without --only writes the others and finishes the schedule"
    print(f"{args.out}: " + (f"{written}; {advice}" if missing else f"{count} pseudo-epochs of {positions} positions"))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from hpcssl.cli.progress import progress
    from hpcssl.schedule.file import Schedule
    from hpcssl.schedule.verify import verify_schedule

    schedule = Schedule.open(args.schedule)
    with progress("verifying", total=schedule.num_positions, unit="positions") as advance:
        verify_schedule(args.schedule, jobs=args.jobs, on_progress=advance)
    hold_out = "; nothing that is held out is drawn" if schedule.header["spec"]["hold_out"] else ""
    print(f"{args.schedule}: all four guarantees hold{hold_out}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from hpcssl.schedule.inspect import inspect_schedule

    inspection = inspect_schedule(args.schedule)
    print(inspection_text(inspection))
    if args.out:
        from hpcssl.report.schedules import write_inspection

        for picture in write_inspection(args.schedule, inspection, args.out):
            print(picture)
    return 0


def inspection_text(inspection: Inspection) -> str:
    """Return the summary of a schedule for a terminal."""
    organs, last = inspection.organs, inspection.coverage.iloc[-1]
    width = max(len("organ"), *organs["organ"].map(len))
    lines = [f"{'organ':<{width}}{'tiles':>16}{'natural':>10}{'positions':>16}{'scheduled':>11}"]
    lines += [
        f"{row['organ']:<{width}}{row['num_tiles']:>16,}{row['natural_share']:>10.2%}"
        f"{row['positions']:>16,}{row['scheduled_share']:>11.2%}"
        for row in organs.to_dict("records")
    ]
    repeats = inspection.repeats
    mean = (repeats["draws"] * repeats["tiles"]).sum() / repeats["tiles"].sum()
    never = int(repeats.loc[repeats["draws"] == 0, "tiles"].sum())
    slides = inspection.passes.groupby("pass")["slides"].sum()
    span = f"{slides.min():,}" if slides.min() == slides.max() else f"{slides.min():,} to {slides.max():,}"
    lines += [
        "",
        f"draws of a tile   {mean:.2f} on average, at most {int(repeats['draws'].max())};"
        f" {never:,} of {int(repeats['tiles'].sum()):,} tiles never",
        f"slides of a pass  {span} in {len(slides)} passes; of a pseudo-epoch {inspection.passes['slides'].min():,}"
        f" to {inspection.passes['slides'].max():,}",
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
