"""What a schedule is asked to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Annotated, Literal

from pydantic import Field

from hpcssl.core import config, resources
from hpcssl.core.config import settings
from hpcssl.core.errors import ConfigError

Count = Annotated[int, Field(ge=1, lt=2**31)]
Power = Annotated[float, Field(ge=0, le=4)]  # 0 is equal or uniform, 1 natural


@settings
class ScheduleSpec:
    """Parameters of a schedule; the paper's value stands beside each default (Campanella et al. 2023).

    An organ's quota of a pseudo-epoch is in proportion to organ_weights[organ] · (its size in the group)^organ_power, a
    slide's within its organ to (its tiles)^slide_power.
    """

    seed: int = 0  # key of every draw; any integer
    num_pseudo_epochs: Count = 50  # files of the schedule; paper 50
    positions_per_pseudo_epoch: Count = 65_000_000  # draws in each; paper 65,000,000
    num_groups: Count = 5  # pseudo-epochs that together use every slide exactly once (a pass); paper 5
    organ_power: Power = 0.0  # 0 uniform over organs (our reading of the paper's "balanced"), 1 natural
    organ_size: Literal["tiles", "slides"] = "tiles"  # what an organ's size counts
    organ_weights: Mapping[str, float] = field(default_factory=dict)  # in any positive unit; 1 for organs not named
    slide_power: Power = 1.0  # 1 by tiles, 0 all slides of an organ alike
    # a slide of n tiles is drawn at most n times this often in a pass; so is a tile, or once more where the pass begins
    # within one of the slide's permutations
    max_repeats: Count = 20
    # column of the slide table → values; only slides that have one of them enter
    include: Mapping[str, Sequence[str | int | float]] = field(default_factory=dict)
    # column of the slide table → values; slides that have one of them never enter
    exclude: Mapping[str, Sequence[str | int | float]] = field(default_factory=dict)
    # CSV file with columns slide_id and/or patient_id; none of these slides and patients ever enters
    hold_out: str = ""
    # MPP → share of the positions read at it, in any positive unit; only for a store of slides, by default all its MPPs
    # alike. A slide that lacks one shares its positions among the others
    mpp_weights: Mapping[float, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):  # a number in YAML is the text of it in the table
            texts = {column: [str(value) for value in values] for column, values in getattr(self, name).items()}
            object.__setattr__(self, name, texts)
        object.__setattr__(self, "mpp_weights", dict(sorted(self.mpp_weights.items())))
        for mpp, weight in self.mpp_weights.items():
            if not (0.01 <= mpp <= 100 and 1e-6 <= weight <= 1e6):
                raise ConfigError(
                    f"schedule spec: mpp_weights: {{{mpp}: {weight}}}; expected microns per pixel, 0.01 to 100, and for"
                    " each a weight, 0.000001 to 1000000; to leave an MPP out, do not name it"
                )
        for organ, weight in self.organ_weights.items():
            if not 1e-6 <= weight <= 1e6:
                raise ConfigError(
                    f"schedule spec: organ_weights.{organ} = {weight}; expected 0.000001 to 1000000;"
                    " to leave an organ out, name it under exclude.organ"
                )


def load_spec(name_or_path: str, overrides: Sequence[str] = ()) -> ScheduleSpec:
    """Load a spec that ships (`opal-3b`, `imagenet-epochs`, `demo`) or a YAML file; ConfigError for what it cannot be.

    A relative `hold_out` in a YAML file counts from that file's folder, one of `overrides` from the current folder.
    """
    path = resources.locate("schedule spec", name_or_path)
    values = config.read_yaml(path)
    spec = config.build(ScheduleSpec, config.with_overrides(values, overrides), where=str(path.name))
    if spec.hold_out and not any(o.startswith("hold_out=") for o in overrides):
        return replace(spec, hold_out=str(path.parent / spec.hold_out))
    return spec
