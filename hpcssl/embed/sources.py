"""The encoder of a run's checkpoint, ready to embed tiles."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hpcssl.core.config import build
from hpcssl.core.errors import RunError
from hpcssl.models.encoder import Encoder, EncoderConfig, build_encoder, normalised
from hpcssl.runs.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint
from hpcssl.runs.run_folder import CONFIG, read_config


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """An encoder that turns tiles into features, on the CPU and in evaluation mode."""

    module: nn.Module
    """What is moved to a device."""
    features: Callable[[Tensor], Tensor]
    """uint8 tiles [B, px, px, 3] on the module's device → features [B, D]."""
    dim: int
    image_px: int
    """Side of the tiles that it is made for."""
    multiple_px: int = 1
    """A tile's side must be a multiple of it."""
    about: dict[str, Any] = field(default_factory=dict)
    """What features.json tells of it, beyond name and size."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where an encoder comes from: a run folder, and the optimiser step of its checkpoint; 0 = untrained."""

    run: Path
    step: int

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read `RUN` (its newest checkpoint) or `RUN@STEP`; RunError where there is no such checkpoint."""
        is_run = (Path(text) / CONFIG).is_file()  # `a@5` may be its whole name
        match = None if is_run else re.fullmatch(r"(.+)@(\d+)", text)
        run = Path(match[1] if match else text)
        read_config(run)
        steps = checkpoint_steps(run)
        if not steps:
            raise RunError(f"{run}: no checkpoints yet")
        step = int(match[2]) if match else steps[-1]
        if step not in steps:
            raise RunError(f"{run}: no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        return cls(run=run, step=step)

    @property
    def name(self) -> str:
        """Name of the encoder in feature folders and results."""
        return self.run.resolve().name

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint in feature folders and results."""
        return str(self.step)

    def load(self) -> Embedder:
        """Return the encoder."""
        encoder, state = load_encoder(self)
        return Embedder(
            module=encoder,
            features=lambda pixels: encoder(normalised(pixels)),
            dim=encoder.embed_dim,
            image_px=encoder.config.image_px,
            multiple_px=encoder.patch_px,
            about={"samples_seen": state["samples_seen"]},
        )


def load_encoder(source: Source) -> tuple[Encoder, dict]:
    """Return the encoder on the CPU in evaluation mode (of DINO the teacher), and the checkpoint's plain values."""
    tensors, state = load_checkpoint(checkpoint_path(source.run, source.step))
    encoder = build_encoder(build(EncoderConfig, state["encoder"], where=f"{source.run}"))
    prefix = state["encoder_prefix"]
    encoder.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    return encoder.eval().requires_grad_(False), state
