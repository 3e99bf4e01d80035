"""The rooms of the design: who may import whom, and the libraries that only one module may import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# in the design's order; of each room, the rooms that it may import ("*": all above it)
ROOMS: dict[str, set[str]] = {
    "core": set(),
    "slides": {"core"},
    "stores": {"core", "slides"},
    "synthetic": {"core", "slides", "stores"},
    "schedule": {"core", "slides"},
    "plan": {"core"},
    "loader": {"core", "stores", "schedule", "plan"},
    "models": {"core"},
    "optim": {"core"},
    "objectives": {"core", "plan", "models", "optim"},
    "runs": {"core"},
    "train": {"core", "slides", "stores", "schedule", "plan", "loader", "models", "optim", "objectives", "runs"},
    "features": {"core"},
    "embed": {"core", "stores", "loader", "models", "objectives", "runs", "features"},
    "evaluate": {"core", "slides", "models", "optim", "features"},
    "report": {"core", "schedule", "runs", "evaluate"},
    "jobs": {"core", "runs"},
}
ROOMS["pipelines"] = set(ROOMS)
ROOMS["doctor"] = {"core", "jobs"}
ROOMS["cli"] = set(ROOMS)
# of a room, what alone may be imported from another
ONLY = {
    ("schedule", "slides"): {"hpcssl.slides.slide_table"},
    ("evaluate", "slides"): {"hpcssl.slides.slide_table"},
    ("report", "runs"): {"hpcssl.runs.trace"},
    ("report", "evaluate"): {"hpcssl.evaluate.results"},
}
BEFORE_TORCH = {"core", "slides", "stores", "synthetic", "schedule", "plan", "report"}
TORCH_LIBRARIES = {"torch", "torchvision", "timm", "safetensors.torch"}
IN_ONE_MODULE = ("nvidia.dali", "openslide", "submitit")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}


def violations(package: Path) -> list[str]:
    """Every import that the table forbids."""
    found = []
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0]
        if room not in ROOMS:
            assert path == package / "__init__.py", f"{path} belongs to no room"
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "hpcssl" and len(parts) > 1 and parts[1] in ROOMS and parts[1] != room:
                allowed = ONLY.get((room, parts[1]))
                if parts[1] not in ROOMS[room]:
                    found.append(f"{path}: {room} imports {name}")
                elif allowed and len(parts) > 2 and not any(name.startswith(a) for a in allowed):
                    found.append(f"{path}: {room} may import only {allowed} of {parts[1]}, not {name}")
            if room in BEFORE_TORCH and any(name == t or name.startswith(f"{t}.") for t in TORCH_LIBRARIES):
                found.append(f"{path}: {room} imports {name}")
    for library in IN_ONE_MODULE:
        users = [
            p
            for p in sorted(package.rglob("*.py"))
            if any(n == library or n.startswith(f"{library}.") for n in imports(p))
        ]
        if len(users) > 1:
            found.append(f"{library} is imported in {', '.join(map(str, users))}")
    return found


def test_rooms_import_only_what_the_design_allows(repository: Path) -> None:
    assert violations(repository / "hpcssl") == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/new.py", "import hpcssl.stores.store"),
        ("plan/new.py", "from hpcssl.schedule.file import Schedule"),
        ("schedule/new.py", "from hpcssl.stores.store import Store"),
        ("plan/new.py", "def f():\n    import torch"),
        ("report/new.py", "from hpcssl.runs.checkpoint import load_latest"),
        ("jobs/new.py", "from hpcssl.train.loop import train"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / "hpcssl" / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n", encoding="utf-8")
    assert len(violations(tmp_path / "hpcssl")) >= 1
