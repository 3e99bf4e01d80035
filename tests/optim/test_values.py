from __future__ import annotations

import numpy as np
import pytest

from hpcssl.core.errors import ConfigError
from hpcssl.optim.values import cosine


@pytest.mark.parametrize("warmup", [0, 1, 7, 10, 40])
def test_follows_dinos_published_table_of_values(warmup):
    base, final, total = 5e-4, 1e-6, 40
    ramp = np.linspace(0, base, warmup) if warmup else np.array([])
    i = np.arange(total - warmup)
    table = np.concatenate([ramp, final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / max(len(i), 1)))])
    ours = [cosine(s, base=base, final=final, total_steps=total, warmup_steps=warmup) for s in range(total)]
    np.testing.assert_allclose(ours, table, rtol=1e-12, atol=0)


@pytest.mark.parametrize("warmup_epochs", [0, 1, 5, 8])
def test_follows_maes_published_values_at_fractions_of_an_epoch(warmup_epochs):
    """There the warm-up would reach its peak on the step after its last."""
    base, final, epochs, steps = 1.5e-4, 1e-7, 8, 10
    wanted = []
    for epoch in np.arange(epochs * steps) / steps:
        if epoch < warmup_epochs:
            wanted.append(base * epoch / warmup_epochs)
        else:
            progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
            wanted.append(final + (base - final) * 0.5 * (1 + np.cos(np.pi * progress)))
    warmup = warmup_epochs * steps
    schedule = {"total_steps": epochs * steps, "warmup_steps": warmup, "peak_step": warmup}
    ours = [cosine(s, base=base, final=final, **schedule) for s in range(epochs * steps)]
    np.testing.assert_allclose(ours, wanted, rtol=1e-12, atol=0)


def test_rises_when_the_final_value_is_larger_and_stays_there():
    values = [cosine(s, base=0.996, final=1.0, total_steps=10) for s in range(15)]
    assert values[0] == 0.996
    assert values[10:] == [1.0] * 5
    assert values[:11] == sorted(values[:11])


def test_refuses_a_warm_up_longer_than_the_schedule():
    with pytest.raises(ConfigError, match="warm-up of 11 steps in a schedule of 10"):
        cosine(0, base=1.0, final=0.0, total_steps=10, warmup_steps=11)
