"""DINO's and MAE's training step in plain PyTorch, as the published loops do it; `bench_step.py` measures against it.

Attention as softmax of a product, drop-path drawn in the forward pass, one backbone pass for each image size and one
head pass for all views, a cross-entropy for each pair of views, clipping tensor by tensor with a look at each norm,
AdamW as torch builds it by default, a Python loop for the teacher's average, and a look at the loss after each step.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from hpcssl.models.encoder import Encoder, drop_path_rates
from hpcssl.objectives.mae.mae_loss import patchify
from hpcssl.optim.parameters import parameter_groups
from hpcssl.train.pretrain_config import PretrainConfig, StepValues


class Attention(nn.Module):
    """Multi-head self-attention that holds its whole matrix."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended tokens."""
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    """A pre-norm transformer block with drop-path of its own drawing."""

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens after both branches."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Vit(nn.Module):
    """A vision transformer whose parameters have timm's names."""

    def __init__(self, like: Encoder, drop_path: Sequence[float]):
        super().__init__()
        config, dim = like.config, like.embed_dim
        assert config.num_heads is not None
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros_like(like.vit.pos_embed), like.vit.pos_embed.requires_grad)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, like.patch_px, like.patch_px)})
        self.blocks = nn.ModuleList(Block(dim, config.num_heads, rate) for rate in drop_path)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.grid = like.grid_size[0]

    def patches(self, images: Tensor) -> Tensor:
        """Return the patches' tokens with their positions."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        return x + self._positions(images.shape[-1] // self.patch_embed["proj"].kernel_size[0])

    def forward(self, patches: Tensor) -> Tensor:
        """Return all tokens after the last norm."""
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)
        x = torch.cat([cls, patches], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _positions(self, side: int) -> Tensor:
        if side == self.grid:
            return self.pos_embed[:, 1:]
        grid = self.pos_embed[:, 1:].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        factor = (side + 0.1) / self.grid
        resampled = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        return resampled.permute(0, 2, 3, 1).reshape(1, side * side, -1)


class MultiCrop(nn.Module):
    """Backbone and head: one backbone pass for each run of views of one size, the head on all of them together."""

    def __init__(self, backbone: Vit, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Return the logits of all views, view after view."""
        runs = (torch.cat(list(run)) for _, run in itertools.groupby(views, key=lambda view: view.shape[-1]))
        return self.head(torch.cat([self.backbone(self.backbone.patches(run))[:, 0] for run in runs]))


class Head(nn.Module):
    """The projection head with torch's weight norm on its last layer."""

    def __init__(self, dim: int, out_dim: int, hidden_dim: int, bottleneck_dim: int):
        super().__init__()
        layers = [nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
        self.last.parametrizations.weight.original0.data.fill_(1)
        self.last.parametrizations.weight.original0.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.last(F.normalize(self.mlp(x), dim=-1))


class PlainDino:
    """DINO's loop over a student, a teacher and a centre."""

    def __init__(self, recipe: PretrainConfig, like: Encoder, weights: Mapping[str, Tensor], device: torch.device):
        head = recipe.objective.head
        assert head.norm_last_layer
        last = "head.last.parametrizations.weight.original"
        of = {"student.encoder.vit.": "backbone.", "student.head.mlp.": "head.mlp.", "student.head.last_v": f"{last}1"}
        loaded = {
            new + n.removeprefix(old): w for n, w in weights.items() for old, new in of.items() if n.startswith(old)
        }
        backbone = Vit(like, drop_path_rates(recipe.encoder)[::2])
        projection = Head(like.embed_dim, head.out_dim, head.hidden_dim, head.bottleneck_dim)
        self.student = MultiCrop(backbone, projection)
        self.student.load_state_dict(loaded | {f"{last}0": torch.ones(head.out_dim, 1)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).to(device)
        self.student.to(device)
        self.center = torch.zeros(1, head.out_dim, device=device)
        self.optimizer = _adamw(self.student, recipe)
        self._config, self._clip = recipe.objective, recipe.optim.clip

    def step(self, views: Sequence[Tensor], precision: torch.dtype, values: StepValues) -> float:
        """Update all once; views are normalised images, the two global ones first."""
        _set_values(self.optimizer, values)
        with torch.autocast(views[0].device.type, precision, enabled=precision is not torch.float32):
            teacher = self.teacher(views[:2])
            loss = self._loss(self.student(views), teacher, len(views))
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None and self._clip:
                factor = self._clip / (parameter.grad.norm(2).item() + 1e-6)
                if factor < 1:
                    parameter.grad.mul_(factor)
        self.optimizer.step()
        momentum = values.objective.momentum
        with torch.no_grad():
            for ours, theirs in zip(self.student.parameters(), self.teacher.parameters()):
                theirs.mul_(momentum).add_((1 - momentum) * ours.detach())
        return loss.item()

    def _loss(self, student: Tensor, teacher: Tensor, num_views: int) -> Tensor:
        parts = (student / self._config.student_temperature).chunk(num_views)
        targets = ((teacher - self.center) / self._config.teacher_temperature).softmax(dim=-1).detach().chunk(2)
        total, terms = torch.zeros((), device=student.device), 0
        for i, target in enumerate(targets):
            for j, part in enumerate(parts):
                if i != j:
                    total = total + (-target * F.log_softmax(part, dim=-1)).sum(dim=-1).mean()
                    terms += 1
        momentum = self._config.center_momentum
        self.center = self.center * momentum + teacher.mean(dim=0, keepdim=True) * (1 - momentum)
        return total / terms


class PlainMae(nn.Module):
    """MAE's model and loop."""

    def __init__(self, recipe: PretrainConfig, like: Encoder, weights: Mapping[str, Tensor], device: torch.device):
        super().__init__()
        decoder = recipe.objective.decoder
        self.encoder = nn.ModuleDict({"vit": Vit(like, [0.0] * len(like.vit.blocks))})
        self.decoder_embed = nn.Linear(like.embed_dim, decoder.embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.embed_dim))
        self.decoder_blocks = nn.Sequential(
            *(Block(decoder.embed_dim, decoder.num_heads) for _ in range(decoder.depth))
        )
        self.decoder_norm = nn.LayerNorm(decoder.embed_dim, eps=1e-6)
        self.patch_px = like.patch_px
        self.decoder_pred = nn.Linear(decoder.embed_dim, 3 * self.patch_px**2)
        self.load_state_dict(dict(weights))
        self.to(device)
        self.optimizer = _adamw(self, recipe)

    def step(
        self, images: Tensor, noise: Tensor, masked: int, position: Tensor, precision: torch.dtype, values: StepValues
    ) -> float:
        """Update all once; of each image the `masked` patches with the largest noise are hidden."""
        _set_values(self.optimizer, values)
        with torch.autocast(images.device.type, precision, enabled=precision is not torch.float32):
            loss = self._loss(images, noise, masked, position)
        value = loss.item()
        loss.backward()
        torch.stack([p.grad.detach().norm(2) for p in self.parameters() if p.grad is not None]).norm(2)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    def _loss(self, images: Tensor, noise: Tensor, masked: int, position: Tensor) -> Tensor:
        vit: Any = self.encoder["vit"]
        patches = vit.patches(images)
        batch, count, dim = patches.shape
        shuffled = noise.argsort(dim=1)
        restored = shuffled.argsort(dim=1)
        kept = shuffled[:, : count - masked]
        x = self.decoder_embed(vit(patches.gather(1, kept[:, :, None].expand(-1, -1, dim))))
        hidden = self.mask_token.expand(batch, masked, -1).to(x.dtype)
        full = torch.cat([x[:, 1:], hidden], dim=1)
        full = full.gather(1, restored[:, :, None].expand(-1, -1, full.shape[2]))
        x = self.decoder_blocks(torch.cat([x[:, :1], full], dim=1) + position)
        predicted = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        target = patchify(images, self.patch_px)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        mask = torch.ones(batch, count, device=images.device)
        mask[:, : count - masked] = 0
        mask = mask.gather(1, restored)
        return (((predicted - target) ** 2).mean(-1) * mask).sum() / mask.sum()


def _adamw(model: nn.Module, recipe: PretrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model.named_parameters()), lr=0.0, betas=recipe.optim.betas)


def _set_values(optimizer: torch.optim.AdamW, values: StepValues) -> None:
    for group in optimizer.param_groups:
        group["lr"] = values.lr
        if group["decays"]:
            group["weight_decay"] = values.weight_decay
