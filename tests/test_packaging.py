"""An installed wheel finds what ships by name: recipes, schedule specs, cluster profiles."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

KINDS = {"recipe": "dino-demo", "schedule spec": "opal-3b", "profile": "a100"}


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
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"],
        cwd=site,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = {"recipe": "hpcssl/train/recipes", "schedule spec": "schedules", "profile": "launch/profiles"}[kind]
    assert done.stdout.split() == sorted(p.stem for p in (repository / folder).glob("*.yaml"))


def test_the_wheel_holds_template_and_format_page(site: Path) -> None:
    assert (site / "hpcssl" / "report" / "report.html.j2").is_file()
    assert (site / "hpcssl" / "data" / "schedules" / "README.md").is_file()
