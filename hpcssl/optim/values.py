"""Values as functions of the step: learning rate, weight decay, momentum."""

from __future__ import annotations

import math

from hpcssl.core.errors import ConfigError


def cosine(
    step: int, *, base: float, final: float, total_steps: int, warmup_steps: int = 0, peak_step: int | None = None
) -> float:
    """Return the value at a step: a linear warm-up from 0, then half a cosine.

    The cosine starts at `base` on step `warmup_steps` and would reach `final` at `total_steps`, where it stays. The
    value depends on the schedule's length, never on where a run stops. ConfigError for a warm-up that is longer.

    Parameters
    ----------
    peak_step : where the line of the warm-up reaches `base`: by default its last step, warmup_steps - 1, as in DINO's
        published training (Caron et al., ICCV 2021); in MAE's (He et al., CVPR 2022) it is warmup_steps

    >>> [cosine(s, base=1.0, final=0.0, total_steps=5, warmup_steps=3) for s in (0, 1, 2, 3, 4, 5, 99)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    >>> [cosine(s, base=1.0, final=0.0, total_steps=4, warmup_steps=2, peak_step=2) for s in range(4)]
    [0.0, 0.5, 1.0, 0.5]
    """
    if warmup_steps > total_steps:
        raise ConfigError(
            f"warm-up of {warmup_steps} steps in a schedule of {total_steps}: expected at most {total_steps}; "
            "shorten the warm-up or lengthen the schedule"
        )
    if step >= total_steps:
        return final
    if step < warmup_steps:
        return base * step / max(warmup_steps - 1 if peak_step is None else peak_step, 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * progress))
