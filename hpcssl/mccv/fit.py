"""Fits the gated-attention heads of all runs of a task, several runs in one tensor.

A run is one (split, replica). Its initial weights, slide orders and dropout masks are functions of (seed, split,
replica), so that it comes out alike alone and beside others, and checkpoints are compared on equal draws.

Shapes: R runs fitted together, S slides of the task, V validation slides, K classes, P parameters, N tiles, D feature
size.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from hpcssl.core.errors import FeatureError
from hpcssl.core.rng import key_of, permute
from hpcssl.mccv.bags import Bags
from hpcssl.mccv.metrics import auc
from hpcssl.mccv.presets import MccvPreset
from hpcssl.models.attention import HeadSizes, dropout_scales, gated_attention, initial_weights, unpack
from hpcssl.optim.values import cosine

BETAS, EPS = (0.9, 0.999), 1e-8
# More parameters than this in one tensor fall out of the processor's cache: fewer runs together are then faster.
STACKED_PARAMETERS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: a split's slides, by index into the task's bags."""

    split: int
    replica: int
    train: NDArray[np.int64]
    val: NDArray[np.int64]

    def key(self, seed: int, purpose: str) -> int:
        """Return the run's own key for a purpose."""
        return key_of(seed, f"mccv/{purpose}/split={self.split}/replica={self.replica}")

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the training slides in the order of an epoch (counted from 1)."""
        size = len(self.train)
        return self.train[permute(np.arange(size), size, self.key(seed, f"order/epoch={epoch}"))]


def fit(
    bags: Bags,
    labels_S: NDArray[np.int64],
    runs: Sequence[Run],
    preset: MccvPreset,
    *,
    seed: int = 0,
    threads: int = 1,
    on_progress: Callable[[int], None] = lambda n: None,
) -> pd.DataFrame:
    """Train every run and measure it after each epoch.

    `labels_S` holds class numbers 0 … K-1, every class on both sides of every run. `threads` stacks are fitted at a
    time, which changes no result. `on_progress` counts epochs of runs.

    Returns
    -------
    Long table `split, replica, epoch, metric, value` with train_loss (mean over the epoch's steps, dropout on),
    val_loss and auc, sorted.

    Raises
    ------
    FeatureError
        If a run's loss is no longer finite.
    """
    num_classes = int(labels_S.max()) + 1
    sizes = HeadSizes(
        dim=bags.features.shape[1],
        classes=num_classes,
        hidden=preset.hidden,
        attention=preset.attention,
        dropout=preset.dropout,
    )
    together = max(1, STACKED_PARAMETERS // sizes.num_parameters)
    # The longest first: at any step those that still train in this epoch are the first rows of the stack.
    queue = sorted(runs, key=lambda run: (-len(run.train), run.split, run.replica))
    stacks = [queue[first : first + together] for first in range(0, len(queue), together)]
    stop, lock = threading.Event(), threading.Lock()

    def fit_stack(members: Sequence[Run]) -> list[tuple[int, int, int, str, float]]:
        stack, rows = _Stack(bags, labels_S, members, sizes, preset, seed), []
        for epoch in range(1, preset.epochs + 1):
            for run, values in zip(members, stack.epoch(epoch, stop), strict=True):
                rows += [(run.split, run.replica, epoch, metric, value) for metric, value in values.items()]
            with lock:
                on_progress(len(members))
        return rows

    with _one_torch_thread(), ThreadPoolExecutor(threads) as pool:
        try:
            found = [row for rows in pool.map(fit_stack, stacks) for row in rows]
        finally:
            stop.set()
    table = pd.DataFrame(found, columns=["split", "replica", "epoch", "metric", "value"])
    return table.sort_values(["split", "replica", "epoch", "metric"], ignore_index=True)


class _StoppedError(Exception):
    """Another stack failed or the user stopped the command."""


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Let every operation use one thread: whole stacks side by side are faster, and sums come out alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Stack:
    """Runs trained together, longest first, with their weights and AdamW moments as rows of [R, P] tensors."""

    def __init__(
        self,
        bags: Bags,
        labels_S: NDArray[np.int64],
        runs: Sequence[Run],
        sizes: HeadSizes,
        preset: MccvPreset,
        seed: int,
    ):
        self.bags, self.runs, self.sizes, self.preset, self.seed = bags, runs, sizes, preset, seed
        self.labels_S = torch.tensor(labels_S)
        self.flat_RP = initial_weights(sizes, [run.key(seed, "weights") for run in runs])
        self.moment_RP, self.square_RP = torch.zeros_like(self.flat_RP), torch.zeros_like(self.flat_RP)
        # Kept from step to step: fresh pages from the system for every step would cost a third of its time.
        self.gradient_RP, self.scale_RP = torch.empty_like(self.flat_RP), torch.empty_like(self.flat_RP)
        self.dropout_keys = [run.key(seed, "dropout") for run in runs]
        self.lengths_R = np.array([len(run.train) for run in runs])
        self.values = {n: _values(preset, n) for n in set(self.lengths_R.tolist())}
        # Bags of like size side by side need little padding; the order of evaluation changes nothing else.
        self.val = [run.val[np.argsort(bags.counts[run.val], kind="stable")] for run in runs]

    def epoch(self, epoch: int, stop: threading.Event) -> list[dict[str, float]]:
        """Train one epoch (counted from 1) and evaluate; return each run's metrics."""
        orders = [run.order(self.seed, epoch) for run in self.runs]
        loss_R = np.zeros(len(self.runs))
        for step in range(self.lengths_R.max()):
            if stop.is_set():
                raise _StoppedError
            active = int((self.lengths_R > step).sum())
            slides_R = np.array([order[step] for order in orders[:active]])
            loss_R[:active] += self._step(slides_R, epoch, step)
        return [
            {"train_loss": loss, **values}
            for loss, values in zip((loss_R / self.lengths_R).tolist(), self._evaluate(epoch), strict=True)
        ]

    def _step(self, slides_R: NDArray[np.int64], epoch: int, step: int) -> NDArray[np.float64]:
        """Update the first R runs, each by its slide; return their losses before the update."""
        active = len(slides_R)
        done_R = (epoch - 1) * self.lengths_R[:active] + step
        x_RND, valid_RN, counts_R = self.bags.gather(slides_R)
        dropout_RNU = None
        if self.preset.dropout:
            keys = self.dropout_keys[:active]
            dropout_RNU = dropout_scales(self.sizes, keys, done_R.tolist(), counts_R.tolist(), x_RND.shape[1])
        weights = {k: v.detach().requires_grad_() for k, v in unpack(self.flat_RP[:active], self.sizes).items()}
        logits_RK, _ = gated_attention(weights, x_RND, valid_RN, dropout_RNU)
        loss_R = F.cross_entropy(logits_RK, self.labels_S[torch.from_numpy(slides_R)], reduction="none")
        gradients = torch.autograd.grad(loss_R.sum(), list(weights.values()))
        torch.cat([g.flatten(1) for g in gradients], dim=1, out=self.gradient_RP[:active])
        self._adamw(done_R)
        return loss_R.detach().double().numpy()

    def _adamw(self, done_R: NDArray[np.int64]) -> None:
        """Apply AdamW (Loshchilov, Hutter, ICLR 2019) to the first R rows, each at its own step."""
        active = len(done_R)
        flat_RP, moment_RP, square_RP = self.flat_RP[:active], self.moment_RP[:active], self.square_RP[:active]
        gradient_RP, scale_RP = self.gradient_RP[:active], self.scale_RP[:active]
        table = np.stack([self.values[n][s] for n, s in zip(self.lengths_R.tolist(), done_R.tolist())])
        shrink_R1, rate_R1, root_R1 = torch.from_numpy(table.astype(np.float32)).split(1, dim=1)
        moment_RP.lerp_(gradient_RP, 1 - BETAS[0])
        square_RP.mul_(BETAS[1]).addcmul_(gradient_RP, gradient_RP, value=1 - BETAS[1])
        flat_RP[:, : self.sizes.num_decayed].mul_(shrink_R1)
        torch.sqrt(square_RP, out=scale_RP).div_(root_R1).add_(EPS)
        flat_RP.sub_(torch.div(moment_RP, scale_RP, out=scale_RP).mul_(rate_R1))

    def _evaluate(self, epoch: int) -> list[dict[str, float]]:
        """Return each run's val_loss and auc."""
        weights = unpack(self.flat_RP, self.sizes)
        longest = max(len(val) for val in self.val)
        with torch.inference_mode():
            # A run with fewer slides repeats its last one; what is too much is not used.
            logits_VRK = torch.stack(
                [
                    gated_attention(
                        weights, *self.bags.gather(np.array([val[min(v, len(val) - 1)] for val in self.val]))[:2]
                    )[0]
                    for v in range(longest)
                ]
            )
        found = []
        for r, val in enumerate(self.val):
            logits_VK = logits_VRK[: len(val), r].double()
            labels_V = self.labels_S[torch.from_numpy(val)]
            loss = F.cross_entropy(logits_VK, labels_V).item()
            if not math.isfinite(loss):
                run = self.runs[r]
                raise FeatureError(
                    f"split {run.split}, replica {run.replica}: the loss is {loss} after epoch {epoch}; look for"
                    " extreme values in the features, or scale them"
                )
            found.append({"val_loss": loss, "auc": auc(labels_V.numpy(), logits_VK.softmax(dim=1).numpy())})
        return found


def _values(preset: MccvPreset, train_slides: int) -> NDArray[np.float64]:
    """Return for every step what AdamW needs: 1 - lr · weight decay, lr / (1 - β₁ᵗ), √(1 - β₂ᵗ)."""
    total = preset.epochs * train_slides
    warmup = preset.warmup_epochs * train_slides
    table = np.empty((total, 3))
    for step in range(total):
        lr = cosine(step, base=preset.lr, final=preset.final_lr, total_steps=total, warmup_steps=warmup)
        decay = cosine(step, base=preset.weight_decay, final=preset.final_weight_decay, total_steps=total)
        bias_1, bias_2 = (1 - beta ** (step + 1) for beta in BETAS)
        table[step] = 1 - lr * decay, lr / bias_1, np.sqrt(bias_2)
    return table
