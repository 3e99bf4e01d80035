#!/usr/bin/env python3
"""Times the benchmark's training against a plain loop: layers, nn.Dropout, torch.optim.AdamW, one run after the other.

`python tools/bench_mccv.py [--size paper|toy] [--repeats N] [--device cpu|cuda] [--precision fp32|bf16]`: the paper's
head, 384 features, 20 x 2 runs, the plain loop in fp32 at its best number of threads, dropout on both sides, bags of 8
to 300 and of 2,000 to 8,000 tiles. A step takes as long in every epoch, so a part of the 50 epochs is timed, at least
200 steps a side. Both sides are taken in turns in one run; a ratio is the median over the repeats. Loss and AUC of both
sides are compared after every epoch of a short training (100 steps) on planted signals with the same dropout masks.
`toy` checks in seconds that all of it runs, its ratios mean nothing. Prints one JSON object last.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import device_name, options, repeated, seconds
from torch import Tensor, nn

from hpcssl.evaluate.metrics import auc
from hpcssl.evaluate.mil.bags import Bags
from hpcssl.evaluate.mil.batched_heads import HeadSizes, dropout_mask, initial_weights, unpack
from hpcssl.evaluate.mil.fits import Run, fit, head_sizes
from hpcssl.evaluate.mil.presets import PRESETS, MccvPreset
from hpcssl.optim.values import cosine

DIM = 384
# tiles of a bag; training slides a run; runs on our side, in the plain loop
SIZES = {
    "paper": {"small": ((8, 300), 50, 40, 5), "large": ((2000, 8000), 6, 40, 34)},
    "toy": {"small": ((2, 9), 3, 4, 2), "large": ((20, 80), 3, 4, 2)},
}
NUM_VAL = 200  # where answers are compared
PRESET = replace(PRESETS["gma-50"], epochs=1, warmup_epochs=0)


class PlainHead(nn.Module):
    """Gated attention from layers; dropout by nn.Dropout, or by given masks."""

    def __init__(self, sizes: HeadSizes, seed: int) -> None:
        super().__init__()
        first, second = sizes.hidden
        self.first, self.second = nn.Linear(sizes.dim, first), nn.Linear(first, second)
        self.content, self.gate = nn.Linear(second, sizes.attention), nn.Linear(second, sizes.attention)
        self.score, self.classifier = nn.Linear(sizes.attention, 1), nn.Linear(second, sizes.classes)
        self.dropout, self.widths = nn.Dropout(sizes.dropout), [first, second, sizes.attention]
        self.scales = [256 / (256 - sizes.dropped[i]) for i in (0, 0, 1)]
        start = {name: value[0].T for name, value in unpack(initial_weights(sizes, [seed]), sizes).items()}
        content, gate = start["branches"].chunk(2)
        layers = {"first": start["hidden0"], "second": start["hidden1"], "content": content, "gate": gate}
        layers |= {name: start[name] for name in ("score", "classifier")}
        for name, weight in layers.items():
            getattr(self, name).weight.data.copy_(weight)
            nn.init.zeros_(getattr(self, name).bias)

    def forward(self, x_ND: Tensor, mask_NU: Tensor | None = None) -> Tensor:
        """Return the logits [K] of one slide."""
        if mask_NU is None:
            h = self.dropout(self.first(x_ND).relu())
            h = self.dropout(self.second(h).relu())
            gated = self.dropout(self.content(h).tanh()) * self.dropout(self.gate(h).sigmoid())
        else:
            masks = [m * s for m, s in zip(mask_NU.float().split(self.widths, dim=1), self.scales, strict=True)]
            h = self.first(x_ND).relu() * masks[0]
            h = self.second(h).relu() * masks[1]
            gated = self.content(h).tanh() * self.gate(h).sigmoid() * masks[2]
        return self.classifier(self.score(gated).softmax(dim=0).T @ h)[0]


def fit_plain(
    bags: Bags, labels_S: np.ndarray, run: Run, preset: MccvPreset, *, masks: bool
) -> list[tuple[float, float]]:
    """Return the mean training loss and the AUC after each epoch of one run."""
    sizes = head_sizes(preset, bags.dim, labels_S)
    head = PlainHead(sizes, run.key(0, "weights")).to(bags.device)
    weights, biases = ([p for p in head.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    targets = torch.from_numpy(labels_S).to(bags.device)
    total, warmup = preset.epochs * len(run.train), preset.warmup_epochs * len(run.train)
    found, step = [], 0
    for epoch in range(1, preset.epochs + 1):
        head.train()
        losses = []
        for slide in run.order(0, epoch):
            lr = cosine(step, base=preset.lr, final=preset.final_lr, total_steps=total, warmup_steps=warmup)
            decay = cosine(step, base=preset.weight_decay, final=preset.final_weight_decay, total_steps=total)
            optimizer.param_groups[0].update(lr=lr, weight_decay=decay)
            optimizer.param_groups[1]["lr"] = lr
            x_ND = bags.slide(slide)
            mask = dropout_mask(sizes, run.key(0, "dropout"), step, len(x_ND), bags.device) if masks else None
            loss = F.cross_entropy(head(x_ND, mask), targets[slide])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
        head.eval()
        with torch.no_grad():
            logits = torch.stack([head(bags.slide(slide)) for slide in run.val])
        probabilities = logits.double().softmax(dim=1).cpu().numpy()
        found.append((statistics.fmean(losses), auc(labels_S[run.val], probabilities)))
    return found


def task(
    tiles: tuple[int, int], num_train: int, num_val: int, num_runs: int, device: str, shift: float = 0.0
) -> tuple[Bags, np.ndarray, list[Run]]:
    """Return bags of random sizes, labels, and runs with the first slides in training and the rest in validation."""
    random = np.random.default_rng(0)
    labels_S = np.arange(num_train + num_val) % 2
    slides = [random.standard_normal((random.integers(*tiles, endpoint=True), DIM), np.float32) for _ in labels_S]
    for slide, label in zip(slides, labels_S, strict=True):
        slide[: 1 + len(slide) // 20, label] += shift
    train, val = np.arange(num_train), np.arange(num_train, len(labels_S))
    runs = [Run(split=1 + i // 2, replica=1 + i % 2, train=train, val=val) for i in range(num_runs)]
    return Bags(slides, memory_gib=64, device=device), labels_S, runs


def speedup(
    size: tuple[tuple[int, int], int, int, int], repeats: int, device: str, precision: str
) -> dict[str, object]:
    """Return the median ratio of seconds a step, its spread, and what was timed."""
    tiles, num_train, ours, plain = size
    bags, labels_S, runs = task(tiles, num_train, max(2, num_train // 4), ours, device)
    cores = len(os.sched_getaffinity(0))
    counts = sorted({1, cores}) if device == "cpu" else [cores]

    def all_plain() -> None:
        for run in runs[:plain]:
            fit_plain(bags, labels_S, run, PRESET, masks=False)

    def take() -> dict[str, float]:
        best = float("inf")
        for threads in counts:
            torch.set_num_threads(threads)
            fit_plain(bags, labels_S, runs[0], PRESET, masks=False)
            best = min(best, seconds(all_plain) / plain / num_train)
        chosen = replace(PRESET, precision=precision)
        our = seconds(lambda: fit(bags, labels_S, runs, chosen, threads=cores)) / ours / num_train
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
    bags, labels_S, runs = task(tiles, num_train, NUM_VAL, 4, device, shift=2.0)
    preset = replace(PRESETS["gma-50"], epochs=epochs, warmup_epochs=1)
    ours_in = replace(preset, precision=precision)
    table = fit(bags, labels_S, runs, ours_in, threads=len(os.sched_getaffinity(0)))
    ours = table.pivot(index=["split", "replica", "epoch"], columns="metric", values="value")[["train_loss", "auc"]]
    plain = [fit_plain(bags, labels_S, run, preset, masks=True) for run in runs]
    off = ours.to_numpy().reshape(len(runs), epochs, 2) - np.array(plain)
    loss, area = np.abs(off).max(axis=(0, 1))
    mean = abs(off[:, -1, 1].mean())
    return {"max_loss_difference": loss, "max_auc_difference": area, "mean_auc_difference": float(mean)}


def main() -> int:
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
