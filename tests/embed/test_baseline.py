"""Baselines: models of timm with weights from a file, or random ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from hpcssl.cli.main import main
from hpcssl.core.errors import ConfigError
from hpcssl.embed.baseline import Baseline
from hpcssl.embed.embedding import embed_store
from hpcssl.features.feature_folder import FeatureSet

pytestmark = pytest.mark.usefixtures("one_thread")
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """timm's resnet18 with its classifier, and a file of its weights."""
    torch.manual_seed(3)
    model = timm.create_model("resnet18", pretrained=False).eval()
    file = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(model.state_dict(), file)
    return model, file


def images(pixels):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)


def test_features_are_timms_own(resnet):
    model, file = resnet
    loaded = Baseline.parse("timm:resnet18", file).load()
    with torch.no_grad():
        wanted = model.forward_head(model.forward_features(images(PIXELS)), pre_logits=True)
        torch.testing.assert_close(loaded.features(PIXELS), wanted, atol=1e-5, rtol=1e-4)
    assert (loaded.dim, loaded.image_px) == (512, 224)
    assert loaded.about["weights_digest"]


def test_a_truncated_resnet_gives_the_mean_of_its_stage(resnet):
    model, file = resnet
    loaded = Baseline.parse("timm:resnet18:stage3", file).load()
    with torch.no_grad():
        x = model.maxpool(model.act1(model.bn1(model.conv1(images(PIXELS)))))
        wanted = model.layer3(model.layer2(model.layer1(x))).mean(dim=(2, 3))
        torch.testing.assert_close(loaded.features(PIXELS), wanted, atol=1e-5, rtol=1e-4)
    assert loaded.dim == 256


def test_the_papers_baselines_have_2048_and_1024_features():
    for text, dim in (("timm:resnet50:random", 2048), ("timm:resnet50:stage3:random", 1024)):
        loaded = Baseline.parse(text).load()
        assert (loaded.dim, loaded.features(PIXELS).shape[1]) == (dim, dim)


def test_a_head_that_widens_the_features_gives_its_own_number_of_them():
    loaded = Baseline.parse("timm:mobilenetv3_large_100:random").load()  # timm's num_features is 960
    assert (loaded.dim, loaded.features(PIXELS).shape[1]) == (1280, 1280)


def test_random_weights_are_the_same_each_time_and_others_than_the_files(resnet):
    first, second = (Baseline.parse("timm:resnet18:random").load().features(PIXELS) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.allclose(first, Baseline.parse("timm:resnet18", resnet[1]).load().features(PIXELS), atol=1e-2)
    names = [Baseline.parse(f"timm:resnet18{end}").name for end in ("", ":stage3", ":random")]
    assert names == ["resnet18", "resnet18, stage 3", "resnet18, random"]


def test_a_vision_transformer_has_its_own_normalisation_and_patch():
    loaded = Baseline.parse("timm:vit_tiny_patch16_224:random").load()
    assert (loaded.dim, loaded.multiple_px) == (192, 16)
    pixels = torch.full((1, 224, 224, 3), 128, dtype=torch.uint8)
    model = loaded.module
    torch.testing.assert_close(loaded.features(pixels), model(torch.full((1, 3, 224, 224), 128 / 255 * 2 - 1)))


def test_weights_that_are_not_there_are_not_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"timm:resnet18: its weights are not on this machine .*--weights FILE"):
        Baseline.parse("timm:resnet18").load()


def test_weights_that_do_not_fit_are_told(resnet, tmp_path):
    weights = resnet[0].state_dict()
    cases = {
        "lacks": ({k: v for k, v in weights.items() if k != "conv1.weight"}, r"lacks conv1\.weight \(1 such of 120\)"),
        "holds": ({**weights, "extra": torch.ones(1)}, r"holds extra"),
        "shape": ({**weights, "conv1.weight": torch.ones(1)}, r"conv1\.weight has shape \(1,\); the model's is \(64"),
    }
    for name, (content, message) in cases.items():
        torch.save({"state_dict": content}, tmp_path / f"{name}.pth")
        with pytest.raises(ConfigError, match=message):
            Baseline.parse("timm:resnet18", tmp_path / f"{name}.pth").load()
    with pytest.raises(ConfigError, match="no such file of weights; nothing is downloaded"):
        Baseline.parse("timm:resnet18", tmp_path / "gone.pth").load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timm:resnet51", "timm has no model resnet51; did you mean resnet"),
        ("timm:resnet18:last", "'last' behind the model's name"),
        ("timm:resnet18:stage5:random", "no stage"),
        ("timm:vit_tiny_patch16_224:stage3:random", "no stage"),
    ],
)
def test_names_that_cannot_be_used(text, message):
    with pytest.raises(ConfigError, match=message):
        Baseline.parse(text).load()


def test_a_store_is_embedded_by_a_baseline(data, resnet, tmp_path, capsys):
    embed_store(data.store, Baseline.parse("timm:resnet18:stage2", resnet[1]), tmp_path / "f", threads=1, tile_px=64)
    features = FeatureSet.open(tmp_path / "f")
    assert (features.encoder, features.checkpoint, features.dim) == ("resnet18, stage 2", "", 128)
    assert json.loads((tmp_path / "f" / "features.json").read_text())["weights"] == str(resnet[1])
    command = ["embed", "--store", str(data.store_path), "--out", str(tmp_path / "g"), "--threads", "1"]
    assert main([*command, "--encoder", "timm:resnet18:random", "--tile-px", "64"]) == 0
    assert FeatureSet.open(tmp_path / "g").encoder == "resnet18, random"
    assert main([*command, "--encoder", "run", "--weights", "x"]) == 2
    assert "run is a run" in capsys.readouterr().err
