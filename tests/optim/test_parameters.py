from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from hpcssl.optim.parameters import clip_each, parameter_groups, update_average


def _net() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    net.register_parameter("stacked_bias", nn.Parameter(torch.zeros(2, 5)))
    net.register_parameter("frozen", nn.Parameter(torch.zeros(2, 5), requires_grad=False))
    return net


def test_biases_and_vectors_do_not_decay():
    decayed, others = parameter_groups(_net().named_parameters())
    assert decayed["names"] == ["0.weight", "2.weight"]
    assert sorted(others["names"]) == ["0.bias", "1.bias", "1.weight", "stacked_bias"]
    assert (decayed["decays"], others["decays"]) == (True, False)
    assert [p.shape for p in decayed["params"]] == [(4, 3), (2, 4)]


def test_the_optimiser_shrinks_only_the_decayed_group():
    net = _net()
    optimiser = torch.optim.AdamW(parameter_groups(net.named_parameters()), lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    for name, p in net.named_parameters():
        factor = 0.95 if name in ("0.weight", "2.weight") else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_adamw_with_groups_is_that_of_its_equations():
    """Loshchilov & Hutter 2019 in float64: decay apart from the gradient, moments corrected for their start.

    The frozen parameter gets its first gradient at step 3: until then neither decay nor moments touch it, and its own
    count of updates begins there.
    """
    rng, betas = np.random.default_rng(0), (0.9, 0.95)
    shapes = {"weight": (4, 3), "bias": (4,), "last_v": (5, 2)}
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    parameters = {name: nn.Parameter(torch.from_numpy(value.copy())) for name, value in values.items()}
    optimiser = torch.optim.AdamW(parameter_groups(parameters.items()), lr=0.0, betas=betas)
    first, second, updates = (dict.fromkeys(shapes, 0.0) for _ in range(3))
    for step in range(8):
        lr, decay = 0.01 * (step + 1), 0.04 + 0.05 * step
        for group in optimiser.param_groups:
            group["lr"], group["weight_decay"] = lr, decay if group["decays"] else 0.0
        for name, parameter in parameters.items():
            if name == "last_v" and step < 3:
                parameter.grad = None
                assert parameter not in optimiser.state
                continue
            grad = rng.normal(size=shapes[name])
            parameter.grad = torch.from_numpy(grad.copy())
            updates[name] += 1
            first[name] = betas[0] * first[name] + (1 - betas[0]) * grad
            second[name] = betas[1] * second[name] + (1 - betas[1]) * grad**2
            mean, square = first[name] / (1 - betas[0] ** updates[name]), second[name] / (1 - betas[1] ** updates[name])
            shrunk = values[name] * (1 - lr * (0.0 if name == "bias" else decay))
            values[name] = shrunk - lr * mean / (np.sqrt(square) + 1e-8)
        optimiser.step()
        for name, parameter in parameters.items():
            np.testing.assert_allclose(parameter.detach().numpy(), values[name], rtol=1e-10, err_msg=f"{name} {step}")


def test_each_gradient_is_clipped_by_its_own_norm():
    rng = np.random.default_rng(0)
    grads = [rng.normal(size=shape) * scale for shape, scale in (((5, 4), 10.0), ((3,), 0.01), ((2, 2, 2), 1.0))]
    parameters = [nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in grads]
    for parameter, grad in zip(parameters, grads):
        parameter.grad = torch.from_numpy(grad.copy())
    without = nn.Parameter(torch.zeros(3))

    norm = clip_each([parameters[0], without, *parameters[1:]], 0.7)

    assert norm == pytest.approx(math.sqrt(sum((g**2).sum() for g in grads)), rel=1e-12)
    assert without.grad is None
    for parameter, grad in zip(parameters, grads):
        expected = grad * min(1.0, 0.7 / (np.sqrt((grad**2).sum()) + 1e-6))
        np.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=1e-12)
    np.testing.assert_array_equal(parameters[1].grad.numpy(), grads[1])  # a small one is left exactly as it was


def test_infinite_limit_only_measures():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_each([parameter], math.inf) == 5.0
    assert parameter.grad.tolist() == [3.0, 4.0]
    assert clip_each([nn.Parameter(torch.zeros(1))], 1.0) == 0.0


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([math.nan, 1.0])
    assert math.isnan(clip_each([parameter], 1.0))


def test_average_moves_the_teacher_and_not_the_student():
    student, teacher = _net(), _net()
    expected = [0.9 * t.detach().double() + 0.1 * s.detach().double() for t, s in _pairs(teacher, student)]
    kept = [s.detach().clone() for s in student.parameters()]
    update_average(teacher.parameters(), student.parameters(), 0.9)
    for (t, s), e, k in zip(_pairs(teacher, student), expected, kept):
        torch.testing.assert_close(t.detach().double(), e, atol=1e-7, rtol=1e-6)
        assert torch.equal(s, k)


@pytest.mark.parametrize(("momentum", "source"), [(1.0, 0), (0.0, 1)])
def test_average_is_exact_at_its_ends(momentum, source):
    nets = _net(), _net()
    expected = [p.detach().clone() for p in nets[1 if source else 0].parameters()]
    update_average(nets[0].parameters(), nets[1].parameters(), momentum)
    assert all(torch.equal(p, e) for p, e in zip(nets[0].parameters(), expected))


def _pairs(teacher: nn.Module, student: nn.Module):
    return list(zip(teacher.parameters(), student.parameters()))
