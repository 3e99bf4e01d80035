"""Files and folders are whole or absent, also when the process is killed between write and rename."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hpcssl.core import atomic
from hpcssl.core.atomic import atomic_dir, atomic_file, digest_bytes, digest_file, write_atomic
from hpcssl.core.errors import UserError

DEATHS = {"exit": "os._exit(9)", "kill": f"os.kill(os.getpid(), {int(signal.SIGKILL)})"}


class Interrupted(BaseException):
    """Stands in for Ctrl-C."""


def visible(folder: Path) -> dict[str, bytes]:
    """Everything below a folder that a reader would take for finished, with its content."""
    files = [p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"<folder>" for p in files}


def run_and_die(script: str, folder: Path) -> None:
    """Run a script in `folder` that must not come to its end."""
    code = "import os, sys\nfrom pathlib import Path\nfrom hpcssl.core import atomic\n" + textwrap.dedent(script)
    env = os.environ | {"PYTHONPATH": str(Path(atomic.__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode in (9, -signal.SIGKILL), done.stderr


def check_kill_leaves_the_old_file(script: str, folder: Path) -> None:
    (folder / "a.txt").write_text("old")
    run_and_die(script, folder)
    assert visible(folder) == {"a.txt": b"old"}


WRITERS = {
    "while writing": """
        with atomic.atomic_file(Path("a.txt")) as temporary:
            temporary.write_text("new, but only ha")
            DIE
        """,
    "before the rename": """
        atomic.os.replace = lambda *names: DIE
        atomic.write_atomic(Path("a.txt"), "new")
        """,
}


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("moment", WRITERS)
def test_a_killed_writer_leaves_the_old_file(tmp_path: Path, death: str, moment: str) -> None:
    check_kill_leaves_the_old_file(WRITERS[moment].replace("DIE", DEATHS[death]), tmp_path)
    write_atomic(tmp_path / "a.txt", "new")
    assert visible(tmp_path) == {"a.txt": b"new"}


def test_the_check_catches_a_writer_in_place(tmp_path: Path) -> None:
    script = """
    Path("a.txt").write_text("new, but only ha")
    os._exit(9)
    """
    with pytest.raises(AssertionError):
        check_kill_leaves_the_old_file(script, tmp_path)


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("moment", ["while writing", "before the rename"])
def test_killed_folder_does_not_look_finished_and_the_next_try_is_clean(
    tmp_path: Path, death: str, moment: str
) -> None:
    script = f"""
    if {moment == "before the rename"}:
        atomic.os.replace = lambda *names: {DEATHS[death]}
    with atomic.atomic_dir(Path("deep/store")) as partial:
        (partial / "half.bin").write_text("ha")
        if {moment == "while writing"}:
            {DEATHS[death]}
    """
    run_and_die(script, tmp_path)
    assert not (tmp_path / "deep/store").exists()
    assert visible(tmp_path / "deep") == {}
    with atomic_dir(tmp_path / "deep/store") as partial:
        assert list(partial.iterdir()) == [], "what the killed try left is cleared"
        (partial / "whole.bin").write_text("whole")
    assert visible(tmp_path) == {"deep": b"<folder>", "deep/store": b"<folder>", "deep/store/whole.bin": b"whole"}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["store"]


@pytest.mark.parametrize("error", [ValueError, Interrupted, SystemExit])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a.txt").write_text("old")

    def fail_amid_file() -> None:
        with atomic_file(tmp_path / "a.txt") as temporary:
            temporary.write_text("new")
            raise error

    def fail_amid_folder() -> None:
        with atomic_dir(tmp_path / "store") as partial:
            (partial / "sub").mkdir()
            (partial / "sub/a").write_text("a")
            raise error

    for fail in (fail_amid_file, fail_amid_folder):
        with pytest.raises(error):
            fail()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    with pytest.raises(OSError, match="No space"), atomic_dir(tmp_path / "store") as partial:
        (partial / "a").write_text("a")
    assert visible(tmp_path) == {"a.txt": b"old"}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/old").write_text("old")
    with pytest.raises(OSError, match="store"), atomic_dir(tmp_path / "store") as partial:
        (partial / "new").write_text("new")
    assert visible(tmp_path) == {"store": b"<folder>", "store/old": b"old"}


def test_a_second_writer_of_a_folder_leaves_the_first_ones_files(tmp_path: Path) -> None:
    with atomic_dir(tmp_path / "store") as first:
        (first / "a").write_text("of the first")
        with contextlib.suppress(OSError, UserError), atomic_dir(tmp_path / "store"):
            raise OSError("the second stops before its end")
        assert (first / "a").read_text() == "of the first"


def events_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record what is synced and renamed, in order."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(fd: int) -> None:
        events.append(f"sync {Path(f'/proc/self/fd/{fd}').readlink().name}")
        fsync(fd)

    def renamed(old: Path, new: Path) -> None:
        events.append(f"rename to {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    return events


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to see which file is synced")
def test_synced_before_and_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = events_of(monkeypatch)
    write_atomic(tmp_path / "a.txt", b"bytes")
    assert re.fullmatch(r"sync \.a\.txt\.[0-9a-f]{8}\.tmp", events[0])
    assert events[1:] == ["rename to a.txt", f"sync {tmp_path.name}"]
    events.clear()
    with atomic_dir(tmp_path / "store") as partial:
        (partial / "one").write_text("1")
        (partial / "two").write_text("2")
    assert sorted(events[:2]) == ["sync one", "sync two"]
    assert events[2:] == ["sync .store.partial", "rename to store", f"sync {tmp_path.name}"]


def test_digests(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for size in (0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 1):
        data = b"x" * size
        path.write_bytes(data)
        assert digest_file(path) == digest_bytes(data) == hashlib.sha256(data).hexdigest()
    path.write_bytes(b"x" * (1 << 22) + b"y")
    assert digest_file(path) != digest_bytes(b"x" * ((1 << 22) + 1)), "the last chunk counts"
