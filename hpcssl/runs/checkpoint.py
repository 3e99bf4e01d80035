"""Checkpoints: one safetensors file each, written whole or not at all, holding its own digest; no code is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hpcssl.core.atomic import atomic_file
from hpcssl.core.errors import RunError

FORMAT = 1
_NAME = re.compile(r"step-(\d+)\.safetensors$")


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the file of a step's checkpoint: the one name that writer, reader and launcher use."""
    return run / "checkpoints" / f"step-{step:09d}.safetensors"


def checkpoint_steps(run: Path) -> list[int]:
    """Return the steps that have a checkpoint, in order."""
    return sorted(int(m[1]) for f in (run / "checkpoints").glob("step-*.safetensors") if (m := _NAME.match(f.name)))


def save_checkpoint(
    run: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    *,
    before_rename: Callable[[], None] = lambda: None,
) -> Path:
    """Write the checkpoint of a step: named tensors and a state of plain values; atomic, synced, with its digest.

    `before_rename` is called when the file is whole and synced; what it raises keeps the file from its name.
    """
    path = checkpoint_path(run, step)
    write_state(path, step, tensors, state, before_rename=before_rename)
    return path


def write_state(
    path: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    *,
    before_rename: Callable[[], None] = lambda: None,
) -> None:
    """Write a file of the format of checkpoints anywhere; `load_checkpoint` reads it."""
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    content = {"format": FORMAT, "step": step, "state": dict(state)}
    header = json.dumps({**content, "digest": _digest(whole, content)})
    with atomic_file(path) as temporary:
        try:
            save_file(whole, temporary, metadata={"hpcssl": header})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number:  # a full disk, say: an error of the system like any other
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
            raise
        with temporary.open("rb") as stream:  # here, not after the last look: on a slow disk it takes a while
            os.fsync(stream.fileno())
        before_rename()


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a checkpoint and check its digest.

    Returns
    -------
    The tensors on the CPU, and the state with `step` in it.

    Raises
    ------
    RunError
        If the file is missing, damaged, or of another format.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            header = json.loads((stream.metadata() or {}).get("hpcssl", "{}"))
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise RunError(f"{path}: no such checkpoint") from None
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise RunError(f"{path}: damaged checkpoint ({error})") from None
    if header.get("format") != FORMAT:
        raise RunError(f"{path}: checkpoint format {header.get('format')}; this version reads {FORMAT}")
    digest = header.pop("digest", None)
    if _digest(tensors, header) != digest:
        raise RunError(f"{path}: damaged checkpoint (its digest differs)")
    return tensors, {**header["state"], "step": header["step"]}


def load_latest(run: Path, on_damaged: Callable[[str], None]) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Read the newest checkpoint that is whole, or None; every damaged one is told to `on_damaged`."""
    for step in reversed(checkpoint_steps(run)):
        try:
            return load_checkpoint(checkpoint_path(run, step))
        except RunError as error:
            on_damaged(f"{error}; falling back to the one before")
    return None


def prune_checkpoints(run: Path, step: int, *, keep_last: int, keep_steps: Callable[[int], bool]) -> None:
    """Remove checkpoints up to `step` but for the last `keep_last` and those whose step is to be kept.

    Later ones are not counted: a run that has not come there yet found them damaged.
    """
    steps = [s for s in checkpoint_steps(run) if s <= step]
    for old in steps[: max(0, len(steps) - keep_last)]:
        if not keep_steps(old):
            checkpoint_path(run, old).unlink(missing_ok=True)


def _digest(tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
