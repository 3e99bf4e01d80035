"""`hpcssl knn`: tile-level k nearest neighbours over Monte-Carlo splits."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpcssl.cli.mccv_command import add_inputs, add_leniency, report_left_out

SUMMARY = "tell slides by the nearest tiles, over the same splits as mccv; nothing is trained"
EXAMPLE = "hpcssl knn --features features/step0 features/step500 --splits breast.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_inputs(parser, "feature folders")
    add = parser.add_argument
    add("--out", type=Path, metavar="RESULTS", help="folder of results that these are added to")
    add("--k", type=int, default=20, help="neighbours (%(default)s)")
    votes = "by similarity, or each neighbour alike (%(default)s)"
    add("--votes", choices=["weighted", "equal"], default="weighted", help=votes)
    add("--tiles-per-slide", type=int, default=100, help="at most, at even distances (%(default)s)")
    add_leniency(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, and print the mean over the splits."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hpcssl.cli.progress import progress
    from hpcssl.evaluate.knn import Neighbours
    from hpcssl.evaluate.labelled import label_features
    from hpcssl.pipelines.evaluate import find_neighbours

    allowed = {"allow_missing": args.allow_missing, "allow_extra": args.allow_missing}
    pairs = label_features(args.features, args.splits, kind=args.kind, **allowed)
    report_left_out((data.name, data) for data in pairs)
    neighbours = Neighbours(k=args.k, weighted=args.votes == "weighted", tiles_per_slide=args.tiles_per_slide)
    with progress("nearest neighbours", total=len(pairs), unit="tables") as advance:
        table = find_neighbours(pairs, neighbours, out=args.out, on_progress=advance)
    table = table[table["encoder"].str.endswith(", k-NN")]
    metrics = ["auc", "accuracy", "tile_auc", "tile_accuracy"]
    means = table.pivot_table(index=["task", "encoder", "checkpoint"], columns="metric", values="value", sort=False)
    shown = Table(title="Mean over the splits", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("task", "encoder", "checkpoint", *metrics):
        shown.add_column(name.replace("_", " "), overflow="fold")
    for names, row in means.iterrows():
        shown.add_row(*(Text(str(name)) for name in names), *(f"{row[metric]:.3f}" for metric in metrics))
    Console().print(shown)
    return 0
