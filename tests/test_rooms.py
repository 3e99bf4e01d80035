"""The rooms of the design: who may import whom, by real imports, without circles; and how long a piece of code may be.

Every rule is a function from a folder of code to its violations, and each is shown code that breaks it.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# in the design's order; of each room, the rooms that it may import
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
ROOMS |= {"study": {"pipelines", "report", "runs"}, "serve": {"pipelines", "report", "runs"}}
ROOMS["doctor"] = {"core", "jobs"}
ROOMS["cli"] = set(ROOMS)
# of a room, what alone may be imported from another
ONLY = {
    ("schedule", "slides"): "hpcssl.slides.slide_table",
    ("evaluate", "slides"): "hpcssl.slides.slide_table",
    ("report", "runs"): "hpcssl.runs.trace",
    ("report", "evaluate"): "hpcssl.evaluate.results",
}
WITHOUT_TORCH = {"core", "slides", "stores", "synthetic", "schedule", "plan", "report"}
TORCH_LIBRARIES = ("torch", "torchvision", "timm", "safetensors.torch")
IN_ONE_MODULE = ("nvidia.dali", "openslide", "submitit", "open_clip", "fastapi")
# modules that may import by name, and the modules of ours that they may name
BY_NAME = {
    "cli/main.py": r"hpcssl\.cli\.\w+",  # the table of commands: a command imports only what it needs
    "loader/execute.py": r"hpcssl\.loader\.\w*",  # backends, of which DALI is optional
    "doctor/machine_facts.py": r"(?!)",  # optional packages, whose import may fail in any way
}
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, PARAMETERS = 400, 60, 8

Rule = Callable[[Path], list[str]]


def trees(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Every module below a folder, parsed."""
    for path in sorted(folder.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, tree: ast.Module) -> Iterator[str]:
    """Every name that a module imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: an import of everything"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("hpcssl."):
            yield ast.unparse(node)


def is_of(name: str, library: str) -> bool:
    return name == library or name.startswith(f"{library}.")


def forbidden_imports(package: Path) -> list[str]:
    """Imports that the table of rooms does not allow."""
    found = []
    for path, tree in trees(package):
        room = path.relative_to(package).parts[0]
        if room not in ROOMS:
            assert path == package / "__init__.py", f"{path} belongs to no room"
            continue
        for name in imports(path, tree):
            _, _, rest = name.partition("hpcssl.")
            other = rest.partition(".")[0]
            if is_of(name, "hpcssl") and other in ROOMS and other != room:
                only = ONLY.get((room, other))
                if other not in ROOMS[room]:
                    found.append(f"{path}: {room} imports {name}")
                elif only and not is_of(name, only):
                    found.append(f"{path}: {room} may import only {only} of {other}, not {name}")
            if room in WITHOUT_TORCH and any(is_of(name, library) for library in TORCH_LIBRARIES):
                found.append(f"{path}: {room} imports {name}")
    return found


def scattered_libraries(package: Path) -> list[str]:
    """Libraries that are imported in more than the one module that they may be imported in."""
    users = defaultdict(set)
    for path, tree in trees(package):
        for library in IN_ONE_MODULE:
            if any(is_of(name, library) for name in imports(path, tree)):
                users[library].add(str(path))
    return [f"{library} is imported in {sorted(paths)}" for library, paths in users.items() if len(paths) > 1]


def circles(package: Path) -> list[str]:
    """Modules that import each other, be it through others or inside functions."""
    graph = {}
    for path, tree in trees(package):
        parts = path.relative_to(package.parent).with_suffix("").parts
        graph[".".join(parts).removesuffix(".__init__")] = set(imports(path, tree))
    for module, names in graph.items():
        known = {name if name in graph else name.rpartition(".")[0] for name in names}
        graph[module] = {name for name in known if name in graph and name != module}
    reached = {module: reachable(graph, module) for module in graph}
    together = {frozenset(m for m in reached[module] if module in reached[m]) for module in graph}
    return [f"a circle of {', '.join(sorted(circle))}" for circle in together if len(circle) > 1]


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """What a module imports, directly or through others."""
    seen: set[str] = set()
    ahead = [start]
    while ahead:
        new = graph[ahead.pop()] - seen
        seen |= new
        ahead += new
    return seen


def imports_by_name(package: Path) -> list[str]:
    """Import paths in strings, and calls that import by name, but in the modules of `BY_NAME`."""
    room = rf"hpcssl\.(?:{'|'.join(ROOMS)})\b"
    path_in_text = re.compile(
        rf"^\s*{room}[\w.]*(?::\w+)?\s*$|(?:import|from|-m)\s+hpcssl\b|{room}[\w.]*:\w", re.MULTILINE
    )
    found = []
    for path, tree in trees(package):
        allowed = BY_NAME.get(str(path.relative_to(package)))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            names = {getattr(node, key, None) for key in ("attr", "id", "module", "name")}
            if names & {"import_module", "__import__", "runpy"} and not allowed:
                found.append(f"{path}:{node.lineno}: imports by name")
            text = node.value if isinstance(node, ast.Constant) and id(node) not in docstrings else None
            if isinstance(text, str) and path_in_text.search(text) and not re.fullmatch(allowed or "(?!)", text):
                found.append(f"{path}:{node.lineno}: an import path in a string: {text.strip()[:60]!r}")
    return found


def stems_that_occur_twice(package: Path) -> list[str]:
    """Names of modules that do not tell which room a line of a traceback is of."""
    paths = defaultdict(list)
    for path in sorted(package.rglob("*.py")):
        paths[path.stem].append(str(path))
    return [f"{stem}: {same}" for stem, same in paths.items() if len(same) > 1 and stem != "__init__"]


def too_long(folder: Path) -> list[str]:
    """Files and functions with too many lines, functions with too many parameters."""
    found = []
    for path, tree in trees(folder):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LINES_OF_A_FILE:
            found.append(f"{path}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                where, given = f"{path}: {node.name}", node.args
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                names = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
                count = sum(name.arg not in ("self", "cls") for name in names)
                found += [f"{where} has {lines} lines"] if lines > LINES_OF_A_FUNCTION else []
                found += [f"{where} has {count} parameters"] if count > PARAMETERS else []
    return found


RULES = (forbidden_imports, scattered_libraries, circles, imports_by_name, stems_that_occur_twice, too_long)


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps_the_rule(repository: Path, rule: Rule) -> None:
    assert rule(repository / "hpcssl") == []


def test_the_tools_are_short(repository: Path) -> None:
    assert too_long(repository / "tools") == []


def test_the_modules_that_may_import_by_name_do(repository: Path) -> None:
    """An entry that outlives its module would allow what nobody meant to."""
    assert all("import_module" in (repository / "hpcssl" / name).read_text(encoding="utf-8") for name in BY_NAME)


BREAKAGES: list[tuple[Rule, dict[str, str]]] = [
    (forbidden_imports, {"core/new.py": "import hpcssl.stores.store"}),
    (forbidden_imports, {"plan/new.py": "from hpcssl.schedule.file import Schedule"}),
    (forbidden_imports, {"schedule/new.py": "from hpcssl.stores.store import Store"}),
    (forbidden_imports, {"schedule/new.py": "from hpcssl.slides import tiff"}),
    (forbidden_imports, {"plan/new.py": "def f():\n    import torch"}),
    (forbidden_imports, {"report/new.py": "from hpcssl.runs.checkpoint import load_latest"}),
    (forbidden_imports, {"jobs/new.py": "from hpcssl.train.loop import train"}),
    (forbidden_imports, {"train/new.py": "from hpcssl import synthetic"}),
    (forbidden_imports, {"jobs/new.py": "import hpcssl\nhpcssl.train.loop.train()"}),
    (scattered_libraries, {"slides/a.py": "import openslide", "slides/b.py": "from openslide import OpenSlide"}),
    (scattered_libraries, {"loader/a.py": "from nvidia import dali", "loader/b.py": "import nvidia.dali.fn"}),
    (circles, {"core/a.py": "import hpcssl.core.b", "core/b.py": "def f():\n    from hpcssl.core.a import g"}),
    (circles, {f"core/{a}.py": f"from hpcssl.core import {b}" for a, b in ("ab", "bc", "ca")}),
    (imports_by_name, {"jobs/new.py": "run('hpcssl.stores.parts:build_part')"}),
    (imports_by_name, {"jobs/new.py": "run(f'hpcssl.loader.{backend}')"}),
    (imports_by_name, {"jobs/new.py": "command = ['-m', 'hpcssl.jobs.rank']"}),
    (imports_by_name, {"jobs/new.py": "code = 'import sys; from hpcssl.jobs import follow'"}),
    (imports_by_name, {"jobs/new.py": "import importlib\nimportlib.import_module(name)"}),
    (imports_by_name, {"jobs/new.py": "from importlib import import_module as load\nload(name)"}),
    (imports_by_name, {"jobs/new.py": "import runpy\nrunpy.run_module(name)"}),
    (imports_by_name, {"jobs/new.py": "__import__(name)"}),
    (imports_by_name, {"cli/main.py": "COMMANDS = {'embed': 'hpcssl.embed.embedding'}"}),
    (stems_that_occur_twice, {"core/store.py": "", "stores/store.py": ""}),
    (too_long, {"core/new.py": "x = 1\n" * 401}),
    (too_long, {"core/new.py": "def f():\n" + "    x = 1\n" * 60}),
    (too_long, {"core/new.py": "class A:\n    def f(self, a, b, c, d, e, *f, g, h, **i): ..."}),
]


@pytest.mark.parametrize(("rule", "files"), BREAKAGES)
def test_a_breakage_is_found(tmp_path: Path, rule: Rule, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = tmp_path / "hpcssl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n", encoding="utf-8")
    assert len(rule(tmp_path / "hpcssl")) >= 1


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    """A docstring and a sentence may name a module, and the table of commands may list them."""
    text = (
        '"""What `hpcssl.jobs.follow` reads.\n\n>>> from hpcssl.core import a\n"""\nx = "(see hpcssl.train.failure)"\n'
    )
    for name, content in {"core/b.py": text, "cli/main.py": "COMMANDS = {'a': 'hpcssl.cli.a_command'}"}.items():
        (tmp_path / "hpcssl" / name).parent.mkdir(parents=True)
        (tmp_path / "hpcssl" / name).write_text(content)
    assert [rule(tmp_path / "hpcssl") for rule in RULES] == [[]] * len(RULES)
