"""`hpcssl export`: a run's encoder as weights for timm, with a model card beside it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUMMARY = "write a run's encoder as weights that timm loads, and a model card"
EXAMPLE = "hpcssl export runs/a@150000 --out opal-vits16.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run_and_step", metavar="RUN[@STEP]", help="a run's newest checkpoint, or that of a step")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.safetensors", help="file to write; the card is FILE.md"
    )
    parser.add_argument("--student", action="store_true", help="of DINO the student instead of the teacher")


def run(args: argparse.Namespace) -> int:
    """Export."""
    from hpcssl.core.atomic import digest_file, write_atomic
    from hpcssl.core.errors import RunError
    from hpcssl.embed.sources import Source

    out: Path = args.out
    if out.suffix != ".safetensors":
        raise RunError(f"--out {out}: expected a name that ends in .safetensors")
    source = Source.parse(args.run_and_step)
    out.parent.mkdir(parents=True, exist_ok=True)
    state = write_weights(source.run, source.step, out, student=args.student)
    card = out.with_suffix(".md")
    write_atomic(card, model_card(source.run, source.step, state, out.name, digest_file(out), student=args.student))
    print(f"weights: {out}\nmodel card: {card}")
    return 0


def write_weights(run: Path, step: int, out: Path, *, student: bool = False) -> dict[str, Any]:
    """Write the encoder of a checkpoint under timm's names, whole or not at all; return the checkpoint's plain values.

    Raises
    ------
    RunError
        If the checkpoint is missing or damaged, or a student is asked for that the run does not have.
    """
    from safetensors.torch import save

    from hpcssl.core.atomic import write_atomic
    from hpcssl.core.errors import RunError
    from hpcssl.runs.checkpoint import checkpoint_path, load_checkpoint

    tensors, state = load_checkpoint(checkpoint_path(run, step))
    prefix = state["encoder_prefix"]
    if student:
        if not prefix.startswith("teacher."):
            raise RunError(f"{run}: --student: a run of {state['objective']} has one encoder; leave --student out")
        prefix = prefix.replace("teacher.", "student.", 1)
    prefix += "vit."
    weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    about = {"format": "pt", "timm": json.dumps(timm_arguments(state["encoder"])), "step": str(step)}
    write_atomic(out, save(weights, metadata=about))
    return state


def timm_arguments(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` that build an encoder of these settings.

    >>> timm_arguments({"name": "vit_small_patch16_224", "image_px": 224, "embed_dim": None})
    {'model_name': 'vit_small_patch16_224', 'num_classes': 0, 'img_size': 224}
    """
    names = {"patch_px": "patch_size", "embed_dim": "embed_dim", "depth": "depth", "num_heads": "num_heads"}
    sizes = {theirs: encoder[ours] for ours, theirs in names.items() if encoder.get(ours) is not None}
    return {"model_name": encoder["name"], "num_classes": 0, "img_size": encoder["image_px"], **sizes}


def model_card(run: Path, step: int, state: Mapping[str, Any], name: str, digest: str, *, student: bool) -> str:
    """Return the card in Markdown: how to load the weights, and what they were made of."""
    from hpcssl import __version__
    from hpcssl.core.config import dump_yaml
    from hpcssl.models.encoder import MEAN, STD
    from hpcssl.runs.run_folder import NOT_SETTINGS, read_config

    config = read_config(run)
    data, recipe = config["data"], {key: value for key, value in config.items() if key not in NOT_SETTINGS}
    arguments = timm_arguments(state["encoder"])
    call = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    positions = config["derived"]["positions_per_pseudo_epoch"]
    objective = {"dino": "DINO", "mae": "MAE"}[state["objective"]]
    part = "student" if student else "teacher" if state["objective"] == "dino" else "encoder"
    rows = {
        "objective": f"{objective}, weights of the {part}",
        "architecture": f"{arguments['model_name']}, class token after the last norm",
        "optimiser steps": f"{step:,}",
        "tiles seen": f"{state['samples_seen']:,} ({state['samples_seen'] / positions:.4g} pseudo-epochs)",
        "tile store (SHA-256)": data["store_digest"],
        "schedule (SHA-256)": data["schedule_digest"],
        "initial weights (SHA-256)": data.get("initial_weights_digest", "none: trained from scratch"),
        "weights file (SHA-256)": digest,
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

{_organs(Path(data["schedule"]), data["schedule_digest"])}

## Recipe

```yaml
{dump_yaml(recipe).rstrip()}
```
"""


def _organs(schedule: Path, digest: str) -> str:
    """Return a table of the organs and their shares of the schedule, if it still lies where the run found it."""
    from hpcssl.core.errors import UserError
    from hpcssl.schedule.file import Schedule
    from hpcssl.schedule.inspect import organ_shares

    try:
        same = Schedule.open(schedule).digest == digest
        shares = organ_shares(schedule) if same else None
    except (UserError, OSError):
        shares = None
    if shares is None:
        return "The run's schedule was not at hand when this card was written."
    shares = shares.sort_values("scheduled_share", ascending=False)
    rows = [
        f"| {row.organ} | {row.num_tiles:,} | {row.natural_share:.2%} | {row.scheduled_share:.2%} |"
        for row in shares.itertuples()
    ]
    return "\n".join(["| organ | tiles | share of tiles | share of positions |", "|---|---|---|---|", *rows])
