"""How a run is computed on a device: what `auto` comes to. None of it changes what is computed."""

from __future__ import annotations

from functools import lru_cache

import torch

from hpcssl.models.blocks import Execution
from hpcssl.train.pretrain_config import TrainConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the recipes' name of a precision.

    >>> dtype_name(torch.bfloat16)
    'bf16'
    """
    return next(name for name, known in _DTYPES.items() if known is dtype)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the forward pass: of `auto`, bf16 where the GPU has it, else fp16; fp32 on the CPU."""
    if precision != "auto":
        return _DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def resolve_execution(train: TrainConfig, device: torch.device) -> Execution:
    """Return how blocks are computed.

    `auto` compiles on GPUs, where it saves most of the memory traffic between the matrix products, if a compiler works
    there; on a CPU it gains little and costs a minute at each start. Torch's fused attention has a slow backward pass
    in half precision on CPUs.
    """
    on_gpu = device.type == "cuda"
    return Execution(
        compiled=(on_gpu and can_compile(device)) if train.compile == "auto" else train.compile,
        checkpointed=train.checkpoint_activations,
        fused_attention=on_gpu or resolve_precision(train.precision, device) is torch.float32,
    )


def describe_execution(train: TrainConfig, device: torch.device) -> str:
    """Say how a run is computed on a device, and which of it `auto` has chosen.

    >>> describe_execution(TrainConfig(), torch.device("cpu"))
    'in fp32 (auto) on the CPU'
    """
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    precision = dtype_name(resolve_precision(train.precision, device))
    chosen = " (auto)" if train.precision == "auto" else ""
    blocks = ", blocks compiled" if resolve_execution(train, device).compiled else ""
    return f"in {precision}{chosen} on {where}{blocks}"


@lru_cache
def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile works on a device, by trying it: it needs a compiler and its headers."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.zeros(2, device=device))
    except (RuntimeError, OSError, ImportError):
        return False
    return True
