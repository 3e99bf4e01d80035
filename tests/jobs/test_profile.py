"""Cluster profiles: what ships, what is refused, what the batch script says of environment and network."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hpcssl.core import resources
from hpcssl.core.config import read_yaml, to_mapping
from hpcssl.core.errors import ConfigError
from hpcssl.jobs.profile import Profile, load_profile


def test_shipped_profiles_name_every_setting_what_to_fill_in_and_what_a_precision_needs() -> None:
    words = {"a100": "trains in bf16", "h100": "trains in bf16", "local": "without GPUs", "v100": "trains in fp16"}
    assert resources.names("profile") == list(words)
    for name in words:
        path = resources.locate("profile", name)
        assert list(read_yaml(path)) == list(to_mapping(Profile())), "in the order of the documentation"
        text = path.read_text(encoding="utf-8")
        assert "Copy this file, fill in" in text
        assert f"hpcssl doctor --profile my-{name}.yaml" in text
        assert words[name] in text
        assert load_profile(name).partition is None, "nobody's cluster"
    assert "4 or 8" in text, "GPUs of a V100 node"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("partitoin: gpu", "profile own: unknown setting partitoin; did you mean partition?"),
        ("network_interfaces: ib0", "did you mean network_interface?"),
        ("gpus_per_node: four", "gpus_per_node = 'four'"),
        ("gpus_per_node: -1", "gpus_per_node = -1; expected at least 0"),
        ("cpus_per_gpu: 0", "cpus_per_gpu = 0; expected at least 1"),
        ("mem_gb_per_gpu: 0", "expected above 0"),
        ("timeout_min: 1", "signal_lead_s = 120; expected less than timeout_min = 1, which are 60 s"),
        ("environment: [A]", "environment = ['A']"),
        ("environment: {A: 1}", "environment.A = 1: input should be a valid string"),
        ("environment: {'A B': x}", "environment names 'A B'; expected letters, digits and _"),
        ("environment: {'A;rm': x}", "environment names 'A;rm'"),
        ("setup: module load cuda", "setup = 'module load cuda'"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "own.yaml").write_text(line + "\n")
    with pytest.raises(ConfigError) as caught:
        load_profile(str(tmp_path / "own.yaml"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_environment_reaches_the_shell_as_it_was_written() -> None:
    strange = {"A": 'it\'s $HOME; "b"', "EMPTY": "", "GLOO_SOCKET_IFNAME": "eth1"}
    profile = Profile(setup=("export A=before",), environment=strange, network_interface="ib0")
    script = "\n".join([*profile.batch_setup, "env -0"])
    told = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True).stdout
    seen = dict(line.split("=", 1) for line in told.split("\0") if "=" in line)
    assert {name: seen[name] for name in strange} == strange, "what environment says comes last"
    assert seen["NCCL_SOCKET_IFNAME"] == "ib0"
    assert Profile().batch_setup == []
