"""The benchmark's training as one would write it for a single fit: layers, nn.Dropout, torch.optim.AdamW, a loop.

`bench_mccv.py` times it, and the tests compare our fits with it.
"""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl.evaluate.metrics import auc
from hpcssl.evaluate.mil.bags import Bags
from hpcssl.evaluate.mil.batched_heads import HeadSizes, dropout_mask, initial_weights, unpack
from hpcssl.evaluate.mil.fits import Fit, head_sizes
from hpcssl.evaluate.mil.presets import MccvPreset
from hpcssl.optim.values import cosine


class PlainHead(nn.Module):
    """A head of layers, with autograd; dropout by nn.Dropout, or by given masks."""

    def __init__(self, sizes: HeadSizes, flat_1P: Tensor) -> None:
        super().__init__()
        widths = [sizes.dim, *sizes.hidden]
        self.sizes, self.dropout = sizes, nn.Dropout(sizes.dropout)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.classifier = nn.Linear(widths[-1], sizes.classes)
        if sizes.pooling == "attention":
            self.tanh, self.sigmoid = (nn.Linear(widths[-1], sizes.attention) for _ in range(2))
            self.score = nn.Linear(sizes.attention, 1)
        flat = unpack(flat_1P, sizes)
        for name, weight, bias in self.named_weights():
            source, half = ("branches", ["tanh", "sigmoid"].index(name)) if name in ("tanh", "sigmoid") else (name, 0)
            rows = slice(half * len(weight), (half + 1) * len(weight))
            weight.data.copy_(flat[source][0].T[rows])
            bias.data.copy_(flat[f"{source}_bias"][0, 0, rows])

    def named_weights(self) -> list[tuple[str, Tensor, Tensor]]:
        """Return name, weight and bias of every layer."""
        layers: dict[str, Any] = {f"hidden{i}": layer for i, layer in enumerate(self.hidden)}
        layers |= {n: getattr(self, n) for n in ("tanh", "sigmoid", "score", "classifier") if hasattr(self, n)}
        return [(name, layer.weight, layer.bias) for name, layer in layers.items()]

    def forward(self, x: Tensor, mask_NU: Tensor | None = None) -> Tensor:
        """Return the logits [K] of one slide, [N, D]."""
        sizes = self.sizes
        if mask_NU is not None:
            one, both = (256 / (256 - dropped) for dropped in sizes.dropped)
            *masks, gated_mask = mask_NU.float().split([*sizes.hidden, sizes.dropout_units - sum(sizes.hidden)], dim=1)
        for i, layer in enumerate(self.hidden):
            x = layer(x).relu()
            x = self.dropout(x) if mask_NU is None else x * masks[i] * one
        if sizes.pooling == "mean":
            return self.classifier(x.mean(dim=0))
        if sizes.pooling == "max":
            return self.classifier(x.max(dim=0).values)
        if mask_NU is None:
            gated = self.dropout(self.tanh(x).tanh()) * self.dropout(self.sigmoid(x).sigmoid())
        else:
            gated = self.tanh(x).tanh() * self.sigmoid(x).sigmoid() * gated_mask * both
        return self.classifier(self.score(gated).softmax(dim=0).T @ x)[0]


def fit_plain(
    bags: Bags, labels_S: np.ndarray, fit: Fit, preset: MccvPreset, *, masks: bool = True
) -> dict[tuple[int, str], float]:
    """Return (epoch, metric) → value of one fit with seed 0, slide after slide; `masks`: drop what our fit drops."""
    sizes = head_sizes(preset, bags.dim, labels_S)
    head = PlainHead(sizes, initial_weights(sizes, [fit.key(0, "weights")])).to(bags.device)
    weights, biases = ([p for p in head.parameters() if (p.ndim > 1) == is_weight] for is_weight in (True, False))
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    targets = torch.from_numpy(labels_S).to(bags.device)
    total, warmup = preset.epochs * len(fit.train), preset.warmup_epochs * len(fit.train)
    values, step = {}, 0
    for epoch in range(1, preset.epochs + 1):
        head.train()
        losses = []
        for slide in fit.order(0, epoch):
            lr = cosine(step, base=preset.lr, final=preset.final_lr, total_steps=total, warmup_steps=warmup)
            decay = cosine(step, base=preset.weight_decay, final=preset.final_weight_decay, total_steps=total)
            optimizer.param_groups[0].update(lr=lr, weight_decay=decay)
            optimizer.param_groups[1]["lr"] = lr
            x_ND = bags.slide(slide)
            mask = None
            if masks and preset.dropout:
                mask = dropout_mask(sizes, fit.key(0, "dropout"), step, len(x_ND), bags.device)
            loss = F.cross_entropy(head(x_ND, mask), targets[slide])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
        head.eval()
        with torch.no_grad():
            logits = torch.stack([head(bags.slide(slide)) for slide in fit.val])
        values[epoch, "train_loss"] = statistics.fmean(losses)
        values[epoch, "val_loss"] = F.cross_entropy(logits, targets[fit.val]).item()
        values[epoch, "auc"] = auc(labels_S[fit.val], logits.double().softmax(dim=1).cpu().numpy())
        values[epoch, "accuracy"] = (logits.argmax(dim=1) == targets[fit.val]).double().mean().item()
    return values
