"""Which numbers of nodes will do, and which is worth waiting for."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from hpcssl.core.errors import ConfigError, RunError
from hpcssl.jobs import elastic
from hpcssl.jobs.cluster import Batch
from hpcssl.jobs.elastic import begin_in_s, parse_gpus, with_gpus
from hpcssl.jobs.profile import Resources


@pytest.mark.parametrize("text", ["8", "8..", "8..4", "0..4", "a..b", "8...9"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ConfigError, match=r"expected MIN\.\.MAX"):
        parse_gpus(text)


@pytest.mark.parametrize("each", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("limits", [(1, 1), (2, 7), (8, 24), (1, 100)])
def test_every_number_that_will_do_and_no_other(each, limits):
    fewest, most = limits
    expected = [n for n in range(1, 101) if fewest <= n * each <= most and 1080 % (n * each) == 0]
    with nullcontext() if expected else pytest.raises(ConfigError, match="choose another range"):
        resources = with_gpus(Resources(processes_per_node=each), fewest, most, global_batch=1080)
        assert [*resources.fewer_nodes, resources.nodes] == expected


@pytest.fixture
def batch(monkeypatch, tmp_path) -> Batch:
    monkeypatch.setattr(Batch, "script", lambda batch: "")
    resources = Resources(nodes=4, fewer_nodes=(1, 2))
    return Batch(name="n", token="t", folder=tmp_path, resources=resources, command=("a",), afterwards=("b",))


@pytest.mark.parametrize(
    ("expected", "wait_min", "held_back_s"),
    [
        ({4: 0.0, 2: 0.0, 1: 0.0}, 10, 0.0),
        ({4: 300.0, 2: 0.0, 1: 0.0}, 10, 300.0),  # worth waiting for
        ({4: 3600.0, 2: 120.0, 1: 0.0}, 10, 120.0),
        ({4: 3600.0, 2: 120.0, 1: 0.0}, 0, 0.0),
        ({4: None, 2: 0.0, 1: 0.0}, 10, 0.0),  # more than the cluster has
        ({4: 3600.0, 2: 3600.0, 1: 3600.0}, 10, 0.0),  # whatever comes first
    ],
)
def test_the_most_nodes_within_the_wait(monkeypatch, batch, expected, wait_min, held_back_s):
    monkeypatch.setattr(elastic, "could_start_in_s", lambda script, nodes: expected[nodes])
    assert begin_in_s(batch, wait_min=wait_min) == held_back_s


def test_what_can_never_start_is_refused(monkeypatch, batch):
    monkeypatch.setattr(elastic, "could_start_in_s", lambda script, nodes: None)
    with pytest.raises(RunError, match="not available"):
        begin_in_s(batch, wait_min=10)
