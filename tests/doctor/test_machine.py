"""Each check with the facts of machines that are not this one, and the command on this one."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcssl.cli import doctor_command
from hpcssl.doctor import machine_checks as checks
from hpcssl.doctor import machine_facts as facts
from hpcssl.doctor.machine_checks import FAIL, PASS, WARN, Check

CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


def _gpu(capability: tuple[int, int], archs: list[str]) -> Check:
    return checks.check_gpu(0, "GPU", capability, 16.0, archs)


def test_volta_without_code_names_the_pins() -> None:
    fix = _gpu((7, 0), CU130).fix
    for pin in ("torch<=2.14", "cu126", "nvidia-dali-cuda120"):
        assert pin in fix
    assert "get_arch_list" in _gpu((10, 0), CU126).fix


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [
        ("torch", "2.4.1", "2.4.1; expected 2.5 or newer"),
        ("torchvision", "0.19.1+cu124", "0.19.1+cu124; expected 0.20 or newer"),
        ("submitit", "1.6.0", "1.6.0; expected <1.6,>=1.5.2"),
    ],
)
def test_what_the_installation_refuses_fails(name: str, version: str, words: str) -> None:
    check = checks.check_package(name, version, "models")
    assert (check.status, check.detail) == (FAIL, words)


@pytest.mark.parametrize(
    ("check", "status", "word"),
    [
        (checks.check_python((2, 7, 18)), FAIL, "too old"),
        (checks.check_python((3, 9, 18)), FAIL, "too old"),
        (checks.check_python((3, 10, 0)), PASS, "3.10.0"),
        (checks.check_python((3, 13, 9)), PASS, "3.13.9"),
        (checks.check_python((3, 14, 0)), WARN, "not tested with it"),
        (checks.check_torch("2.15.0+cpu", 2, 8), PASS, "2.15.0+cpu, 2 threads on 8 CPUs"),
        (checks.check_torch("2.3.1", 2, 8), FAIL, "2.3.1; expected 2.5 or newer"),
        (_gpu((7, 0), CU126), PASS, "precision: fp16 with loss scaling"),
        (_gpu((7, 5), CU130), PASS, "precision: fp16 with loss scaling"),
        (_gpu((8, 0), CU126), PASS, "precision: bf16"),
        (_gpu((8, 9), CU130), PASS, "precision: bf16"),  # sm_86 code runs on sm_89
        (_gpu((9, 0), CU130), PASS, "precision: bf16"),
        (_gpu((12, 1), CU130), PASS, "precision: bf16"),  # through the PTX
        (_gpu((7, 0), CU130), FAIL, "sm_70; this torch holds no code for it"),
        (_gpu((10, 0), CU126), FAIL, "sm_100; this torch holds no code for it"),
        (_gpu((8, 0), []), FAIL, "sm_80; this torch holds no code for it"),
        (checks.check_no_gpu(None, driver=False), WARN, "none; not needed for the demo"),
        (checks.check_no_gpu("13.0", driver=False), WARN, "none; not needed for the demo"),
        (checks.check_no_gpu(None, driver=True), WARN, "built for the CPU"),
        (checks.check_no_gpu("13.0", driver=True), WARN, "CUDA 13.0"),
        *(
            (checks.check_package("timm", version, "the encoders"), status, version or "not installed")
            for status, versions in ((FAIL, (None, "1.0.8")), (PASS, ("1.0.9", "1.0.31", "1.1.0.dev0")))
            for version in versions
        ),
        (checks.check_dali(None, "no module nvidia"), WARN, "not installed"),
        (checks.check_dali("nvidia-dali-cuda130 2.4", "libcuda missing"), WARN, "libcuda missing"),
        (checks.check_dali("nvidia-dali-cuda130 2.4", None), PASS, "without a GPU"),
        (checks.check_pillow("12.0", None, "12.0", True), PASS, "pillow 12.0"),
        (checks.check_pillow(None, "9.5.0.post2", "9.5.0.post2", True), PASS, "pillow-simd 9.5.0.post2"),
        (checks.check_pillow("12.0", None, "12.0", False), WARN, "libjpeg-turbo"),
        (checks.check_pillow("12.0", "9.5", "9.5", True), FAIL, "both"),
        (checks.check_openslide(None, "no module openslide"), WARN, "not needed for JPEG"),
        (checks.check_openslide("1.4", None), PASS, "1.4"),
        (checks.check_slurm(["sinfo", "sbatch"], None), WARN, "no sinfo and no sbatch"),
        (checks.check_slurm([], None), WARN, "no answer within 5 s"),
        (checks.check_slurm([], "gpu* cpu"), PASS, "gpu* cpu"),
        (checks.check_disk(Path("/x"), 500, True), PASS, "500.0 GiB"),
        (checks.check_disk(Path("/x"), 19.9, True), WARN, "19.9 GiB"),
        (checks.check_disk(Path("/x"), 0.9, True), FAIL, "0.9 GiB"),
        (checks.check_disk(Path("/x"), 500, False), FAIL, "not writable"),
        (checks.check_shared_memory(0.0625), WARN, "0.06 GiB"),
        (checks.check_shared_memory(1.0), PASS, "1.0 GiB"),
        (checks.check_shared_memory(None), WARN, "no /dev/shm"),
        (checks.check_open_files(1024, 1048576), WARN, "1024"),
        (checks.check_open_files(4096, 4096), PASS, "4096"),
        (checks.check_open_files(-1, -1), PASS, "no limit"),
        (checks.check_processes(["fork", "spawn"], None), PASS, "gloo"),
        (checks.check_processes(["spawn"], None), WARN, "no fork"),
        (checks.check_processes(["fork"], "cannot resolve host"), FAIL, "cannot resolve host"),
        (checks.check_temp_folder("/tmp", None), PASS, "/tmp"),
        (checks.check_temp_folder("/tmp", "Read-only file system"), FAIL, "Read-only"),
    ],
)
def test_checks_of_a_machine(check: Check, status: str, word: str) -> None:
    assert check.status == status
    assert word in check.detail
    assert bool(check.fix) == (status != PASS)


def test_open_files_fix_respects_the_hard_limit() -> None:
    assert checks.check_open_files(1024, 1048576).fix == "ulimit -n 65536"
    assert "ulimit -n 2048" in checks.check_open_files(1024, 2048).fix


def test_a_check_that_blows_up_is_a_failed_line() -> None:
    def blow() -> Check:
        raise ImportError("libfoo.so:\n undefined symbol")

    (check,) = facts.guarded("torch", blow)
    assert check.status == FAIL
    assert check.detail == "ImportError: libfoo.so: undefined symbol"
    assert check.fix


def test_an_optional_module_that_breaks_is_told_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brokenthing.py").write_text("raise OSError('libopenslide.so.1: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    assert facts._failure("brokenthing") == "libopenslide.so.1: cannot open"
    assert facts._failure("nosuchthing.sub") == "no module nosuchthing"
    assert facts._failure("json") is None
    assert facts._import("nosuchthing") is None
    with pytest.raises(OSError, match="cannot open"):
        facts._import("brokenthing")


def test_slurm_that_hangs_is_given_up(commands: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    commands(sinfo="exec sleep 30", sbatch="exit 0")
    monkeypatch.setattr(facts, "SLURM_TIMEOUT_S", 0.2)
    assert facts._slurm() == ([], None)
    commands(sinfo="printf 'gpu*\\ncpu\\n'")
    assert facts._slurm() == ([], "gpu* cpu")
    commands(sinfo="exit 1")
    assert facts._slurm() == ([], None)


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    check = facts._disk(tmp_path / "a" / "b")
    assert str(tmp_path) in check.detail


def test_exit_code_follows_the_failures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def outcome(*statuses: str) -> int:
        lines = [Check(name=f"c{i}", status=s, detail="d", fix="f" * (s != PASS)) for i, s in enumerate(statuses)]
        monkeypatch.setattr(facts, "diagnose", lambda out: lines)
        return doctor_command.run(argparse.Namespace(out=Path(), profile=None))

    assert outcome(PASS, WARN) == 0
    assert outcome(PASS, FAIL, WARN) == 2
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "pass  c0  d",
        "fail  c1  d; fix: f",
        "warn  c2  d; fix: f",
        "1 pass, 1 warn, 1 fail",
    ]


def test_a_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    doctor_command.show([Check(name="dali", status=WARN, detail="not [bold]here[/bold]", fix="pip install '.[dali]'")])
    out = capsys.readouterr().out
    assert "│" in out
    assert "not [bold]here[/bold]" in out
    assert "'.[dali]'" in out


def test_the_command_here(tmp_path: Path) -> None:
    """On this machine: every line is a pass, warn or fail with a fix, and no terminal codes."""
    command = [sys.executable, "-m", "hpcssl.cli.main", "doctor", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    *lines, summary = done.stdout.splitlines()
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    names = {line[6:].split("  ")[0] for line in lines}
    expected = "python torch torchvision timm pillow dali slurm openslide disk processes"
    assert names >= set(expected.split())
    for line in lines:
        assert line.startswith("pass  ") or (line.startswith(("warn  ", "fail  ")) and "; fix: " in line)
    failed = sum(line.startswith("fail") for line in lines)
    assert f"{failed} fail" in summary
    assert done.returncode == (2 if failed else 0)
