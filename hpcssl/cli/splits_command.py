"""`hpcssl splits`: draw and check Monte-Carlo train/val splits."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SUMMARY = "draw Monte-Carlo train/val splits of labelled slides, or check such a file"
EXAMPLE = (
    "hpcssl splits --slides slides.csv --organ breast --target label --out breast.csv\n  hpcssl splits check breast.csv"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "action", nargs="?", choices=["draw", "check"], default="draw", help="draw (if left out) or check"
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="split file to check")
    parser.add_argument(
        "--slides", type=Path, metavar="TABLE", help="slide table, CSV or Parquet; check: what FILE is compared with"
    )
    parser.add_argument("--target", metavar="COLUMN", help="column of the label; slides where it is blank are left out")
    parser.add_argument("--out", type=Path, metavar="SPLITS.csv", help="split file to write")
    parser.add_argument("--organ", metavar="NAME", help="only the slides of one organ")
    parser.add_argument("--num", type=int, default=20, help="number of splits (%(default)s)")
    parser.add_argument("--train", type=float, default=0.8, help="part of each class that trains (%(default)s)")
    parser.add_argument(
        "--group", metavar="COLUMN", help="slides alike here stay on one side (patient_id, where there is one)"
    )
    parser.add_argument("--kind", choices=["classes", "values"], help="of the target (read from the column)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (%(default)s)")
    parser.add_argument("--features", type=Path, metavar="FEATURES", help="check: all slides have features here")


def run(args: argparse.Namespace) -> int:
    """Draw or check."""
    return _check(args) if args.action == "check" else _draw(args)


def _draw(args: argparse.Namespace) -> int:
    from hpcssl.core.atomic import write_atomic
    from hpcssl.core.errors import ConfigError
    from hpcssl.evaluate.splits import PATIENT, make_splits

    for option in ("slides", "target", "out"):
        if getattr(args, option) is None:
            raise ConfigError(f"splits: --{option} is missing; example: {EXAMPLE.splitlines()[0]}")
    frame = _slides_of(args)
    _check_named(args.group, frame, args.slides)
    group = args.group or PATIENT
    table = make_splits(frame, args.target, args.num, args.train, group, args.seed, args.kind)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, table.to_csv(index=False))
    print(f"{args.out}: {_described(table, args.kind)}")
    if len(table) < len(frame):
        print(f"{len(frame) - len(table)} slides have no {args.target} and were left out")
    _tell_ungrouped(table, group, args.out)
    return 0


def _check(args: argparse.Namespace) -> int:
    from hpcssl.core.errors import ConfigError
    from hpcssl.evaluate.splits import PATIENT, check_splits, read_splits, with_slides, without_missing
    from hpcssl.features.feature_folder import FeatureSet

    if args.file is None:
        raise ConfigError("splits check: no FILE named; example: hpcssl splits check breast.csv")
    group = args.group or PATIENT
    if args.slides is None:
        table = read_splits(args.file, group, args.kind)
        _check_named(args.group, table, args.file)
    else:
        table = read_splits(args.file, kind=args.kind)
        frame = _slides_of(args)
        _check_named(args.group, frame, args.slides)
        table = with_slides(table, frame, where=f"{args.file} with {args.slides}", target=args.target, group=group)
        check_splits(table, where=str(args.file), group=group if group in table.columns else PATIENT, kind=args.kind)
    if args.features is not None:
        where = f"{args.file} with {args.features}"
        without_missing(table, FeatureSet.open(args.features).slides, where=where, allow_missing=False, kind=args.kind)
    groups = f"no {group} on both sides" if group in table.columns else f"no column {group} to check"
    print(f"{args.file}: {_described(table, args.kind)}; {groups}")
    _tell_ungrouped(table, group, args.file)
    return 0


def _tell_ungrouped(table, group: str, path: Path) -> None:  # type: ignore[no-untyped-def]  # as below
    """Say what it means where slides have no group."""
    from hpcssl.slides.slide_table import missing

    alone = int(missing(table[group]).sum()) if group in table.columns else len(table)
    if alone:
        print(
            f"{path}: {alone} of {len(table)} slides have no {group}, so each is a group of its own; where several"
            " slides show one patient, scores will come out too high (--group names another column)",
            file=sys.stderr,
        )


def _slides_of(args: argparse.Namespace):  # type: ignore[no-untyped-def]  # as below
    """Return the slide table, or the part of it that is of --organ."""
    from hpcssl.core.errors import SplitError
    from hpcssl.slides.slide_table import read_slides

    frame = read_slides(args.slides)
    if args.organ is None:
        return frame
    organs = sorted(frame["organ"].unique())
    if args.organ not in organs:
        raise SplitError(f"{args.slides}: no slide of organ {args.organ}; it has {', '.join(organs)}")
    return frame[frame["organ"] == args.organ]


def _check_named(group: str | None, table, path: Path) -> None:  # type: ignore[no-untyped-def]  # as below
    from hpcssl.core.errors import SplitError

    if group is not None and group not in table.columns:
        raise SplitError(f"{path}: no column {group} (--group); it has {', '.join(table.columns)}")


def _described(table, kind: str | None) -> str:  # type: ignore[no-untyped-def]  # pandas is imported only when the command runs
    from hpcssl.evaluate.splits import CLASSES, TRAIN, split_columns, target_kind

    columns = split_columns(table)
    sizes = [int((table[column] == TRAIN).sum()) for column in columns]
    if target_kind(table["target"], kind, where="target") == CLASSES:
        told = ", ".join(f"{name} {count}" for name, count in table["target"].value_counts().sort_index().items())
    else:
        values = table["target"].astype(float)
        told = f"values {values.min():g} to {values.max():g}"
    train = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    return f"{len(columns)} splits of {len(table)} slides ({told}), {train} in train"
