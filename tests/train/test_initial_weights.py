from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hpcssl.cli.main import main
from hpcssl.core.atomic import digest_file
from hpcssl.models.encoder import build_encoder
from hpcssl.runs.checkpoint import checkpoint_path, load_checkpoint
from hpcssl.runs.trace import read_metrics
from hpcssl.train.objective import build_objective, load_initial_weights


@pytest.fixture
def file(small, tmp_path: Path) -> Path:
    """Weights of the small recipes' encoder, unlike those that a run draws."""
    torch.manual_seed(77)
    path = tmp_path / "start.safetensors"
    save_file({n: t + 0.01 for n, t in build_encoder(small.dino_recipe().encoder).vit.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_every_encoder_starts_from_the_file(small, file, objective):
    built = build_objective(small.RECIPES[objective](), torch.device("cpu"))
    other = {n: t.clone() for n, t in built.module.state_dict().items() if ".vit." not in n}
    load_initial_weights(built, file)
    after = built.module.state_dict()
    prefixes = {n.partition("vit.")[0] for n in after if "vit." in n}
    assert prefixes == ({"student.encoder.", "teacher.encoder."} if objective == "dino" else {"encoder."})
    for prefix in prefixes:
        for name, tensor in load_file(file).items():
            assert torch.equal(after[f"{prefix}vit.{name}"], tensor), name
    assert all(torch.equal(after[n], t) for n, t in other.items())


def test_a_run_records_the_file_and_uses_it_at_step_0_only(small, data, file, tmp_path, capsys, own_process):
    recipe = small.write_recipe(tmp_path / "r.yaml", replace(small.mae_recipe(), stop_after=1))
    run = tmp_path / "run"

    def pretrain(*more: str) -> int:
        where = ("--store", data.store_path, "--schedule", data.schedule_path, "--out", run, "--cluster", "none")
        return main([str(a) for a in ("pretrain", recipe, *where, "--set", f"initial_weights={file}", *more)])

    assert pretrain() == 0
    assert "of its tensors matched" in capsys.readouterr().out
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["initial_weights_digest"] == digest_file(file)
    tensors, _ = load_checkpoint(checkpoint_path(run, 0))
    start = load_file(file)
    assert torch.equal(tensors["encoder.vit.cls_token"], start["cls_token"])
    last = max((run / "checkpoints").iterdir())
    assert pretrain("--set", "stop_after=2") == 0  # goes on from `last`, whose weights are the file's no more
    steps = read_metrics(run)["step"].tolist()
    assert steps == list(range(1, len(steps) + 1))
    assert last.exists()
    save_file({n: t + 1 for n, t in start.items()}, file)
    capsys.readouterr()
    assert pretrain("--set", "stop_after=3") == 2
    assert "initial_weights_digest" in capsys.readouterr().err
