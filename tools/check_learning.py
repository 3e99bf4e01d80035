#!/usr/bin/env python3
"""Does pretraining teach something on labelled tiles? k-NN of the trained and the untrained encoder and of colours.

`python tools/check_learning.py TILES [--recipe mae-demo] [--pseudo-epochs 40] [--minutes 15] [--set key=value] …`:
TILES is laid out as `<organ>/<slide_id>/<name>.jpg` with a slides.csv (slide_id, organ, label, patient_id). Pretrains
in one process, at most so many minutes; each organ's slides are then told by their nearest tiles over 20 splits by
patient (a slide without one is its own group). Prints one JSON object last: for every organ the mean over the splits
for `untrained`, `trained` and `colour` (a histogram of 8³ bins), and what was gained on the untrained encoder, with the
number of splits in which something was.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from measuring import device_name, options, print_figures, seconds

from hpcssl.embed.embedding import embed_store
from hpcssl.embed.sources import Source
from hpcssl.evaluate.knn import Neighbours
from hpcssl.evaluate.labelled import label_features
from hpcssl.evaluate.splits import make_splits
from hpcssl.features.feature_files import write_slide
from hpcssl.features.feature_folder import write_index
from hpcssl.loader.pillow import decode
from hpcssl.pipelines.demo import SPEC
from hpcssl.pipelines.demo_inputs import demo_spec
from hpcssl.pipelines.evaluate import find_neighbours
from hpcssl.schedule.build import build_schedule
from hpcssl.stores.scan import build_store
from hpcssl.stores.store import Store
from hpcssl.train.pretrain_config import load_recipe

METRICS = ("tile_auc", "tile_accuracy", "auc", "accuracy")


def pretrain(recipe: str, work: Path, minutes: float, overrides: list[str]) -> float:
    """Pretrain until the end or so many minutes, as a user does; returns the seconds."""
    command = [sys.executable, "-m", "hpcssl.cli.main", "pretrain", recipe, "--cluster", "none"]
    for name in ("store", "schedule"):
        command += [f"--{name}", str(work / name)]
    command += ["--out", str(work / "run")]
    for override in overrides:
        command += ["--set", override]

    def train() -> None:
        process = subprocess.Popen(command, stdout=sys.stderr)
        try:
            process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it saves and stops, with exit code 2
        if process.wait(600) not in (0, 2) or not (work / "run" / "checkpoints").is_dir():
            sys.exit("check_learning: pretraining failed")

    return seconds(train)


def colours(store: Store, out: Path) -> None:
    """Write a feature file a slide: the roots of each tile's histogram, so that cosines are Bhattacharyya's."""
    out.mkdir()
    write_index(out, encoder="colour", checkpoint="", dim=512)
    for slide in store.slides.itertuples():
        rows = []
        for tile in range(slide.first_tile, slide.first_tile + slide.num_tiles):
            pixels = np.asarray(decode(store.fetch(tile, tile), name=str(tile))).reshape(-1, 3) // 32
            counts = np.bincount(pixels @ np.array([64, 8, 1]), minlength=512)
            rows.append(np.sqrt(counts / len(pixels)))
        write_slide(out / f"{slide.slide_id}.h5", np.stack(rows), np.zeros((len(rows), 2), np.int64))


def compare(store: Store, features: dict[str, Path], splits: Path, k: int) -> dict[str, dict[str, object]]:
    """Return of every organ the figures of every feature set, and what the trained encoder gained."""
    splits.mkdir()
    for organ, slides in store.slides.groupby("organ"):
        table = make_splits(slides.reset_index(drop=True), "label", 20, 0.8, "patient_id", 0)
        table.to_csv(splits / f"{organ}.csv", index=False)
    tables = []
    for name, folder in features.items():
        pairs = label_features([folder], sorted(splits.glob("*.csv")))
        tables.append(find_neighbours(pairs, Neighbours(k=k)).assign(features=name))
    figures: dict[str, dict[str, object]] = {}
    for organ, rows in pd.concat(tables).groupby("task"):
        by_split = rows.pivot_table(index="split", columns=["features", "metric"], values="value")
        gained = (by_split["trained"] - by_split["untrained"])[list(METRICS)]
        figures[str(organ)] = {
            **{name: by_split[name][list(METRICS)].mean().round(4).to_dict() for name in features},
            "gained": gained.mean().round(4).to_dict(),
            "splits_that_gained": (gained > 0).sum().to_dict(),
            "splits": len(gained),
        }
    return figures


def measure(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Pretrain, embed with both encoders, and compare."""
    work, threads = args.work or folder, torch.get_num_threads()
    store = build_store(args.tiles, work / "store")
    batch = load_recipe(args.recipe, args.set).global_batch
    spec = demo_spec(SPEC, store.slides, 0, batch)
    spec = dataclasses.replace(spec, num_pseudo_epochs=args.pseudo_epochs)
    build_schedule(spec, store.slides, work / "schedule")
    took = pretrain(args.recipe, work, args.minutes, args.set)
    run, features = work / "run", {name: work / name for name in ("untrained", "trained", "colour")}
    last = Source.parse(str(run))
    embed_store(store, Source.parse(f"{run}@0"), features["untrained"], threads=threads)
    embed_store(store, last, features["trained"], threads=threads)
    colours(store, features["colour"])
    about = {"recipe": args.recipe, "settings": args.set, "steps": last.step, "tiles_seen": last.step * batch}
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"), platform.machine())
    about |= {"pretrained_s": round(took), "k": args.k, "device": device, "threads": threads}
    return {**compare(store, features, work / "splits", args.k), **about}


if __name__ == "__main__":
    parser = options(__doc__, recipe="mae-demo", minutes=15.0, pseudo_epochs=40, set=[], k=20, work=None)
    parser.add_argument("tiles", type=Path, metavar="TILES")
    print_figures(measure, parser.parse_args())
