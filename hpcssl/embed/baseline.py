"""Encoders that are no run's: any model of timm, a ResNet up to one of its stages, or random weights; no download ever.

The baselines of Campanella et al. 2023 are `timm:resnet50` (2,048 features, ImageNet weights) and
`timm:resnet50:stage3` (1,024 features).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import timm
import torch
from torch import Tensor, nn

from hpcssl.core.atomic import digest_file
from hpcssl.core.config import nearest
from hpcssl.core.errors import ConfigError
from hpcssl.embed.sources import Embedder
from hpcssl.models.weights import read_weights

PREFIX = "timm:"
_GROUPS = ("state_dict", "model", "model_ema", "teacher")  # below which published files keep the weights
_SEED = 0  # of random weights


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A model of timm and where its weights come from."""

    checkpoint: ClassVar[str] = ""
    """Name of the checkpoint in feature folders and results: none."""
    model: str
    """timm's name."""
    stage: int | None = None
    """Of a ResNet: features are the mean over the places of this stage's output; None: the whole model's."""
    random: bool = False
    """Weights as timm draws them, from a fixed seed."""
    weights: Path | None = None
    """File of weights; None: where timm keeps what it has downloaded."""

    @classmethod
    def parse(cls, text: str, weights: Path | None = None) -> Baseline:
        """Read `timm:NAME`, with `:stageN` and `:random` behind it if wanted; ConfigError for any other text."""
        name, *rest = text.removeprefix(PREFIX).split(":")
        if not timm.is_model(name):
            raise ConfigError(f"{text}: timm has no model {name}; {nearest(name, timm.list_models())}")
        stage = None
        for word in rest:
            if word.startswith("stage") and word[5:].isdigit():
                stage = int(word[5:])
            elif word != "random":
                raise ConfigError(f"{text}: {word!r} behind the model's name; expected stageN or random")
        if "random" in rest and weights is not None:
            raise ConfigError(f"{text}: random weights and --weights {weights}; expected one of them")
        return cls(model=name, stage=stage, random="random" in rest, weights=weights)

    @property
    def name(self) -> str:
        """Name of the encoder in feature folders and results."""
        stage = f", stage {self.stage}" if self.stage is not None else ""
        return f"{self.model}{stage}{', random' if self.random else ''}"

    def load(self) -> Embedder:
        """Return the model with its weights; ConfigError for missing or unfit ones, and a stage that it has not."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model: Any = timm.create_model(self.model, pretrained=False, num_classes=0)
        about: dict[str, Any] = {"weights": "random"}
        if not self.random:
            file = self.weights or _kept_by_timm(self.model, model.pretrained_cfg)
            _load(model, file, model.pretrained_cfg.get("classifier"))
            about = {"weights": str(file), "weights_digest": digest_file(file)}
        model.eval().requires_grad_(False)
        config = model.pretrained_cfg
        features = _features(model, self.stage, config["mean"], config["std"])
        px = int(config["input_size"][-1])
        patch_px = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
        return Embedder(
            module=model,
            features=features,
            dim=_dim(features, px, self.model) if self.stage is None else _channels(model, self.model, self.stage),
            image_px=px,
            multiple_px=int(np.ravel(patch_px)[0]),
            about=about,
        )


def _features(model: Any, stage: int | None, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """Return what turns uint8 tiles [B, px, px, 3] into features [B, D], normalised as the model expects."""

    def features(pixels: Tensor) -> Tensor:
        centre, spread = (255 * torch.tensor(value, device=pixels.device) for value in (mean, std))
        images = ((pixels.float() - centre) / spread).permute(0, 3, 1, 2)
        if stage is None:
            return model(images)
        kept = model.forward_intermediates(images, indices=[stage], stop_early=True, intermediates_only=True)
        return kept[0].mean(dim=(2, 3))

    return features


def _dim(features: Any, px: int, name: str) -> int:
    """Return the number of features by computing some: timm's num_features is not what every model's head gives."""
    shape = tuple(features(torch.zeros(1, px, px, 3, dtype=torch.uint8)).shape)
    if len(shape) != 2:
        raise ConfigError(f"timm:{name}: gives {shape} for a tile; expected one row of features")
    return shape[1]


def _channels(model: Any, name: str, stage: int) -> int:
    """Return the channels of a ResNet's stage."""
    modules = [info["module"] for info in getattr(model, "feature_info", [])]
    if f"layer{stage}" not in modules or modules.index(f"layer{stage}") != stage:
        raise ConfigError(f"timm:{name}: no stage {stage} to stop at; stages 1 to 4 of a ResNet can be taken")
    return int(model.feature_info[stage]["num_chs"])


def _kept_by_timm(name: str, config: dict[str, Any]) -> Path:
    """Return the file that timm has downloaded some time; ConfigError says where to put one."""
    from huggingface_hub import try_to_load_from_cache

    repository = config.get("hf_hub_id")
    for file in ("model.safetensors", "pytorch_model.bin") if repository else ():
        found = try_to_load_from_cache(str(repository), file)
        if isinstance(found, str):
            return Path(found)
    source = f" (published as {repository} on the Hugging Face hub)" if repository else ""
    raise ConfigError(
        f"timm:{name}: its weights are not on this machine{source}, and nothing is downloaded; fetch the file elsewhere"
        f" and name it with --weights FILE, or take timm:{name}:random"
    )


def _load(model: nn.Module, file: Path, classifier: str | tuple[str, ...] | None) -> None:
    """Load weights; of the file, only the classifier may be left over."""
    stored, expected = read_weights(file, _GROUPS), model.state_dict()
    ends = tuple(f"{name}." for name in ((classifier,) if isinstance(classifier, str) else classifier or ()))
    left = [name for name in stored if name not in expected and not name.startswith(ends)]
    missing = [name for name in expected if name not in stored]
    for verb, names in (("lacks", missing), ("holds", left)):
        if names:
            raise ConfigError(
                f"{file}: {verb} {names[0]} ({len(names)} such of {len(expected)}); expected weights of the same model"
            )
    for name, tensor in expected.items():
        if stored[name].shape != tensor.shape:
            raise ConfigError(
                f"{file}: {name} has shape {tuple(stored[name].shape)}; the model's is {tuple(tensor.shape)}"
            )
    model.load_state_dict({name: stored[name] for name in expected})
