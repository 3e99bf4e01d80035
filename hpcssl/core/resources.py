"""Named values that ship with the package: recipes, schedule specs, cluster profiles."""

from __future__ import annotations

from pathlib import Path

from hpcssl.core.config import nearest
from hpcssl.core.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
# of each kind: the folder in an installed wheel, the folder in a checkout
_FOLDERS = {
    "recipe": (_PACKAGE / "train" / "recipes",),
    "schedule spec": (_PACKAGE / "data" / "schedules", _PACKAGE.parent / "schedules"),
    "profile": (_PACKAGE / "data" / "profiles", _PACKAGE.parent / "launch" / "profiles"),
}


def names(kind: str) -> list[str]:
    """Return the names of the shipped values of a kind ("recipe", "schedule spec", "profile")."""
    return sorted(path.stem for path in _folder(kind).glob("*.yaml"))


def locate(kind: str, name_or_path: str) -> Path:
    """Return the file of a shipped name, or the given YAML file; ConfigError names the nearest where it is neither."""
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise ConfigError(f"{kind} {path}: no such file")
        return path
    if name_or_path not in names(kind):
        hint = nearest(name_or_path, names(kind))
        raise ConfigError(f"{kind} {name_or_path}: neither a .yaml file nor a name that ships; {hint}")
    return _folder(kind) / f"{name_or_path}.yaml"


def _folder(kind: str) -> Path:
    return next(folder for folder in _FOLDERS[kind] if folder.is_dir())
