"""The objectives by their kind, and how their settings are found in a recipe, also in one of a former version."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Discriminator, PlainValidator, TypeAdapter

from hpcssl.core.config import build, nearest, tag_of, with_overrides
from hpcssl.core.errors import ConfigError
from hpcssl.objectives.contract import Objective, ObjectiveConfig
from hpcssl.objectives.dino.dino_objective import Dino, DinoConfig
from hpcssl.objectives.mae.mae_objective import Mae, MaeConfig

_OBJECTIVES: dict[type[ObjectiveConfig], type[Objective]] = ObjectiveConfig.registered_kinds
# version 1 said `objective: dino`, and settings stood beside it: their group there, their kind and place now
_FORMER = {"dino": ("dino",), "decoder": ("mae", "decoder")}


def register(config: type[ObjectiveConfig], objective: type[Objective]) -> None:
    """Make an objective known to this process: recipes, run folders and commands understand its `kind` from now on.

    ConfigError where the settings have no `kind` of their own, or another objective has it.
    """
    kind = tag_of(config)
    if not isinstance(kind, str) or any(tag_of(other) == kind for other in _OBJECTIVES if other is not config):
        raise ConfigError(f"{config.__name__}: kind = {kind}; expected a kind that no other objective has")
    _OBJECTIVES[config] = objective


register(DinoConfig, Dino)
register(MaeConfig, Mae)


def objective_of(config: ObjectiveConfig) -> type[Objective]:
    """Return the class that learns by these settings."""
    return _OBJECTIVES[type(config)]


def objective_named(kind: str, *, where: str) -> type[Objective]:
    """Return the class of a kind; ConfigError, which begins with `where`, names the nearest one."""
    return _OBJECTIVES[_config_named(kind, where)]


def _config_named(kind: Any, where: str) -> type[ObjectiveConfig]:
    kinds = {str(tag_of(config)): config for config in _OBJECTIVES}
    if str(kind) not in kinds:
        raise ConfigError(f"{where}: objective.kind = {kind}; {nearest(str(kind), list(kinds))}")
    return kinds[str(kind)]


def _validated(value: Any) -> ObjectiveConfig:
    if isinstance(value, ObjectiveConfig):
        return value
    union: Any = functools.reduce(operator.or_, _OBJECTIVES)
    settings: ObjectiveConfig = TypeAdapter(Annotated[union, Discriminator("kind")]).validate_python(value)
    return settings


# of any registered kind, found by the value of `kind`
RegisteredConfig = Annotated[ObjectiveConfig, PlainValidator(_validated)]


def present_layout(recipe: Mapping[str, Any], where: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the mapping of a recipe with `--set` applied and its objective as one group, `objective: {kind: dino, …}`.

    Recipes and run folders of version 1, and `--set dino.momentum=…` or `--set objective=mae` of its commands, are
    understood; settings of another objective than the one that comes out are checked and left out. ConfigError, which
    begins with `where`, for a kind that is not known, a group in both layouts, and settings that a kind does not have.
    """
    kind, groups = _groups_by_kind(recipe, where)
    below_groups = []
    for override in overrides:
        key, sign, text = override.partition("=")
        if key in ("objective", "objective.kind"):
            kind, given = _groups_by_kind(with_overrides({}, [f"objective{sign}{text}"]), where)
            groups |= given
        else:
            below_groups.append(override)

    def with_kind(override: str) -> str:
        key, sign, text = override.partition("=")
        group, *below = key.split(".")
        places = {"objective": (str(kind),), **_FORMER}
        return ".".join(("objective", *places[group], *below)) + sign + text if group in places else override

    rest = {key: value for key, value in recipe.items() if key not in ("objective", *_FORMER)}
    values = with_overrides({**rest, "objective": groups}, [with_kind(override) for override in below_groups])
    groups = values.pop("objective")
    if kind is None:
        return values  # whoever builds it says what is missing
    for one, settings in {str(kind): {}, **groups}.items():
        config = _config_named(one, where)
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{where}: objective {one} = {settings!r}; expected a group of settings")
        if one != kind:
            build(config, {"kind": one, **settings}, where=f"{where}: objective {one}")
    return {**values, "objective": {"kind": kind, **groups.get(kind, {})}}


def _groups_by_kind(recipe: Mapping[str, Any], where: str) -> tuple[Any, dict[str, Any]]:
    """Return the kind that a recipe names, and the settings of each kind that it holds, in either layout."""
    kind = objective = recipe.get("objective")
    groups: dict[str, Any] = {}
    if isinstance(objective, Mapping):
        kind = objective.get("kind")
        groups[str(kind)] = {key: value for key, value in objective.items() if key != "kind"}
    for group, (former, *below) in _FORMER.items():
        if group in recipe:
            if former in groups:
                raise ConfigError(f"{where}: {group} beside objective.kind = {former}; give its settings in one place")
            groups[former] = {below[0]: recipe[group]} if below else recipe[group]
    return kind, groups
