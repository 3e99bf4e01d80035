"""The verb `pretrain` as a function: a plan that writes nothing, then a run that tells its display how far it is."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from hpcssl.pipelines.display import Display
from hpcssl.pipelines.pretrain import PretrainOutcome, PretrainRequest, describe_start, plan_pretraining, pretrain


@pytest.mark.usefixtures("own_process")
def test_a_plan_writes_nothing_and_a_start_trains_to_the_end(small, data, tmp_path):
    recipe = small.write_recipe(tmp_path / "recipe.yaml", small.mae_recipe(stop_after=1))
    where = {"store": data.store_path, "schedule": data.schedule_path, "out": tmp_path / "run"}
    request = PretrainRequest(recipe=str(recipe), cluster="none", overrides=["seed=3"], **where)
    plan = plan_pretraining(request)
    assert describe_start(plan).splitlines()[1] == "1 node x 1 processes, 12 tiles of the global batch of 12 each"
    assert (plan.recipe.seed, plan.note) == (3, "")
    assert not request.out.exists()
    steps, labels = [], []

    @contextmanager
    def progress(label, total, unit):
        labels.append((label, total, unit))
        yield steps.append

    assert pretrain(plan, Display(progress=progress, say=print)) == PretrainOutcome(state="finished")
    assert (sum(steps), labels) == (3, [("pretraining", 3, "steps")])
