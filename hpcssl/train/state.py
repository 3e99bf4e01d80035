"""The whole state of a run at a step: weights, optimiser, loss scale; to and from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hpcssl.core.config import to_mapping
from hpcssl.core.errors import RunError
from hpcssl.optim.parameters import parameter_groups
from hpcssl.train.execution import resolve_precision
from hpcssl.train.objective import build_objective
from hpcssl.train.pretrain_config import PretrainConfig, StepValues
from hpcssl.train.reduce import GradientBuffer

_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainState:
    """What training changes: model, optimiser, loss scale, and the numbers of steps done and of those skipped."""

    def __init__(self, recipe: PretrainConfig, device: torch.device):
        self.step = self.skipped_steps = 0
        self.objective = build_objective(recipe, device)
        self._recipe = recipe
        groups = parameter_groups(self.objective.trained.named_parameters())
        self.parameters: list[torch.nn.Parameter] = [p for g in groups for p in g["params"]]
        self._names: list[str] = [n for g in groups for n in g["names"]]
        self.gradients = GradientBuffer(self.parameters)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=recipe.optim.betas, fused=True)
        fp16 = resolve_precision(recipe.train.precision, device) is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    def set_values(self, values: StepValues) -> None:
        """Set learning rate and weight decay of the step."""
        for group in self.optimizer.param_groups:
            group["lr"] = values.lr
            group["weight_decay"] = values.weight_decay if group["decays"] else 0.0

    def gradients_not_finite(self) -> list[str]:
        """Return the names of the parameters whose gradient is not finite."""
        named = zip(self._names, self.parameters, strict=True)
        return [name for name, p in named if p.grad is not None and not bool(p.grad.isfinite().all())]

    def is_overflow_normal(self) -> bool:
        """Return whether gradients may overflow: fp16's do until its loss scale is low enough; below 1 they may not."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

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
            "objective": self._recipe.objective.kind,
            "encoder": to_mapping(self._recipe.encoder),
            "encoder_prefix": self.objective.encoder_prefix,
            "updates": updates,
            "scaler": self.scaler.state_dict(),
            "skipped_steps": self.skipped_steps,
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
        self.step, self.skipped_steps = state["step"], state.get("skipped_steps", 0)
