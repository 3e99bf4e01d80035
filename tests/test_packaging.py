"""An installed wheel finds what ships by name; what is required is used, and what is used is required."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

KINDS = {"recipe": "dino-demo", "schedule spec": "opal-3b", "profile": "a100"}
# requirements that no line of ours imports, and why they are there
NEEDED_BY_OTHERS = {
    "torchvision": "timm imports it",
    "openslide-bin": "the library that openslide-python loads",
    "pyarrow": "pandas reads and writes Parquet with it",
    "tensorboard": "torch.utils.tensorboard imports it",
    "aiohttp": "fsspec reads over HTTP with it",
    "pytest-timeout": "a plugin of pytest",
    "moto": "the tests start its server as a command",
    "tiffslide": "tools/bench_tiling.py stands beside it",
    **dict.fromkeys(("ruff", "mypy", "pandas-stubs", "types-pyyaml"), "tools/test.sh runs it, or mypy reads it"),
}
# extras of which one excludes another, so that they are never all installed: the module that they are imported as
ALTERNATIVES = {"nvidia-dali-cuda130": "nvidia", "nvidia-dali-cuda120": "nvidia", "pillow-simd": "PIL"}
COME_WITH = {"pydantic_core": "pydantic", "huggingface_hub": "timm"}  # imported here, pinned by the other


@pytest.fixture(scope="module")
def site(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the unpacked wheel."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("hpcssl", "schedules", "launch"):
        shutil.copytree(repository / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", site, source]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    (wheel,) = site.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


@pytest.mark.parametrize(("kind", "name"), KINDS.items())
def test_a_wheel_finds_what_ships(site: Path, repository: Path, kind: str, name: str) -> None:
    code = (
        "import hpcssl.core.resources as r, pathlib, sys;"
        f"assert r.__file__.startswith({str(site)!r}), r.__file__;"
        f"print(*r.names({kind!r})); assert r.locate({kind!r}, {name!r}).is_file()"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"]
    done = subprocess.run(command, cwd=site, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = {"recipe": "hpcssl/train/recipes", "schedule spec": "schedules", "profile": "launch/profiles"}[kind]
    assert done.stdout.split() == sorted(p.stem for p in (repository / folder).glob("*.yaml"))


def test_the_wheel_holds_template_and_format_page(site: Path) -> None:
    assert (site / "hpcssl" / "report" / "report.html.j2").is_file()
    assert (site / "hpcssl" / "data" / "schedules" / "README.md").is_file()


def canonical(requirement: str) -> str:
    """The name of a distribution, without version and extras."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~ ]", requirement)[0]).lower()


def requirements(repository: Path) -> tuple[set[str], set[str]]:
    """Distributions that setup.py requires always, and with some extra."""
    tree = ast.parse((repository / "setup.py").read_text(encoding="utf-8"))
    assigned = {n.targets[0].id: n.value for n in tree.body if isinstance(n, ast.Assign)}  # type: ignore[attr-defined]
    always, extras = (ast.literal_eval(assigned[name]) for name in ("REQUIRED", "EXTRAS"))
    return set(map(canonical, always)), {canonical(name) for names in extras.values() for name in names}


def imported_by(folder: Path) -> set[str]:
    """Top-level modules that the code below a folder imports."""
    nodes = [n for path in folder.rglob("*.py") for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@cache
def owners() -> dict[str, list[str]]:
    """The distributions of every top-level module that is installed."""
    return {module: list(map(canonical, names)) for module, names in packages_distributions().items()}


def modules_of(distribution: str) -> set[str]:
    """Top-level modules of an installed distribution; empty where it is not installed."""
    if distribution in ALTERNATIVES:
        return {ALTERNATIVES[distribution]}
    return {module for module, names in owners().items() if distribution in names}


def test_every_requirement_is_imported_somewhere_and_can_be(repository: Path) -> None:
    always, extras = requirements(repository)
    ours, tests = imported_by(repository / "hpcssl"), imported_by(repository / "tests")
    for name in always:
        modules = modules_of(name)
        assert modules & ours or name in NEEDED_BY_OTHERS, f"{name} is required and never imported"
        for module in modules & ours or modules:
            importlib.import_module(module)
    for name in extras - always:
        modules = modules_of(name)
        assert not modules or modules & (ours | tests) or name in NEEDED_BY_OTHERS, f"{name}: no extra needs it"
    assert NEEDED_BY_OTHERS.keys() <= always | extras


def test_everything_imported_is_required(repository: Path) -> None:
    always, extras = requirements(repository)
    owned = {module for name in always | extras for module in modules_of(name)} | set(sys.stdlib_module_names)
    assert imported_by(repository / "hpcssl") - owned - {"hpcssl"} == COME_WITH.keys()
    assert set(COME_WITH.values()) <= always
