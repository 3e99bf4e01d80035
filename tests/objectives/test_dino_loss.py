from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax

from hpcssl.objectives.dino.dino_loss import dino_loss, teacher_entropy, update_center

TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.04}


def _draw(views=5, num_global=2, tiles=3, prototypes=7):
    rng = np.random.default_rng(1)
    return (
        rng.uniform(-1, 1, (views, tiles, prototypes)),
        rng.uniform(-1, 1, (num_global, tiles, prototypes)),
        rng.uniform(-0.5, 0.5, prototypes),
    )


@pytest.mark.parametrize(("views", "num_global"), [(2, 2), (5, 2), (4, 1), (3, 3)])
def test_loss_is_the_mean_cross_entropy_over_pairs_of_different_views(views, num_global):
    student, teacher, center = _draw(views, num_global)
    q = softmax((teacher - center) / 0.04, axis=-1)
    log_p = np.log(softmax(student / 0.1, axis=-1))
    pairs = [-(q[g] * log_p[v]).sum(-1).mean() for g in range(num_global) for v in range(views) if v != g]
    loss = dino_loss(*(torch.from_numpy(a) for a in (student, teacher, center)), **TEMPERATURES)
    assert loss.item() == pytest.approx(np.mean(pairs), rel=1e-12)
    with_same = [-(q[g] * log_p[v]).sum(-1).mean() for g in range(num_global) for v in range(views)]
    assert abs(loss.item() - np.mean(with_same)) > 1e-3


def test_gradient_is_softmax_less_the_teachers_and_reaches_the_student_alone():
    student, teacher, center = (torch.from_numpy(a).requires_grad_() for a in _draw())
    dino_loss(student, teacher, center, **TEMPERATURES).backward()
    assert teacher.grad is None
    assert center.grad is None
    s, t, c = (a.detach().numpy() for a in (student, teacher, center))
    p, q = softmax(s / 0.1, axis=-1), softmax((t - c) / 0.04, axis=-1)
    expected = np.stack([sum(p[v] - q[g] for g in range(2) if g != v) for v in range(5)]) / 0.1 / (2 * 4) / 3
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_float32_and_half_inputs_stay_close_to_float64():
    arrays = _draw(10, 2, 4, 4096)
    exact = dino_loss(*(torch.from_numpy(a) for a in arrays), **TEMPERATURES).item()
    student, teacher, center = (torch.from_numpy(a).float() for a in arrays)
    single = dino_loss(student, teacher, center, **TEMPERATURES)
    half = dino_loss(student.bfloat16(), teacher.bfloat16(), center, **TEMPERATURES)
    assert single.dtype == half.dtype == torch.float32
    assert single.item() == pytest.approx(exact, rel=1e-5)
    assert half.item() == pytest.approx(exact, rel=2e-2)


def test_center_is_the_running_mean_of_the_global_batch_however_it_is_split():
    _, teacher, center = _draw(tiles=8)
    expected = 0.9 * center + 0.1 * teacher.mean((0, 1))
    shares = [torch.from_numpy(teacher[:, a:b]).sum((0, 1)) for a, b in ((0, 5), (5, 8))]
    updated = update_center(torch.from_numpy(center), shares[0] + shares[1], 16, 0.9)
    np.testing.assert_allclose(updated.numpy(), expected, rtol=1e-12)


def test_center_stays_float32_with_half_teachers():
    assert update_center(torch.zeros(3), torch.ones(3, dtype=torch.bfloat16), 2, 0.9).dtype == torch.float32


def test_entropy_tells_both_collapses_from_health():
    uniform = teacher_entropy(torch.zeros(2, 3, 50), torch.zeros(50), 0.04)
    assert uniform.item() == pytest.approx(math.log(50), rel=1e-6)
    certain = torch.zeros(2, 3, 50)
    certain[..., 4] = 1000.0
    assert teacher_entropy(certain, torch.zeros(50), 0.04).item() == 0.0
    _, teacher, center = _draw()
    q = softmax((teacher - center) / 0.07, axis=-1)
    ours = teacher_entropy(torch.from_numpy(teacher), torch.from_numpy(center), 0.07)
    assert ours.item() == pytest.approx(-(q * np.log(q)).sum(-1).mean(), rel=1e-12)
