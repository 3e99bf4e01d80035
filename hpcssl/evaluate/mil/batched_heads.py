"""Heads over the tiles of a slide, for several independently trained heads at once, with their gradients by hand.

Hidden layers of every tile, then one vector a slide (gated attention, mean or maximum over the tiles), then a linear
layer. Gated attention is that of Ilse, Tomczak, Welling, "Attention-based deep multiple instance learning" (ICML 2018),
equation 9; with two hidden layers before it, it is the head of Campanella et al. 2023. Autograd would keep every
intermediate of every tile; written out, a chunk of tiles passes all layers while it is in the processor's cache.

Shapes: R heads (each has its own weights and sees its own slide), N tiles (padded), D feature size, H units of a hidden
layer, A units of an attention branch, K outputs, P parameters of one head, U dropout units of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

DROPOUT_STEPS = 256  # a dropout mask spends one byte a unit
_CHUNK = 512  # tiles that pass all layers together on a CPU: their activations stay in its cache


@dataclass(frozen=True, kw_only=True)
class HeadSizes:
    """Sizes of one head."""

    dim: int
    """Feature size of a tile."""
    classes: int
    """Outputs of the last layer."""
    hidden: tuple[int, ...] = (512, 512)
    """Units of the hidden layers, at least one layer; the paper's."""
    attention: int = 384
    """Units of each of the two attention branches; the paper's."""
    pooling: Literal["attention", "mean", "max"] = "attention"
    """How the tiles become one vector; without attention there are no branches."""
    dropout: float = 0.25
    """After the hidden layers and both branches; rounded to 1/256."""

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name to (in, out): all weights, then all biases (in = 1). The two branches are one matrix, tanh's first."""
        widths = [self.dim, *self.hidden]
        layers = {f"hidden{i}": (widths[i], widths[i + 1]) for i in range(len(self.hidden))}
        if self.pooling == "attention":
            layers |= {"branches": (widths[-1], 2 * self.attention), "score": (self.attention, 1)}
        layers["classifier"] = (widths[-1], self.classes)
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
        """Units of one tile that dropout may switch off, U: the hidden ones, then those of the gated product."""
        return sum(self.hidden) + (self.attention if self.pooling == "attention" else 0)

    @property
    def dropped(self) -> tuple[int, int]:
        """Bytes of 256 that switch off a hidden unit, and one of the gated product (where both branches drop out)."""
        one = round(self.dropout * DROPOUT_STEPS)
        return one, round((1 - (1 - one / DROPOUT_STEPS) ** 2) * DROPOUT_STEPS)


def initial_weights(sizes: HeadSizes, seeds: Sequence[int]) -> Tensor:
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


def unpack(flat_RP: Tensor, sizes: HeadSizes) -> dict[str, Tensor]:
    """Return views [R, in, out] into flat parameters, by name."""
    views, start = {}, 0
    for name, (rows, columns) in sizes.shapes.items():
        views[name] = flat_RP[:, start : start + rows * columns].unflatten(1, (rows, columns))
        start += rows * columns
    return views


def dropout_mask(sizes: HeadSizes, key: int, step: int, num_tiles: int, device: torch.device | str = "cpu") -> Tensor:
    """Return one head's dropout mask, uint8 [N, U], 1 where a unit stays: a function of key, step, tile and unit.

    The two branches of the attention meet in one product, so one byte decides for both. GPUs draw from a generator of
    their own, which is another function of the same arguments.
    """
    shape = num_tiles, sizes.dropout_units
    first, hidden = sizes.dropped, sum(sizes.hidden)
    if torch.device(device).type != "cpu":
        generator = torch.Generator(device).manual_seed((key ^ (step * 0x9E3779B97F4A7C15)) & (2**63 - 1))
        bytes_NU = torch.empty(shape, dtype=torch.uint8, device=device).random_(0, DROPOUT_STEPS, generator=generator)
        limits_U = torch.tensor([first[0]] * hidden + [first[1]] * (shape[1] - hidden), device=device)
        return (bytes_NU >= limits_U).to(torch.uint8)
    philox = np.random.Philox(key=[key, 0], counter=[0, step, 0, 0])
    size = math.prod(shape)
    drawn = philox.random_raw(-(-size // 8)).view(np.uint8)[:size].reshape(shape)
    mask_NU = np.empty(shape, bool)
    np.greater_equal(drawn[:, :hidden], first[0], out=mask_NU[:, :hidden])
    np.greater_equal(drawn[:, hidden:], first[1], out=mask_NU[:, hidden:])
    return torch.from_numpy(mask_NU.view(np.uint8))


class Heads:
    """R heads with their gradients, and the buffers that both passes reuse from slide to slide.

    `forward`, then `backward`, fills `gradient_RP`; `flat_RP` may be changed in place between slides. Buffers take
    about 4 · (hidden + 2 attention) bytes a tile of the largest bag so far, for each head; half as much with `compute`
    bfloat16. Then the layers of the tiles are computed with rounded weights and kept in 16 bits; scores, attention,
    classifier and the sums of gradients stay in 32.
    """

    def __init__(self, flat_RP: Tensor, sizes: HeadSizes, compute: torch.dtype = torch.float32):
        self.flat_RP, self.sizes, self.compute = flat_RP, sizes, compute
        self.gradient_RP = torch.zeros_like(flat_RP)
        self.weights, self.gradients = unpack(flat_RP, sizes), unpack(self.gradient_RP, sizes)
        self._rounded_RP = flat_RP.to(compute)  # in float32 the weights themselves
        self._rounded = unpack(self._rounded_RP, sizes)
        self._buffers: dict[str, Tensor] = {}

    def forward(
        self, x_RND: Tensor, valid_RN: Tensor | None = None, mask_RNU: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Classify one bag per head: return logits [R, K] and each tile's part in the slide's vector [R, N].

        The parts sum to one over a bag and are zero on the padding; with maximum pooling, a part is that of the units
        whose maximum the tile is.

        Parameters
        ----------
        x_RND : features; what stands in the padding is ignored, but must be finite
        valid_RN : True where there is a tile, at least one in every bag; None: everywhere
        mask_RNU : from `dropout_mask`; None at evaluation
        """
        sizes, w = self.sizes, self._rounded
        if self._rounded_RP is not self.flat_RP:
            self._rounded_RP.copy_(self.flat_RP)
        x_RND = x_RND.to(self.compute)
        self._x_RND, self._valid_RN = x_RND, valid_RN
        num_tiles = x_RND.shape[1]
        drop_1, drop_2 = sizes.dropped if mask_RNU is not None else (0, 0)
        self._scale, self._scale_2 = (DROPOUT_STEPS / (DROPOUT_STEPS - drop) for drop in (drop_1, drop_2))
        self._hidden = [self._buffer(f"hidden{i}", num_tiles, units) for i, units in enumerate(sizes.hidden)]
        for part in self._parts(num_tiles):
            h, start = x_RND[:, part], 0
            for i, whole in enumerate(self._hidden):
                out, bias = whole[:, part], w[f"hidden{i}_bias"]
                torch.baddbmm(bias, h, w[f"hidden{i}"], beta=self._scale, alpha=self._scale, out=out).relu_()
                if mask_RNU is not None:
                    out.mul_(mask_RNU[:, part, start : start + sizes.hidden[i]])
                h, start = out, start + sizes.hidden[i]
            if sizes.pooling == "attention":
                self._score(part, h, None if mask_RNU is None else mask_RNU[:, part, start:], num_tiles)
        self._pool(num_tiles)
        head = self.weights
        logits_RK = torch.baddbmm(head["classifier_bias"], self._pooled_R1H, head["classifier"]).squeeze(1)
        return logits_RK, self._part_RN

    def backward(self, dlogits_RK: Tensor) -> None:
        """Fill `gradient_RP`, given the gradient of a loss with respect to the logits of the last `forward`."""
        sizes, w, g = self.sizes, self._rounded, self.gradients
        last = len(sizes.hidden) - 1
        d_R1K = dlogits_RK[:, None]
        g["classifier"].baddbmm_(self._pooled_R1H.mT, d_R1K, beta=0)
        g["classifier_bias"].copy_(d_R1K)
        d_pooled_R1H = torch.bmm(d_R1K, self.weights["classifier"].mT)
        if sizes.pooling == "attention":
            gain_RN = torch.bmm(self._hidden[last], d_pooled_R1H.mT.to(self.compute)).squeeze(2).float()
            mean_R1 = (self._part_RN * gain_RN).sum(dim=1, keepdim=True)
            # the score's bias cancels: gradient 0
            self._dscore_RN1 = (self._part_RN * (gain_RN - mean_R1)).unsqueeze(2)
        for part in self._parts(self._x_RND.shape[1]):
            more = float(part.start > 0)  # 0 overwrites the gradients of the slide before
            dh = self._d_pooling(part, d_pooled_R1H)
            if sizes.pooling == "attention":
                dboth = self._d_branches(part, more)
                dh.baddbmm_(dboth, w["branches"].mT, beta=self._scale, alpha=self._scale)
            elif self._scale != 1:
                dh.mul_(self._scale)
            for i in range(last, -1, -1):
                # a unit that is zero was cut off or dropped out
                torch.ops.aten.threshold_backward.grad_input(dh, self._hidden[i][:, part], 0, grad_input=dh)
                before = self._hidden[i - 1][:, part] if i else self._x_RND[:, part]
                _add_product(g[f"hidden{i}"], before.mT, dh, more)
                _add_rows(g[f"hidden{i}_bias"], dh, more)
                if i:
                    below = self._chunk(f"dhidden{i - 1}", part, sizes.hidden[i - 1])
                    dh = torch.baddbmm(below, dh, w[f"hidden{i}"].mT, beta=0, alpha=self._scale, out=below)

    def _score(self, part: slice, h: Tensor, mask: Tensor | None, num_tiles: int) -> None:
        """Compute the branches and the scores of a chunk; what dropped out is zero in the sigmoid branch."""
        width, w = self.sizes.attention, self.weights
        both = self._buffer("both", num_tiles, 2 * width)[:, part]
        torch.baddbmm(self._rounded["branches_bias"], h, self._rounded["branches"], out=both)
        content, gate = both[..., :width], both[..., width:]
        content.mul_(2)  # tanh(x) = 2 sigmoid(2 x) - 1; PyTorch's own tanh takes five times as long
        both.sigmoid_()
        content.mul_(2).sub_(1)
        if mask is not None:
            gate.mul_(mask)
        gated = torch.mul(content, gate, out=self._chunk("gated", part, width))
        scores = self._buffer("scores", num_tiles, 1, torch.float32)[:, part]
        torch.baddbmm(w["score_bias"], gated.float(), w["score"], alpha=self._scale_2, out=scores)

    def _pool(self, num_tiles: int) -> None:
        h_RNH, valid_RN = self._hidden[-1], self._valid_RN
        if self.sizes.pooling == "max":
            seen = h_RNH if valid_RN is None else h_RNH.masked_fill(~valid_RN[..., None], -1.0)
            best = seen.max(dim=1, keepdim=True)
            self._pooled_R1H, self._best_R1H = best.values.float(), best.indices
            share = torch.full_like(self._pooled_R1H[:, 0], 1 / h_RNH.shape[2])
            self._part_RN = share.new_zeros(h_RNH.shape[:2]).scatter_add_(1, best.indices[:, 0], share)
            return
        if self.sizes.pooling == "attention":
            scores_RN = self._buffer("scores", num_tiles, 1, torch.float32).squeeze(2)
        else:
            scores_RN = self.flat_RP.new_zeros(h_RNH.shape[:2])
        if valid_RN is not None:
            scores_RN = scores_RN.masked_fill(~valid_RN, -torch.inf)
        self._part_RN = scores_RN.softmax(dim=1)
        self._pooled_R1H = torch.bmm(self._part_RN[:, None].to(self.compute), h_RNH).float()

    def _d_pooling(self, part: slice, d_pooled_R1H: Tensor) -> Tensor:
        """Return the gradient that a chunk's last hidden layer gets by the slide's vector."""
        dh = self._chunk(f"dhidden{len(self.sizes.hidden) - 1}", part, self.sizes.hidden[-1])
        if self.sizes.pooling == "max":
            tiles = torch.arange(part.start, part.stop, device=dh.device)
            return torch.mul(self._best_R1H == tiles[None, :, None], d_pooled_R1H, out=dh)
        return torch.mul(self._part_RN[:, part, None], d_pooled_R1H, out=dh)

    def _d_branches(self, part: slice, more: float) -> Tensor:
        """Add a chunk to the gradients of branches and score, and return the gradient before their nonlinearities."""
        width, w, g = self.sizes.attention, self.weights, self.gradients
        both = self._buffer("both", self._x_RND.shape[1], 2 * width)[:, part]
        content, gate = both[..., :width], both[..., width:]
        dscore = self._dscore_RN1[:, part]
        gated = torch.mul(content, gate, out=self._chunk("gated", part, width))
        g["score"].baddbmm_(gated.mT.float(), dscore, beta=more, alpha=self._scale_2)
        dboth = self._chunk("dboth", part, 2 * width)
        torch.addcmul(gate, gated, content, value=-1, out=dboth[..., :width])
        torch.addcmul(gated, gated, gate, value=-1, out=dboth[..., width:])
        dgated = torch.mul(dscore, w["score"].mT * self._scale_2, out=gated)
        dboth[..., :width].mul_(dgated)
        dboth[..., width:].mul_(dgated)
        _add_product(g["branches"], self._hidden[-1][:, part].mT, dboth, more)
        _add_rows(g["branches_bias"], dboth, more)
        return dboth

    def _parts(self, num_tiles: int) -> Iterator[slice]:
        """Yield the chunks of a bag; a GPU takes all at once."""
        size = _CHUNK if self.flat_RP.device.type == "cpu" else num_tiles
        for start in range(0, num_tiles, size):
            yield slice(start, min(start + size, num_tiles))

    def _chunk(self, name: str, part: slice, width: int) -> Tensor:
        """Return a buffer [R, n, width] for the tiles of one chunk."""
        return self._buffer(name, part.stop - part.start, width)

    def _buffer(self, name: str, rows: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a buffer [R, rows, width]; its memory is kept, for fresh pages would cost a third of the time."""
        heads = len(self.flat_RP)
        memory, size = self._buffers.get(name), heads * rows * width
        if memory is None or memory.numel() < size:
            memory = self._buffers[name] = self.flat_RP.new_empty(size, dtype=dtype or self.compute)
        return memory[:size].view(heads, rows, width)


def _add_product(gradient_RIO: Tensor, x_RIN: Tensor, d_RNO: Tensor, more: float) -> None:
    """Put a chunk's product into a weight's gradient, or add it there; chunks are added in the gradient's precision."""
    if x_RIN.dtype == gradient_RIO.dtype:
        gradient_RIO.baddbmm_(x_RIN, d_RNO, beta=more)
    else:
        _add(gradient_RIO, torch.bmm(x_RIN, d_RNO), more)


def _add_rows(bias_R1U: Tensor, d_RNU: Tensor, more: float) -> None:
    """Put the sum over the tiles into a bias's gradient, or add it there."""
    _add(bias_R1U, d_RNU.sum(dim=1, keepdim=True, dtype=bias_R1U.dtype), more)


def _add(gradient: Tensor, of_chunk: Tensor, more: float) -> None:
    if more:
        gradient.add_(of_chunk)
    else:
        gradient.copy_(of_chunk)
