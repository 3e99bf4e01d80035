"""Against the published code of DINO (github.com/facebookresearch/dino): set HPCSSL_DINO_REPO to a checkout."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from hpcssl.models.encoder import normalised
from hpcssl.optim.parameters import clip_each, parameter_groups
from hpcssl.optim.values import cosine
from hpcssl.train.config import StepValues
from hpcssl.train.objective import Dino
from hpcssl.train.reduce import Collectives
from hpcssl.train.state import TrainState

CPU = torch.device("cpu")
REPOSITORY = ("HPCSSL_DINO_REPO", "main_dino.py")
TOLERANCE = 1e-5
VALUES = StepValues(lr=0.0, weight_decay=0.0, momentum=0.9, teacher_temperature=0.04, last_layer_frozen=False)

pytestmark = pytest.mark.usefixtures("one_thread")


def their_name(ours: str) -> str:
    """Return the published name of a parameter of student or teacher, in its MultiCropWrapper."""
    for mine, theirs in (
        ("encoder.vit.", "backbone."),
        ("head.last_v", "head.last_layer.weight_v"),
        ("head.last_g", "head.last_layer.weight_g"),
    ):
        if ours.startswith(mine):
            return theirs + ours.removeprefix(mine)
    return ours


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


@pytest.fixture
def one_process(tmp_path):
    """A process group of one: the published loss reduces its centre."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _theirs(recipe, ours: nn.Module) -> nn.Module:
    """Return the published student or teacher with our weights."""
    vits, utils = importlib.import_module("vision_transformer"), importlib.import_module("utils")
    size, head = recipe.encoder, recipe.dino.head
    backbone = vits.VisionTransformer(
        img_size=[size.image_px],
        patch_size=size.patch_px,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        mlp_ratio=4,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    top = vits.DINOHead(
        size.embed_dim,
        head.out_dim,
        hidden_dim=head.hidden_dim,
        bottleneck_dim=head.bottleneck_dim,
        norm_last_layer=True,
    )
    model = utils.MultiCropWrapper(backbone, top)
    weights = {their_name(name): tensor for name, tensor in ours.state_dict().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == ["head.last_layer.weight_g"], "the lengths are 1 and frozen"
    return model


@pytest.fixture
def pair(small, published):
    """Our objective, the published student and teacher, and the same views for both."""
    published(*REPOSITORY)
    recipe = small.dino_recipe()
    recipe = replace(recipe, encoder=replace(recipe.encoder, drop_path=0.0))
    ours = Dino(recipe, CPU)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in ours.module.parameters():  # the teacher is another model, and no weight is 0
            parameter += 0.05 * torch.randn_like(parameter)
        ours.module.get_buffer("center").copy_(0.1 * torch.randn(64))
    views = tuple(torch.randint(0, 256, (2, 6, px, px, 3), dtype=torch.uint8) for px in (32, 16))
    models = [_theirs(recipe, ours.module.get_submodule(part)) for part in ("student", "teacher")]
    return recipe, ours, models, views


@pytest.mark.usefixtures("one_process")
def test_loss_gradients_and_centre_are_the_published_ones(pair):
    recipe, ours, (student, teacher), views = pair
    loss_of = importlib.import_module("main_dino").DINOLoss(
        recipe.dino.head.out_dim, 4, 0.04, 0.04, 0, 10, student_temp=0.1, center_momentum=0.9
    )
    loss_of.center.copy_(ours.module.get_buffer("center")[None])
    crops = [normalised(view) for kind in views for view in kind]
    theirs = loss_of(student(crops), teacher(crops[:2]).detach(), 0)
    theirs.backward()

    loss = ours.loss(views, np.arange(6), None, VALUES)
    loss.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=TOLERANCE)
    gradients = {name: p.grad for name, p in student.named_parameters()}
    for name, parameter in ours.trained.named_parameters():
        assert _difference(parameter.grad, gradients[their_name(name)]) < TOLERANCE, name
    ours.after_update(VALUES, 6, Collectives())
    assert _difference(ours.module.get_buffer("center"), loss_of.center[0]) < TOLERANCE


def test_clipping_and_freezing_are_the_published_ones(pair):
    recipe, ours, (student, _), _ = pair
    utils = importlib.import_module("utils")
    theirs = dict(student.named_parameters())
    for name, parameter in ours.trained.named_parameters():
        parameter.grad = torch.randn_like(parameter)
        theirs[their_name(name)].grad = parameter.grad.clone()
    utils.clip_gradients(student, 1.0)
    clip_each(ours.trained.parameters(), 1.0)
    for name, parameter in ours.trained.named_parameters():
        assert _difference(parameter.grad, theirs[their_name(name)].grad) < TOLERANCE, name
    utils.cancel_gradients_last_layer(0, student, 1)
    ours.before_update(replace(VALUES, last_layer_frozen=True))
    for name, parameter in ours.trained.named_parameters():
        assert (parameter.grad is None) == (theirs[their_name(name)].grad is None), name


def test_the_same_parameters_decay(pair):
    _, ours, (student, _), _ = pair
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    published = [
        {names[id(p)] for p in g["params"]} for g in importlib.import_module("utils").get_params_groups(student)
    ]
    groups = [{their_name(n) for n in g["names"]} for g in parameter_groups(ours.trained.named_parameters())]
    assert groups == published


def test_values_are_the_published_ones(published):
    published(*REPOSITORY)
    table = importlib.import_module("utils").cosine_scheduler(5e-4, 1e-6, 20, 7, warmup_epochs=3)
    ours = [cosine(step, base=5e-4, final=1e-6, total_steps=140, warmup_steps=21) for step in range(140)]
    np.testing.assert_allclose(ours, table, rtol=1e-12)


def test_ten_steps_give_the_published_weights(pair, small):
    """AdamW with its groups, clipping, freezing and the moving average, as main_dino's loop applies them."""
    recipe, _, _, _ = pair
    utils = importlib.import_module("utils")
    state = TrainState(replace(recipe, train=replace(recipe.train, precision="fp32")), CPU)
    student, teacher = (_theirs(recipe, state.objective.module.get_submodule(p)) for p in ("student", "teacher"))
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    torch.manual_seed(1)
    for step in range(10):
        values = replace(VALUES, lr=1e-3, weight_decay=0.04 + 0.01 * step, last_layer_frozen=step < 3)
        state.set_values(values)
        theirs = dict(student.named_parameters())
        for name, parameter in state.objective.trained.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            theirs[their_name(name)].grad = parameter.grad.clone()
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = values.lr
            if i == 0:
                group["weight_decay"] = values.weight_decay
        utils.clip_gradients(student, 1.0)
        utils.cancel_gradients_last_layer(0 if step < 3 else 1, student, 1)
        optimizer.step()
        with torch.no_grad():
            for mine, other in zip(student.parameters(), teacher.parameters(), strict=True):
                other.mul_(0.9).add_(0.1 * mine)
        state.objective.before_update(values)
        clip_each(state.parameters, 1.0)
        state.optimizer.step()
        state.objective.after_update(values, 1, Collectives())
    for part, model in (("student", student), ("teacher", teacher)):
        weights = model.state_dict()
        for name, tensor in state.objective.module.get_submodule(part).state_dict().items():
            assert _difference(tensor, weights[their_name(name)]) < TOLERANCE, f"{part}.{name}"
