"""Against the published code of MAE (github.com/facebookresearch/mae): set HPCSSL_MAE_REPO to a checkout."""

from __future__ import annotations

import importlib
from functools import partial

import numpy as np
import pytest
import timm.models.vision_transformer
import torch
from torch import nn

from hpcssl.models.encoder import normalised
from hpcssl.train.config import StepValues
from hpcssl.train.objective import Mae

CPU = torch.device("cpu")
TOLERANCE = 1e-5
VALUES = StepValues(lr=0.0, weight_decay=0.0, momentum=1.0, teacher_temperature=1.0, last_layer_frozen=False)

pytestmark = pytest.mark.usefixtures("one_thread")


def their_name(ours: str) -> str:
    """Return the published name of a parameter."""
    return ours.removeprefix("encoder.vit.")


@pytest.fixture
def models_mae(published, monkeypatch):
    """The published module; it was written for older releases of timm and numpy."""
    published("HPCSSL_MAE_REPO", "models_mae.py")
    block = timm.models.vision_transformer.Block
    monkeypatch.setattr(
        timm.models.vision_transformer, "Block", lambda *sizes, qk_scale=None, **more: block(*sizes, **more)
    )
    monkeypatch.setattr(np, "float", float, raising=False)
    return importlib.import_module("models_mae")


def test_loss_and_gradients_are_the_published_ones(small, models_mae, monkeypatch):
    recipe = small.mae_recipe()
    size, decoder = recipe.encoder, recipe.decoder
    ours = Mae(recipe, CPU)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in ours.module.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    theirs = models_mae.MaskedAutoencoderViT(
        img_size=size.image_px,
        patch_size=size.patch_px,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        decoder_embed_dim=decoder.embed_dim,
        decoder_depth=decoder.depth,
        decoder_num_heads=decoder.num_heads,
        mlp_ratio=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        norm_pix_loss=True,
    )
    positions = {name: tensor.clone() for name, tensor in theirs.state_dict().items() if name.endswith("pos_embed")}
    weights = {their_name(name): tensor for name, tensor in ours.module.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"decoder_pos_embed"}
    torch.testing.assert_close(theirs.pos_embed.detach(), positions["pos_embed"])  # both position embeddings are fixed
    torch.testing.assert_close(ours.module.decoder_position, positions["decoder_pos_embed"])

    views = torch.randint(0, 256, (1, 6, size.image_px, size.image_px, 3), dtype=torch.uint8)
    mask = torch.zeros(6, 16, dtype=torch.bool)
    noise = torch.rand(6, 16)
    mask.scatter_(1, noise.argsort(1)[:, 4:], True)  # what the published code hides for this noise
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **more: noise)
        published_loss, _, hidden = theirs(normalised(views[0]), mask_ratio=0.75)
    assert torch.equal(hidden.bool(), mask)
    published_loss.backward()
    loss = ours.loss((views,), np.arange(6), mask, VALUES)
    loss.backward()
    assert loss.item() == pytest.approx(published_loss.item(), rel=TOLERANCE)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compared = 0
    for name, parameter in ours.module.named_parameters():
        if parameter.requires_grad:
            wanted = gradients[their_name(name)]
            assert float((parameter.grad - wanted).norm() / wanted.norm()) < TOLERANCE, name
            compared += 1
    assert compared == sum(parameter.requires_grad for parameter in theirs.parameters())
