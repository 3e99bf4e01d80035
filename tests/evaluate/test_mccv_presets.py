import pytest

from hpcssl.core.errors import ConfigError
from hpcssl.evaluate.mil.presets import PRESETS, preset_named


def test_the_papers_preset():
    paper = preset_named("gma-50")
    assert (paper.epochs, paper.warmup_epochs, paper.lr, paper.final_lr) == (50, 10, 5e-4, 1e-6)
    assert (paper.weight_decay, paper.final_weight_decay) == (0.04, 0.4)
    assert (paper.hidden, paper.attention, paper.dropout) == ((512, 512), 384, 0.25)
    assert (PRESETS["gma-40"].epochs, PRESETS["gma-40"].lr) == (40, 1e-4)


def test_another_length_keeps_the_warm_up_within_a_quarter():
    assert preset_named("gma-50", 40) == preset_named("gma-50", 40)
    assert [preset_named("gma-50", n).warmup_epochs for n in (100, 40, 8, 1)] == [10, 10, 2, 0]


def test_unknown_preset_and_no_epochs():
    with pytest.raises(ConfigError, match=r"preset gma50: .* did you mean gma-50\?"):
        preset_named("gma50")
    with pytest.raises(ConfigError, match="0 epochs"):
        preset_named("gma-50", 0)
