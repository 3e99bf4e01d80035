#!/usr/bin/env python3
"""Times the benchmark's training against a plain loop of layers, nn.Dropout and torch.optim.AdamW (`plain_head.py`).

`python tools/bench_mccv.py [--size paper|toy] [--repeats N] [--device cpu|cuda] [--precision fp32|bf16]`: the paper's
head, 384 features, 20 x 2 fits, the plain loop in fp32 at its best number of threads, dropout on both sides, bags of 8
to 300 and of 2,000 to 8,000 tiles. A step takes as long in every epoch, so a part of the 50 epochs is timed, at least
200 steps a side. Both sides are taken in turns in one process; a ratio is the median over the repeats. Loss and AUC of
both sides are compared after every epoch of a short training (100 steps) on planted signals with the same dropout
masks. `toy` checks in seconds that all of it runs, its ratios mean nothing. Prints one JSON object last.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
from dataclasses import replace

import numpy as np
import torch
from measuring import device_name, options, repeated, seconds
from plain_head import fit_plain

from hpcssl.evaluate.mil.bags import Bags
from hpcssl.evaluate.mil.fits import Fit, fit_heads
from hpcssl.evaluate.mil.presets import PRESETS

DIM = 384
# tiles of a bag; training slides of a fit; fits on our side, in the plain loop
SIZES = {
    "paper": {"small": ((8, 300), 50, 40, 5), "large": ((2000, 8000), 6, 40, 34)},
    "toy": {"small": ((2, 9), 3, 4, 2), "large": ((20, 80), 3, 4, 2)},
}
NUM_VAL = 200  # where answers are compared
PRESET = replace(PRESETS["gma-50"], epochs=1, warmup_epochs=0)


def task(
    tiles: tuple[int, int], num_train: int, num_val: int, num_fits: int, device: str, shift: float = 0.0
) -> tuple[Bags, np.ndarray, list[Fit]]:
    """Return bags of random sizes, labels, and fits with the first slides in training and the rest in validation."""
    random = np.random.default_rng(0)
    labels_S = np.arange(num_train + num_val) % 2
    slides = [random.standard_normal((random.integers(*tiles, endpoint=True), DIM), np.float32) for _ in labels_S]
    for slide, label in zip(slides, labels_S, strict=True):
        slide[: 1 + len(slide) // 20, label] += shift
    train, val = np.arange(num_train), np.arange(num_train, len(labels_S))
    fits = [Fit(split=1 + i // 2, replica=1 + i % 2, train=train, val=val) for i in range(num_fits)]
    return Bags(slides, memory_gib=64, device=device), labels_S, fits


def speedup(
    size: tuple[tuple[int, int], int, int, int], repeats: int, device: str, precision: str
) -> dict[str, object]:
    """Return the median ratio of seconds a step, its spread, and what was timed."""
    tiles, num_train, ours, plain = size
    bags, labels_S, fits = task(tiles, num_train, max(2, num_train // 4), ours, device)
    cores = len(os.sched_getaffinity(0))
    counts = sorted({1, cores}) if device == "cpu" else [cores]

    def all_plain() -> None:
        for one in fits[:plain]:
            fit_plain(bags, labels_S, one, PRESET, masks=False)

    def take() -> dict[str, float]:
        best = float("inf")
        for threads in counts:
            torch.set_num_threads(threads)
            fit_plain(bags, labels_S, fits[0], PRESET, masks=False)
            best = min(best, seconds(all_plain) / plain / num_train)
        chosen = replace(PRESET, precision=precision)
        our = seconds(lambda: fit_heads(bags, labels_S, fits, chosen, threads=cores)) / ours / num_train
        return {"speedup": best / our, "plain_ms_per_step": 1000 * best, "our_ms_per_step": 1000 * our}

    rows = repeated(take, repeats, warm_ups=0)
    figures: dict[str, object] = {name: statistics.median(values) for name, values in rows.items()}
    figures["spread"] = [min(rows["speedup"]), max(rows["speedup"])]
    return figures | {"steps": [plain * num_train, ours * num_train]}


def differences(
    size: tuple[tuple[int, int], int, int, int], device: str, precision: str, epochs: int = 2
) -> dict[str, float]:
    """Return the largest differences of loss and AUC after any epoch, and that of the mean AUC after the last.

    Both sides are trained briefly with the same masks. Enough slides validate that one swapped pair, which is a matter
    of rounding, does not show in the AUC.
    """
    tiles, num_train, _, _ = size
    bags, labels_S, fits = task(tiles, num_train, NUM_VAL, 4, device, shift=2.0)
    preset = replace(PRESETS["gma-50"], epochs=epochs, warmup_epochs=1)
    ours_in = replace(preset, precision=precision)
    table = fit_heads(bags, labels_S, fits, ours_in, threads=len(os.sched_getaffinity(0)))
    ours = table.pivot(index=["split", "replica", "epoch"], columns="metric", values="value")[["train_loss", "auc"]]
    plain = [fit_plain(bags, labels_S, one, preset) for one in fits]
    theirs = [[[of_fit[e + 1, m] for m in ("train_loss", "auc")] for e in range(epochs)] for of_fit in plain]
    off = ours.to_numpy().reshape(len(fits), epochs, 2) - np.array(theirs)
    loss, area = np.abs(off).max(axis=(0, 1))
    mean = abs(off[:, -1, 1].mean())
    return {"max_loss_difference": loss, "max_auc_difference": area, "mean_auc_difference": float(mean)}


def main() -> None:
    """Run all, print one JSON object last."""
    choices = {"size": ("paper", "toy"), "precision": ("fp32", "bf16")}
    args = options(__doc__, repeats=5, device="cpu", **choices).parse_args()
    sizes = SIZES[args.size]
    figures: dict[str, object] = {}
    for name in ("small", "large"):
        of_bags = speedup(sizes[name], args.repeats, args.device, args.precision)
        figures |= {f"{name}_bags_speedup": of_bags["speedup"], f"{name}_bags": of_bags}
    figures |= differences(sizes["small"], args.device, args.precision)
    figures["peak_rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    cpu = f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    device = device_name(torch.device(args.device), cpu)
    print(json.dumps({**figures, "device": device, "precision": args.precision, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
