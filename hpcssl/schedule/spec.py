"""What a schedule is asked to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpcssl.core import config, resources
from hpcssl.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """Parameters of a schedule; the paper's value stands beside each default (Campanella et al. 2023).

    Attributes
    ----------
    seed : key of every draw; any integer
    num_pseudo_epochs : files of the schedule; paper 50
    positions_per_pseudo_epoch : draws in each; paper 65,000,000
    num_groups : pseudo-epochs that together use every slide exactly once (a pass); paper 5
    organ_power : an organ's weight is its tiles in the group to this power; 1 natural, 0 uniform. The paper says
        "balanced" without a formula; 0 is our reading
    max_repeats : a slide of n tiles is drawn at most n times this often in a pass; so is a tile, or once more where the
        pass begins within one of the slide's permutations
    """

    seed: int = 0
    num_pseudo_epochs: int = 50
    positions_per_pseudo_epoch: int = 65_000_000
    num_groups: int = 5
    organ_power: float = 0.0
    max_repeats: int = 20

    def __post_init__(self) -> None:
        for name in ("num_pseudo_epochs", "positions_per_pseudo_epoch", "num_groups", "max_repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"schedule spec: {name} = {getattr(self, name)}; expected at least 1")
        for name in ("positions_per_pseudo_epoch", "max_repeats"):
            if getattr(self, name) >= 2**31:
                raise ConfigError(f"schedule spec: {name} = {getattr(self, name)}; expected below 2^31")
        if not 0 <= self.organ_power <= 4:
            raise ConfigError(
                f"schedule spec: organ_power = {self.organ_power}; expected 0 (uniform) to 1 (natural), at most 4"
            )


def load_spec(name_or_path: str, overrides: Sequence[str] = ()) -> ScheduleSpec:
    """Load a spec that ships (`opal-3b`, `demo`) or a YAML file; ConfigError for anything unknown in it."""
    path = resources.locate("schedule spec", name_or_path)
    return config.build(ScheduleSpec, config.with_overrides(config.read_yaml(path), overrides), where=str(path.name))
