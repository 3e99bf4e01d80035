"""Starting points: the weights of an encoder from a local file, in timm's layout or of an official checkpoint.

Understood are .safetensors and files of `torch.save`, read without unpickling code: bare weights under timm's names,
those below `state_dict` or `model` (MAE's checkpoints), and DINO's `teacher` or `student` with their prefixes
`module.` and `backbone.`. Nothing is ever downloaded.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hpcssl.core.errors import ConfigError
from hpcssl.models.encoder import Encoder

_BELOW = ("teacher", "student", "model", "state_dict")  # of these the first that there is holds the weights
_PREFIXES = ("module.", "backbone.")
_NOT_ENCODER = ("head", "fc_norm.", "decoder_", "mask_token")  # classifier, projection head, MAE's decoder


def read_initial_weights(path: Path, encoder: Encoder) -> tuple[dict[str, Tensor], str]:
    """Return the weights of `encoder.vit` from a file, and a sentence that says what matched.

    Only names and shapes of the encoder are looked at: it may lie on torch's meta device.

    Raises
    ------
    ConfigError
        If there is no such file, it holds no weights, or the first that does not fit: its name and both shapes.
    """
    weights, left_out = {}, 0
    for name, tensor in _read(path).items():
        name = _bare(name)
        if name.startswith(_NOT_ENCODER):
            left_out += 1
        else:
            weights[name] = tensor
    wanted = {name: tuple(t.shape) for name, t in encoder.vit.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise ConfigError(
                f"{path}: does not fit encoder {encoder.config.name}: {name} is {_shape(found.get(name))} in the file,"
                f" {_shape(wanted.get(name))} in the encoder; set encoder to the file's sizes, or give another file"
            )
    others = f"; {left_out} of a head or decoder left out" if left_out else ""
    return weights, f"encoder starts from {path}: all {len(wanted)} of its tensors matched{others}"


def _read(path: Path) -> dict[str, Tensor]:
    """Return the named tensors of a file, wherever in it they stand."""
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file; nothing is downloaded: put the weights there (timm's .safetensors or .pth, an"
            " official DINO or MAE checkpoint), or leave out initial_weights"
        )
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise ConfigError(f"{path}: cannot be read as weights ({''.join(reason)[:200]})") from None
    for name in _BELOW:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise ConfigError(f"{path}: no named weights in it; expected some, or a mapping with {', '.join(_BELOW)}")
    return tensors


def _unpickled(path: Path) -> Any:
    """Read a file of `torch.save`; official checkpoints also hold the command line, an argparse.Namespace."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a number"
