"""Self-distillation without labels (Caron et al., ICCV 2021): cross-entropy between views, a centred teacher.

Shapes: V views of the student, the G of the teacher (the global ones) first; B tiles, K prototypes. Everything is
computed in the dtype of the centre, which is kept in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dino_loss(
    student_VBK: Tensor,
    teacher_GBK: Tensor,
    center_K: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Return the mean cross-entropy, in nats, over pairs of a teacher view and another of the student, and over tiles.

    With q the teacher's softmax and s the student's logits over the temperature, one pair gives
    logsumexp(s) - q · s; the sums over q and over s are taken before the product, so that no pair costs an array. No
    gradient flows to the teacher's logits, nor to their running mean, the centre.
    """
    num_views, num_tiles, _ = student_VBK.shape
    num_global = len(teacher_GBK)
    assert 1 <= num_global <= num_views, (num_global, num_views)
    assert num_views > 1, "one view has no partner"
    num_pairs = num_global * (num_views - 1)
    teacher_GBK = _probabilities(teacher_GBK, center_K, teacher_temperature)
    student_VBK = student_VBK.to(center_K.dtype) / student_temperature

    log_norm_V = student_VBK.logsumexp(-1).sum(-1)
    partners_V = torch.full_like(log_norm_V, num_global)  # how many teacher views a view is compared with
    partners_V[:num_global] -= 1
    all_pairs = (teacher_GBK.sum(0) * student_VBK.sum(0)).sum()
    same_view = (teacher_GBK * student_VBK[:num_global]).sum()
    return ((partners_V * log_norm_V).sum() - all_pairs + same_view) / (num_pairs * num_tiles)


@torch.no_grad()
def update_center(center_K: Tensor, teacher_sum_K: Tensor, count: int, momentum: float) -> Tensor:
    """Return the centre after a step, momentum · center + (1 - momentum) · mean.

    `teacher_sum_K` sums the teacher's logits over its views and the *global* batch, `count` vectors (the caller
    reduces it).
    """
    return center_K * momentum + teacher_sum_K.to(center_K.dtype) * ((1 - momentum) / count)


@torch.no_grad()
def teacher_entropy(teacher_GBK: Tensor, center_K: Tensor, temperature: float) -> Tensor:
    """Return the mean entropy of the teacher's distributions, a scalar in nats.

    It watches for collapse: log(K) when every output is uniform, 0 when every one is certain.
    """
    return entropy(_probabilities(teacher_GBK, center_K, temperature)).mean()


def entropy(shares_NK: Tensor) -> Tensor:
    """Return the entropy of each row's shares, [N], in nats."""
    return -torch.special.xlogy(shares_NK, shares_NK).sum(-1)


@torch.no_grad()
def _probabilities(teacher_GBK: Tensor, center_K: Tensor, temperature: float) -> Tensor:
    return ((teacher_GBK.to(center_K.dtype) - center_K) / temperature).softmax(-1)
