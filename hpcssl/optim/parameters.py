"""Parameter groups, gradient clipping, and the running average that makes the teacher."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Return two groups for a torch optimiser: what weight decay shrinks, and biases and 1-D parameters.

    Each has `params`, `names` (in their order) and `decays`; the second has `decays` False and `weight_decay` 0.
    Whoever sets the weight decay of a step sets it where `decays` is True.
    """
    decayed: dict[str, Any] = {"params": [], "names": [], "decays": True}
    others: dict[str, Any] = {"params": [], "names": [], "decays": False, "weight_decay": 0.0}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            group = others if name.endswith("bias") or parameter.ndim <= 1 else decayed
            group["params"].append(parameter)
            group["names"].append(name)
    return [decayed, others]


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale each parameter's gradient, in place, down to its own L2 norm of at most `max_norm`.

    Returns the global L2 norm before clipping, not finite if any gradient is not; `max_norm=math.inf` only measures.
    Not the usual clipping by the global norm: DINO's published training clips tensor by tensor.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return 0.0
    norms = torch.stack(torch._foreach_norm(grads)).tolist()  # one transfer for all
    scales = [max_norm / (norm + 1e-6) for norm in norms]
    clipped = [(grad, scale) for grad, scale in zip(grads, scales) if scale < 1]
    if clipped:
        torch._foreach_mul_([grad for grad, _ in clipped], [scale for _, scale in clipped])
    return math.sqrt(sum(norm * norm for norm in norms))


@torch.no_grad()
def update_average(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float) -> None:
    """Move each teacher parameter, in place, to momentum · teacher + (1 - momentum) · student."""
    torch._foreach_lerp_(list(teacher), list(student), 1.0 - momentum)
