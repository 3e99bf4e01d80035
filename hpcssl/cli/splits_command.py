"""`hpcssl splits`: draw and check Monte-Carlo train/val splits."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

SUMMARY = "draw Monte-Carlo train/val splits of labelled slides, or check such a file"
EXAMPLE = (
    "hpcssl splits --slides slides.csv --organ breast --target label --out breast.csv\n  hpcssl splits check breast.csv"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("action", nargs="?", choices=["draw", "check"], default="draw", help="draw (if left out) or check")
    add("file", nargs="?", type=Path, metavar="FILE", help="split file to check")
    slides = "slide table, CSV or Parquet; check: what FILE is compared with"
    add("--slides", type=Path, metavar="TABLE", help=slides)
    add("--target", metavar="COLUMN", help="column of the label; slides where it is blank are left out")
    add("--out", type=Path, metavar="SPLITS.csv", help="split file to write")
    add("--organ", metavar="NAME", help="only the slides of one organ")
    add("--num", type=int, default=20, help="number of splits (%(default)s)")
    add("--train", type=float, default=0.8, help="part of each class that trains (%(default)s)")
    add("--group", metavar="COLUMN", help="slides alike here stay on one side (patient_id, where there is one)")
    add("--kind", choices=["classes", "values"], help="of the target (read from the column)")
    add("--seed", type=int, default=0, help="of the draw (%(default)s)")
    add("--features", type=Path, metavar="FEATURES", help="check: all slides have features here")


def run(args: argparse.Namespace) -> int:
    """Draw or check."""
    if args.action == "check":
        _check(args)
    else:
        _draw(args)
    return 0


def _draw(args: argparse.Namespace) -> None:
    from hpcssl.core.atomic import write_atomic
    from hpcssl.core.errors import ConfigError
    from hpcssl.evaluate.splits import PATIENT, make_splits

    for option in ("slides", "target", "out"):
        if getattr(args, option) is None:
            raise ConfigError(f"splits: --{option} is missing; example: {EXAMPLE.splitlines()[0]}")
    frame = _slides_of(args)
    _check_group(args.group, frame, args.slides)
    group = args.group or PATIENT
    table = make_splits(frame, args.target, args.num, args.train, group, args.seed, args.kind)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, table.to_csv(index=False))
    print(f"{args.out}: {_describe(table, args.kind)}")
    if len(table) < len(frame):
        print(f"{len(frame) - len(table)} slides have no {args.target} and were left out")
    _warn_ungrouped(table, group, args.out)


def _check(args: argparse.Namespace) -> None:
    from hpcssl.core.errors import ConfigError
    from hpcssl.evaluate.splits import PATIENT, check_splits, read_splits, with_slides, without_missing
    from hpcssl.features.feature_folder import FeatureSet

    if args.file is None:
        raise ConfigError("splits check: no FILE named; example: hpcssl splits check breast.csv")
    group = args.group or PATIENT
    if args.slides is None:
        table = read_splits(args.file, group, args.kind)
        _check_group(args.group, table, args.file)
    else:
        table = read_splits(args.file, kind=args.kind)
        frame = _slides_of(args)
        _check_group(args.group, frame, args.slides)
        table = with_slides(table, frame, where=f"{args.file} with {args.slides}", target=args.target, group=group)
        check_splits(table, where=str(args.file), group=group if group in table.columns else PATIENT, kind=args.kind)
    if args.features is not None:
        where = f"{args.file} with {args.features}"
        without_missing(table, FeatureSet.open(args.features).slides, where=where, allow_missing=False, kind=args.kind)
    groups = f"no {group} on both sides" if group in table.columns else f"no column {group} to check"
    print(f"{args.file}: {_describe(table, args.kind)}; {groups}")
    _warn_ungrouped(table, group, args.file)


def _warn_ungrouped(table: pd.DataFrame, group: str, path: Path) -> None:
    """Say what it means where slides have no group."""
    from hpcssl.slides.slide_table import missing

    alone = int(missing(table[group]).sum()) if group in table.columns else len(table)
    if alone:
        print(
            f"{path}: {alone} of {len(table)} slides have no {group}, so each is a group of its own; where several"
            " slides show one patient, scores will come out too high (--group names another column)",
            file=sys.stderr,
        )


def _slides_of(args: argparse.Namespace) -> pd.DataFrame:
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


def _check_group(group: str | None, table: pd.DataFrame, path: Path) -> None:
    from hpcssl.core.errors import SplitError

    if group is not None and group not in table.columns:
        raise SplitError(f"{path}: no column {group} (--group); it has {', '.join(table.columns)}")


def _describe(table: pd.DataFrame, kind: str | None) -> str:
    from hpcssl.evaluate.splits import CLASSES, TRAIN, split_columns, target_kind

    columns = split_columns(table)
    sizes = [int((table[column] == TRAIN).sum()) for column in columns]
    if target_kind(table["target"], kind, where="target") == CLASSES:
        targets = ", ".join(f"{name} {count}" for name, count in table["target"].value_counts().sort_index().items())
    else:
        values = table["target"].astype(float)
        targets = f"values {values.min():g} to {values.max():g}"
    train = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    return f"{len(columns)} splits of {len(table)} slides ({targets}), {train} in train"
