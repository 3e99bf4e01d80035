"""Transformer blocks of timm, run one by one with planned drop-path; and how, not what, is computed.

Shapes: B images, N tokens, D embedding, L residual branches (two a block: attention, then MLP).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How blocks are computed. No choice changes the result but for the order of float sums, nor any weight's name.

    Attributes
    ----------
    compiled : by torch.compile, one graph for each shape of the tokens
    checkpointed : for the backward pass only the inputs of blocks are kept, and each block is computed a second time
    fused_attention : by torch's fused kernels; else as softmax of a product
    """

    compiled: bool = False
    checkpointed: bool = False
    fused_attention: bool = True


def run_blocks(
    blocks: Iterable[nn.Module], x_BND: Tensor, execution: Execution, residual_scale_BL: Tensor | None = None
) -> Tensor:
    """Return the tokens after all blocks, each residual branch scaled sample by sample (None: by 1)."""
    run = _compiled_block() if execution.compiled else _block
    for i, block in enumerate(blocks):
        scale_B2 = None if residual_scale_BL is None else residual_scale_BL[:, 2 * i : 2 * i + 2]
        if execution.checkpointed and torch.is_grad_enabled():
            # nothing in a block is random, so no generator's state needs to be put back
            x_BND = checkpoint(run, block, x_BND, scale_B2, use_reentrant=False, preserve_rng_state=False)
        else:
            x_BND = run(block, x_BND, scale_B2)
    return x_BND


def choose_attention(blocks: Iterable[nn.Module], execution: Execution) -> None:
    """Tell timm's attention layers which of their two ways to take."""
    for block in blocks:
        for layer in block.modules():
            if isinstance(layer, Attention):
                layer.fused_attn = execution.fused_attention  # type: ignore[misc]


def _block(block: Any, x_BND: Tensor, scale_B2: Tensor | None) -> Tensor:
    x_BND = x_BND + _scaled(block.ls1(block.attn(block.norm1(x_BND))), scale_B2, 0)
    return x_BND + _scaled(block.ls2(block.mlp(block.norm2(x_BND))), scale_B2, 1)


def _scaled(y_BND: Tensor, scale_B2: Tensor | None, branch: int) -> Tensor:
    return y_BND if scale_B2 is None else y_BND * scale_B2[:, branch, None, None].to(y_BND.dtype)


@lru_cache
def _compiled_block() -> Callable[..., Tensor]:
    """Return the compiled block; all blocks of a model share its graphs."""
    return torch.compile(_block, dynamic=False)
