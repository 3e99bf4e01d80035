"""`hpcssl export`: what it writes loads into timm and gives the encoder's features; the card says what was run."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from hpcssl.cli.main import main
from hpcssl.core.atomic import digest_file
from hpcssl.embed.sources import Source, load_encoder
from hpcssl.models.encoder import MEAN


@pytest.fixture
def make_run(small: Any, data: Any, tmp_path: Path) -> Any:
    """A run folder with checkpoints at steps 0 and 7 whose student and teacher differ."""
    return lambda recipe, schedule=data: small.make_trained_run(tmp_path / "run", schedule, recipe)


def call_of(card: Path) -> dict[str, Any]:
    """Return the arguments of the card's own `timm.create_model(...)`."""
    found = re.search(r"timm\.create_model\((.*)\)", card.read_text())
    assert found
    return eval(f"dict({found[1]})")


@torch.no_grad()
@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_timm_loads_the_file_as_the_card_says_and_gives_our_features(small, make_run, tmp_path, objective) -> None:
    run, out = make_run(small.RECIPES[objective]()), tmp_path / "new" / "weights.safetensors"
    assert main(["export", str(run), "--out", str(out)]) == 0
    model = timm.create_model(**call_of(out.with_suffix(".md"))).eval()
    model.load_state_dict(load_file(out), strict=True)
    by_path = timm.create_model(**call_of(out.with_suffix(".md")), checkpoint_path=out).eval()
    encoder, _ = load_encoder(Source.parse(str(run)))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for other in (model, by_path):
        torch.testing.assert_close(other(images), encoder(images), atol=1e-6, rtol=1e-6)
    untrained, _ = load_encoder(Source.parse(f"{run}@0"))
    assert (untrained(images) - model(images)).abs().max() > 1e-2
    assert sorted(path.name for path in out.parent.iterdir()) == ["weights.md", "weights.safetensors"]


def test_student_and_step_are_those_asked_for(small, make_run, tmp_path) -> None:
    run = make_run(small.dino_recipe())
    files = {}
    for name, arguments in {"teacher": [f"{run}"], "student": [f"{run}", "--student"], "start": [f"{run}@0"]}.items():
        files[name] = tmp_path / f"{name}.safetensors"
        assert main(["export", *arguments, "--out", str(files[name])]) == 0
    tensors = {name: load_file(path)["cls_token"] for name, path in files.items()}
    assert not torch.equal(tensors["teacher"], tensors["student"])
    assert not torch.equal(tensors["teacher"], tensors["start"])
    assert "weights of the student" in files["student"].with_suffix(".md").read_text()


def test_the_card_says_what_was_run(small, data, make_run, tmp_path) -> None:
    run, out = make_run(small.dino_recipe()), tmp_path / "w.safetensors"
    assert main(["export", f"{run}@7", "--out", str(out)]) == 0
    card = out.with_suffix(".md").read_text()
    for expected in (
        "| optimiser steps | 7 |",
        "| tiles seen | 84 (2.1 pseudo-epochs) |",
        f"| tile store (SHA-256) | {data.store.digest} |",
        f"| schedule (SHA-256) | {data.schedule.digest} |",
        f"| weights file (SHA-256) | {digest_file(out)} |",
        "| initial weights (SHA-256) | none: trained from scratch |",
        "| licence | TO BE STATED",
        f"mean {list(MEAN)}",
        "global_batch: 12",
    ):
        assert expected in card
    shares = [float(share) for share in re.findall(r"^\| (?:breast|lung) .* ([\d.]+)% \|$", card, re.MULTILINE)]
    assert len(shares) == 2
    assert sum(shares) == pytest.approx(100, abs=0.02)


def test_a_schedule_that_is_gone_is_said(small, make_run, tmp_path) -> None:
    own = small.make_data(tmp_path / "own")
    run, out = make_run(small.mae_recipe(), schedule=own), tmp_path / "w.safetensors"
    shutil.rmtree(own.schedule_path)
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert "schedule was not at hand" in out.with_suffix(".md").read_text()


def test_what_cannot_be_exported_is_told_in_one_line(small, make_run, tmp_path, refused) -> None:
    run, out = make_run(replace(small.mae_recipe(), stop_after=1)), tmp_path / "w.safetensors"
    assert "ends in .safetensors" in refused("export", run, "--out", tmp_path / "w.pth")
    assert "no checkpoint of step 3; it has 0, 7" in refused("export", f"{run}@3", "--out", out)
    assert "leave --student out" in refused("export", run, "--student", "--out", out)
    assert "no run" in refused("export", tmp_path, "--out", out)
    assert not list(tmp_path.glob("w.*"))
