"""Values as functions of the step: learning rate, weight decay, momentum."""

from __future__ import annotations

import math

from hpcssl.core.errors import ConfigError


def cosine(
    step: int, *, base: float, final: float, total_steps: int, warmup_steps: int = 0, warmup_start: float = 0.0
) -> float:
    """Return the value at a step: a linear warm-up, then half a cosine.

    The warm-up reaches `base` on its last step (warmup_steps - 1); the cosine starts at `base` on the step after and
    would reach `final` at `total_steps`, where it stays. That is the convention of DINO's published training (Caron
    et al., ICCV 2021). The value depends on the schedule's length, never on where a run stops.

    Raises
    ------
    ConfigError
        If the warm-up is longer than the schedule.

    >>> [cosine(s, base=1.0, final=0.0, total_steps=5, warmup_steps=3) for s in (0, 1, 2, 3, 4, 5, 99)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    if warmup_steps > total_steps:
        raise ConfigError(
            f"warm-up of {warmup_steps} steps in a schedule of {total_steps}: expected at most {total_steps}; "
            "shorten the warm-up or lengthen the schedule"
        )
    if step >= total_steps:
        return final
    if step < warmup_steps:
        return warmup_start + (base - warmup_start) * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * progress))
