"""Strict configuration: YAML and `--set key=value` into frozen dataclasses.

An unknown key is an error that names the nearest known one; a wrong type and a value out of its range are errors that
say what was expected. A number is finite, and no `true` or `false`.

`settings` makes such a dataclass. The range of a setting stands in its type (`AtLeast1`, `Share`, …), and whether it
may change on a run that has begun is said where it is declared, by `free` or `fixed`.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic_core import ErrorDetails
from typing_extensions import dataclass_transform

from hpcssl.core.errors import ConfigError

T = TypeVar("T")
AtLeast0 = Annotated[int, Field(ge=0)]
AtLeast1 = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
_SHOWN = 20
_RANGES = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "finite_number": "a finite number",
}
_FREE = "free"


def free(default: Any = dataclasses.MISSING) -> Any:
    """Declare a setting that may change on a run that has begun: where it stops, and how (not what) it computes."""
    return dataclasses.field(default=default, metadata={_FREE: True})


def fixed(default: Any = dataclasses.MISSING) -> Any:
    """Declare a setting that is the same for a whole run."""
    return dataclasses.field(default=default, metadata={_FREE: False})


# `free` and `fixed` are no field specifiers to type checkers, which would look for the default behind a keyword
@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass whose values are checked whenever one is made.

    ConfigError where one is made with a value that cannot be.

    >>> @settings
    ... class Loader:
    ...     threads: AtLeast1 = free(1)
    >>> Loader(threads=0)
    Traceback (most recent call last):
    hpcssl.core.errors.ConfigError: threads = 0; expected at least 1
    """
    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    made: Any = checked_dataclass(cls, frozen=True, kw_only=True, config=config)
    check: Callable[..., None] = made.__init__

    def init(self: Any, **values: Any) -> None:
        try:
            check(self, **values)
        except ValidationError as error:
            raise ConfigError(_describe(made, error.errors()[0])) from None

    made.__init__ = init
    return typing.cast("type[T]", made)


def is_free(field: dataclasses.Field[Any]) -> bool | None:
    """Return whether a setting may change on a run that has begun; None where its declaration does not say."""
    return field.metadata.get(_FREE)


def groups_in(field_type: Any) -> list[type]:
    """Return the dataclasses of a field's type: itself, or those within an optional or a union.

    A base class may stand for a union that others join: its attribute `registered_kinds` lists them.
    """
    groups = [t for t in _types_in(field_type) if isinstance(t, type) and dataclasses.is_dataclass(t)]
    return [kind for group in groups for kind in getattr(group, "registered_kinds", [group])]


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
    result = copy.deepcopy(dict(values))
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

    A class whose layout was another one in a former version has a function `present_layout(values, where)`, which
    returns such a mapping in the present one. ConfigError, which starts with `where`, for an unknown key (naming the
    nearest), a missing one, or a value that cannot be.
    """
    values = getattr(cls, "present_layout", lambda values, where: values)(values, where)
    for key, value in _truth_values(cls, values):
        raise ConfigError(f"{where}: {key} = {value}; expected a finite number")
    try:
        return TypeAdapter(cls).validate_python({str(key): value for key, value in values.items()})
    except ValidationError as error:
        raise ConfigError(f"{where}: {_describe(cls, error.errors()[0])}") from None


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


def _describe(cls: type, error: ErrorDetails) -> str:
    """Say in one line what is wrong with which setting of a dataclass, and what was expected."""
    key, siblings = _path_in(cls, error["loc"])
    kind, value = error["type"], error["input"]
    if kind == "unexpected_keyword_argument":
        return f"unknown setting {key}; {nearest(key.rpartition('.')[2], siblings)}"
    if kind.startswith("missing"):
        return f"{key} is missing"
    if kind in _RANGES:
        return f"{key} = {value}; expected {_RANGES[kind].format(**_limits(error))}"
    return f"{key} = {value!r}: {error['msg'].lower()}"


def _limits(error: ErrorDetails) -> dict[str, Any]:
    """Return the limits of a range, whole ones without a point."""
    limits = error.get("ctx", {}).items()
    return {name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in limits}


def _path_in(cls: type, location: Sequence[int | str]) -> tuple[str, list[str]]:
    """Return the dotted key of an error's location, without tags of unions, and the settings of its last group."""
    words, groups, last = [], [cls], cls
    for word in location:
        tagged = [group for group in groups if len(groups) > 1 and word in (tag_of(group), group.__name__)]
        if not tagged:
            words.append(str(word))
            hints = typing.get_type_hints(groups[0]) if len(groups) == 1 else {}
        groups = tagged or groups_in(hints.get(str(word)))
        if len(groups) == 1:
            (last,) = groups
    return ".".join(words), [f.name for f in dataclasses.fields(last)]


def tag_of(group: type) -> Any:
    """Return what `kind` says of a dataclass in a tagged union; None where it has none."""
    return next((f.default for f in dataclasses.fields(group) if f.name == "kind"), None)


def _truth_values(cls: Any, values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Yield the settings for numbers that are given `true` or `false`, which pydantic would take for 1 and 0."""
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        groups = groups_in(hints.get(key))
        if isinstance(value, Mapping) and groups:
            group = next((g for g in groups if tag_of(g) == value.get("kind")), groups[0])
            yield from _truth_values(group, value, f"{prefix}{key}.")
        within = set(_types_in(hints.get(key)))
        if {int, float} & within and not {bool, str} & within:
            items = value if isinstance(value, (list, tuple)) else [value]
            yield from ((f"{prefix}{key}", item) for item in items if isinstance(item, bool))


def _types_in(hint: Any) -> Iterator[Any]:
    """Yield a type and all that stand within it."""
    yield hint
    for inner in typing.get_args(hint):
        yield from _types_in(inner)
