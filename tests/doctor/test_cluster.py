"""`hpcssl doctor --profile`: each check with the answers of clusters that are not here (a real one: tests/slurm)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from hpcssl.cli.main import main
from hpcssl.doctor import cluster_checks as checks
from hpcssl.doctor import cluster_facts
from hpcssl.doctor.machine_checks import FAIL, PASS, WARN, Check
from hpcssl.jobs.profile import Profile

SCONTROL = """\
PartitionName=gpu AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=YES MaxNodes=8 MaxTime=1-00:00:00 State=UP
PartitionName=volta AllowAccounts=path,bio DenyQos=x Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP
PartitionName=old AllowAccounts=ALL Default=NO MaxTime=12:00:00 State=DRAIN
"""
SINFO = """\
g1|64|515000|gpu:a100:4(S:0-1)|a100,ib|mixed
g2|64|515000|gpu:a100:4(S:0-1)|a100,ib|drained*
g3|32|257000|gpu:v100:2,shard:8|v100|idle
c1|128|1031000|(null)|(null)|idle
"""
PARTITIONS = checks.read_partitions(SCONTROL)
NODES = checks.read_nodes(SINFO)
GPU, VOLTA, OLD = PARTITIONS
A100 = Profile(gpus_per_node=4, cpus_per_gpu=8, mem_gb_per_gpu=120)
BEST = "g1 has 4 GPUs, 64 cores, 503 GB"
PROBED: dict[str, Any] = {
    **{"host": "g1", "python": "3.11.4", "hpcssl": "0.1.0", "torch": "2.15.0", "cuda": "13.0", "folder": True},
    **{"archs": ["sm_80", "sm_90"], "gpus": [["NVIDIA A100", [8, 0], 40.0]]},
}


def test_answers_are_read() -> None:
    assert [(p.name, p.is_default, p.most_min, p.accounts) for p in PARTITIONS] == [
        ("gpu", True, 1440, ()),
        ("volta", False, float("inf"), ("path", "bio")),
        ("old", False, 720, ()),
    ]
    assert [(n.name, n.gpus, n.cores, n.features) for n in NODES] == [
        ("g1", 4, 64, ("a100", "ib")),
        ("g2", 4, 64, ("a100", "ib")),
        ("g3", 2, 32, ("v100",)),
        ("c1", 0, 128, ()),
    ]
    assert checks.read_partitions("No partitions in the system\n") == []


def _partition(name: str | None, partitions: Sequence[checks.Partition] = PARTITIONS) -> Check:
    return checks.check_partition(Profile(partition=name), partitions)[0]


def _time_limit(minutes: int, partition: checks.Partition) -> Check:
    return checks.check_time_limit(Profile(timeout_min=minutes), partition)


def _nodes(nodes: Sequence[checks.Node] = NODES, **changes: Any) -> Check:
    return checks.check_nodes(replace(A100, **changes), GPU, nodes)


def _account(account: str | None, accounts: list[str] | None) -> Check:
    return checks.check_account(Profile(account=account), VOLTA, accounts)


@pytest.mark.parametrize(
    ("check", "status", "word", "fix"),
    [
        (_partition(None), PASS, "gpu, the cluster's default", ""),
        (_partition("volta"), PASS, "volta", ""),
        (_partition("vlta"), FAIL, "no such partition", "did you mean volta?"),
        (_partition("old"), FAIL, "its state is DRAIN", "another partition"),
        (_partition(None, [VOLTA, OLD]), FAIL, "no default among volta, old", "fill in partition"),
        (_partition(None, []), FAIL, "no default among none at all", "fill in partition"),
        (_time_limit(1440, GPU), PASS, "1440 min", ""),
        (_time_limit(99999, VOLTA), PASS, "99999 min", ""),
        (_time_limit(1441, GPU), FAIL, "1441 min; gpu allows 1440", "timeout_min: 1440"),
        (_nodes(), PASS, "2 of 4 in gpu have 4 GPUs, 32 cores, 480 GB; a job may have 8, 1 up", ""),
        (_nodes(constraint="a100"), PASS, "and a100", ""),
        (_nodes(constraint="h100"), FAIL, "none of the 4 nodes of gpu has 4 GPUs, 32 cores, 480 GB and h100", BEST),
        (_nodes(constraint="a100|h100"), PASS, "2 of 4", ""),  # an expression is SLURM's to judge
        (_nodes(gpus_per_node=8), FAIL, "8 GPUs, 64 cores, 960 GB", BEST),
        (_nodes(cpus_per_gpu=17), FAIL, "68 cores", BEST),
        (_nodes(mem_gb_per_gpu=130), FAIL, "520 GB", BEST),
        (_nodes(gpus_per_node=0, mem_gb_per_gpu=None), PASS, "4 of 4 in gpu have 8 cores; a job may have 8, 3 up", ""),
        (_nodes(NODES[1:]), WARN, "none is up (drained*)", "wait"),
        (_nodes([]), FAIL, "none of the 0 nodes", "take another partition"),
        (_account("bio", ["bio", "chem"]), PASS, "bio", ""),
        (_account("chem", ["bio", "chem"]), FAIL, "chem: not one of this user's that may use volta", "profile: bio"),
        (_account(None, ["bio", "path"]), PASS, "the cluster's default, of bio, path", ""),
        (_account("bio", None), PASS, "bio; not to be checked", ""),
        (_account(None, []), FAIL, "no account that may use volta", "ask"),
        (checks.check_accepted("Batch job submission failed: Invalid qos", ""), FAIL, "Invalid qos", "correct"),
        (checks.check_accepted(None, "Job 3 to start at …"), PASS, "Job 3", ""),
        (checks.check_no_probe("no node was free for 60 s", busy=True), WARN, "no node was free", "again"),
        (checks.check_no_probe("bash: /opt/python: No such file", busy=False), FAIL, "No such file", "Python"),
    ],
)
def test_checks_of_a_profile(check: Check, status: str, word: str, fix: str) -> None:
    assert check.status == status
    assert word in check.detail
    assert fix in check.fix
    assert bool(check.fix) == (status != PASS)


def test_only_nodes_that_fit_say_what_stack_is_needed() -> None:
    """The V100 node of two GPUs is none for four; for two both kinds are."""
    for gpus, kinds in ((4, {"gpu:a100:4(S:0-1)"}), (2, {"gpu:a100:4(S:0-1)", "gpu:v100:2,shard:8"})):
        profile = replace(A100, gpus_per_node=gpus)
        assert {node.gpu_kinds for node in checks.nodes_that_fit(profile, NODES)} == kinds


@pytest.mark.parametrize(
    ("names", "cuda", "status"),
    [
        ("my-v100.yaml gpu", "12.6", PASS),
        ("own volta gpu:v100:2", "13.0", FAIL),
        ("own gpu V100", None, FAIL),
        ("own gpu V100", "12.8", FAIL),
        ("a100 gpu", "13.0", None),
    ],
)
def test_v100_nodes_need_the_older_stack(names: str, cuda: str | None, status: str | None) -> None:
    found = checks.check_stack(names, "2.15.0", cuda)
    assert [check.status for check in found] == ([status] if status else [])
    if status == FAIL:
        assert "V100 nodes need an older one" in found[0].detail
        for pin in ("torch<=2.14", "cu126", "nvidia-dali-cuda120"):
            assert pin in found[0].fix


def _by_name(found: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in found}


def test_what_a_process_on_a_node_tells() -> None:
    found = _by_name(checks.check_probe(A100, PROBED, "/shared"))
    assert {check.status for check in found.values()} == {PASS}
    assert found["python on a node"].detail == "g1: python 3.11.4, hpcssl 0.1.0, torch 2.15.0"
    assert "precision: bf16" in found["gpu on a node"].detail
    assert "gpu on a node" not in _by_name(checks.check_probe(Profile(gpus_per_node=0), PROBED, "/shared"))


@pytest.mark.parametrize(
    ("changes", "name", "word"),
    [
        ({"failure": "ModuleNotFoundError: No module named 'hpcssl'"}, "python on a node", "No module named 'hpcssl'"),
        ({"gpus": []}, "gpu on a node", "sees no GPU"),
        ({"gpus": [["Tesla V100", [7, 0], 32.0]]}, "gpu on a node", "sm_70; this torch holds no code for it"),
        ({"folder": False}, "shared folder", "g1 does not see, or may not write, /shared"),
    ],
)
def test_what_is_missing_on_a_node_is_told_with_its_fix(changes: dict[str, Any], name: str, word: str) -> None:
    check = _by_name(checks.check_probe(A100, PROBED | changes, "/shared"))[name]
    assert check.status == FAIL
    assert word in check.detail
    assert check.fix


def test_without_slurm_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["doctor", "--profile", "local"]) == 2
    line, summary = capsys.readouterr().out.splitlines()
    assert line.startswith("fail  slurm  no scontrol on PATH; fix: run on a login node")
    assert summary == "0 pass, 0 warn, 1 fail"


def test_a_controller_that_hangs_is_given_up(commands: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    commands(scontrol="exec sleep 30")
    monkeypatch.setattr(cluster_facts, "_ANSWER_S", 0.2)
    (check,) = cluster_facts.diagnose_cluster(Profile(), "local", tmp_path)
    assert (check.status, "no answer within" in check.detail) == (FAIL, True)


def test_an_unknown_profile_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--profile", "a10"]) == 2
    assert "did you mean a100?" in capsys.readouterr().err
