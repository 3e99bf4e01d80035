"""Fixtures that every room's tests share."""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import subprocess
import sys
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARING = ("tests/slurm", "tests/long")  # folders whose files share what is dear: a SLURM, a demo
# files of the short run that are not marked as fast: they start many processes, kill many builds, train many runs
NOT_FAST = [
    *("backends_agree", "demo_inputs", "elastic", "follow", "full_size", "hang", "jobs_command", "kill", "launch"),
    *("mccv_fit", "online_remote", "resume", "signals", "store_killed", "tiling"),
]
END_S = 120  # for what tests left behind to end in

# bitwise promises are made for one thread; said here, so that plain `pytest` and every process that it starts heed it
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # before -m is heeded
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is fast, of every room; let several processes begin with the files that take minutes."""
    dear = set()
    for item in items:
        if item.get_closest_marker("long") or item.get_closest_marker("slurm"):
            dear.add(item.path)
        elif item.path.parent.name != "tools" and item.path.stem.removeprefix("test_") not in NOT_FAST:
            item.add_marker("fast")
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path not in dear)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Let no thread that a test left behind hold up the end: after `END_S` seconds stderr tells where it stands."""
    faulthandler.dump_traceback_later(END_S, exit=True, file=sys.__stderr__)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a file to one process as a whole, for the sake of its fixtures; likewise the files of a sharing folder."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = PurePosixPath(nodeid.partition("::")[0])
            return str(file.parent if str(file.parent) in SHARING else file)

    config.option.loadscopereorder = False  # ours is the order of `pytest_collection_modifyitems`
    return Files(config, log)


def _load(stem: str) -> ModuleType:
    """Load a module by its path: with --import-mode=importlib the tests are no package that could be imported from."""
    name = f"hpcssl_tests_{stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{stem}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def small() -> ModuleType:
    """Helpers that make small real inputs (tests/small.py)."""
    return _load("small")


@pytest.fixture(scope="session")
def online() -> ModuleType:
    """Helpers that make small slides and serve them (tests/online.py)."""
    return _load("online")


@pytest.fixture(scope="session")
def online_slides(online: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The table of four small slides that tests read and do not change."""
    return online.draw_slides(tmp_path_factory.mktemp("slides"))


@pytest.fixture(scope="session")
def data(small: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiles, store and schedule that tests read and do not change (`small.Data`)."""
    return small.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def one_thread() -> Any:
    """One CPU thread, as bitwise comparisons need it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_process() -> Any:
    """Puts back what a pretraining run in this process changes: signal handlers and torch's threads."""
    import signal

    import torch

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before, threads = [signal.getsignal(number) for number in numbers], torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what commands on PATH do: `commands(squeue="echo 7")` writes a script of that line of shell."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def write(**lines: str) -> None:
        for name, line in lines.items():
            (folder / name).write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
            (folder / name).chmod(0o755)

    return write


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """A file system of 2 MB, or of `request.param` bytes; skips without the right to mount one."""
    folder, size = tmp_path / "disk", f"size={getattr(request, 'param', '2m')}"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=False).returncode:
        pytest.skip("no right to mount a small tmpfs here; needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real H&E tiles, slides and MIL bags: HPCSSL_TEST_DATA, else ../shared/data; skips where there are none."""
    folder = Path(os.environ.get("HPCSSL_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "tiles").is_dir():
        pytest.skip(f"no real data at {folder}; set HPCSSL_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY
