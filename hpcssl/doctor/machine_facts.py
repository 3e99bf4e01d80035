"""What `hpcssl doctor` gathers of this machine; `hpcssl.doctor.machine_checks` judges the facts of any machine."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from hpcssl.core.provenance import version_of
from hpcssl.doctor import machine_checks as checks
from hpcssl.doctor.machine_checks import SLURM_TIMEOUT_S, Check

_GIB = 1 << 30


def diagnose(out: Path) -> list[Check]:
    """Return all checks of this machine; `out` is where results would go."""
    gatherers: tuple[tuple[str, Callable[[], Check | list[Check]]], ...] = (
        ("python", lambda: checks.check_python(sys.version_info[:3])),
        ("torch", _torch),
        ("gpu", _gpus),
        ("torchvision", lambda: checks.check_package("torchvision", _import("torchvision"), "the encoders")),
        ("timm", lambda: checks.check_package("timm", version_of("timm"), "the encoders")),
        ("processes", _processes),
        ("pillow", _pillow),
        ("dali", lambda: checks.check_dali(_dali_package(), _failure("nvidia.dali"))),
        ("openslide", lambda: checks.check_openslide(version_of("openslide-python"), _failure("openslide"))),
        ("hdf5", lambda: checks.check_package("h5py", _import("h5py"), "feature files")),
        ("parquet", lambda: checks.check_package("pyarrow", _import("pyarrow"), "slide tables")),
        ("submitit", lambda: checks.check_package("submitit", version_of("submitit"), "launching jobs")),
        ("slurm", lambda: checks.check_slurm(*_slurm())),
        ("disk", lambda: _disk(out)),
        ("shared memory", _shared_memory),
        ("open files", lambda: checks.check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))),
        ("temp folder", _temp_folder),
    )
    return [check for name, gather in gatherers for check in guarded(name, gather)]


def guarded(name: str, gather: Callable[[], Check | list[Check]]) -> list[Check]:
    """Return what a check says; one that blows up is a failed line with the error."""
    try:
        result = gather()
    except Exception as error:  # noqa: BLE001 - the line holds the error, and the exit code tells of it
        fix = "mend this error, or reinstall the package that it names"
        return [Check.failure(name, f"{type(error).__name__}: {_one_line(error)}", fix)]
    return [result] if isinstance(result, Check) else result


def _torch() -> Check:
    import torch

    return checks.check_torch(torch.__version__, torch.get_num_threads(), os.cpu_count() or 1)


def _gpus() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
        return [checks.check_no_gpu(torch.version.cuda, driver)]
    arch_list = torch.cuda.get_arch_list()
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        checks.check_gpu(i, gpu.name, (gpu.major, gpu.minor), gpu.total_memory / _GIB, arch_list)
        for i, gpu in enumerate(gpus)
    ]


def _processes() -> Check:
    import torch.distributed as dist

    failure = None
    if not (dist.is_available() and dist.is_gloo_available()):
        failure = "this torch is built without it"
    elif not dist.is_initialized():
        try:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
            dist.destroy_process_group()
        except (RuntimeError, OSError) as error:
            failure = _one_line(error)
    return checks.check_processes(multiprocessing.get_all_start_methods(), failure)


def _pillow() -> Check:
    import PIL
    from PIL import features

    turbo = bool(features.check_feature("libjpeg_turbo"))
    return checks.check_pillow(version_of("pillow"), version_of("pillow-simd"), PIL.__version__, turbo)


def _dali_package() -> str | None:
    names = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")
    return next((f"{name} {version}" for name in names if (version := version_of(name))), None)


def _slurm() -> tuple[list[str], str | None]:
    missing = [command for command in ("sinfo", "sbatch") if shutil.which(command) is None]
    if missing:
        return missing, None
    command = ["sinfo", "--noheader", "--format=%P"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SLURM_TIMEOUT_S)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return [], None
    return [], " ".join(answer.stdout.split())


def _disk(out: Path) -> Check:
    folder = out.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return checks.check_disk(folder, shutil.disk_usage(folder).free / _GIB, os.access(folder, os.W_OK | os.X_OK))


def _shared_memory() -> Check:
    shm = Path("/dev/shm")
    return checks.check_shared_memory(shutil.disk_usage(shm).total / _GIB if shm.is_dir() else None)


def _temp_folder() -> Check:
    folder = os.environ.get("TMPDIR", "/tmp")
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile() as stream:
            stream.write(bytes(1 << 16))
    except OSError as error:
        return checks.check_temp_folder(folder, error.strerror or _one_line(error))
    return checks.check_temp_folder(folder, None)


def _import(module: str) -> str | None:
    """Return the version of a module that imports, None where it is not installed; raises what its import raises."""
    try:
        return str(importlib.import_module(module).__version__)
    except ModuleNotFoundError as error:
        if error.name == module:
            return None
        raise


def _failure(module: str) -> str | None:
    """Return why an optional module does not import, or None."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"no module {error.name}"
    except Exception as error:  # noqa: BLE001 - an optional package may break in any way; the line holds the error
        return _one_line(error)
    return None


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
