"""An objective that the package does not know: trained, killed, gone on with, exported, embedded; and the contract."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from hpcssl.core import resources
from hpcssl.core.config import build, to_mapping
from hpcssl.core.errors import ConfigError
from hpcssl.embed.exported import timm_arguments
from hpcssl.features.feature_files import read_slide
from hpcssl.loader.pillow import whole_tile
from hpcssl.runs.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint
from hpcssl.runs.run_folder import read_config
from hpcssl.runs.trace import read_metrics
from hpcssl.train.pretrain_config import PretrainConfig, load_recipe

OBJECTIVE = '''"""An objective from outside the package: the embedding of a tile predicts the tile's mean colour."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from hpcssl.core.config import Above0, fixed, settings
from hpcssl.models.encoder import Encoder, normalised
from hpcssl.objectives.contract import Objective, ObjectiveConfig, Tiles
from hpcssl.objectives.registry import register
from hpcssl.plan.recipe import AugmentRecipe


@settings
class ColourConfig(ObjectiveConfig):
    """weight : factor of the loss"""

    kind: Literal["colour"] = fixed("colour")
    weight: Above0 = fixed(1.0)


class Colour(Objective):
    """A linear layer on the class token, and the squared error of the three colours."""

    title = "mean colour"

    def __init__(self, config: ColourConfig, encoder: Encoder, augment: AugmentRecipe, device: torch.device):
        self._weight = config.weight
        self.module = nn.ModuleDict({"encoder": encoder, "colour": nn.Linear(encoder.embed_dim, 3)}).to(device)
        self.trained = self.module

    def loss(self, tiles: Tiles, values: Any) -> Tensor:
        images = normalised(tiles.views[0][0])
        predicted = self.module["colour"](self.module["encoder"](images))
        return self._weight * (predicted - images.mean((2, 3))).square().mean()


register(ColourConfig, Colour)
'''
# runs commands, each after a "--", as `hpcssl` does; with LEFT set, a process dies in the step after so many
DRIVER = """
import itertools, os, signal, sys
from hpcssl.cli.main import main
from own_objective import Colour
real, steps = Colour.loss, itertools.count()
def loss(self, tiles, values):
    if next(steps) == int(os.environ.get("LEFT", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, tiles, values)
Colour.loss = loss
commands = [list(group) for dashes, group in itertools.groupby(sys.argv[1:], lambda word: word == "--") if not dashes]
sys.exit(max(main(command) for command in commands))
"""
RECIPE = """
objective: {kind: colour, weight: 2.0}
global_batch: 12
encoder: {name: vit_tiny_patch16_224, image_px: 32, patch_px: 8, embed_dim: 24, depth: 2, num_heads: 2, drop_path: 0.0}
augment: {global_views: {count: 1, view_px: 32, scale: [0.4, 1.0]}}
optim: {lr_per_256: 0.02}
train: {threads: 1}
"""


@pytest.fixture
def hpcssl(small, repository, tmp_path):
    """Runs commands in a process that has registered the objective; returns it, ended."""

    def run(*commands: list[object], **environment: str) -> subprocess.CompletedProcess[str]:
        words = [str(word) for command in commands for word in ("--", *command)]
        (tmp_path / "own_objective.py").write_text(OBJECTIVE)
        path = f"{repository}:{tmp_path}"
        environment = {**small.environment(), "PYTHONPATH": path, **environment}
        arguments = [sys.executable, "-c", DRIVER, *words]
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=300)

    return run


def test_an_objective_from_outside_goes_all_the_way(small, data, tmp_path, hpcssl):
    assert len(OBJECTIVE.splitlines()) <= 60
    (tmp_path / "colour.yaml").write_text(RECIPE)
    whole, killed, out, features = (tmp_path / name for name in ("whole", "killed", "w.safetensors", "features"))

    def pretrain(run: Path) -> list[object]:
        where = ("--store", data.store_path, "--schedule", data.schedule_path, "--out", run)
        return ["pretrain", tmp_path / "colour.yaml", *where, "--cluster", "none"]

    export = ["export", whole, "--out", out]
    embed = ["embed", "--store", data.store_path, "--encoder", whole, "--out", features, "--threads", 1]
    done = hpcssl(pretrain(whole), export, embed)
    assert done.returncode == 0, done.stderr
    assert hpcssl(pretrain(killed), LEFT="8").returncode == -signal.SIGKILL
    assert checkpoint_steps(killed)[-1] < small.STEPS
    done = hpcssl(pretrain(killed))
    assert done.returncode == 0, done.stderr
    assert not re.search("begins at step 0 ", done.stderr)
    small.assert_same_run(killed, whole, small.STEPS)
    losses = read_metrics(whole)["loss"]
    assert losses.iloc[-3:].mean() < losses.iloc[:3].mean()

    assert "| objective | mean colour, weights of the encoder |" in out.with_suffix(".md").read_text()
    _, state = load_checkpoint(checkpoint_path(whole, small.STEPS))
    model = timm.create_model(**timm_arguments(state["encoder"])).eval()
    model.load_state_dict(load_file(out), strict=True)
    tile = small.jpeg(0)  # the first of the first slide
    images = torch.from_numpy(whole_tile(tile, 32, name="").copy())[None].permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = model((images - mean[:, None, None]) / std[:, None, None])[0]
    embedded = torch.from_numpy(read_slide(features / "breast-0.h5"))[0]
    torch.testing.assert_close(embedded, expected, atol=1e-5, rtol=1e-4)

    settings = {key: value for key, value in read_config(whole).items() if key not in ("data", "derived")}
    unknown = r"^run: objective.kind = colour; known: dino, mae"  # where none registered it
    with pytest.raises(ConfigError, match=unknown):
        build(PretrainConfig, settings, where="run")


def test_train_names_no_objective(repository):
    names = re.compile("dino|mae", re.IGNORECASE)
    assert not [path for path in (repository / "hpcssl" / "train").glob("*.py") if names.search(path.read_text())]


HEAD, DECODER = {"out_dim": 512, "hidden_dim": 256, "bottleneck_dim": 64}, {"embed_dim": 64, "depth": 2, "num_heads": 4}
FORMER = {  # both groups stood in every run folder of version 1
    "dino-demo": {
        "objective": "dino",
        "dino": {"head": HEAD, "teacher_temperature": 0.01, "center_momentum": 0.8},
        "decoder": {"depth": 8},
    },
    "mae-demo": {"objective": "mae", "decoder": DECODER, "dino": {"momentum": 0.9}},
}


@pytest.mark.parametrize("name", FORMER)
def test_the_former_layout_of_recipes_and_settings_is_understood(small, tmp_path, name):
    from hpcssl.core.config import dump_yaml, to_mapping

    recipe = load_recipe(name)
    former = {**to_mapping(recipe), **FORMER[name]}
    assert build(PretrainConfig, former, where="run") == recipe
    (tmp_path / "former.yaml").write_text(dump_yaml(former))
    present = small.write_recipe(tmp_path / "present.yaml", recipe)
    kind, setting = ("dino", "dino.head.out_dim") if name == "dino-demo" else ("mae", "decoder.depth")
    for file in ("former.yaml", present):
        found = load_recipe(str(tmp_path / file), [f"{setting}=3", f"objective={kind}"])
        assert found == load_recipe(name, [f"objective.{setting.removeprefix('dino.')}=3"]) != recipe


MAE = ("augment.mask_ratio=0.75", "augment.global_views.count=1", "augment.local_views=null")


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("mae-demo", ["decoder={depth: 3}"], {"decoder": {"embed_dim": 512, "depth": 3, "num_heads": 16}}),
        ("dino-demo", ["dino={momentum: 0.9}"], {"momentum": 0.9, "center_momentum": 0.9}),
        ("dino-demo", ["objective.momentum=0.9", "objective=dino"], {"momentum": 0.9, "center_momentum": 0.8}),
        ("dino-demo", ["dino.momentum=0.8", "objective.momentum=0.9"], {"momentum": 0.9}),
        ("dino-demo", ["objective.momentum=0.9", "dino.momentum=0.8"], {"momentum": 0.8}),
        ("dino-demo", ["objective=mae", "objective.decoder.depth=3", *MAE], {"kind": "mae"}),
        ("dino-demo", ["objective.kind=mae", *MAE], {"kind": "mae"}),
        ("dino-demo", ["objective={kind: mae, decoder: {depth: 2}}", *MAE], {"kind": "mae"}),
    ],
)
def test_settings_of_both_layouts_go_together(name, settings, expected):
    """A group that is given replaces the one before, the last of two settings counts, and so does the last kind."""
    objective = to_mapping(load_recipe(name, settings).objective)
    assert {key: objective[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("mae-demo", "dino.momentumm=1", "objective dino: unknown setting momentumm; did you mean momentum?"),
        ("dino-demo", "objective.kind=[a]", "objective.kind = ['a']; known: dino, mae"),
        ("dino-demo", "objective=deno", "did you mean dino?"),
        ("dino-demo", "objective=[x", "objective.kind = [x; known: dino, mae"),
        ("dino-demo", "objective", "--set objective: expected key=value"),
        ("dino-demo", "dino=3", "expected a group of settings"),
    ],
)
def test_an_objective_that_cannot_be_is_refused_in_one_line(name, setting, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe(name, [setting])


def test_the_settings_of_a_recipe_that_may_become_another_are_kept(tmp_path):
    text = resources.locate("recipe", "dino-demo").read_text()
    start, end = text.index("objective:"), text.index("global_batch:")
    both = "objective: dino\ndino: {momentum: 0.9}\ndecoder: {depth: 2, embed_dim: 64, num_heads: 4}\n"
    (tmp_path / "both.yaml").write_text(text[:start] + both + text[end:])
    decoder = load_recipe(str(tmp_path / "both.yaml"), ["objective=mae", *MAE]).objective.decoder
    assert (decoder.depth, decoder.embed_dim) == (2, 64)
    twice = "objective: {kind: dino, momentum: 0.8}\ndino: {momentum: 0.9}\n"
    (tmp_path / "twice.yaml").write_text(text[:start] + twice + text[end:])
    with pytest.raises(ConfigError, match="give its settings in one place"):
        load_recipe(str(tmp_path / "twice.yaml"))
