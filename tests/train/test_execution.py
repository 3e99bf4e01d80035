from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hpcssl.core.config import build
from hpcssl.core.errors import ConfigError
from hpcssl.loader.stream import Batch
from hpcssl.plan.draw import draw_plan
from hpcssl.train import execution
from hpcssl.train.execution import can_compile, describe_execution, resolve_execution, resolve_precision
from hpcssl.train.objective import build_objective
from hpcssl.train.pretrain_config import Timeline, TrainConfig
from hpcssl.train.reduce import Collectives
from hpcssl.train.state import TrainState
from hpcssl.train.step import train_step

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def forgetful():
    can_compile.cache_clear()
    yield
    can_compile.cache_clear()


def test_on_a_cpu_auto_does_not_compile_and_half_precision_takes_plain_attention():
    assert not resolve_execution(TrainConfig(), CPU).compiled
    assert resolve_execution(TrainConfig(), CPU).fused_attention
    assert not resolve_execution(TrainConfig(precision="bf16"), CPU).fused_attention
    assert resolve_execution(TrainConfig(compile=True), CPU).compiled


@pytest.mark.parametrize(
    ("name", "capability", "wanted"),
    [
        ("V100", (7, 0), torch.float16),
        ("T4", (7, 5), torch.float16),
        ("A100", (8, 0), torch.bfloat16),
        ("H100", (9, 0), torch.bfloat16),
    ],
)
def test_auto_takes_the_half_precision_that_the_gpu_has_and_says_so(monkeypatch, name, capability, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(execution, "can_compile", lambda device: True)
    assert resolve_precision("auto", GPU) is wanted
    short = {torch.float16: "fp16", torch.bfloat16: "bf16"}[wanted]
    assert describe_execution(TrainConfig(), GPU) == f"in {short} (auto) on {name}, blocks compiled"
    assert describe_execution(TrainConfig(precision="fp32", compile=False), GPU) == f"in fp32 on {name}"
    assert resolve_precision("auto", CPU) is torch.float32


@pytest.mark.parametrize("able", [True, False])
def test_on_a_gpu_auto_compiles_where_that_works(monkeypatch, able):
    monkeypatch.setattr(execution, "can_compile", lambda device: able)
    assert resolve_execution(TrainConfig(precision="bf16"), GPU).compiled is able
    assert resolve_execution(TrainConfig(precision="bf16"), GPU).fused_attention
    assert not resolve_execution(TrainConfig(precision="bf16", compile=False), GPU).compiled


@pytest.mark.parametrize("error", [RuntimeError("no compiler"), FileNotFoundError("gcc"), ImportError("triton")])
def test_a_compiler_that_fails_is_no_compiler(monkeypatch, error):
    def broken(function):
        raise error

    monkeypatch.setattr(torch, "compile", broken)
    assert not can_compile(CPU)


def test_the_settings_are_read_from_yaml():
    values = {"compile": "auto", "checkpoint_activations": True}
    assert resolve_execution(build(TrainConfig, values, where="recipe"), CPU).checkpointed
    assert build(TrainConfig, {"compile": False}, where="recipe").compile is False
    with pytest.raises(ConfigError, match="compile"):
        build(TrainConfig, {"compile": "always"}, where="recipe")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_on_a_gpu_compiled_and_checkpointed_steps_are_plain_steps(small, data, objective):
    recipe = small.RECIPES[objective]()
    views = tuple(
        torch.randint(0, 256, (k.count, 12, k.view_px, k.view_px, 3), dtype=torch.uint8) for k in recipe.augment.kinds
    )
    needs = build_objective(recipe, CPU).needs
    batch = Batch.of(0, views, draw_plan(recipe.augment, 0, np.arange(12), **vars(needs)))
    losses = []
    for changes in ({}, {"compile": True}, {"checkpoint_activations": True}):
        changed = replace(recipe, train=TrainConfig(precision="fp32", **({"compile": False} | changes)))
        state, timeline = TrainState(changed, GPU), Timeline(changed, data.schedule)
        losses.append([train_step(state, batch, changed, timeline, Collectives(), GPU)["loss"] for _ in range(5)])
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-4)
