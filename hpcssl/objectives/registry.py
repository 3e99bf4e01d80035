"""The objectives by their kind, and how their settings are found in a recipe, also in one of a former version."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, PlainValidator, TypeAdapter

from hpcssl.core.config import build, nearest, tag_of
from hpcssl.core.errors import ConfigError
from hpcssl.objectives.contract import Objective, ObjectiveConfig
from hpcssl.objectives.dino.dino_objective import Dino, DinoConfig
from hpcssl.objectives.mae.mae_objective import Mae, MaeConfig

_OBJECTIVES: dict[type[ObjectiveConfig], type[Objective]] = ObjectiveConfig.registered_kinds
# in version 1 a recipe said `objective: dino`, and settings stood beside it: their group, the kind, where they are now
_FORMER = {"dino": ("dino", ""), "decoder": ("mae", "decoder")}


def register(config: type[ObjectiveConfig], objective: type[Objective]) -> None:
    """Make an objective known: recipes, run folders and commands understand its `kind` from now on."""
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
    if kind not in kinds:
        raise ConfigError(f"{where}: objective.kind = {kind}; {nearest(str(kind), list(kinds))}")
    return kinds[kind]


def _validated(value: Any) -> ObjectiveConfig:
    if isinstance(value, ObjectiveConfig):
        return value
    union: Any = functools.reduce(operator.or_, _OBJECTIVES)
    settings: ObjectiveConfig = TypeAdapter(Annotated[union, Discriminator("kind")]).validate_python(value)
    return settings


# of any registered kind, found by the value of `kind`
RegisteredConfig = Annotated[ObjectiveConfig, PlainValidator(_validated)]


def present_layout(recipe: Mapping[str, Any], where: str, *, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the mapping of a recipe with its objective as one group, `objective: {kind: dino, …}`.

    Recipes and run folders of version 1, and `--set dino.momentum=…` or `--set objective=mae` of its commands, are
    understood; settings of another objective than the recipe's are checked and left out. `before` is the recipe, in
    this layout, that `recipe` was made from by `--set`. ConfigError, which begins with `where`, for a kind that is not
    known, and for settings of another objective that it does not have.
    """
    recipe = dict(recipe)
    objective = recipe.get("objective")
    if isinstance(objective, str):
        former = {} if before is None else before["objective"]
        objective = former if former.get("kind") == objective else {"kind": objective}
    if not isinstance(objective, Mapping):
        return recipe  # whoever builds it says what is wrong
    _config_named(objective.get("kind"), where)
    for group, (kind, below) in _FORMER.items():
        if isinstance(recipe.get(group), Mapping):
            settings = recipe.pop(group)
            settings = {below: settings} if below else settings
            if objective["kind"] == kind:
                objective = _merged(objective, settings)
            else:
                build(_config_named(kind, where), {"kind": kind, **settings}, where=where)
    return {**recipe, "objective": objective}


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    inner = {k: _merged(values[k], v) for k, v in changes.items() if isinstance(v, Mapping) and k in values}
    return {**values, **changes, **inner}
