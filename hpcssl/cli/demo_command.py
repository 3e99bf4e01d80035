"""`hpcssl demo`: everything, from whole slides or tiles to a benchmark report."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

SUMMARY = "everything, end to end, on this machine's CPU: tiles to benchmark report in minutes"
EXAMPLE = "hpcssl demo --tiles TILES --out demo-out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    folder = "folder for everything; continued where it was (%(default)s)"
    add("--out", type=Path, default=Path("demo-out"), help=folder)
    source = parser.add_mutually_exclusive_group()
    slides = "slide table of whole slides: slide_id, organ, path, mpp, label"
    source.add_argument("--slides", type=Path, metavar="TABLE", help=slides)
    tiles = "JPEG tiles as <organ>/<slide_id>/<name>.jpg, with or without slides.csv (default: draw some)"
    source.add_argument("--tiles", type=Path, help=tiles)
    add("--label", metavar="COLUMN", help="column of the slide table to predict (default: label, if there)")
    add("--assume-mpp", type=float, metavar="MPP", help="of slides whose MPP neither the table nor the file says")
    add("--seed", type=int, default=0, help="of everything that is drawn (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the stages that are not done, and print the closing table."""
    from rich.console import Console

    from hpcssl.cli.progress import display, say
    from hpcssl.cli.report_command import format_table
    from hpcssl.pipelines.demo import Demo
    from hpcssl.report.summary import verdict_text

    started = time.monotonic()
    names = ("out", "tiles", "slides", "label", "seed", "assume_mpp")
    demo = Demo(**{name: getattr(args, name) for name in names}, display=display())
    demo.claim()
    say("about 5 minutes on 2 cores; stop it whenever you like: the same command goes on where it was")
    summary = demo.run_stages()
    if summary is not None:
        Console().print(format_table(summary))
        print(verdict_text(summary))
    print(f"{args.out / 'report.html'} (this took {time.monotonic() - started:.0f} s)")
    return 0
