"""`hpcssl embed`: a feature file per slide."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

SUMMARY = "embed every slide of a store with an encoder; done slides are not computed again"
EXAMPLE = (
    "hpcssl embed --store STORE --encoder runs/a@150000 --out features/a-150000\n"
    "  hpcssl embed --store STORE --encoder timm:resnet50:stage3 --weights resnet50.safetensors --out features/resnet50"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--store", type=Path, required=True, help="tile store")
    parser.add_argument(
        "--encoder",
        required=True,
        metavar="RUN[@STEP]|timm:NAME[:stage3][:random]",
        help="a run's newest checkpoint, or that of a step (0 is untrained); or a model of timm, a ResNet up to"
        " a stage, random weights",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="of a timm model; else they are looked for where timm keeps them"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FEATURES", help="folder of feature files, new or to be completed"
    )
    parser.add_argument(
        "--tile-px", type=int, default=None, help="side that tiles are resized to (default: the encoder's)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="for decoding and computing (default: all cores)",
    )


def run(args: argparse.Namespace) -> int:
    """Embed."""
    from hpcssl.cli.progress import progress
    from hpcssl.core.errors import ConfigError
    from hpcssl.embed.baseline import PREFIX, Baseline
    from hpcssl.embed.encoder import Source
    from hpcssl.embed.run import embed_store
    from hpcssl.tiles.store import Store

    store = Store.open(args.store)
    if args.encoder.startswith(PREFIX):
        source: Source | Baseline = Baseline.parse(args.encoder, args.weights)
    elif args.weights is None:
        source = Source.parse(args.encoder)
    else:
        raise ConfigError(f"--weights {args.weights}: {args.encoder} is a run, which has its own; expected timm:NAME")
    with progress(f"embedding {args.encoder}", total=store.num_slides, unit="slides") as advance:
        embed_store(store, source, args.out, threads=args.threads, tile_px=args.tile_px, on_progress=advance)
    print(f"features of {store.num_slides} slides: {args.out}")
    return 0
