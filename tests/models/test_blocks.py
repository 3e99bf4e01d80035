from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hpcssl.models import blocks
from hpcssl.models.blocks import Execution
from hpcssl.models.decoder import MaeDecoderConfig, MaskedAutoencoder
from hpcssl.models.encoder import EncoderConfig, build_encoder, drop_path_rates, residual_scale

TINY = EncoderConfig(image_px=32, patch_px=8, embed_dim=24, depth=3, num_heads=2, drop_path=0.3)
HAS_COMPILER = shutil.which("g++") or shutil.which("clang++")


def _encoder(execution: Execution):
    torch.manual_seed(0)
    return build_encoder(TINY, execution).double()


def _scale():
    keep = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.6
    return residual_scale(keep, drop_path_rates(TINY))


def _images(px=32):
    return torch.randn(4, 3, px, px, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _loss_and_gradients(encoder, px=32):
    loss = encoder(_images(px), _scale()).square().mean()
    encoder.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in encoder.named_parameters()}


def _assert_same(a, b, px=32):
    (loss, gradients), (loss_again, gradients_again) = (_loss_and_gradients(e, px) for e in (a, b))
    torch.testing.assert_close(loss, loss_again, rtol=1e-10, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_again[name], rtol=1e-7, atol=1e-12)


def _saved_bytes(encoder) -> int:
    """What autograd keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = encoder(_images(), _scale()).sum()
    del loss
    return sum(kept.values())


def test_checkpointed_blocks_give_the_same_bits_and_keep_less(one_thread):
    plain, checkpointed = (_encoder(Execution(checkpointed=c)) for c in (False, True))
    assert list(plain.state_dict()) == list(checkpointed.state_dict())
    (loss, gradients), (loss_again, gradients_again) = map(_loss_and_gradients, (plain, checkpointed))
    assert torch.equal(loss, loss_again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name
    assert _saved_bytes(checkpointed) < 0.35 * _saved_bytes(plain)


@torch.no_grad()
def test_nothing_is_computed_twice_without_a_backward_pass(monkeypatch):
    monkeypatch.setattr(blocks, "checkpoint", None)
    _encoder(Execution(checkpointed=True))(_images())


def test_plain_attention_is_fused_attention(monkeypatch):
    fused, plain = (_encoder(Execution(fused_attention=f)) for f in (True, False))
    _assert_same(fused, plain)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    plain(_images())
    with pytest.raises(TypeError):
        fused(_images())


def test_the_decoder_is_computed_as_the_encoder(monkeypatch):
    encoder = build_encoder(replace(TINY, drop_path=0.0), Execution(fused_attention=False))
    model = MaskedAutoencoder(encoder, MaeDecoderConfig(embed_dim=16, depth=1, num_heads=2))
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[:, :12] = True
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    model(_images().float(), mask)


def _assert_one_graph_a_size():
    torch._dynamo.reset()
    plain, compiled = (_encoder(Execution(compiled=c)) for c in (False, True))
    assert list(plain.state_dict()) == list(compiled.state_dict())
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for px in (32, 16):
        _assert_same(plain, compiled, px)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2


def test_compiled_blocks_are_captured_whole_and_share_a_graph_for_each_image_size(monkeypatch):
    captured = torch.compile(blocks._block, dynamic=False, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(blocks, "_compiled_block", lambda: captured)
    _assert_one_graph_a_size()


@pytest.mark.long
@pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile on a CPU needs g++ or clang++")
def test_compiled_blocks_are_the_same_function():
    _assert_one_graph_a_size()
