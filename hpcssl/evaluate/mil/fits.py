"""Fits of heads: one training each, on the training slides of a split.

A fit is named by (split, replica). Its initial weights, slide orders and dropout masks are functions of (seed, split,
replica), so that it comes out alike alone and beside others, and checkpoints are compared on equal draws.

On a GPU all fits are stacked into one tensor. On a CPU a fit is computed by itself in one thread, several at a time: no
padding, no waiting for each other, and the same bits whatever is fitted beside it. Heads and bags so small that the
calls would take longer than the sums are stacked there, too, in stacks of one shape (a fit alone fills it with copies),
so that the bits stay the same.

Shapes: R fits in one stack, S slides of the task, V validation slides, K outputs, P parameters, N tiles, D feature
size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.adamw import adamw

from hpcssl.core.errors import FeatureError
from hpcssl.core.rng import key_of, permute
from hpcssl.evaluate.metrics import class_metrics, value_metrics
from hpcssl.evaluate.mil.bags import Bags
from hpcssl.evaluate.mil.batched_heads import Heads, HeadSizes, dropout_mask, initial_weights
from hpcssl.evaluate.mil.presets import MccvPreset
from hpcssl.optim.values import cosine

_ADAMW: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "fused": True, "amsgrad": False, "maximize": False}
STACK_GIB = 16.0  # of activations of one stack on a GPU
# on a CPU, the stack of small heads: as many rows, for at most so many multiplications a bag
SMALL_STACK, SMALL_BAG = 20, 4_000_000


@dataclass(frozen=True)
class Fit:
    """One training of a head: a split's slides, by index into the task's bags."""

    split: int
    replica: int
    train: NDArray[np.int64]
    val: NDArray[np.int64]

    def key(self, seed: int, purpose: str) -> int:
        """Return the fit's own key for a purpose."""
        return key_of(seed, f"mccv/{purpose}/split={self.split}/replica={self.replica}")

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the training slides in the order of an epoch (counted from 1)."""
        size = len(self.train)
        return self.train[permute(np.arange(size), size, self.key(seed, f"order/epoch={epoch}"))]


def fit_heads(
    bags: Bags,
    targets_S: NDArray[np.int64] | NDArray[np.float64],
    fits: Sequence[Fit],
    preset: MccvPreset,
    *,
    seed: int = 0,
    threads: int = 1,
    on_fitted: Callable[[Fit, Callable[[int], NDArray[np.float64]]], None] = lambda fit, attention_to: None,
    on_progress: Callable[[int], None] = lambda n: None,
) -> pd.DataFrame:
    """Train every head, on the device of the bags, and return its measurements after each epoch.

    They are a long table `split, replica, epoch, metric, value`, sorted: train_loss (mean over the epoch's steps,
    dropout on), val_loss, and the metrics of `class_metrics` or `value_metrics`. The losses are cross-entropy, or the
    squared error in units of the training slides' deviation. FeatureError if the loss of a fit is no longer finite.

    On a CPU, beside the bags, each of `threads` heads that are fitted one by one takes 4 · (hidden units + 2 ·
    attention) + 2 · dropout units bytes a tile of the largest slide, and 8 · D more where bags are streamed.

    Parameters
    ----------
    targets_S : class numbers 0 … K-1 as integers, every class on both sides of every fit; or values to be predicted as
        floats
    threads : fits at a time on a CPU; changes no result
    on_fitted : called with every fit after its last epoch, in no order, and a function that gives how much its head
        attends to each tile of a slide (its index), [N], summing to one
    on_progress : counts epochs of fits
    """
    sizes = head_sizes(preset, bags.dim, targets_S)
    stacks, padded = _stacks(bags, fits, sizes)
    stop, lock = threading.Event(), threading.Lock()

    def fit_stack(members: Sequence[Fit]) -> list[tuple[int, int, int, str, float]]:
        stack, rows = _Stack(bags, targets_S, members, sizes, preset, seed, padded), []
        distinct = members[: len({(fit.split, fit.replica) for fit in members})]
        for epoch in range(1, preset.epochs + 1):
            for fit, values in zip(distinct, stack.epoch(epoch, stop)):
                rows += [(fit.split, fit.replica, epoch, metric, value) for metric, value in values.items()]
            with lock:
                on_progress(len(distinct))
        with lock:
            for r, fit in enumerate(distinct):
                on_fitted(fit, partial(stack.attention, r))
        return rows

    workers = threads if bags.device.type == "cpu" else 1
    with ExitStack() as at_the_end:
        # one thread an operation: whole fits side by side are faster, and sums come out alike
        at_the_end.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        at_the_end.enter_context(pool)
        at_the_end.callback(stop.set)
        rows = [row for of_stack in pool.map(fit_stack, stacks) for row in of_stack]
    table = pd.DataFrame(rows, columns=["split", "replica", "epoch", "metric", "value"])
    return table.sort_values(["split", "replica", "epoch", "metric"], ignore_index=True)


def head_sizes(preset: MccvPreset, dim: int, targets_S: NDArray[Any]) -> HeadSizes:
    """Return the sizes of a preset's head for a feature size and a target: an output a class, or one for a value."""
    return HeadSizes(
        dim=dim,
        classes=int(targets_S.max()) + 1 if targets_S.dtype.kind == "i" else 1,
        hidden=preset.hidden,
        attention=preset.attention,
        pooling=preset.pooling,
        dropout=preset.dropout,
    )


class _StoppedError(Exception):
    """Another stack failed or the user stopped the command."""


def _stacks(bags: Bags, fits: Sequence[Fit], sizes: HeadSizes) -> tuple[list[list[Fit]], int]:
    """Return which fits share a stack, the longest first, and the tiles that all their bags are padded to."""
    queue = sorted(fits, key=lambda fit: (-len(fit.train), fit.split, fit.replica))
    longest = int(bags.counts.max())
    if bags.device.type != "cpu":
        units = sizes.dim + 3 * sizes.dropout_units
        rows, padded = max(1, int(STACK_GIB * 2**30 / (4 * units * longest))), 0
    else:
        small = longest * sizes.num_parameters <= SMALL_BAG
        rows, padded = (SMALL_STACK, longest) if small else (1, 0)
    stacks = [queue[first : first + rows] for first in range(0, len(queue), rows)]
    if padded:
        stacks = [stack + stack[:1] * (rows - len(stack)) for stack in stacks]
    return stacks, padded


class _Stack:
    """Heads trained together, with their weights and AdamW moments as rows of [R, P] tensors."""

    def __init__(
        self,
        bags: Bags,
        targets_S: NDArray[Any],
        fits: Sequence[Fit],
        sizes: HeadSizes,
        preset: MccvPreset,
        seed: int,
        num_tiles: int,
    ):
        self.bags, self.fits, self.sizes, self.preset, self.seed = bags, fits, sizes, preset, seed
        self.targets_S, self.classes, self.num_tiles = targets_S, targets_S.dtype.kind == "i", num_tiles
        weights_RP = initial_weights(sizes, [fit.key(seed, "weights") for fit in fits])
        compute = torch.bfloat16 if preset.precision == "bf16" else torch.float32
        self.heads = Heads(weights_RP.to(bags.device), sizes, compute)
        self.dropout_keys = [fit.key(seed, "dropout") for fit in fits]
        self.lengths_R = np.array([len(fit.train) for fit in fits])
        self.adamw = {n: _AdamW(self.heads, preset, n, np.flatnonzero(self.lengths_R == n)) for n in {*self.lengths_R}}
        if not self.classes:
            trained = [targets_S[fit.train] for fit in fits]
            self.centre_R = np.array([t.mean() for t in trained])
            self.spread_R = np.array([t.std() or 1.0 for t in trained])

    def epoch(self, epoch: int, stop: threading.Event) -> list[dict[str, float]]:
        """Train one epoch (counted from 1) and evaluate; return each fit's metrics."""
        orders = _even([fit.order(self.seed, epoch) for fit in self.fits])
        loss_R = torch.zeros(len(self.fits), dtype=torch.float64, device=self.bags.device)
        for step, slides_R in enumerate(orders.T):
            if stop.is_set():
                raise _StoppedError
            loss_R += self._step(slides_R, epoch, step)
        means = (loss_R.cpu() / torch.from_numpy(self.lengths_R)).tolist()
        return [
            {"train_loss": loss, **self._metrics(r, epoch, logits)}
            for r, (loss, logits) in enumerate(zip(means, self._evaluate(), strict=True))
        ]

    def attention(self, r: int, slide: int) -> NDArray[np.float64]:
        """Return how much head r attends to each tile of a slide, [N]."""
        bags = self.bags.gather(np.full(len(self.fits), slide), self.num_tiles)
        part_RN = self.heads.forward(*bags)[1]
        return part_RN[r, : self.bags.counts[slide]].double().cpu().numpy()

    def _step(self, slides_R: NDArray[np.int64], epoch: int, step: int) -> Tensor:
        """Update the heads, each by its slide; return their losses before the update, 0 for fits past their end."""
        x_RND, valid_RN = self.bags.gather(slides_R, self.num_tiles)
        mask_RNU = self._dropout(slides_R, epoch, step, x_RND) if self.preset.dropout else None
        logits_RK, _ = self.heads.forward(x_RND, valid_RN, mask_RNU)
        loss_R, dlogits_RK = self._loss(logits_RK, slides_R)
        self.heads.backward(dlogits_RK)
        for length, part in self.adamw.items():
            if step < length:
                part.step((epoch - 1) * length + step)
        running_R = torch.from_numpy(step < self.lengths_R).to(loss_R.device)
        return torch.where(running_R, loss_R.double(), 0.0)

    def _dropout(self, slides_R: NDArray[np.int64], epoch: int, step: int, x_RND: Tensor) -> Tensor:
        """Return the masks [R, N, U], each fit's by its own step."""
        steps_R, counts_R = (epoch - 1) * self.lengths_R + step, self.bags.counts[slides_R]
        masks = [
            dropout_mask(self.sizes, key, int(step), int(count), x_RND.device)
            for key, step, count in zip(self.dropout_keys, steps_R, counts_R, strict=True)
        ]
        if len(masks) == 1:
            return masks[0][None]
        mask_RNU = masks[0].new_zeros(len(masks), x_RND.shape[1], masks[0].shape[1])
        for mask_NU, mask in zip(mask_RNU, masks, strict=True):
            mask_NU[: len(mask)] = mask
        return mask_RNU

    def _loss(self, logits_RK: Tensor, slides_R: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the losses [R] and their gradients with respect to the logits [R, K]."""
        targets_R = self.targets_S[slides_R]
        if self.classes:
            classes_R1 = torch.as_tensor(targets_R, device=logits_RK.device)[:, None]
            logp_RK = logits_RK.log_softmax(dim=1)
            dlogits_RK = logp_RK.exp()
            dlogits_RK.scatter_add_(1, classes_R1, torch.full_like(logp_RK[:, :1], -1.0))
            return -logp_RK.gather(1, classes_R1)[:, 0], dlogits_RK
        scaled = ((targets_R - self.centre_R) / self.spread_R).astype(np.float32)
        error_R1 = logits_RK - torch.from_numpy(scaled).to(logits_RK.device)[:, None]
        return error_R1[:, 0].square(), 2 * error_R1

    def _evaluate(self) -> list[NDArray[np.float64]]:
        """Return each head's logits [V, K] on its validation slides."""
        slides_RV = _even([fit.val for fit in self.fits])
        logits_VRK = torch.stack(
            [self.heads.forward(*self.bags.gather(slides_R, self.num_tiles))[0] for slides_R in slides_RV.T]
        )
        return [logits_VRK[: len(fit.val), r].double().cpu().numpy() for r, fit in enumerate(self.fits)]

    def _metrics(self, r: int, epoch: int, logits_VK: NDArray[np.float64]) -> dict[str, float]:
        """Return val_loss and metrics of a fit."""
        fit = self.fits[r]
        targets_V = self.targets_S[fit.val]
        if not np.isfinite(logits_VK).all():
            raise FeatureError(
                f"split {fit.split}, replica {fit.replica}: the loss is no longer finite after epoch {epoch}; look for"
                " extreme values in the features, or scale them"
            )
        if self.classes:
            return class_metrics(targets_V, logits_VK)
        centre, spread = self.centre_R[r], self.spread_R[r]
        predicted_V = logits_VK[:, 0] * spread + centre
        loss = float((((targets_V - predicted_V) / spread) ** 2).mean())
        return {"val_loss": loss, **value_metrics(targets_V, predicted_V)}


class _AdamW:
    """AdamW (Loshchilov, Hutter, ICLR 2019) for the heads whose fits have one length; no weight decay on biases."""

    def __init__(self, heads: Heads, preset: MccvPreset, length: int, rows: NDArray[np.int64]):
        self.preset, self.length = preset, length
        decayed = heads.sizes.num_decayed
        self.groups = []
        for columns in (slice(decayed), slice(decayed, None)):
            weights = [heads.flat_RP[r, columns] for r in rows]
            gradients = [heads.gradient_RP[r, columns] for r in rows]
            moments, squares = ([torch.zeros_like(row) for row in weights] for _ in range(2))
            self.groups.append((weights, gradients, moments, squares, [torch.zeros_like(w[0]) for w in weights]))

    def step(self, step: int) -> None:
        """Update the weights in place, with the values of a step of these fits."""
        preset, total = self.preset, self.preset.epochs * self.length
        warmup = preset.warmup_epochs * self.length
        lr = cosine(step, base=preset.lr, final=preset.final_lr, total_steps=total, warmup_steps=warmup)
        decay = cosine(step, base=preset.weight_decay, final=preset.final_weight_decay, total_steps=total)
        for group, weight_decay in zip(self.groups, (decay, 0.0), strict=True):
            weights, gradients, moments, squares, counts = group
            adamw(weights, gradients, moments, squares, [], counts, lr=lr, weight_decay=weight_decay, **_ADAMW)


def _even(slides: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return lists of slides as rows of one length: a shorter one repeats its last slide, which is not used."""
    longest = max(map(len, slides))
    return np.stack([row[np.minimum(np.arange(longest), len(row) - 1)] for row in slides])
