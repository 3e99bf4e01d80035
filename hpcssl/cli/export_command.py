"""`hpcssl export`: a run's encoder as weights for timm, with a model card beside it."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "write a run's encoder as weights that timm loads, and a model card"
EXAMPLE = "hpcssl export runs/a@150000 --out opal-vits16.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run_and_step", metavar="RUN[@STEP]", help="a run's newest checkpoint, or that of a step")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.safetensors", help="file to write; the card is FILE.md"
    )
    parser.add_argument("--student", action="store_true", help="of DINO the student instead of the teacher")


def run(args: argparse.Namespace) -> int:
    """Export."""
    from hpcssl.pipelines.export import export

    card = export(args.run_and_step, args.out, student=args.student)
    print(f"weights: {args.out}\nmodel card: {card}")
    return 0
