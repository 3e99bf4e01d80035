"""The whole state of a run at a step: weights, optimiser, loss scale; to and from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hpcssl.core.config import to_mapping
from hpcssl.core.errors import RunError
from hpcssl.optim.parameters import parameter_groups
from hpcssl.train.config import PretrainConfig, StepValues
from hpcssl.train.objective import Objective, build_objective
from hpcssl.train.reduce import GradientBuffer

_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainState:
    """What training changes.

    Attributes
    ----------
    step : optimiser steps done
    objective : model and loss
    """

    def __init__(self, recipe: PretrainConfig, device: torch.device):
        self.step = 0
        self.objective: Objective = build_objective(recipe, device)
        self._recipe = recipe
        groups = parameter_groups(self.objective.trained.named_parameters())
        self.parameters: list[torch.nn.Parameter] = [p for g in groups for p in g["params"]]
        self._names: list[str] = [n for g in groups for n in g["names"]]
        self.gradients = GradientBuffer(self.parameters)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=recipe.optim.betas, fused=device.type == "cuda")
        fp16 = resolve_precision(recipe.train.precision, device) is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    def set_values(self, values: StepValues) -> None:
        """Set learning rate and weight decay of the step."""
        for group in self.optimizer.param_groups:
            group["lr"] = values.lr
            group["weight_decay"] = values.weight_decay if group["decays"] else 0.0

    def to_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors by name and plain values."""
        tensors = dict(self.objective.module.state_dict())
        updates: dict[str, float] = {}
        for name, parameter in zip(self._names, self.parameters, strict=True):
            moments = self.optimizer.state.get(parameter)
            if moments:
                updates[name] = float(moments["step"])
                tensors |= {f"optimizer.{key}.{name}": moments[key] for key in _MOMENTS}
        state = {
            "objective": self._recipe.objective,
            "encoder": to_mapping(self._recipe.encoder),
            "encoder_prefix": self.objective.encoder_prefix,
            "updates": updates,
            "scaler": self.scaler.state_dict(),
            "samples_seen": self.step * self._recipe.global_batch,
        }
        return tensors, state

    def from_checkpoint(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Become the state of a checkpoint; RunError where its weights are another model's."""
        weights = {name: t for name, t in tensors.items() if not name.startswith("optimizer.")}
        try:
            self.objective.module.load_state_dict(weights)
        except RuntimeError as error:
            raise RunError(f"the checkpoint of step {state['step']} holds another model ({error})") from None
        for name, parameter in zip(self._names, self.parameters, strict=True):
            if name in state["updates"]:
                count_device = parameter.device if parameter.is_cuda else torch.device("cpu")
                moments = {key: tensors[f"optimizer.{key}.{name}"].to(parameter.device) for key in _MOMENTS}
                count = torch.tensor(state["updates"][name], dtype=torch.float32, device=count_device)
                self.optimizer.state[parameter] = {"step": count, **moments}
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the forward pass: of `auto`, bf16 where the GPU has it, else fp16; fp32 on the CPU."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision != "auto":
        return named[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
