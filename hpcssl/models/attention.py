"""Gated attention over the tiles of a slide, for many independently trained heads at once.

Attention-based multiple-instance learning of Ilse, Tomczak, Welling, "Attention-based deep multiple instance learning"
(ICML 2018), with two hidden layers before the attention, as the pathology benchmark of Campanella et al. 2023 uses it.

Shapes: R heads (each has its own weights and sees its own slide), N tiles (padded), D feature size, K classes,
P parameters of one head, U dropout units of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

DROPOUT_STEPS = 256  # a dropout mask spends one byte a unit


@dataclass(frozen=True, kw_only=True)
class HeadSizes:
    """Sizes of one gated-attention head."""

    dim: int
    """Feature size of a tile."""
    classes: int
    hidden: tuple[int, int] = (512, 512)
    """Units of the two hidden layers; the paper's."""
    attention: int = 384
    """Units of each of the two attention branches; the paper's."""
    dropout: float = 0.25
    """After both hidden layers and both branches; rounded to 1/256."""

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name to (in, out): all weights, then all biases (in = 1). The two branches are one matrix, tanh's first."""
        first, second = self.hidden
        layers = {
            "first": (self.dim, first),
            "second": (first, second),
            "branches": (second, 2 * self.attention),
            "score": (self.attention, 1),
            "classifier": (second, self.classes),
        }
        return {**layers, **{f"{name}_bias": (1, out) for name, (_, out) in layers.items()}}

    @property
    def num_parameters(self) -> int:
        """Parameters of one head, P."""
        return sum(a * b for a, b in self.shapes.values())

    @property
    def num_decayed(self) -> int:
        """How many of the P parameters are weights, which come first; the rest are biases."""
        return sum(a * b for name, (a, b) in self.shapes.items() if not name.endswith("_bias"))

    @property
    def dropout_units(self) -> int:
        """Units of one tile that dropout may switch off, U."""
        return sum(self.hidden) + 2 * self.attention


def initial_weights(sizes: HeadSizes, seeds: Sequence[int]) -> torch.Tensor:
    """Return flat parameters [R, P]: Xavier-normal weights, zero biases; row r depends on seeds[r] alone."""
    flat_RP = torch.zeros(len(seeds), sizes.num_parameters)
    for row_P, seed in zip(flat_RP, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        for name, weight in unpack(row_P[None], sizes).items():
            if name.endswith("_bias"):
                continue
            branches = 2 if name == "branches" else 1
            fan_in, fan_out = weight.shape[1], weight.shape[2] // branches
            weight.normal_(0.0, math.sqrt(2.0 / (fan_in + fan_out)), generator=generator)
    return flat_RP


def unpack(flat_RP: torch.Tensor, sizes: HeadSizes) -> dict[str, torch.Tensor]:
    """Return views [R, in, out] into flat parameters, by name."""
    views, start = {}, 0
    for name, (rows, columns) in sizes.shapes.items():
        views[name] = flat_RP[:, start : start + rows * columns].unflatten(1, (rows, columns))
        start += rows * columns
    return views


def dropout_scales(
    sizes: HeadSizes, keys: Sequence[int], steps: Sequence[int], counts: Sequence[int], num_tiles: int
) -> torch.Tensor:
    """Return dropout factors [R, N, U], 0 or 1 / keep, a function of each head's key and step, the tile and the unit.

    Neither the other heads nor the padding from counts[r] to num_tiles changes a head's mask (padding is 0).
    """
    units = sizes.dropout_units
    threshold = round(sizes.dropout * DROPOUT_STEPS)
    bytes_RNU = np.zeros((len(keys), num_tiles, units), np.uint8)
    philox = np.random.Philox(0)
    generator = np.random.Generator(philox)
    state = philox.state
    for bytes_NU, key, step, count in zip(bytes_RNU, keys, steps, counts, strict=True):
        state["state"]["key"][:] = key, 0
        state["state"]["counter"][:] = 0, step, 0, 0
        state["buffer_pos"] = 4  # nothing buffered
        philox.state = state
        words = generator.integers(2**64 - 1, size=-(-count * units // 8), dtype=np.uint64, endpoint=True)
        bytes_NU[:count] = words.view(np.uint8)[: count * units].reshape(count, units)
    kept = torch.from_numpy(bytes_RNU) >= threshold
    return kept.float().mul_(DROPOUT_STEPS / (DROPOUT_STEPS - threshold))


def gated_attention(
    weights: dict[str, torch.Tensor],
    x_RND: torch.Tensor,
    valid_RN: torch.Tensor,
    dropout_RNU: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classify one padded bag per head.

    Parameters
    ----------
    weights : as from `unpack`
    x_RND : features; what stands in the padding is ignored, but must be finite
    valid_RN : True where there is a tile; at least one in every bag
    dropout_RNU : from `dropout_scales`; None at evaluation

    Returns
    -------
    logits [R, K] and attention [R, N], which sums to one over a bag's tiles and is zero on the padding.
    """
    attention = weights["score"].shape[1]
    hidden = [weights[name].shape[2] for name in ("first", "second")]
    drop = dropout_RNU.split([*hidden, 2 * attention], dim=2) if dropout_RNU is not None else None
    h_RNH = _linear(weights, "first", x_RND).relu()
    if drop is not None:
        h_RNH = h_RNH * drop[0]
    h_RNH = _linear(weights, "second", h_RNH).relu()
    if drop is not None:
        h_RNH = h_RNH * drop[1]
    both_RNA = _linear(weights, "branches", h_RNH)
    content_RNA, gate_RNA = both_RNA[..., :attention].tanh(), both_RNA[..., attention:].sigmoid()
    gated_RNA = content_RNA * gate_RNA
    if drop is not None:
        gated_RNA = gated_RNA * (drop[2][..., :attention] * drop[2][..., attention:])
    scores_RN = _linear(weights, "score", gated_RNA).squeeze(2)
    attn_RN = scores_RN.masked_fill(~valid_RN, -torch.inf).softmax(dim=1)
    pooled_R1H = torch.bmm(attn_RN[:, None], h_RNH)
    return _linear(weights, "classifier", pooled_R1H).squeeze(1), attn_RN


def _linear(weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(weights[f"{name}_bias"], x, weights[name])
