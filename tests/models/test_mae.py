from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hpcssl.core.errors import ConfigError
from hpcssl.models.decoder import MaeDecoderConfig, MaskedAutoencoder, sincos_position
from hpcssl.models.encoder import EncoderConfig, build_encoder

TINY = EncoderConfig(image_px=32, patch_px=8, embed_dim=24, depth=2, num_heads=2, drop_path=0.0)
DECODER = MaeDecoderConfig(embed_dim=16, depth=2, num_heads=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MaskedAutoencoder(build_encoder(TINY), DECODER)


def _inputs(batch=3, num_masked=12):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 32, 32, generator=generator)
    mask = torch.zeros(batch, 16, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(16, generator=generator)[:num_masked]] = True
    return images, mask


def _pixels(mask):
    return mask.reshape(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)


@torch.no_grad()
def test_masked_pixels_change_no_prediction(model):
    images, mask = _inputs()
    noise = torch.randn(images.shape) * _pixels(mask)
    assert torch.equal(model(images + noise, mask), model(images, mask))
    shifted = model(images + torch.randn(images.shape) * ~_pixels(mask), mask)
    assert (shifted - model(images, mask)).abs().max() > 1e-2


@torch.no_grad()
def test_predictions_equal_a_plain_loop_over_samples(model):
    """Each sample alone, its visible patches picked by index and put back by index."""
    images, mask = _inputs()
    vit = model.encoder.vit
    expected = []
    for image, row in zip(images, mask):
        visible = (~row).nonzero()[:, 0]
        patches = vit.patch_embed(image[None])[0] + vit.pos_embed[0, 1:]
        x = torch.cat([vit.cls_token[0] + vit.pos_embed[0, :1], patches[visible]])[None]
        x = model.decoder_embed(vit.norm(vit.blocks(x)))[0]
        full = model.mask_token[0].repeat(17, 1)
        full[0] = x[0]
        full[1 + visible] = x[1:]
        y = model.decoder_blocks(full[None] + model.decoder_position)
        expected.append(model.decoder_pred(model.decoder_norm(y))[0, 1:])
    predictions = model(images, mask)
    assert predictions.shape == (3, 16, 192)
    torch.testing.assert_close(predictions, torch.stack(expected), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_encoder_runs_on_the_visible_patches_only(model):
    lengths = []
    model.encoder.vit.blocks[0].attn.register_forward_hook(lambda _m, args, _o: lengths.append(args[0].shape[1]))
    model(*_inputs(num_masked=12))
    assert lengths == [1 + 4]


def test_refuses_rows_with_unequal_masks(model):
    images, mask = _inputs()
    mask[0] = False
    with pytest.raises(AssertionError, match="visible patches"):
        model(images, mask)


@pytest.mark.parametrize(("dim", "rows", "columns"), [(16, 4, 4), (8, 2, 3)])
def test_position_embedding_is_the_published_one(dim, rows, columns):
    omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))
    ours = sincos_position(dim, (rows, columns))[0].numpy()
    assert np.all(ours[0] == 0)
    for r in range(rows):
        for c in range(columns):
            expected = np.concatenate([np.sin(c * omega), np.cos(c * omega), np.sin(r * omega), np.cos(r * omega)])
            np.testing.assert_allclose(ours[1 + r * columns + c], expected, atol=1e-7)


def test_position_embeddings_are_fixed(model):
    images, mask = _inputs()
    model(images, mask).square().mean().backward()
    assert torch.equal(model.encoder.vit.pos_embed.data, sincos_position(24, (4, 4)))
    assert not model.encoder.vit.pos_embed.requires_grad
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == ["encoder.vit.pos_embed"]
    assert "decoder_position" not in model.state_dict()


def test_initial_weights_are_xavier_uniform_and_tokens_small(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
            assert module.bias.abs().max() == 0
    proj = model.encoder.vit.patch_embed.proj.weight
    bound = (6 / (24 + 192)) ** 0.5
    assert 0.9 * bound < proj.abs().max() <= bound
    assert 0.005 < model.mask_token.std() < 0.05


def test_refuses_what_does_not_fit():
    with pytest.raises(ConfigError, match=r"drop_path 0.1: MAE has none"):
        MaskedAutoencoder(build_encoder(replace(TINY, drop_path=0.1)), DECODER)
    with pytest.raises(ConfigError, match="multiple of 4"):
        MaskedAutoencoder(build_encoder(TINY), MaeDecoderConfig(embed_dim=18, num_heads=2))
    with pytest.raises(ConfigError, match="multiple of num_heads, which is 5"):
        MaeDecoderConfig(embed_dim=16, num_heads=5)


def test_keeps_working_under_autocast(model):
    images, mask = _inputs()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images, mask)
    torch.testing.assert_close(half.float(), model(images, mask), atol=0.1, rtol=0)
