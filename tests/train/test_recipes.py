"""The recipes that ship: each can be trained, and its encoder loads into timm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch

from hpcssl.core import resources
from hpcssl.core.config import to_mapping
from hpcssl.core.errors import ConfigError
from hpcssl.embed.exported import timm_arguments
from hpcssl.train.objective import build_objective, check_recipe
from hpcssl.train.pretrain_config import load_recipe


@pytest.mark.parametrize("name", resources.names("recipe"))
def test_what_export_writes_of_every_recipe_is_what_timm_expects(name):
    """Names, shapes and types of all tensors, without memory for them: a strict load needs no more."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        objective = build_objective(recipe, torch.device("meta"))
        encoder = objective.module.get_submodule(objective.encoder_prefix.rstrip("."))
        model = timm.create_model(**timm_arguments(to_mapping(encoder.config)))
    ours, theirs = ({n: (t.shape, t.dtype) for n, t in m.state_dict().items()} for m in (encoder.vit, model))
    assert ours == theirs
    assert recipe.objective.kind == name.partition("-")[0]
    assert check_recipe(recipe) == ""


def test_what_cannot_be_trained_is_refused_without_building_it(small):
    mae, dino = small.mae_recipe(), small.dino_recipe()
    views = mae.augment.global_views
    for recipe, told in (
        (replace(mae, encoder=replace(mae.encoder, drop_path=0.1)), "drop_path 0.1: MAE has none"),
        (
            replace(mae, augment=replace(mae.augment, global_views=replace(views, view_px=48))),
            "view of 48 px; expected encoder.image_px = 32",
        ),
        (
            replace(dino, augment=replace(dino.augment, local_views=replace(dino.augment.local_views, view_px=20))),
            "views of 20 px; expected a multiple of the patch of 8 px",
        ),
    ):
        with pytest.raises(ConfigError, match=told) as caught:
            check_recipe(recipe)
        assert "\n" not in str(caught.value)
