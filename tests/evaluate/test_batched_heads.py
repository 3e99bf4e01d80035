from dataclasses import replace

import numpy as np
import pytest
import torch

from hpcssl.evaluate.mil import batched_heads as attention
from hpcssl.evaluate.mil.batched_heads import Heads, HeadSizes, dropout_mask, initial_weights, unpack

SIZES = HeadSizes(dim=6, classes=3, hidden=(16, 8), attention=4)
ALL = [
    SIZES,
    replace(SIZES, pooling="mean"),
    replace(SIZES, pooling="max"),
    replace(SIZES, hidden=(8,), dropout=0.0),
    replace(SIZES, hidden=(8, 6, 4), dropout=0.5),
]
of_all_sizes = pytest.mark.parametrize("sizes", ALL, ids=lambda s: f"{s.pooling}-{len(s.hidden)}")


def bags(counts, num_tiles, dim=6, seed=0):
    """Padded bags whose padding is far from zero, and which tiles are there."""
    generator = torch.Generator().manual_seed(seed)
    x_RND = torch.full((len(counts), num_tiles, dim), 99.0)
    for x_ND, count in zip(x_RND, counts, strict=True):
        x_ND[:count] = torch.randn(count, dim, generator=generator)
    return x_RND, torch.arange(num_tiles) < torch.tensor(counts)[:, None]


def heads(seeds, sizes=SIZES):
    """Heads whose biases are not zero."""
    flat_RP = initial_weights(sizes, seeds)
    return Heads(flat_RP + 0.1 * torch.randn(flat_RP.shape, generator=torch.Generator().manual_seed(9)), sizes)


def test_the_papers_head_has_855_thousand_parameters():
    sizes = HeadSizes(dim=384, classes=2)
    assert sizes.num_parameters == 855_171
    assert sizes.num_parameters - sizes.num_decayed == 512 + 512 + 2 * 384 + 1 + 2


def test_weights_are_xavier_normal_by_the_fits_own_seed_alone_and_biases_zero():
    among = initial_weights(SIZES, [3, 4, 5])
    assert torch.equal(among[1], initial_weights(SIZES, [4])[0])
    assert not torch.equal(among[0], among[1])
    sizes = HeadSizes(dim=300, classes=2, hidden=(200, 100), attention=150)
    weights = unpack(initial_weights(sizes, [0]), sizes)
    for name, (fan_in, fan_out) in {"hidden0": (300, 200), "hidden1": (200, 100), "branches": (100, 150)}.items():
        assert weights[name].std().item() == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.03)
        assert not weights[f"{name}_bias"].any()


@of_all_sizes
@pytest.mark.parametrize("chunk", [3, 512])
def test_logits_and_gradients_equal_layers_and_autograd(plain, sizes, chunk, monkeypatch):
    """Two stacked heads with padded bags, dropout on, in chunks that end within a bag."""
    monkeypatch.setattr(attention, "_CHUNK", chunk)
    stack, counts = heads([1, 2], sizes), [7, 4]
    x_RND, valid_RN = bags(counts, 8)
    masks = [dropout_mask(sizes, 5 + r, 1, n) for r, n in enumerate(counts)] if sizes.dropout else None
    padded = torch.zeros(2, 8, sizes.dropout_units, dtype=torch.uint8)
    for r, mask in enumerate(masks or []):
        padded[r, : counts[r]] = mask
    wanted_RK = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.5, -0.7]])
    for _ in range(2):  # the second time, buffers hold the values of the first
        logits_RK, part_RN = stack.forward(x_RND, valid_RN, padded if masks else None)
        stack.backward(wanted_RK)
    assert not part_RN[~valid_RN].any()
    torch.testing.assert_close(part_RN.sum(dim=1), torch.ones(2))
    for r, count in enumerate(counts):
        layers = plain.PlainHead(sizes, stack.flat_RP[r : r + 1])
        logits_K = layers(x_RND[r, :count], masks[r] if masks else None)
        torch.testing.assert_close(logits_RK[r], logits_K)
        logits_K.backward(wanted_RK[r])
        for name, weight, bias in layers.named_weights():
            if name == "score":
                torch.testing.assert_close(weight.grad.T, stack.gradients["score"][r])
                continue  # its bias shifts all scores alike: no gradient
            source, half = ("branches", int(name == "sigmoid")) if name in ("tanh", "sigmoid") else (name, 0)
            rows = slice(half * len(weight), (half + 1) * len(weight))
            torch.testing.assert_close(weight.grad.T, stack.gradients[source][r][:, rows], atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(bias.grad, stack.gradients[f"{source}_bias"][r, 0, rows], atol=1e-6, rtol=1e-4)
    if sizes.pooling == "attention":
        assert not stack.gradients["score_bias"].any()


@of_all_sizes
def test_half_precision_is_near_and_adds_its_chunks_up_in_full(sizes, monkeypatch):
    monkeypatch.setattr(attention, "_CHUNK", 64)
    x_RND, _ = bags([4000, 4000], 4000)
    exact = heads([1, 2], sizes)
    rounded = Heads(exact.flat_RP.clone(), sizes, torch.bfloat16)
    found = []
    for stack in (exact, rounded):
        logits_RK, part_RN = stack.forward(x_RND)
        stack.backward(torch.tensor([[0.3, -1.0, 0.7]] * 2))
        found.append((logits_RK.clone(), part_RN.clone(), stack.gradient_RP.clone()))
    assert all(t.dtype == torch.float32 for t in found[1])
    assert not torch.equal(found[0][0], found[1][0])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 0.03 * one.norm()
    exact.flat_RP.mul_(1.5)  # weights are rounded anew
    rounded.flat_RP.mul_(1.5)
    torch.testing.assert_close(rounded.forward(x_RND)[0], exact.forward(x_RND)[0], rtol=0.05, atol=0.05)


@of_all_sizes
def test_padding_and_tile_order_change_nothing(sizes):
    stack = heads([1, 2], sizes)
    x_RND, valid_RN = bags([5, 3], 5)
    expected, parts = (t.clone() for t in stack.forward(x_RND, valid_RN))
    padded = stack.forward(*bags([5, 3], 40))[0]
    torch.testing.assert_close(padded, expected)
    order = torch.tensor([4, 2, 0, 1, 3])
    shuffled, moved = stack.forward(x_RND[:, order], valid_RN[:, order])
    torch.testing.assert_close(shuffled, expected)
    torch.testing.assert_close(heads([1], sizes).forward(*bags([1], 4))[1], torch.tensor([[1.0, 0, 0, 0]]))
    if sizes.pooling != "max":  # where a unit is zero on all tiles, the first tile counts as its maximum
        torch.testing.assert_close(moved, parts[:, order])


def test_a_bag_of_200_000_tiles_keeps_its_float_sums_apart(plain):
    sizes = HeadSizes(dim=4, classes=2, hidden=(8,), attention=4)
    x_ND = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0))
    stack = heads([1], sizes)
    logits_RK, part_RN = stack.forward(x_ND[None])
    stack.backward(torch.tensor([[1.0, -1.0]]))
    exact = plain.PlainHead(sizes, stack.flat_RP).double().eval()
    logits_K = exact(x_ND.double())
    logits_K.backward(torch.tensor([1.0, -1.0], dtype=torch.float64))
    torch.testing.assert_close(logits_RK[0].double(), logits_K, atol=1e-5, rtol=1e-5)
    assert part_RN.double().sum().item() == pytest.approx(1, abs=1e-4)
    gradient = exact.hidden[0].weight.grad.T
    assert (stack.gradients["hidden0"][0] - gradient).abs().max() < 1e-4 * gradient.abs().max()


def test_dropout_is_a_function_of_fit_and_step_alone():
    alone = dropout_mask(SIZES, 7, 3, 5)
    assert torch.equal(dropout_mask(SIZES, 7, 3, 9)[:5], alone)
    assert not torch.equal(dropout_mask(SIZES, 7, 4, 5), alone)
    assert not torch.equal(dropout_mask(SIZES, 8, 3, 5), alone)
    assert alone.shape == (5, 16 + 8 + 4)
    assert SIZES.dropped == (64, 112)
    drawn = np.random.Philox(key=[7, 0], counter=[0, 3, 0, 0]).random_raw(18).view(np.uint8)[: 5 * 28].reshape(5, 28)
    kept = drawn >= np.repeat([64, 112], [24, 4])
    assert np.array_equal(alone.numpy(), kept.astype(np.uint8)), "3/4 of the units stay, of either branch 9/16"


def test_dropout_acts_on_every_layer_and_keeps_the_scale():
    stack = heads([1])
    x_RND, _ = bags([4], 4)
    ones = torch.ones(1, 4, SIZES.dropout_units, dtype=torch.uint8)
    full = stack.forward(x_RND, None, ones)[0].clone()
    for start, stop in ((0, 16), (16, 24), (24, 28)):
        mask = ones.clone()
        mask[:, 0, start : stop - 1] = 0
        assert not torch.allclose(stack.forward(x_RND, None, mask)[0], full)
    masks = (dropout_mask(SIZES, 3, step, 4)[None] for step in range(3000))
    mean = torch.stack([stack.forward(x_RND, None, mask)[0].clone() for mask in masks]).mean(dim=0)
    off = (mean - stack.forward(x_RND)[0]).abs().max()
    assert off < 0.2 * stack.forward(x_RND)[0].abs().max()  # unscaled, two layers alone would make it 0.44
