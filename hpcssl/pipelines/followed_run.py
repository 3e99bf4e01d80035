"""What a run that is followed by a benchmark tells of itself; each rank imports this, and so nothing that is heavy."""

from __future__ import annotations

from pathlib import Path

from hpcssl.runs.checkpoint import checkpoint_steps
from hpcssl.runs.run_folder import read_config


def folder_of(run: Path) -> Path:
    """Return the folder of a run's benchmark."""
    return run / "benchmark"


def is_followed(run: Path) -> bool:
    """Return whether a run has a benchmark."""
    return (folder_of(run) / "bench.yaml").is_file()


def measured_steps(run: Path, *, every: int) -> list[int]:
    """Return the steps whose checkpoints are there and end every so many pseudo-epochs; 0, untrained, is one."""
    settings = read_config(run)
    batch, positions = settings["global_batch"], settings["derived"]["positions_per_pseudo_epoch"]

    def is_measured(step: int) -> bool:
        number = -(-step * batch // positions)
        return number % every == 0 and number * positions // batch == step

    return [step for step in checkpoint_steps(run) if is_measured(step)]
