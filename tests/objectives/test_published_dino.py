"""Against the published code of DINO (github.com/facebookresearch/dino): set HPCSSL_DINO_REPO to a checkout."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from hpcssl.loader.stream import Batch
from hpcssl.models.encoder import EncoderConfig, build_encoder, normalised, resample_position
from hpcssl.models.heads import DinoHead, DinoHeadConfig
from hpcssl.objectives.contract import Tiles
from hpcssl.objectives.dino.dino_objective import DinoValues
from hpcssl.train.objective import build_objective
from hpcssl.train.reduce import Collectives
from hpcssl.train.state import TrainState
from hpcssl.train.step import train_step

CPU = torch.device("cpu")
REPOSITORY = ("HPCSSL_DINO_REPO", "main_dino.py")
TOLERANCE = 1e-5
VALUES = DinoValues(momentum=0.9, teacher_temperature=0.04, last_layer_frozen=False)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),  # which the published head uses
]


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
    return float((ours - theirs).detach().norm() / theirs.detach().norm().clamp_min(1e-12))


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
    size, head = recipe.encoder, recipe.objective.head
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
        norm_last_layer=head.norm_last_layer,
    )
    model = utils.MultiCropWrapper(backbone, top)
    weights = {their_name(name): tensor for name, tensor in ours.state_dict().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    fixed = ["head.last_layer.weight_g"] if head.norm_last_layer else []  # lengths of 1
    assert missing == fixed
    return model


@pytest.fixture(params=[True, False], ids=["unit_prototypes", "free_prototypes"])
def pair(request, small, published):
    """Our objective, the published student and teacher, and the same views for both."""
    published(*REPOSITORY)
    recipe = small.dino_recipe()
    head = replace(recipe.objective.head, norm_last_layer=request.param)
    recipe = replace(
        recipe, encoder=replace(recipe.encoder, drop_path=0.0), objective=replace(recipe.objective, head=head)
    )
    ours = build_objective(recipe, CPU)
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
        recipe.objective.head.out_dim, 4, 0.04, 0.04, 0, 10, student_temp=0.1, center_momentum=0.9
    )
    loss_of.center.copy_(ours.module.get_buffer("center")[None])
    crops = [normalised(view) for kind in views for view in kind]
    theirs = loss_of(student(crops), teacher(crops[:2]).detach(), 0)
    theirs.backward()

    loss = ours.loss(Tiles(positions=np.arange(6), views=views), VALUES)
    loss.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=TOLERANCE)
    gradients = {name: p.grad for name, p in student.named_parameters()}
    for name, parameter in ours.trained.named_parameters():
        assert _difference(parameter.grad, gradients[their_name(name)]) < TOLERANCE, name
    ours.after_update(VALUES, 6, lambda tensor: None)
    assert _difference(ours.module.get_buffer("center"), loss_of.center[0]) < TOLERANCE


@pytest.mark.parametrize("image_px", [96, 224, 448])
def test_the_position_embedding_of_other_views_is_the_published_one(published, image_px):
    """224 px in patches of 16 px, as published; local views have 96 px."""
    published(*REPOSITORY)
    torch.manual_seed(0)
    theirs = importlib.import_module("vision_transformer").VisionTransformer(embed_dim=48, depth=1, num_heads=1)
    side = image_px // 16
    wanted = theirs.interpolate_pos_encoding(torch.zeros(1, 1 + side**2, 48), image_px, image_px)[0]
    ours = resample_position(theirs.pos_embed[0], (14, 14), (side, side))
    assert _difference(ours, wanted) < TOLERANCE
    weight = torch.randn(ours.shape)
    gradients = [torch.autograd.grad((out * weight).sum(), theirs.pos_embed)[0] for out in (ours, wanted)]
    assert _difference(*gradients) < TOLERANCE


def test_pixels_are_normalised_as_published(published):
    published(*REPOSITORY)
    views = importlib.import_module("main_dino").DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 1)
    pixels = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, 2)
    wanted = views.local_transfo.transforms[-1](pixels)  # the last one makes a tensor of the image
    assert _difference(normalised(torch.from_numpy(pixels)[None])[0], wanted) < 1e-6


def test_fresh_weights_are_drawn_as_published(published):
    published(*REPOSITORY)
    vits = importlib.import_module("vision_transformer")
    torch.manual_seed(0)
    config = DinoHeadConfig(out_dim=512, hidden_dim=128, bottleneck_dim=64)
    ours = nn.ModuleDict(
        {"encoder": build_encoder(EncoderConfig(name="vit_tiny_patch16_224")), "head": DinoHead(192, config)}
    )
    backbone, head = vits.vit_tiny(), vits.DINOHead(192, 512, hidden_dim=128, bottleneck_dim=64)
    theirs = dict(nn.ModuleDict({"backbone": backbone, "head": head}).named_parameters())
    for name, parameter in ours.named_parameters():
        wanted = theirs[their_name(name)]
        rel = 0.05 if parameter.numel() > 10_000 else 0.3  # of 192 numbers at least
        assert parameter.std().item() == pytest.approx(wanted.std().item(), rel=rel), name
        assert parameter.mean().item() == pytest.approx(wanted.mean().item(), abs=1e-2), name


def _tables(recipe, epochs: int, steps: int) -> dict[str, np.ndarray]:
    """Return the learning rate, weight decay and momentum of every step, as main_dino has them."""
    table, optim = importlib.import_module("utils").cosine_scheduler, recipe.optim
    peak, warmup = optim.lr_per_256 * recipe.global_batch / 256, round(optim.warmup_pseudo_epochs)
    return {
        "lr": table(peak, optim.final_lr, epochs, steps, warmup_epochs=warmup),
        "weight_decay": table(optim.weight_decay, optim.final_weight_decay, epochs, steps),
        "momentum": table(recipe.objective.momentum, 1, epochs, steps),
    }


def test_values_are_the_published_ones(published, small, timeline_of):
    """Every value of every step, for 20 epochs of 7 steps."""
    published(*REPOSITORY)
    epochs, steps = 20, 7
    recipe = small.dino_recipe(global_batch=512)
    recipe = replace(
        recipe,
        optim=replace(recipe.optim, warmup_pseudo_epochs=3),
        objective=replace(
            recipe.objective,
            teacher_temperature=0.07,
            teacher_temperature_warmup_pseudo_epochs=6,
            freeze_last_layer_pseudo_epochs=2,
        ),
    )
    timeline = timeline_of(recipe, epochs, steps)
    temperatures = importlib.import_module("main_dino").DINOLoss(64, 4, 0.04, 0.07, 6, epochs).teacher_temp_schedule
    tables = _tables(recipe, epochs, steps) | {
        "teacher_temperature": np.repeat(temperatures, steps),
        "last_layer_frozen": np.arange(epochs * steps) // steps < 2,
    }
    values = [vars(v) | vars(v.objective) for v in map(timeline.values, range(timeline.total_steps))]
    for name, table in tables.items():
        np.testing.assert_allclose([value[name] for value in values], table, rtol=1e-12, err_msg=name)


@pytest.mark.usefixtures("one_process", "in_float64")
def test_twelve_steps_of_training_give_the_published_weights(pair, timeline_of):
    """Four epochs of three steps: what `train_step` does against the same in the order of main_dino's loop.

    The last layer is frozen in the first epoch, and every decay and clipped gradient shows in the weights.
    """
    recipe, clip, epochs, steps = pair[0], 0.1, 4, 3
    optim = replace(recipe.optim, clip=clip)
    recipe = replace(recipe, global_batch=6, optim=optim, train=replace(recipe.train, precision="fp32", micro_batch=4))
    utils = importlib.import_module("utils")
    state, timeline = TrainState(recipe, CPU), timeline_of(recipe, epochs, steps)
    student, teacher = (_theirs(recipe, state.objective.module.get_submodule(p)) for p in ("student", "teacher"))
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    tables = _tables(recipe, epochs, steps)
    loss_of = importlib.import_module("main_dino").DINOLoss(recipe.objective.head.out_dim, 4, 0.04, 0.04, 0, epochs)
    torch.manual_seed(1)
    norms: list[float] = []
    for step in range(epochs * steps):
        views = tuple(torch.randint(0, 256, (2, 6, px, px, 3), dtype=torch.uint8) for px in (32, 16))
        crops = [normalised(view).double() for kind in views for view in kind]
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = tables["lr"][step]
            if i == 0:
                group["weight_decay"] = tables["weight_decay"][step]
        loss = loss_of(student(crops), teacher(crops[:2]), step // steps)
        optimizer.zero_grad()
        loss.backward()
        norms += utils.clip_gradients(student, clip)
        utils.cancel_gradients_last_layer(step // steps, student, 1)
        optimizer.step()
        momentum = tables["momentum"][step]
        with torch.no_grad():
            for mine, other in zip(student.parameters(), teacher.parameters(), strict=True):
                other.mul_(momentum).add_((1 - momentum) * mine)

        batch = Batch(step=step, positions=np.arange(6), views=views, mask=None)
        record = train_step(state, batch, recipe, timeline, Collectives(), CPU)
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-9), step
    assert 0 < sum(norm > clip for norm in norms) < len(norms), "some gradients were clipped and some were not"
    assert _difference(state.objective.module.get_buffer("center"), loss_of.center[0]) < 1e-9
    for part, model in (("student", student), ("teacher", teacher)):
        weights = model.state_dict()
        for name, tensor in state.objective.module.get_submodule(part).state_dict().items():
            assert _difference(tensor, weights[their_name(name)]) < 1e-9, f"{part}.{name}"
