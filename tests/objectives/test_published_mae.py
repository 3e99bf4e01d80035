"""Against the published code of MAE (github.com/facebookresearch/mae): set HPCSSL_MAE_REPO to a checkout."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm.models.vision_transformer
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from hpcssl.loader.stream import Batch
from hpcssl.models.decoder import MaeDecoderConfig, MaskedAutoencoder, sincos_position
from hpcssl.models.encoder import EncoderConfig, build_encoder, normalised
from hpcssl.objectives.contract import Tiles
from hpcssl.objectives.mae.mae_loss import patchify
from hpcssl.plan.draw import draw_mask
from hpcssl.train.objective import build_objective
from hpcssl.train.reduce import Collectives
from hpcssl.train.state import TrainState
from hpcssl.train.step import train_step

CPU = torch.device("cpu")
TOLERANCE = 1e-5

pytestmark = pytest.mark.usefixtures("one_thread")


def their_name(ours: str) -> str:
    """Return the published name of a parameter."""
    return ours.removeprefix("encoder.vit.")


@pytest.fixture
def models_mae(published, monkeypatch):
    """The published module, unchanged, under today's timm and numpy.

    It was written for timm 0.3.2 and numpy before 1.24. Two names are put back while it is in use: timm's Block takes
    qk_scale again (which must be None: the default scale), and np.float is Python's float.
    """
    published("HPCSSL_MAE_REPO", "models_mae.py")
    block = timm.models.vision_transformer.Block

    def old_block(*sizes, qk_scale=None, **more):
        assert qk_scale is None
        return block(*sizes, **more)

    monkeypatch.setattr(timm.models.vision_transformer, "Block", old_block)
    monkeypatch.setattr(np, "float", float, raising=False)
    return importlib.import_module("models_mae")


def _theirs(models_mae, recipe) -> nn.Module:
    """Return the published model in the recipe's sizes."""
    size, decoder = recipe.encoder, recipe.objective.decoder
    return models_mae.MaskedAutoencoderViT(
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


def _load(theirs: nn.Module, ours: Any) -> None:
    weights = {their_name(name): tensor for name, tensor in ours.module.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == ["decoder_pos_embed"]


def _masks(noise: torch.Tensor) -> torch.Tensor:
    """Return what the published code hides of 16 patches for this noise."""
    return torch.zeros(noise.shape, dtype=torch.bool).scatter_(1, noise.argsort(1)[:, 4:], True)


def test_loss_and_gradients_are_the_published_ones(small, models_mae, monkeypatch):
    recipe = small.mae_recipe()
    size = recipe.encoder
    ours = build_objective(recipe, CPU)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in ours.module.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    theirs = _theirs(models_mae, recipe)
    positions = {name: tensor.clone() for name, tensor in theirs.state_dict().items() if name.endswith("pos_embed")}
    _load(theirs, ours)
    for mine, published in (  # both are fixed
        (ours.module.get_submodule("encoder").vit.pos_embed.detach(), positions["pos_embed"]),
        (ours.module.decoder_position, positions["decoder_pos_embed"]),
    ):
        torch.testing.assert_close(mine, published, atol=1e-7, rtol=0)

    views = torch.randint(0, 256, (1, 6, size.image_px, size.image_px, 3), dtype=torch.uint8)
    noise = torch.rand(6, 16)
    mask = _masks(noise)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **more: noise)
        published_loss, _, hidden = theirs(normalised(views[0]), mask_ratio=0.75)
    assert torch.equal(hidden.bool(), mask)
    assert torch.equal(patchify(normalised(views[0]), size.patch_px), theirs.patchify(normalised(views[0])))
    published_loss.backward()
    loss = ours.loss(Tiles(positions=np.arange(6), views=(views,), mask=mask), None)
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


@pytest.mark.parametrize(("embed_dim", "side"), [(1024, 14), (512, 14), (1280, 16)])
def test_the_position_embedding_is_the_published_one(models_mae, embed_dim, side):
    published = models_mae.get_2d_sincos_pos_embed(embed_dim, side, cls_token=True)
    np.testing.assert_allclose(sincos_position(embed_dim, (side, side))[0].numpy(), published, atol=1e-7)


def test_as_many_patches_are_hidden_as_published(models_mae):
    for num_patches, ratio in itertools.product((16, 36, 196, 256), (0.1, 0.4, 0.6, 0.75, 0.8, 0.9)):
        mask = draw_mask(0, np.arange(5), num_patches, ratio)
        tokens = torch.zeros(5, num_patches, 1)
        _, hidden, _ = models_mae.MaskedAutoencoderViT.random_masking(None, tokens, ratio)
        assert mask.sum(1).tolist() == hidden.sum(1).tolist(), (num_patches, ratio)


def test_fresh_weights_are_drawn_as_published(models_mae):
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name="vit_tiny_patch16_224", depth=2, drop_path=0.0))
    ours = MaskedAutoencoder(encoder, MaeDecoderConfig(embed_dim=128, depth=1, num_heads=4))
    theirs = dict(
        models_mae.MaskedAutoencoderViT(
            embed_dim=192, depth=2, num_heads=3, decoder_embed_dim=128, decoder_depth=1, decoder_num_heads=4
        ).named_parameters()
    )
    for name, parameter in ours.named_parameters():
        wanted = theirs[their_name(name)]
        rel = 0.05 if parameter.numel() > 10_000 else 0.3  # of 128 numbers at least
        assert parameter.std().item() == pytest.approx(wanted.std().item(), rel=rel), name
        assert parameter.mean().item() == pytest.approx(wanted.mean().item(), abs=1e-2), name


def test_learning_rates_are_the_published_ones(published, small, timeline_of):
    published("HPCSSL_MAE_REPO", "util/lr_sched.py")
    adjust = importlib.import_module("util.lr_sched").adjust_learning_rate
    recipe = small.mae_recipe(global_batch=512)
    recipe = replace(recipe, optim=replace(recipe.optim, lr_per_256=1.5e-4, final_lr=1e-7, warmup_pseudo_epochs=3))
    timeline = timeline_of(recipe, 20, 7)
    settings = SimpleNamespace(lr=1.5e-4 * 512 / 256, min_lr=1e-7, warmup_epochs=3, epochs=20)
    for step in range(20 * 7):
        optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
        adjust(optimizer, step / 7, settings)
        assert timeline.values(step).lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step


@pytest.mark.usefixtures("in_float64")
def test_twelve_steps_of_training_give_the_published_weights(small, models_mae, timeline_of, monkeypatch):
    """Four epochs of three steps: what `train_step` does against the same in the order of engine_pretrain's loop."""
    adjust = importlib.import_module("util.lr_sched").adjust_learning_rate
    recipe = small.mae_recipe(global_batch=6)
    recipe = replace(
        recipe,
        optim=replace(recipe.optim, clip=None, warmup_pseudo_epochs=1),
        train=replace(recipe.train, precision="fp32", micro_batch=4),
    )
    state, timeline, theirs = TrainState(recipe, CPU), timeline_of(recipe, 4, 3), _theirs(models_mae, recipe)
    _load(theirs, state.objective)
    groups = param_groups_weight_decay(theirs, recipe.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    settings = SimpleNamespace(lr=timeline.peak_lr, min_lr=recipe.optim.final_lr, warmup_epochs=1, epochs=4)
    torch.manual_seed(1)
    for step in range(12):
        views = torch.randint(0, 256, (1, 6, 32, 32, 3), dtype=torch.uint8)
        noise = torch.rand(6, 16)
        adjust(optimizer, step / 3, settings)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *shape, noise=noise, **more: noise)
            loss, _, _ = theirs(normalised(views[0]).double(), mask_ratio=0.75)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        batch = Batch(step=step, positions=np.arange(6), views=(views,), mask=_masks(noise))
        record = train_step(state, batch, recipe, timeline, Collectives(), CPU)
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-9), step
    weights = theirs.state_dict()
    for name, tensor in state.objective.module.state_dict().items():
        torch.testing.assert_close(tensor, weights[their_name(name)], rtol=0, atol=1e-9)
