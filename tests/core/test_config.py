"""Strict configuration: unknown keys, wrong types, `--set`, and where two configurations part."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from hpcssl.core.config import (
    build,
    dump_yaml,
    first_difference,
    read_yaml,
    settings,
    to_mapping,
    with_overrides,
)
from hpcssl.core.errors import ConfigError, UserError


@settings
class Optim:
    """A group of settings."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = None


@settings
class Run:
    """Settings of every kind that recipes use."""

    name: str = "run"
    steps: int = 10
    precision: Literal["fp32", "bf16"] = "fp32"
    optim: Optim = field(default_factory=lambda: Optim(lr=0.1))
    teacher: Optim | None = None
    out: Path = Path("out")


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build(Run, values, where="recipe x")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("recipe x: ")
    return message


def test_values_reach_their_fields() -> None:
    run = build(Run, {"name": "a", "optim": {"lr": 1, "betas": [0, 1]}, "teacher": {"lr": 2.5}}, where="x")
    assert run == Run(name="a", optim=Optim(lr=1.0, betas=(0.0, 1.0)), teacher=Optim(lr=2.5))
    assert isinstance(run.optim.lr, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.name = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "unknown", "hint"),
    [
        ({"step": 5}, "step", "did you mean steps?"),
        ({"optim": {"lr": 1, "bet": 2}}, "optim.bet", "did you mean betas?"),
        ({"teacher": {"lr": 1, "clipp": 2}}, "teacher.clipp", "did you mean clip?"),
        ({"zzzzzzzz": 5}, "zzzzzzzz", "known: name, steps, precision, optim, teacher, out"),
        ({7: 5}, "7", "known: name"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(values: dict[Any, Any], unknown: str, hint: str) -> None:
    message = refusal(values)
    assert f"unknown setting {unknown}; " in message
    assert hint in message


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"steps": "many"}, "steps = 'many'"),
        ({"steps": 2.5}, "steps = 2.5"),
        ({"steps": None}, "steps = None"),
        ({"steps": {"a": 1}}, "steps = {'a': 1}"),
        ({"name": 5}, "name = 5"),
        ({"precision": "fp8"}, "precision = 'fp8'"),
        ({"optim": {"lr": "fast"}}, "optim.lr = 'fast'"),
        ({"optim": {"lr": 1, "betas": [1]}}, "optim.betas.1 "),
        ({"optim": {"lr": 1, "betas": "a\nb"}}, "optim.betas = 'a\\nb'"),
        ({"optim": {}}, "optim.lr is missing"),
        ({"optim": 3}, "optim = 3"),
    ],
)
def test_a_wrong_value_is_one_line_with_key_and_value(values: dict[str, Any], told: str) -> None:
    assert told in refusal(values)


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "inf", "nan", "1e400", "true", "false"])
@pytest.mark.parametrize("setting", ["steps={}", "optim.lr={}", "optim.clip={}", "optim.betas=[0.9, {}]"])
def test_no_number_is_taken_that_is_not_finite_or_a_truth_value(setting: str, number: str) -> None:
    values = with_overrides({"optim": {"lr": 1}}, [setting.format(number)])
    assert refusal(values).startswith(f"recipe x: {setting.partition('=')[0]}")


def test_truth_values_and_text_are_taken_where_they_belong() -> None:
    @settings
    class Switches:
        """Settings that are no numbers, or not only."""

        on: bool
        compile: Literal["auto"] | bool
        name: str
        include: dict[str, tuple[str | int | float, ...]]

    values = {"on": True, "compile": False, "name": "nan", "include": {"grade": ["inf", 3]}}
    assert to_mapping(build(Switches, values, where="x")) == values


def test_yaml_reads_5e_5_as_text_and_it_becomes_a_number() -> None:
    values = yaml.safe_load("optim: {lr: 5e-5}")
    assert values == {"optim": {"lr": "5e-5"}}, "YAML 1.1 wants a dot in a float; the trap is still there"
    assert build(Run, values, where="x").optim.lr == 5e-5
    assert build(Run, with_overrides({}, ["optim.lr=1e-6"]), where="x").optim.lr == 1e-6


def test_read_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: {b: 1}\nc: é\n", encoding="utf-8")
    assert read_yaml(path) == {"a": {"b": 1}, "c": "é"}


NO_MAPPINGS = [b"", b"- a\n- b\n", b"5", b"a: [1", b"a: b: c", b"\xff\xfe\x00", b"a:\n\t- b", b"seed: 1\nseed: 2\n"]


@pytest.mark.parametrize("content", NO_MAPPINGS)
def test_what_is_no_mapping_or_has_a_key_twice_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        read_yaml(tmp_path / "absent.yaml")


def test_overrides_set_values_without_touching_the_original() -> None:
    values = {"optim": {"lr": 1, "betas": [0, 1]}, "name": "a"}
    found = with_overrides(values, ["optim.lr=2", "optim.betas=[0.5, 0.6]", "teacher.lr=3", "name=x=y", "clip=null"])
    assert found == {"optim": {"lr": 2, "betas": [0.5, 0.6]}, "name": "x=y", "teacher": {"lr": 3}, "clip": None}
    assert values == {"optim": {"lr": 1, "betas": [0, 1]}, "name": "a"}
    assert with_overrides(values, ["optim.lr=2", "optim.lr=3"])["optim"]["lr"] == 3, "the last one holds"
    assert with_overrides({}, ["name=a: b: c", "out=[x"]) == {"name": "a: b: c", "out": "[x"}, "no YAML stays text"


@pytest.mark.parametrize("override", ["lr", "", "=5", "=", "name.x=1"])
def test_what_is_no_override_or_below_a_value_is_refused(override: str) -> None:
    expected = r"--set name\.x: name is a value" if "x" in override else "expected key=value"
    with pytest.raises(ConfigError, match=expected):
        with_overrides({"name": "a"}, [override])


def test_text_that_is_no_yaml_stays_text() -> None:
    assert with_overrides({}, ["name=a: b: c", "out=[x"]) == {"name": "a: b: c", "out": "[x"}


def test_a_configuration_survives_yaml(tmp_path: Path) -> None:
    run = Run(optim=Optim(lr=5e-5, clip=3.0), teacher=Optim(lr=1e-300), out=tmp_path / "é", name="3")
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(to_mapping(run)), encoding="utf-8")
    assert build(Run, read_yaml(path), where="x") == run
    assert list(read_yaml(path)) == ["name", "steps", "precision", "optim", "teacher", "out"]


def test_first_difference_names_key_and_both_values() -> None:
    old = {"a": 1, "b": {"c": 2, "d": {"e": [3]}}, "f": 4}
    assert first_difference(old, {"f": 4, "b": {"d": {"e": [3]}, "c": 2}, "a": 1}) is None
    assert first_difference(old, old | {"b": {"c": 2, "d": {"e": [5]}}}) == ("b.d.e", [3], [5])
    assert first_difference(old, old | {"a": 9, "f": 9}) == ("a", 1, 9)
    assert first_difference(old, old | {"b": 7}) == ("b", {"c": 2, "d": {"e": [3]}}, 7)
    assert first_difference(old, old | {"new": 1}) == ("new", None, 1)
    assert first_difference(old | {"gone": 1}, old) == ("gone", 1, None)


def test_every_error_is_the_users() -> None:
    assert issubclass(ConfigError, UserError)
    assert not issubclass(UserError, ValueError), "pydantic would swallow it inside __post_init__"


def test_an_error_of_a_dataclass_itself_passes_unchanged() -> None:
    @settings
    class Picky:
        """Refuses negative sizes."""

        size: int

        def __post_init__(self) -> None:
            if self.size < 0:
                raise ConfigError(f"size = {self.size}; expected at least 0")

    with pytest.raises(ConfigError, match=r"^size = -1; expected at least 0$"):
        build(Picky, {"size": -1}, where="x")
