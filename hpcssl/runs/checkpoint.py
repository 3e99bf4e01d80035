"""Checkpoints: one safetensors file each, written whole or not at all, holding its own digest; no code is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from hpcssl.core.atomic import atomic_file
from hpcssl.core.errors import RunError

if TYPE_CHECKING:
    import torch

FORMAT = 1
_NAME = re.compile(r"step-(\d+)\.safetensors$")
_DTYPES = {  # PyTorch's names, which takes seconds to import, and safetensors'
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


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
            _write_safetensors(temporary, whole, {"hpcssl": header})
        except OSError as error:  # which may not know the file, let alone its final name
            raise OSError(error.errno, error.strerror, str(path)) from None
        before_rename()


def _write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file of the format safetensors, and sync it.

    The library's own writer puts the data into another temporary file, which a kill would leave for ever and which
    nobody but its owner may read; some of its versions hold the interpreter's lock meanwhile.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    in_order = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that all lie aligned
    end = 0
    for name, tensor in in_order:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in in_order:
            stream.write(_bytes(tensor).data)
        stream.flush()
        os.fsync(stream.fileno())  # here, not after the last look at the claim: on a slow disk it takes a while


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return a checkpoint's tensors on the CPU, and its state with `step` in it, after checking its digest.

    RunError where the file is missing, damaged, or of another format.
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
    """Read the newest whole checkpoint, or None where nothing was trained; damaged ones are told to `on_damaged`.

    RunError where there are checkpoints of trained steps and none can be read: to begin anew would bury what they hold.
    """
    steps, damages = checkpoint_steps(run), []
    for step in reversed(steps):
        try:
            loaded = load_checkpoint(checkpoint_path(run, step))
        except RunError as error:
            damages.append(str(error))
            continue
        for damage in damages:
            on_damaged(f"{damage}; falling back to step {step}")
        return loaded
    if steps and steps[-1] > 0:
        raise RunError(
            f"{run}: none of its {len(steps)} checkpoints can be read (the newest: {damages[0]}); nothing was changed;"
            " put a whole one back, or choose another --out"
        )
    for damage in damages:
        on_damaged(f"{damage}; it is computed again")
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
        digest.update(_bytes(tensor).data)
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """Return a contiguous tensor's memory."""
    import torch

    content: NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return content
