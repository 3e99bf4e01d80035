"""Strict configuration: YAML and `--set key=value` into frozen dataclasses.

An unknown key is an error that names the nearest known one; a wrong type is an error that says what was expected. A
number is finite, and no `true` or `false`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hpcssl.core.errors import ConfigError

T = TypeVar("T")
_SHOWN = 20


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, but a key that is given twice is an error, where YAML takes the later one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; MarkedYAMLError for a key that stands in it twice."""
        merge = "tag:yaml.org,2002:merge"
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
        if twice is not None:
            raise yaml.MarkedYAMLError(problem=f"{twice} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; ConfigError where there is none."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(content).__name__}")
    return content


def with_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the mapping with `a.b=value` applied, each value read as YAML.

    >>> with_overrides({"train": {"lr": 1}}, ["train.lr=2", "name=x"])
    {'train': {'lr': 2}, 'name': 'x'}
    """
    result = _copied(values)
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set {override}: expected key=value")
        node = result
        *parents, leaf = key.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"--set {key}: {parent} is a value, not a group of settings")
            node = child
        try:
            node[leaf] = yaml.safe_load(text)
        except yaml.YAMLError:
            node[leaf] = text
    return result


def build(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Build a (nested) frozen dataclass from a mapping.

    Raises
    ------
    ConfigError
        For an unknown key (naming the nearest), a missing one, or a value of the wrong type; it starts with `where`.
    """
    from pydantic import TypeAdapter, ValidationError

    _refuse_unknown(cls, values, where, prefix="")
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"].startswith("missing"):
            raise ConfigError(f"{where}: {key} is missing") from None
        raise ConfigError(f"{where}: {key} = {first['input']!r}: {first['msg'].lower()}") from None


def to_mapping(config: Any) -> dict[str, Any]:
    """Return a dataclass as plain values that YAML and JSON can hold."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Return YAML in the order given."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """Return (dotted key, old value, new value) of the first setting in which two mappings part, or None."""
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inner = first_difference(a, b, f"{prefix}{key}.")
            if inner:
                return inner
        elif a != b:
            return f"{prefix}{key}", a, b
    return None


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a hint such as `; did you mean train.lr?`, or the (first) known words where none is near."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if match:
        return f"did you mean {match[0]}?"
    return f"known: {', '.join(known[:_SHOWN])}" + (" …" if len(known) > _SHOWN else "")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copied(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def _refuse_unknown(cls: Any, values: Mapping[str, Any], where: str, prefix: str) -> None:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key, value in values.items():
        if key not in names:
            raise ConfigError(f"{where}: unknown setting {prefix}{key}; {nearest(str(key), names)}")
        inner = _dataclass_in(hints[key])
        if inner and isinstance(value, Mapping):
            _refuse_unknown(inner, value, where, prefix=f"{prefix}{key}.")
        for leaf in _no_numbers(hints[key], value):
            raise ConfigError(f"{where}: {prefix}{key} = {leaf}; expected a finite number")


def _no_numbers(hint: Any, value: Any) -> Iterator[Any]:
    """Yield what pydantic would take for a number in a value of a type of numbers: truth values, infinity, NaN."""
    types_in = set(_types_in(hint))
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _no_numbers(hint, item)
    elif isinstance(value, bool):
        if {int, float} & types_in and not {bool, str} & types_in:
            yield value
    elif isinstance(value, (float, str)) and {int, float} & types_in and str not in types_in:
        with suppress(ValueError):  # text that is no number at all is for pydantic to tell
            if not math.isfinite(float(value)):
                yield value


def _types_in(hint: Any) -> Iterator[Any]:
    """Yield a type and all that stand within it."""
    yield hint
    for inner in typing.get_args(hint):
        yield from _types_in(inner)


def _dataclass_in(hint: Any) -> type | None:
    """Return the dataclass of a field's type, also inside an optional."""
    candidates = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)
