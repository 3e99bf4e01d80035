"""A run's encoder as others use it: weights under timm's names, and the words of a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from hpcssl import __version__
from hpcssl.core.atomic import digest_file, write_atomic
from hpcssl.core.config import dump_yaml
from hpcssl.core.errors import RunError
from hpcssl.embed.sources import Source
from hpcssl.models.encoder import MEAN, STD
from hpcssl.objectives.registry import objective_named
from hpcssl.runs.checkpoint import checkpoint_path, load_checkpoint
from hpcssl.runs.run_folder import NOT_SETTINGS, read_config


def write_weights(source: Source, out: Path, *, student: bool = False) -> tuple[dict[str, Any], str]:
    """Write an encoder of a checkpoint under timm's names, whole or not at all.

    Returns the checkpoint's plain values, and the words of the card on what was learnt and which encoder this is.
    RunError where the checkpoint is missing or damaged, or has no such student; ConfigError for an unknown objective.
    """
    tensors, state = load_checkpoint(checkpoint_path(source.run, source.step))
    objective = objective_named(state["objective"], where=str(source.run))
    part, prefix = next(iter(objective.encoders)), state["encoder_prefix"]
    if student:
        part = "student"
        if part not in objective.encoders:
            raise RunError(
                f"{source.run}: --student: a run of {state['objective']} has one encoder; leave --student out"
            )
        prefix = objective.encoders[part]
    prefix += "vit."
    weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    about = {"format": "pt", "timm": json.dumps(timm_arguments(state["encoder"])), "step": str(source.step)}
    write_atomic(out, save(weights, metadata=about))
    return state, f"{objective.title}, weights of the {part}"


def timm_arguments(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` that build an encoder of these settings.

    >>> timm_arguments({"name": "vit_small_patch16_224", "image_px": 224, "embed_dim": None})
    {'model_name': 'vit_small_patch16_224', 'num_classes': 0, 'img_size': 224}
    """
    names = {"patch_px": "patch_size", "embed_dim": "embed_dim", "depth": "depth", "num_heads": "num_heads"}
    sizes = {theirs: encoder[ours] for ours, theirs in names.items() if encoder.get(ours) is not None}
    return {"model_name": encoder["name"], "num_classes": 0, "img_size": encoder["image_px"], **sizes}


def model_card(source: Source, file: Path, state: Mapping[str, Any], *, objective: str, organs: str) -> str:
    """Return the card in Markdown: how to load the weights, and what they were made of.

    `state` and `objective` are what `write_weights` returned of the weights in `file`, `organs` is the text on those of
    the schedule.
    """
    config, name = read_config(source.run), file.name
    data, recipe = config["data"], {key: value for key, value in config.items() if key not in NOT_SETTINGS}
    arguments = timm_arguments(state["encoder"])
    call = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    positions = config["derived"]["positions_per_pseudo_epoch"]
    rows = {
        "objective": objective,
        "architecture": f"{arguments['model_name']}, class token after the last norm",
        "optimiser steps": f"{source.step:,}",
        "tiles seen": f"{state['samples_seen']:,} ({state['samples_seen'] / positions:.4g} pseudo-epochs)",
        "tile store (SHA-256)": data["store_digest"],
        "schedule (SHA-256)": data["schedule_digest"],
        "initial weights (SHA-256)": data.get("initial_weights_digest", "none: trained from scratch"),
        "weights file (SHA-256)": digest_file(file),
        "written by": f"hpcssl {__version__}",
        "licence": "TO BE STATED by whoever publishes these weights",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""# {name.removesuffix(".safetensors")}

| | |
|---|---|
{table}

## Loading

```python
import timm
from safetensors.torch import load_file

model = timm.create_model({call})
model.load_state_dict(load_file({name!r}), strict=True)
```

Images are RGB in [0, 1] of {arguments["img_size"]} px, less the mean {list(MEAN)}, over the deviation {list(STD)}.

## Organs

{organs}

## Recipe

```yaml
{dump_yaml(recipe).rstrip()}
```
"""
