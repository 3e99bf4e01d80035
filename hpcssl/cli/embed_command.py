"""`hpcssl embed`: a feature file per slide."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hpcssl.cli.array_arguments import add_array_arguments, array_profile, tell_array

SUMMARY = "embed every slide of a store with an encoder; done slides are not computed again"
EXAMPLE = (
    "hpcssl embed --store STORE --encoder runs/a@150000 --out features/a-150000\n"
    "  hpcssl embed --store STORE --encoder timm:resnet50:stage3 --weights r50.safetensors --out features/r50\n"
    "  hpcssl embed --store STORE --encoder runs/a --out features/a --cluster slurm --array 32 --profile a100"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--store", type=Path, required=True, help="tile store")
    encoder = (
        "a run's newest checkpoint, or that of a step (0 is untrained); or a model of timm, a ResNet up to a stage,"
        " random weights"
    )
    add("--encoder", required=True, metavar="RUN[@STEP]|timm:NAME[:stage3][:random]", help=encoder)
    weights = "of a timm model; else they are looked for where timm keeps them"
    add("--weights", type=Path, metavar="FILE", help=weights)
    out = "folder of feature files, new or to be completed"
    add("--out", type=Path, required=True, metavar="FEATURES", help=out)
    add("--tile-px", type=int, help="side that tiles are resized to (default: the encoder's)")
    add("--threads", type=int, help="for decoding and computing (default: all cores; not on SLURM)")
    add_array_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Embed, here or in a job array."""
    from hpcssl.cli.progress import progress
    from hpcssl.core.errors import ConfigError
    from hpcssl.pipelines.embed import EmbedRequest, embed, submit_embedding

    profile = array_profile(args)
    request = EmbedRequest(
        store=args.store, encoder=args.encoder, out=args.out, weights=args.weights, tile_px=args.tile_px
    )
    if profile is None:
        threads = len(os.sched_getaffinity(0)) if args.threads is None else args.threads
        num_slides = embed(request, threads=threads, progress=progress)
        print(f"features of {num_slides} slides: {args.out}")
        return 0
    if args.threads is not None:
        raise ConfigError("--threads: a task of the array has the profile's cpus_per_gpu; leave it out")
    array = submit_embedding(request, profile, num_tasks=args.array)
    if array:
        tell_array(array, args.out, f"embed what is missing in {args.out}")
    else:
        print(f"features of all slides are there: {args.out}")
    return 0
