#!/usr/bin/env python3
"""Accuracy of gated attention on the classical MIL sets: MUSK1, MUSK2, FOX, TIGER, ELEPHANT; 10 folds x 5 repeats.

`python tools/bench_mil.py DATA [NAME ...] [--epochs N] [--threads N]`: DATA holds NAME.npz with X (instances x
features), bag (of every instance), y (of every bag) and, if there are, test_fold (repeats x bags). Features are
standardised on each fold's training bags; one that does not vary there is left out. One recipe for all sets: gated
attention of 64 over one hidden layer of 64 (Ilse et al., ICML 2018, have three for these sets, of 256, 128 and 64),
dropout 0.25, 80 epochs; all of it was chosen on other folds than those that are reported. Prints one JSON
object last: mean accuracy after the last epoch, and its standard deviation over the repeats.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from measuring import options

from hpcssl.evaluate.mil.bags import Bags
from hpcssl.evaluate.mil.fits import Fit, fit_heads
from hpcssl.evaluate.mil.presets import MccvPreset

NAMES = ("musk1", "musk2", "fox", "tiger", "elephant")
REPEATS, FOLDS = 5, 10
PRESET = MccvPreset(name="mil", epochs=80, warmup_epochs=4, lr=1e-3, hidden=(64,), attention=64, dropout=0.25)


def draw_folds(y: np.ndarray) -> np.ndarray:
    """Draw the test fold of every bag in every repeat, [5, bags], stratified and seeded."""
    random = np.random.default_rng(0)
    drawn = np.empty((REPEATS, len(y)), dtype=np.int64)
    for row in drawn:
        order = np.argsort(random.random(len(y)) + y)  # class after class, each in random order
        row[order] = np.arange(len(y)) % FOLDS
    return drawn


def standardised(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Return features with mean 0 and deviation 1 over the rows `train`; one that is constant there is 0 everywhere."""
    known = x[train]
    varies = np.ptp(known, axis=0) > 0
    scaled = (x[:, varies] - known[:, varies].mean(axis=0)) / known[:, varies].std(axis=0)
    features = np.zeros(x.shape, np.float32)
    features[:, varies] = scaled
    return features


def measure(file: Path, preset: MccvPreset, threads: int) -> dict[str, float]:
    """Return mean accuracy, and the deviation of the repeats' means."""
    published = np.load(file)
    x, bag, y = published["X"].astype(np.float64), published["bag"], published["y"].astype(np.int64)
    bags, of = np.unique(bag, return_inverse=True)
    fold = published["test_fold"] if "test_fold" in published.files else draw_folds(y)
    slides, fits = [], []
    for repeat in range(len(fold)):
        for number in np.unique(fold[repeat]):
            first, test = len(slides), fold[repeat] == number
            scaled = standardised(x, ~test[of])
            slides += [scaled[of == b] for b in range(len(bags))]
            rows = first + np.arange(len(bags))
            fits.append(Fit(split=int(number) + 1, replica=repeat + 1, train=rows[~test], val=rows[test]))
    table = fit_heads(Bags(slides), np.tile(y, len(fits)), fits, preset, threads=threads)
    last = table[(table["metric"] == "accuracy") & (table["epoch"] == preset.epochs)]
    sizes = {(fit.split, fit.replica): len(fit.val) for fit in fits}
    right = last["value"] * [sizes[key] for key in zip(last["split"], last["replica"], strict=True)]
    repeats = right.groupby(last["replica"]).sum() / len(bags)
    return {"accuracy": round(float(repeats.mean()), 4), "deviation": round(float(repeats.std()), 4)}


def main() -> None:
    """Measure, print one JSON object last."""
    parser = options(__doc__, epochs=PRESET.epochs, threads=len(os.sched_getaffinity(0)))
    parser.add_argument("data", type=Path)
    parser.add_argument("names", nargs="*", default=NAMES)
    args = parser.parse_args()
    preset = replace(PRESET, epochs=args.epochs, warmup_epochs=args.epochs // 20)
    figures = {}
    for name in args.names:
        figures[name] = measure(args.data / f"{name}.npz", preset, args.threads)
        print(f"{name}: {json.dumps(figures[name])}", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
