"""What `hpcssl doctor` makes of the facts: each check is a function from facts to one line of the report."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PASS, WARN, FAIL = "pass", "warn", "fail"
SLURM_TIMEOUT_S = 5.0
VOLTA_PINS = (
    "install the last builds that hold Volta code: 'torch<=2.14' built for CUDA 12.6"
    " (--index-url https://download.pytorch.org/whl/cu126) and, for DALI, nvidia-dali-cuda120"
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str
    status: str  # pass, warn (the main job works without it) or fail
    detail: str
    fix: str = ""  # what to do about a warn or fail

    @classmethod
    def ok(cls, name: str, detail: str) -> Check:
        """Return the line of what works."""
        return cls(name=name, status=PASS, detail=detail)

    @classmethod
    def warning(cls, name: str, detail: str, fix: str) -> Check:
        """Return the line of what the main job works without."""
        return cls(name=name, status=WARN, detail=detail, fix=fix)

    @classmethod
    def failure(cls, name: str, detail: str, fix: str) -> Check:
        """Return the line of what does not work."""
        return cls(name=name, status=FAIL, detail=detail, fix=fix)


def requirement_of(package: str) -> Requirement:
    """Return what the installed hpcssl requires of a package, as its metadata say.

    >>> str(requirement_of("timm"))
    'timm>=1.0.9'
    """
    requirements = map(Requirement, importlib.metadata.requires("hpcssl") or ())
    return next(r for r in requirements if r.name == package and (r.marker is None or r.marker.evaluate({"extra": ""})))


def check_python(version: Sequence[int]) -> Check:
    """Check for Python 3.10 to 3.13."""
    detail = ".".join(map(str, version))
    if (3, 10) <= tuple(version[:2]) <= (3, 13):
        return Check.ok("python", detail)
    is_newer = tuple(version[:2]) > (3, 13)
    judge, why = (Check.warning, "not tested with it") if is_newer else (Check.failure, "too old")
    fix = "make the environment with python3.10, 3.11, 3.12 or 3.13"
    return judge("python", f"{detail}, {why}; expected 3.10 to 3.13", fix)


def check_package(name: str, version: str | None, purpose: str) -> Check:
    """Check a required package: present, and of a version that hpcssl allows."""
    requirement = requirement_of(name)
    if version is None:
        return Check.failure(name, f"not installed; {purpose} need it", f"pip install '{requirement}'")
    # of a development version, the release that it leads to
    if not requirement.specifier.contains(Version(version).base_version):
        allowed = re.sub(r"^>=([^,]+)$", r"\1 or newer", str(requirement.specifier))
        return Check.failure(name, f"{version}; expected {allowed}", f"pip install -U '{requirement}'")
    return Check.ok(name, version)


def check_torch(version: str, threads: int, cpu_count: int) -> Check:
    """Check torch and tell its CPU threads."""
    check = check_package("torch", version, "all models")
    if check.status == FAIL:
        return check
    return Check.ok("torch", f"{version}, {threads} threads on {cpu_count} CPUs")


def check_no_gpu(cuda_build: str | None, driver: bool) -> Check:
    """Check why torch sees no GPU: none here, a CPU build of torch, or a driver that it cannot use."""
    if not driver:
        return Check.warning("gpu", "none; not needed for the demo or small runs", "pretrain at scale on GPU nodes")
    if cuda_build is None:
        fix = "pip install --force-reinstall torch torchvision, builds for CUDA (see pytorch.org)"
        return Check.warning("gpu", "the machine has a driver, but this torch is built for the CPU", fix)
    fix = "compare the CUDA version of nvidia-smi with torch's, and look at CUDA_VISIBLE_DEVICES"
    return Check.warning("gpu", f"torch (CUDA {cuda_build}) cannot use the driver; nothing will run on a GPU", fix)


def check_gpu(index: int, name: str, capability: tuple[int, int], memory_gib: float, arch_list: Sequence[str]) -> Check:
    """Check that torch holds code for a GPU; bf16 suits it from capability 8, fp16 with loss scaling below."""
    where, sm = f"gpu {index}", f"sm_{capability[0]}{capability[1]}"
    detail = f"{name}, {memory_gib:.0f} GiB, {sm}"
    if not _holds_code(capability, arch_list):
        fix = VOLTA_PINS if capability == (7, 0) else f"install a torch whose torch.cuda.get_arch_list() holds {sm}"
        lack = f"this torch holds no code for it, only {' '.join(arch_list) or 'none'}"
        return Check.failure(where, f"{detail}; {lack}", fix)
    precision = "bf16" if capability >= (8, 0) else "fp16 with loss scaling (no bf16)"
    return Check.ok(where, f"{detail}; precision: {precision}")


def check_dali(package: str | None, failure: str | None) -> Check:
    """Check DALI, which is optional; its CPU pipelines work without a GPU."""
    install = "pip install '.[dali]' (V100: '.[dali-cuda12]')"
    if package is None:
        return Check.warning("dali", "not installed; not needed for the CPU backends", install)
    if failure:
        detail = f"{package} does not import ({failure}); not needed for the CPU backends"
        return Check.warning("dali", detail, f"pip uninstall {package.split()[0]}, then {install}")
    return Check.ok("dali", f"{package}; its CPU pipelines work without a GPU")


def check_pillow(pillow: str | None, simd: str | None, module: str, turbo: bool) -> Check:
    """Check which of pillow and pillow-simd is in use and whether it decodes JPEG with libjpeg-turbo."""
    again = "pip uninstall -y pillow pillow-simd && pip install pillow (or '.[simd]')"
    if pillow and simd:
        detail = f"pillow {pillow} and pillow-simd {simd} are both installed, over each other (PIL is {module})"
        return Check.failure("pillow", detail, again)
    if not pillow and not simd:
        return Check.failure("pillow", f"PIL {module} is of no known package", again)
    used = f"pillow-simd {simd}" if simd else f"pillow {pillow}"
    if not turbo:
        detail = f"{used} without libjpeg-turbo: JPEG decoding is several times slower"
        return Check.warning("pillow", detail, "pip install --force-reinstall pillow, a binary wheel")
    hint = "" if simd else "; pillow-simd is not needed, but resizes faster ('.[simd]')"
    return Check.ok("pillow", f"{used} with libjpeg-turbo{hint}")


def check_openslide(version: str | None, failure: str | None) -> Check:
    """Check OpenSlide, which is optional."""
    if failure is None:
        return Check.ok("openslide", version or "found")
    detail = f"not usable ({failure}); not needed for JPEG tiles"
    return Check.warning("openslide", detail, "pip install openslide-python openslide-bin")


def check_slurm(missing: Sequence[str], answer: str | None) -> Check:
    """Check SLURM, which is optional: missing commands, and what sinfo answered (None: nothing in time)."""
    unneeded = "not needed on one machine"
    if missing:
        fix = "run on a login node of the cluster, or load its slurm module"
        return Check.warning("slurm", f"no {' and no '.join(missing)} on PATH; {unneeded}", fix)
    if answer is None:
        detail = f"sinfo gave no answer within {SLURM_TIMEOUT_S:.0f} s; {unneeded}"
        return Check.warning("slurm", detail, "see whether slurmctld is up: scontrol ping")
    return Check.ok("slurm", f"partitions: {answer or 'none listed'}")


def check_disk(folder: Path, free_gib: float, writable: bool) -> Check:
    """Check that results can be written: under 1 GiB fails, under 20 GiB warns."""
    detail = f"{free_gib:.1f} GiB free in {folder}"
    if not writable:
        return Check.failure("disk", f"{detail}, not writable for this user", "choose another folder with --out")
    if free_gib < 20:
        judge = Check.failure if free_gib < 1 else Check.warning
        return judge("disk", detail, "free some space, or choose another folder with --out")
    return Check.ok("disk", detail)


def check_shared_memory(size_gib: float | None) -> Check:
    """Check /dev/shm, through which loader and ranks hand over batches."""
    if size_gib is None:
        detail = "no /dev/shm here; batches between processes go through files"
        return Check.warning("shared memory", detail, "run on Linux for training at scale")
    if size_gib < 1:
        fix = "enlarge it: docker run --shm-size=8g, or mount -o remount,size=8G /dev/shm"
        return Check.warning("shared memory", f"{size_gib:.2f} GiB in /dev/shm, under 1 GiB", fix)
    return Check.ok("shared memory", f"{size_gib:.1f} GiB in /dev/shm")


def check_open_files(soft: int, hard: int) -> Check:
    """Check the limit on open files (-1: none), which the shards of a packed store and the ranks share."""
    if soft < 0 or soft >= 4096:
        return Check.ok("open files", "no limit" if soft < 0 else f"limit {soft}")
    fix = "ulimit -n 65536" if hard < 0 or hard >= 65536 else f"ulimit -n {hard}; ask for more in limits.conf"
    detail = f"limit {soft}; not needed for the demo, but stores of thousands of shards want 4096 or more"
    return Check.warning("open files", detail, fix)


def check_processes(start_methods: Sequence[str], gloo_failure: str | None) -> Check:
    """Check that ranks can start and meet on this machine's CPU."""
    if gloo_failure:
        fix = "see that this host's name resolves (getent hosts $(hostname)), or set GLOO_SOCKET_IFNAME=lo"
        return Check.failure("processes", f"gloo does not start: {gloo_failure}", fix)
    if "fork" not in start_methods:
        detail = "gloo works, but no fork here: loader processes start slowly"
        return Check.warning("processes", detail, "run on Linux for training at scale")
    return Check.ok("processes", "fork and gloo work")


def check_temp_folder(folder: str, failure: str | None) -> Check:
    """Check that temporary files can be written."""
    if failure:
        return Check.failure("temp folder", f"{folder}: {failure}", "set TMPDIR to a writable folder with free space")
    return Check.ok("temp folder", f"{folder} is writable")


def _holds_code(capability: tuple[int, int], arch_list: Iterable[str]) -> bool:
    """Say whether one of the builds (sm_80, sm_90a, compute_90 …) runs on a GPU.

    Machine code runs on the same major version from its minor version on; PTX (compute_) on everything later.
    """
    builds = [(m[1], (int(m[2]), int(m[3]))) for arch in arch_list if (m := re.match(r"([a-z]+)_(\d+)(\d)", arch))]
    return any(code <= capability and (code[0] == capability[0] or kind == "compute") for kind, code in builds)
