"""The run folder: one run's settings and data or a refusal that changes nothing, and whose claim is the newest."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field, fields
from pathlib import Path
from typing import get_type_hints

import pytest

from hpcssl.core.config import build, fixed, free, groups_in, is_free, read_yaml, settings, to_mapping, with_overrides
from hpcssl.core.errors import ConfigError, RunError
from hpcssl.runs import run_folder as folder
from hpcssl.runs.run_folder import Generation, prepare_run, read_config


@settings
class Optim:
    lr_per_256: float = fixed(5e-5)
    betas: tuple[float, float] = fixed((0.9, 0.999))
    clip: float | None = fixed(None)


@settings
class Train:
    precision: str = fixed("auto")
    micro_batch: int | None = free(None)


@settings
class Config:
    objective: str = fixed("dino")
    seed: int = fixed(0)
    global_batch: int = fixed(1080)
    stop_after: float | None = free(None)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)


@settings
class YoungerOptim(Optim):
    momentum: float = fixed(0.9)


@settings
class YoungerConfig(Config):
    """Of a later version that has two more settings."""

    optim: YoungerOptim = field(default_factory=YoungerOptim)
    crops: int = fixed(2)


DATA = {"store": "/a/store", "store_digest": "s1", "schedule": "/a/schedule", "schedule_digest": "d1"}


def _prepare(run: Path, *changes: str, kind: type[Config] = Config, derived: int = 10, **data: str) -> None:
    config = build(kind, with_overrides({}, changes), where="test")
    prepare_run(run, config, data={**DATA, **data}, derived={"total_steps": derived})


@pytest.fixture
def run(tmp_path):
    _prepare(tmp_path / "runs" / "a")
    return tmp_path / "runs" / "a"


def test_a_new_run_folder_says_what_the_run_is(run):
    assert read_config(run) == {**to_mapping(Config()), "data": DATA, "derived": {"total_steps": 10}}
    about = json.loads((run / "provenance.json").read_text())
    assert about["packages"]["torch"]
    assert about["python"]
    assert all((run / name).is_dir() for name in ("checkpoints", "generations", "logs"))


def test_the_same_settings_continue(run):
    before = (run / "config.yaml").read_bytes()
    _prepare(run)
    assert (run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("seed", 1, "seed = 0, asked for is 1"),
        ("global_batch", 540, "global_batch = 1080, asked for is 540"),
        ("objective", "mae", "objective = dino, asked for is mae"),
        ("optim.lr_per_256", 1e-4, r"optim.lr_per_256 = 5e-05, asked for is 0.0001"),
        ("optim.clip", 3.0, r"optim.clip = None, asked for is 3.0"),
        ("optim.betas", [0.9, 0.95], r"optim.betas = \[0.9, 0.999\], asked for is \[0.9, 0.95\]"),
    ],
)
def test_another_setting_is_refused_with_both_values(run, key, value, told):
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    with pytest.raises(RunError, match=told) as caught:
        _prepare(run, f"{key}={value}")
    assert str(run) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before, "a refusal changes nothing"


def test_a_run_begun_before_a_setting_was_added_goes_on_with_its_default(run):
    _prepare(run, kind=YoungerConfig)
    assert read_config(run)["optim"]["momentum"] == 0.9
    assert read_config(run)["crops"] == 2


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("optim.momentum", 0.8, r"optim.momentum = 0.9, asked for is 0.8"),
        ("crops", 3, r"crops = 2, asked for is 3"),
        ("seed", 1, r"seed = 0, asked for is 1"),
    ],
)
def test_another_value_of_a_setting_that_was_added_is_refused(run, key, value, told):
    with pytest.raises(RunError, match=told):
        _prepare(run, f"{key}={value}", kind=YoungerConfig)


def test_the_run_of_a_later_version_is_refused_in_one_line(run):
    _prepare(run, kind=YoungerConfig)
    with pytest.raises(ConfigError, match=r"config.yaml: unknown setting optim.momentum; known") as caught:
        _prepare(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["store_digest", "schedule_digest"])
def test_other_data_are_refused_with_both_values(run, key):
    with pytest.raises(RunError, match=f"{key} = {DATA[key]}, asked for is other"):
        _prepare(run, **{key: "other"})


def test_data_may_have_moved(run):
    _prepare(run, store="/b/store", schedule="/b/schedule")
    assert read_config(run)["data"]["store"] == "/b/store"


def test_free_settings_change(run):
    _prepare(run, "stop_after=25.0", "train.micro_batch=4", derived=5)
    config = read_config(run)
    assert (config["stop_after"], config["train"]["micro_batch"]) == (25.0, 4)
    assert config["derived"] == {"total_steps": 5}


def test_every_setting_of_a_run_says_whether_it_is_free():
    from hpcssl.train.pretrain_config import PretrainConfig

    silent, groups = [], [PretrainConfig]
    for group in groups:
        hints = get_type_hints(group)
        for field_ in fields(group):
            inner = groups_in(hints[field_.name])
            groups += inner
            if not inner and is_free(field_) is None:
                silent.append(f"{group.__name__}.{field_.name}")
    assert len(groups) > 10
    assert silent == []


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="not empty and no run"):
        _prepare(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_taken(tmp_path):
    _prepare(tmp_path)
    assert read_config(tmp_path)["seed"] == 0


def test_no_run_is_told(tmp_path):
    with pytest.raises(RunError, match="no run"):
        read_config(tmp_path)


@pytest.mark.parametrize("write", [1, 2])
def test_killed_while_preparing_the_same_command_goes_on(tmp_path, monkeypatch, write):
    """A start that is gone before its first or its second file stands may not block the folder."""
    real, calls = folder.write_atomic, []

    def dying(path: Path, content: str) -> None:
        calls.append(path)
        if len(calls) == write:
            raise SystemExit(9)
        real(path, content)

    monkeypatch.setattr(folder, "write_atomic", dying)
    with pytest.raises(SystemExit):
        _prepare(tmp_path / "run")
    monkeypatch.undo()
    _prepare(tmp_path / "run")


def test_a_later_start_makes_the_former_stale(run):
    claims: list[Generation] = []
    for number in (1, 2, 3):
        claims.append(Generation.take(run))
        assert [claim.number for claim in claims if not claim.is_stale()] == [number]


def test_claims_survive_their_processes(run):
    Generation.take(run)
    for name in ("rendezvous-abc.json", ".000009.tmp"):
        (run / "generations" / name).write_text("{}")
    assert Generation.take(run).number == 2


def test_concurrent_claims_are_distinct_and_one_of_them_is_current(run):
    barrier = threading.Barrier(16)
    with ThreadPoolExecutor(16) as pool:
        claims = list(pool.map(lambda _: (barrier.wait(), Generation.take(run))[1], range(16)))
    assert sorted(c.number for c in claims) == list(range(1, 17))
    assert [c.number for c in claims if not c.is_stale()] == [16]


@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_a_resolved_recipe_comes_back_from_the_run_folder(small, data, tmp_path, objective):
    """YAML keeps every number and every None; the ranks read nothing else."""
    from hpcssl.train.pretrain_config import PretrainConfig

    recipe = small.RECIPES[objective](stop_after=2.5)
    settings = read_config(small.make_run(tmp_path / "run", data, recipe))
    assert settings.pop("derived")["stop_step"] == 100 // 12
    assert settings.pop("data") == data.identity
    assert build(PretrainConfig, settings, where="run") == recipe
    small.make_run(tmp_path / "run", data, recipe)
    assert read_yaml(tmp_path / "run" / "config.yaml")["seed"] == 0
