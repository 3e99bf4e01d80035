from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from hpcssl.core.errors import ConfigError
from hpcssl.models.encoder import EncoderConfig, build_encoder
from hpcssl.models.weights import read_initial_weights

TINY = EncoderConfig(image_px=32, patch_px=8, embed_dim=24, depth=2, num_heads=2, drop_path=0.0)
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def vit():
    """A timm model with a classifier, its weights unlike those of any encoder built later."""
    torch.manual_seed(9)
    return timm.create_model(TINY.name, num_classes=5, **TIMM).eval()


def _write(path: Path, layout: str, weights: dict) -> Path:
    backbone = {n: t for n, t in weights.items() if not n.startswith("head")}
    head = {"head.mlp.0.weight": torch.zeros(3, 24), "head.last_layer.weight_v": torch.zeros(7, 3)}
    teacher = {f"backbone.{n}": t for n, t in backbone.items()} | head
    student = {f"module.{n}": torch.zeros_like(t) for n, t in teacher.items()}
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 24)}
    args = argparse.Namespace(arch="vit_small", lr=0.1)
    contents = {
        "bare": weights,
        "dino": {"student": student, "teacher": teacher, "epoch": 3, "args": args},
        "dino_student": {"student": {f"module.{n}": t for n, t in teacher.items()}},
        "mae": {"model": backbone | decoder},
        "state_dict": {"epoch": 1, "state_dict": {f"module.{n}": t for n, t in weights.items()}},
    }
    save_file(weights, path) if layout == "safetensors" else torch.save(contents[layout], path)
    return path


@pytest.mark.parametrize("layout", ["safetensors", "bare", "dino", "dino_student", "mae", "state_dict"])
def test_every_layout_gives_the_encoder_its_features(tmp_path, vit, layout):
    path = _write(tmp_path / ("w.safetensors" if layout == "safetensors" else "w.pth"), layout, vit.state_dict())
    encoder = build_encoder(TINY)
    weights, told = read_initial_weights(path, encoder)
    encoder.vit.load_state_dict(weights, strict=True)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), vit.forward_features(images)[:, 0], atol=1e-5, rtol=0)
    assert f"all {len(encoder.vit.state_dict())} of its tensors matched; 2 of a head or decoder left out" in told


def test_a_wrong_architecture_is_refused_by_its_first_tensor(tmp_path, vit):
    path = _write(tmp_path / "w.safetensors", "safetensors", vit.state_dict())
    with torch.device("meta"):
        wide, deep, large = (
            build_encoder(replace(TINY, **change)) for change in ({"embed_dim": 32}, {"depth": 3}, {"image_px": 64})
        )
        shallow = build_encoder(replace(TINY, depth=1))
    for encoder, message in (
        (wide, r"cls_token is 1x1x24 in the file, 1x1x32 in the encoder"),
        (deep, r"blocks.2.norm1.weight is absent in the file, 24 in the encoder"),
        (shallow, r"blocks.1.\S+ is 24 in the file, absent in the encoder"),
        (large, r"pos_embed is 1x17x24 in the file, 1x65x24 in the encoder"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            read_initial_weights(path, encoder)
        assert "\n" not in str(caught.value)


class _Code:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file ran')",))


def test_no_code_of_a_file_runs_and_what_is_no_weights_is_told_in_one_line(tmp_path):
    encoder = build_encoder(TINY)
    torch.save({"model": {}, "extra": _Code()}, tmp_path / "code.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 5)
    for name, message in (
        ("code.pth", "cannot be read as weights"),
        ("empty.pth", "no named weights"),
        ("list.pth", "no named weights"),
        ("torn.pth", "cannot be read as weights"),
        ("torn.safetensors", "cannot be read as weights"),
        ("nowhere.pth", "no such file of weights; nothing is downloaded: put them there"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            read_initial_weights(tmp_path / name, encoder)
        assert "\n" not in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)
