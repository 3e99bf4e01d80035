from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from hpcssl.core.config import build
from hpcssl.core.errors import ConfigError
from hpcssl.models.encoder import EncoderConfig, build_encoder, drop_path_rates, resample_position, residual_scale

TINY = EncoderConfig(image_px=32, patch_px=8, embed_dim=24, depth=3, num_heads=2, drop_path=0.3)
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return build_encoder(TINY)


def _images(batch=4, px=32):
    return torch.randn(batch, 3, px, px, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_weights_load_into_timm_and_give_its_features(encoder):
    vit = timm.create_model(TINY.name, **TIMM).eval()
    vit.load_state_dict({k.removeprefix("vit."): v for k, v in encoder.state_dict().items()}, strict=True)
    torch.testing.assert_close(encoder(_images()), vit(_images()), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.tokens(_images()), vit.forward_features(_images()), atol=1e-5, rtol=0)
    assert encoder(_images()).std() > 0.1


def test_unset_sizes_are_timms_and_the_config_tells_them():
    config = build(EncoderConfig, {"name": "vit_tiny_patch16_224", "image_px": 48}, where="recipe")
    encoder = build_encoder(config)
    assert encoder.config == replace(config, patch_px=16, embed_dim=192, depth=12, num_heads=3)
    assert encoder.grid_size == (3, 3)
    assert drop_path_rates(config) == drop_path_rates(encoder.config)


def test_nothing_is_random_in_training_mode(encoder):
    encoder.train()
    assert torch.equal(encoder(_images()), encoder(_images()))


def test_the_class_token_starts_as_published_not_at_timms_near_zero(encoder):
    assert 0.01 < encoder.vit.cls_token.std() < 0.03


def test_drop_path_rates_are_linear_over_blocks_and_shared_by_branches():
    """Asking for them leaves torch's generator alone."""
    state = torch.get_rng_state()
    assert drop_path_rates(TINY) == pytest.approx([0, 0, 0.15, 0.15, 0.3, 0.3])
    rates = drop_path_rates(EncoderConfig())
    assert len(rates) == 24
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.1)
    assert len(drop_path_rates(EncoderConfig(name="vit_large_patch16_224"))) == 48
    assert torch.equal(torch.get_rng_state(), state)


def test_residual_scale_keeps_the_expectation():
    keep = torch.tensor([[True, False], [True, True]])
    expected = np.array([[1 / 1.0, 0.0], [1.0, 1 / 0.75]])
    np.testing.assert_allclose(residual_scale(keep, [0.0, 0.25]).numpy(), expected)
    assert residual_scale(keep, torch.tensor([0.0, 0.25])).dtype == torch.float32


@torch.no_grad()
def test_a_sample_is_the_same_in_every_batch(encoder):
    keep = torch.rand(6, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    scale, images = residual_scale(keep, drop_path_rates(TINY)), _images(6)
    whole = encoder(images, scale)
    turned = torch.tensor([4, 1, 0, 5, 3, 2])
    torch.testing.assert_close(encoder(images[turned], scale[turned]), whole[turned], atol=1e-6, rtol=0)
    for i in range(6):
        torch.testing.assert_close(encoder(images[i : i + 1], scale[i : i + 1])[0], whole[i], atol=1e-6, rtol=0)


@torch.no_grad()
def test_each_column_scales_its_own_branch(encoder):
    """Against timm with the branch's last layer scaled; the scale of column 2i is attention's, of 2i + 1 the MLP's."""
    for column in range(6):
        scale = torch.ones(4, 6)
        scale[:, column] = 0.4
        other = build_encoder(TINY)
        other.load_state_dict(encoder.state_dict())
        block = other.vit.blocks[column // 2]
        last = block.mlp.fc2 if column % 2 else block.attn.proj
        last.weight.mul_(0.4)
        last.bias.mul_(0.4)
        torch.testing.assert_close(encoder(_images(), scale), other.vit(_images()), atol=1e-5, rtol=0)
    assert not torch.allclose(encoder(_images(), scale), encoder(_images()))


@pytest.mark.parametrize(("native", "side"), [(14, 6), (14, 37), (7, 3)])
def test_position_embedding_is_resampled_as_published(native, side):
    position = torch.randn(1 + native**2, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    grid = position[None, 1:].reshape(1, native, native, 16).permute(0, 3, 1, 2)
    factor = (side + 0.1) / native
    published = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    assert published.shape[-2:] == (side, side)
    expected = torch.cat([position[:1], published.permute(0, 2, 3, 1).reshape(-1, 16)])
    ours = resample_position(position, (native, native), (side, side))
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    gradients = [torch.autograd.grad((out * weight).sum(), position)[0] for out in (ours, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)
    by_size = F.interpolate(grid, size=(side, side), mode="bicubic").permute(0, 2, 3, 1).reshape(-1, 16)
    assert (ours[1:] - by_size).abs().max() > 1e-3  # the 0.1 matters


def test_native_grid_is_left_exactly():
    position = torch.randn(10, 4)
    assert resample_position(position, (3, 3), (3, 3)) is position


@torch.no_grad()
def test_rows_and_columns_are_not_swapped(encoder):
    position = encoder.vit.pos_embed[0]
    wide = resample_position(position, (4, 4), (2, 5))[1:].reshape(2, 5, -1)
    grid = position[1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, scale_factor=(2.1 / 4, 5.1 / 4), mode="bicubic")[0].permute(1, 2, 0)
    torch.testing.assert_close(wide, expected, atol=1e-6, rtol=0)
    assert encoder.tokens(torch.zeros(1, 3, 16, 40)).shape == (1, 11, 24)


def test_resampling_keeps_float32_under_autocast(encoder):
    exact = resample_position(encoder.vit.pos_embed[0], (4, 4), (2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resample_position(encoder.vit.pos_embed[0], (4, 4), (2, 2)), exact)
        features = encoder(_images(2, 16), torch.ones(2, 6))
    assert torch.isfinite(features).all()


def test_refuses_an_image_that_does_not_divide(encoder):
    with pytest.raises(ConfigError, match=r"image of 30 x 30 px: .* patch of 8 px"):
        encoder(torch.zeros(1, 3, 30, 30))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "vit_smal_patch16_224"}, "did you mean vit_small_patch16_224"),
        ({"name": "resnet18"}, "resnet18"),
        ({"name": "vit_small_patch14_reg4_dinov2"}, "plain vision transformer"),
        ({"name": "vit_base_patch16_gap_224"}, "vit_base_patch16_gap_224"),
        ({"num_heads": 5}, "timm cannot build it"),
        ({"image_px": 33}, "multiple of the patch of 8 px"),
        ({"drop_path": 1.0}, "drop_path = 1.0; expected below 1"),
        ({"depth": 0}, "depth = 0; expected at least 1"),
    ],
)
def test_refuses_what_it_cannot_build_in_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_encoder(replace(TINY, **changes))
    assert "\n" not in str(caught.value)
