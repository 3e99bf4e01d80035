"""Weights from a local file, in timm's layout or of an official checkpoint: an encoder's starting point, a baseline.

Understood are .safetensors and files of `torch.save`, read without unpickling code: bare weights under timm's names,
those below `state_dict` or `model` (MAE's checkpoints), and DINO's `teacher` or `student` with their prefixes
`module.` and `backbone.`. Nothing is ever downloaded.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hpcssl.core.errors import ConfigError
from hpcssl.models.encoder import Encoder

_GROUPS = ("teacher", "student", "model", "state_dict", "model_ema")  # the first that there is holds the weights
_NOT_ENCODER = ("head", "fc_norm.", "decoder_", "mask_token")  # classifier, projection head, MAE's decoder


def read_weights(path: Path, groups: Sequence[str] = _GROUPS) -> dict[str, Tensor]:
    """Return the named tensors of a file, without the prefix `module.` of their names.

    They stand in the first of some `groups` that there is, again and again, else on top.

    ConfigError where there is no such file, or it holds no weights that load without running code.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file of weights; nothing is downloaded: put them there (.safetensors or .pth of timm, or"
            " an official DINO or MAE checkpoint)"
        )
    try:
        # official checkpoints also hold the command line, an argparse.Namespace
        with torch.serialization.safe_globals([argparse.Namespace]):
            is_pickle = path.suffix != ".safetensors"
            content = torch.load(path, map_location="cpu", weights_only=True) if is_pickle else load_file(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise ConfigError(f"{path}: cannot be read as weights ({''.join(reason)[:200]})") from None
    while isinstance(content, Mapping) and (
        inner := [content[group] for group in groups if isinstance(content.get(group), Mapping)]
    ):
        content = inner[0]
    values = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(name).removeprefix("module."): value for name, value in values if isinstance(value, Tensor)}
    if not tensors:
        raise ConfigError(f"{path}: no named weights in it; expected some, or a mapping with {', '.join(groups)}")
    return tensors


def read_initial_weights(path: Path, encoder: Encoder) -> tuple[dict[str, Tensor], str]:
    """Return the weights of `encoder.vit` from a file, and a sentence that says what matched.

    Only names and shapes of the encoder are looked at: it may lie on torch's meta device. ConfigError as of
    `read_weights`, and for the first tensor that does not fit, with its name and both shapes.
    """
    named = {name.removeprefix("backbone."): tensor for name, tensor in read_weights(path).items()}
    weights = {name: tensor for name, tensor in named.items() if not name.startswith(_NOT_ENCODER)}
    expected = {name: tuple(tensor.shape) for name, tensor in encoder.vit.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in [*expected, *stored]:
        if expected.get(name) != stored.get(name):
            raise ConfigError(
                f"{path}: does not fit encoder {encoder.config.name}: {name} is {_shape(stored.get(name))} in the file,"
                f" {_shape(expected.get(name))} in the encoder; set encoder to the file's sizes, or give another file"
            )
    left_out = len(named) - len(weights)
    others = f"; {left_out} of a head or decoder left out" if left_out else ""
    return weights, f"encoder starts from {path}: all {len(expected)} of its tensors matched{others}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a number"
