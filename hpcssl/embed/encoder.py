"""The encoder of a run's checkpoint, ready to embed tiles."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from hpcssl.core.config import build
from hpcssl.core.errors import RunError
from hpcssl.models.encoder import Encoder, EncoderConfig, build_encoder
from hpcssl.runs.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint
from hpcssl.runs.folder import read_config


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where an encoder comes from.

    Attributes
    ----------
    run : run folder
    step : optimiser step of the checkpoint; 0 = untrained
    """

    run: Path
    step: int

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read `RUN` (its newest checkpoint) or `RUN@STEP`; RunError where there is no such checkpoint."""
        if text.startswith("timm:"):
            raise RunError(f"{text}: encoders without a run are not supported yet; expected RUN or RUN@STEP")
        match = re.fullmatch(r"(.+)@(\d+)", text)
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


def load_encoder(source: Source) -> tuple[Encoder, dict]:
    """Return the encoder on the CPU in evaluation mode (of DINO the teacher), and the checkpoint's plain values."""
    tensors, state = load_checkpoint(checkpoint_path(source.run, source.step))
    encoder = build_encoder(build(EncoderConfig, state["encoder"], where=f"{source.run}"))
    prefix = state["encoder_prefix"]
    encoder.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    return encoder.eval().requires_grad_(False), state


def best_device() -> torch.device:
    """Return the first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
