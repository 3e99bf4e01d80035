"""What `hpcssl doctor --profile` makes of a cluster's answers: each check is a function from facts to a line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpcssl.core.config import nearest
from hpcssl.doctor.machine_checks import VOLTA_PINS, Check, check_gpu
from hpcssl.jobs.profile import Profile

_UNUSABLE = ("down", "drain", "drng", "fail", "maint", "unk", "boot", "power")  # beginnings of a node's states


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition as `scontrol show partition` tells it."""

    name: str
    is_default: bool = False
    state: str = "UP"
    most_min: float = math.inf  # time limit of its jobs, in minutes
    most_nodes: float = math.inf  # of a job
    accounts: tuple[str, ...] = ()  # that may use it; none = all


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node as `sinfo` tells it."""

    name: str
    cores: int
    memory_gb: float
    gpus: int = 0
    gpu_kinds: str = ""  # as the cluster calls them, such as `gpu:v100:4`
    features: tuple[str, ...] = ()
    state: str = "idle"


def read_partitions(text: str) -> list[Partition]:
    """Read the answer to `scontrol show partition --oneliner`.

    >>> read_partitions("PartitionName=gpu AllowAccounts=ALL Default=YES MaxNodes=4 MaxTime=2-00:00:00 State=UP")[0]
    Partition(name='gpu', is_default=True, state='UP', most_min=2880.0, most_nodes=4.0, accounts=())
    """
    partitions = []
    for line in text.splitlines():
        facts = dict(word.partition("=")[::2] for word in line.split())
        if "PartitionName" in facts:
            allowed = facts.get("AllowAccounts", "ALL")
            partitions.append(
                Partition(
                    name=facts["PartitionName"],
                    is_default=facts.get("Default") == "YES",
                    state=facts.get("State", "UP"),
                    most_min=_minutes(facts.get("MaxTime", "UNLIMITED")),
                    most_nodes=float(facts["MaxNodes"]) if facts.get("MaxNodes", "").isdigit() else math.inf,
                    accounts=() if allowed == "ALL" else tuple(allowed.split(",")),
                )
            )
    return partitions


def read_nodes(text: str) -> list[Node]:
    """Read the answer to `sinfo --noheader --Node --format='%N|%c|%m|%G|%f|%T'`.

    >>> read_nodes("n1|64|515000|gpu:a100:4(S:0-1)|a100,ib|mixed")[0].gpus
    4
    """
    nodes = []
    for line in text.splitlines():
        name, cores, megabytes, gres, features, state = line.strip().split("|")
        counts = re.findall(r"\bgpu(?::[^,:(]+)?:(\d+)", gres)
        nodes.append(
            Node(
                name=name,
                cores=int(cores.rstrip("+")),
                memory_gb=int(megabytes.rstrip("+")) / 1024,
                gpus=sum(map(int, counts)),
                gpu_kinds=gres if counts else "",
                features=tuple(features.split(",")) if features != "(null)" else (),
                state=state,
            )
        )
    return nodes


def check_partition(profile: Profile, partitions: Sequence[Partition]) -> tuple[Check, Partition | None]:
    """Check that the profile's partition exists and takes jobs; returns it, too."""
    names = [p.name for p in partitions]
    is_meant = (lambda p: p.is_default) if profile.partition is None else (lambda p: p.name == profile.partition)
    partition = next(filter(is_meant, partitions), None)
    if partition is None and profile.partition is None:
        detail = f"the profile names none, and the cluster has no default among {', '.join(names) or 'none at all'}"
        return Check.failure("partition", detail, "fill in partition in the profile"), None
    if partition is None:
        fix = f"correct partition in the profile; {nearest(str(profile.partition), names)}"
        return Check.failure("partition", f"{profile.partition}: the cluster has no such partition", fix), None
    named = partition.name if profile.partition else f"{partition.name}, the cluster's default"
    if partition.state != "UP":
        fix = "ask the administrators, or take another partition"
        return Check.failure("partition", f"{named}: its state is {partition.state}", fix), partition
    return Check.ok("partition", named), partition


def check_time_limit(profile: Profile, partition: Partition) -> Check:
    """Check that the partition allows the profile's time limit."""
    if profile.timeout_min <= partition.most_min:
        return Check.ok("time limit", f"{profile.timeout_min} min")
    fix = f"timeout_min: {partition.most_min:.0f} in the profile; a run requeues itself until it is done"
    detail = f"{profile.timeout_min} min; {partition.name} allows {partition.most_min:.0f}"
    return Check.failure("time limit", detail, fix)


def nodes_that_fit(profile: Profile, nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes that have what a full one of the profile asks for."""
    (cores, memory_gb), feature = _required(profile), _feature(profile)

    def fits(node: Node) -> bool:
        is_large = node.gpus >= profile.gpus_per_node and node.cores >= cores and node.memory_gb >= memory_gb
        return is_large and (feature is None or feature in node.features)

    return list(filter(fits, nodes))


def check_nodes(profile: Profile, partition: Partition, nodes: Sequence[Node]) -> Check:
    """Check that nodes of the partition have what a full one of the profile asks for, and are up."""
    fitting, feature = nodes_that_fit(profile, nodes), _feature(profile)
    required = _amounts(profile.gpus_per_node, *_required(profile)) + (f" and {feature}" if feature else "")
    if not fitting:
        best = max(nodes, key=lambda n: (n.gpus, n.cores, n.memory_gb), default=None)
        detail, fix = f"none of the {len(nodes)} nodes of {partition.name} has {required}", "take another partition"
        if best:
            has = _amounts(best.gpus, best.cores, best.memory_gb)
            features = f" and the features {', '.join(best.features) or 'none'}" if feature else ""
            fix = f"lower gpus_per_node, cpus_per_gpu or mem_gb_per_gpu: {best.name} has {has}{features}"
        return Check.failure("nodes", detail, fix)
    up = [node for node in fitting if not node.state.lower().startswith(_UNUSABLE)]
    most = f"; a job may have {partition.most_nodes:.0f}" if math.isfinite(partition.most_nodes) else ""
    detail = f"{len(fitting)} of {len(nodes)} in {partition.name} have {required}{most}"
    if not up:
        states = ", ".join(sorted({node.state for node in fitting}))
        return Check.warning("nodes", f"{detail}, but none is up ({states})", "wait, or ask why")
    return Check.ok("nodes", f"{detail}, {len(up)} up")


def check_account(profile: Profile, partition: Partition, accounts: Sequence[str] | None) -> Check:
    """Check that this user may use the profile's account there; `accounts` None = the cluster tells none."""
    if accounts is None:
        return Check.ok("account", f"{profile.account or 'none named'}; not to be checked: sacctmgr tells none here")
    allowed = [a for a in accounts if not partition.accounts or a in partition.accounts]
    if not allowed:
        detail = f"this user has no account that may use {partition.name}"
        return Check.failure("account", detail, "ask the administrators for one")
    if profile.account is None:
        return Check.ok("account", f"the cluster's default, of {', '.join(allowed)}")
    if profile.account in allowed:
        return Check.ok("account", profile.account)
    detail = f"{profile.account}: not one of this user's that may use {partition.name}"
    return Check.failure("account", detail, f"correct account in the profile: {', '.join(allowed)}")


def check_accepted(refusal: str | None, answer: str) -> Check:
    """Check what SLURM says to a job of one full node, without submitting it."""
    if refusal is not None:
        return Check.failure("a job", f"SLURM would refuse it: {refusal}", "correct what SLURM names in the profile")
    return Check.ok("a job", f"SLURM would take it: {answer}")


def check_stack(names: str, torch_version: str, cuda_build: str | None) -> list[Check]:
    """Check, where V100 nodes are meant, that this environment, from which jobs run, is of the older stack."""
    if "v100" not in names.lower():
        return []
    numbers = tuple(int(part) for part in re.findall(r"\d+", cuda_build or ""))[:2]
    built_for = f"CUDA {cuda_build}" if cuda_build else "the CPU"
    detail = f"V100 nodes need an older one; here is torch {torch_version} for {built_for}"
    if not numbers or numbers > (12, 6):
        return [Check.failure("stack", detail, f"{VOLTA_PINS}; then submit from there")]
    return [Check.ok("stack", detail)]


def check_probe(profile: Profile, facts: Mapping[str, Any], folder: str) -> list[Check]:
    """Check what a process on a node has told: its Python and packages, its GPUs, the shared folder."""
    where = facts["host"]
    if facts.get("failure"):
        fix = "install hpcssl where the nodes see it, or add what it needs to setup in the profile"
        checks = [Check.failure("python on a node", f"{where}: python {facts['python']}, but {facts['failure']}", fix)]
    else:
        detail = f"{where}: python {facts['python']}, hpcssl {facts['hpcssl']}, torch {facts['torch']}"
        checks = [Check.ok("python on a node", detail)]
        checks += _gpu_checks(profile, facts)
    if facts["folder"]:
        checks.append(Check.ok("shared folder", f"{where} reads and writes {folder}"))
    else:
        fix = "run in a folder of a shared file system, or name one with --out"
        checks.append(Check.failure("shared folder", f"{where} does not see, or may not write, {folder}", fix))
    return checks


def check_no_probe(words: str, *, busy: bool) -> Check:
    """Tell why no process on a node has told anything; `busy` = none was free, which is no fault of the profile."""
    if busy:
        fix = "run hpcssl doctor again when a node is free"
        return Check.warning("python on a node", f"not looked at: {words}", fix)
    fix = "see that this Python lies where the nodes see it, and that setup in the profile works there"
    return Check.failure("python on a node", words, fix)


def _gpu_checks(profile: Profile, facts: Mapping[str, Any]) -> list[Check]:
    if not profile.gpus_per_node:
        return []
    if not facts["gpus"]:
        detail = f"{facts['host']}: torch (CUDA {facts['cuda'] or 'none: built for the CPU'}) sees no GPU"
        fix = "install a torch for CUDA that suits the node's driver; see that the partition has GPUs"
        return [Check.failure("gpu on a node", detail, fix)]
    kind, capability, memory_gib = facts["gpus"][0]
    return [replace(check_gpu(0, kind, tuple(capability), memory_gib, facts["archs"]), name="gpu on a node")]


def _required(profile: Profile) -> tuple[int, float]:
    """Return (cores, GB) that a profile asks for on each node."""
    ranks = profile.gpus_per_node or 1
    return profile.cpus_per_gpu * ranks, (profile.mem_gb_per_gpu or 0) * ranks


def _feature(profile: Profile) -> str | None:
    """Return the feature that a node must have; an expression of several is SLURM's to judge."""
    return profile.constraint if re.fullmatch(r"[\w.-]+", profile.constraint or "") else None


def _amounts(gpus: int, cores: int, memory_gb: float) -> str:
    memory = f", {memory_gb:.0f} GB" if memory_gb else ""
    return f"{f'{gpus} GPUs, ' if gpus else ''}{cores} cores{memory}"


def _minutes(text: str) -> float:
    """Read SLURM's `[days-]hours:minutes:seconds`.

    >>> _minutes("1-12:30:00"), _minutes("00:02:00"), _minutes("UNLIMITED")
    (2190.0, 2.0, inf)
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if not match:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes + seconds / 60
