import numpy as np
import pytest
import torch

from hpcssl.models.attention import HeadSizes, dropout_scales, gated_attention, initial_weights, unpack

SIZES = HeadSizes(dim=6, classes=3, hidden=(16, 8), attention=4)


def bags(counts, num_tiles, dim=6, seed=0):
    """Padded bags whose padding is far from zero, and which tiles are there."""
    generator = torch.Generator().manual_seed(seed)
    x_RND = torch.full((len(counts), num_tiles, dim), 99.0)
    for x_ND, count in zip(x_RND, counts, strict=True):
        x_ND[:count] = torch.randn(count, dim, generator=generator)
    return x_RND, torch.arange(num_tiles) < torch.tensor(counts)[:, None]


def test_the_papers_head_has_855_thousand_parameters():
    sizes = HeadSizes(dim=384, classes=2)
    assert sizes.num_parameters == 855_171
    assert sizes.num_parameters - sizes.num_decayed == 512 + 512 + 2 * 384 + 1 + 2


def test_a_runs_weights_depend_on_its_own_seed_alone():
    among = initial_weights(SIZES, [3, 4, 5])
    assert torch.equal(among[1], initial_weights(SIZES, [4])[0])
    assert not torch.equal(among[0], among[1])


def test_weights_are_xavier_normal_and_biases_zero():
    sizes = HeadSizes(dim=300, classes=2, hidden=(200, 100), attention=150)
    weights = unpack(initial_weights(sizes, [0]), sizes)
    for name, (fan_in, fan_out) in {"first": (300, 200), "second": (200, 100), "branches": (100, 150)}.items():
        assert weights[name].std().item() == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.03)
        assert not weights[f"{name}_bias"].any()


def test_one_stacked_head_equals_plain_layers():
    weights = unpack(initial_weights(SIZES, [1, 2]).add_(0.01), SIZES)
    x_RND, valid_RN = bags([5, 3], 5)
    logits_RK, attn_RN = gated_attention(weights, x_RND, valid_RN)
    w = {name: value[1] for name, value in weights.items()}
    h = x_RND[1, :3]
    for name in ("first", "second"):
        h = torch.relu(h @ w[name] + w[f"{name}_bias"])
    tanh, sigmoid = (h @ w["branches"] + w["branches_bias"]).chunk(2, dim=1)
    attention = torch.softmax(((torch.tanh(tanh) * torch.sigmoid(sigmoid)) @ w["score"] + w["score_bias"])[:, 0], dim=0)
    expected = (attention @ h) @ w["classifier"] + w["classifier_bias"][0]
    torch.testing.assert_close(logits_RK[1], expected)
    torch.testing.assert_close(attn_RN[1], torch.cat([attention, torch.zeros(2)]))


def test_padding_and_tile_order_change_nothing():
    weights = unpack(initial_weights(SIZES, [1, 2]), SIZES)
    x_RND, valid_RN = bags([5, 3], 5)
    expected, attention = gated_attention(weights, x_RND, valid_RN)
    padded = gated_attention(weights, *bags([5, 3], 40))[0]
    torch.testing.assert_close(padded, expected)
    order = torch.tensor([4, 2, 0, 1, 3])
    shuffled, moved = gated_attention(weights, x_RND[:, order], valid_RN[:, order])
    torch.testing.assert_close(shuffled, expected)
    torch.testing.assert_close(moved, attention[:, order])


def test_a_bag_of_one_tile_gets_all_attention():
    x_RND, valid_RN = bags([1], 4)
    _, attn_RN = gated_attention(unpack(initial_weights(SIZES, [1]), SIZES), x_RND, valid_RN)
    assert attn_RN.tolist() == [[1, 0, 0, 0]]


def test_padding_gets_no_gradient():
    weights = unpack(initial_weights(SIZES, [1]), SIZES)
    x_RND, valid_RN = bags([2], 5)
    x_RND.requires_grad_()
    gated_attention(weights, x_RND, valid_RN)[0].square().sum().backward()
    assert x_RND.grad[0, :2].abs().sum() > 0
    assert not x_RND.grad[0, 2:].any()


def test_dropout_is_a_function_of_run_and_step_alone():
    alone = dropout_scales(SIZES, [7], [3], [5], 5)[0]
    among = dropout_scales(SIZES, [1, 7], [0, 3], [9, 5], 9)[1]
    assert torch.equal(among[:5], alone)
    assert not torch.equal(dropout_scales(SIZES, [7], [4], [5], 5)[0], alone)
    assert not torch.equal(dropout_scales(SIZES, [8], [3], [5], 5)[0], alone)
    words = np.random.Philox(key=[7, 0], counter=[0, 3, 0, 0]).random_raw(5 * SIZES.dropout_units // 8)
    kept = words.view(np.uint8).reshape(5, -1) >= 64
    assert np.array_equal(alone.numpy() > 0, kept)


def test_dropout_keeps_three_quarters_and_the_mean():
    scales = dropout_scales(SIZES, [1, 2], [0, 0], [500, 500], 500)
    assert (scales > 0).float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert scales.unique().tolist() == pytest.approx([0, 4 / 3])


def test_dropout_acts_on_both_layers_and_both_branches():
    weights = unpack(initial_weights(SIZES, [1]), SIZES)
    x_RND, valid_RN = bags([4], 4)
    plain = gated_attention(weights, x_RND, valid_RN)[0]
    first, second, branch = 0, 16, 24
    for start, stop in ((first, second), (second, branch), (branch, branch + 4), (branch + 4, branch + 8)):
        scales = torch.ones(1, 4, SIZES.dropout_units)
        scales[:, 0, start : stop - 1] = 0
        assert not torch.allclose(gated_attention(weights, x_RND, valid_RN, scales)[0], plain)
