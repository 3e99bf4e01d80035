"""A whole training step again, in float64 numpy from pixels to weights: loss, gradient, update, teacher and centre.

Nothing of the library takes part but the draws of masks and drop-path. Gradients are compared with difference quotients
of the numpy loss, one random direction a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf, softmax

from hpcssl.loader.stream import Batch
from hpcssl.objectives.contract import Tiles
from hpcssl.objectives.mae.mae_loss import patchify
from hpcssl.plan.draw import draw_plan
from hpcssl.train.pretrain_config import Timeline
from hpcssl.train.reduce import Collectives
from hpcssl.train.state import TrainState
from hpcssl.train.step import train_step

CPU = torch.device("cpu")
PATCH, HEADS, DEPTH = 8, 2, 2  # of the small recipes' encoder
LOSS, GRADIENT = 1e-5, 2e-4  # relative; the second of the product of both lengths
Weights = dict[str, np.ndarray]

pytestmark = pytest.mark.usefixtures("one_thread")


def _normed(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * weight + bias


def _blocks(w: Weights, prefix: str, x: np.ndarray, depth: int, scale: np.ndarray | None = None) -> np.ndarray:
    """Pre-norm transformer blocks on [B, N, D]; `scale` [B, 2 · depth] multiplies attention's and MLP's branches."""

    def linear(name: str, y: np.ndarray) -> np.ndarray:
        return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    batch, tokens, dim = x.shape
    scale = np.ones((batch, 2 * depth)) if scale is None else scale
    for i in range(depth):
        at = f"{prefix}{i}."
        y = linear(f"{at}attn.qkv", _normed(x, w[f"{at}norm1.weight"], w[f"{at}norm1.bias"]))
        q, k, v = y.reshape(batch, tokens, 3, HEADS, dim // HEADS).transpose(2, 0, 3, 1, 4)
        y = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(dim // HEADS), axis=-1) @ v
        x = x + scale[:, 2 * i, None, None] * linear(f"{at}attn.proj", y.swapaxes(1, 2).reshape(batch, tokens, dim))
        y = linear(f"{at}mlp.fc1", _normed(x, w[f"{at}norm2.weight"], w[f"{at}norm2.bias"]))
        y = linear(f"{at}mlp.fc2", y * 0.5 * (1 + erf(y / np.sqrt(2))))
        x = x + scale[:, 2 * i + 1, None, None] * y
    return x


def _images(views: np.ndarray) -> np.ndarray:
    """uint8 [..., px, px, 3] less ImageNet's mean, over its deviation."""
    return (views / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]


def _cut(images: np.ndarray) -> np.ndarray:
    """[B, H, W, 3] in patches, row after row: [B, N, PATCH, PATCH, 3]."""
    batch, height, width, _ = images.shape
    cut = images.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, 3).swapaxes(2, 3)
    return cut.reshape(batch, -1, PATCH, PATCH, 3)


def _bicubic(native: int, side: int) -> np.ndarray:
    """Matrix [side, native] of the cubic convolution with a = -0.75 at the scale (side + 0.1) / native, edges kept."""
    matrix = np.zeros((side, native))
    for row in range(side):
        at = (row + 0.5) * native / (side + 0.1) - 0.5
        first = int(np.floor(at)) - 1
        for tap in range(first, first + 4):
            d, a = abs(at - tap), -0.75
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[row, min(max(tap, 0), native - 1)] += near if d <= 1 else far if d < 2 else 0.0
    return matrix


def _positions(position: np.ndarray, side: int) -> np.ndarray:
    """The patches' part of a position embedding [1 + native², D], resampled to side²."""
    native = int(np.sqrt(len(position) - 1))
    if side == native:
        return position[1:]
    grid = position[1:].reshape(native, native, -1)
    matrix = _bicubic(native, side)
    return np.einsum("ai,bj,ijd->abd", matrix, matrix, grid).reshape(side * side, -1)


def _embedded(w: Weights, images: np.ndarray) -> np.ndarray:
    """The patches' tokens with their positions, [B, N, D]."""
    kernel = w["patch_embed.proj.weight"].transpose(0, 2, 3, 1)  # timm's is (D, channel, row, column)
    tokens = np.einsum("bnijc,dijc->bnd", _cut(images), kernel) + w["patch_embed.proj.bias"]
    return tokens + _positions(w["pos_embed"][0], images.shape[1] // PATCH)


def _encoded(w: Weights, tokens: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
    """Class token before the patches, blocks, last norm: [B, 1 + N, D]."""
    first = np.broadcast_to(w["cls_token"] + w["pos_embed"][:, :1], (len(tokens), 1, tokens.shape[2]))
    x = _blocks(w, "blocks.", np.concatenate([first, tokens], 1), DEPTH, scale)
    return _normed(x, w["norm.weight"], w["norm.bias"])


def _below(w: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}


def _logits(w: Weights, views: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
    """Backbone and head on [V, B, px, px, 3]: [V, B, K]."""
    images = _images(views.reshape(-1, *views.shape[2:]))
    vit, head = _below(w, "encoder.vit."), _below(w, "head.")
    x = _encoded(vit, _embedded(vit, images), scale)[:, 0]
    for layer in (0, 2, 4):
        x = x @ head[f"mlp.{layer}.weight"].T + head[f"mlp.{layer}.bias"]
        x = x * 0.5 * (1 + erf(x / np.sqrt(2))) if layer < 4 else x
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    length = np.linalg.norm(head["last_v"], axis=1, keepdims=True)
    return (x @ (head.get("last_g", 1.0) * head["last_v"] / length).T).reshape(*views.shape[:2], -1)


@dataclass
class _Dino:
    """DINO's loss of all weights, and what follows an update."""

    recipe: Any
    batch: Batch

    @property
    def views(self) -> list[np.ndarray]:
        return [view.numpy() for view in self.batch.views]

    def scales(self) -> list[np.ndarray]:
        rates = np.repeat(np.linspace(0, self.recipe.encoder.drop_path, DEPTH), 2)
        return [kept.numpy().reshape(-1, 2 * DEPTH) / (1 - rates) for kept in self.batch.drop_path]

    def targets(self, w: Weights) -> tuple[np.ndarray, np.ndarray]:
        logits = _logits(_below(w, "teacher."), self.views[0])
        return logits, softmax((logits - w["center"]) / self.recipe.objective.teacher_temperature, axis=-1)

    def loss(self, w: Weights) -> float:
        _, q = self.targets(w)
        student = [_logits(_below(w, "student."), v, s) for v, s in zip(self.views, self.scales(), strict=True)]
        log_p = np.log(softmax(np.concatenate(student) / self.recipe.objective.student_temperature, axis=-1))
        pairs = [-(q[g] * log_p[v]).sum(-1).mean() for g in range(2) for v in range(4) if v != g]
        return float(np.mean(pairs))


@dataclass
class _Mae:
    """The masked autoencoder's loss of all weights."""

    recipe: Any
    batch: Batch

    def loss(self, w: Weights) -> float:
        images, mask = _images(self.batch.views[0][0].numpy()), self.batch.mask.numpy()
        vit, position = _below(w, "encoder.vit."), w["decoder_position"]
        tokens, errors = _embedded(vit, images), []
        for image, row, of_image in zip(images, mask, tokens, strict=True):
            x = _encoded(vit, of_image[None, ~row])[0] @ w["decoder_embed.weight"].T + w["decoder_embed.bias"]
            full = np.repeat(w["mask_token"][0], len(row) + 1, 0)
            full[0], full[1:][~row] = x[0], x[1:]
            y = _blocks(w, "decoder_blocks.", full[None] + position, self.recipe.objective.decoder.depth)
            y = _normed(y, w["decoder_norm.weight"], w["decoder_norm.bias"])[0, 1:]
            predicted = y @ w["decoder_pred.weight"].T + w["decoder_pred.bias"]
            target = _cut(image[None])[0].reshape(len(row), -1)
            target = (target - target.mean(1, keepdims=True)) / np.sqrt(target.var(1, ddof=1, keepdims=True) + 1e-6)
            errors.append(((predicted - target) ** 2).mean(1)[row].mean())
        return float(np.mean(errors))


def _sincos(dim: int, side: int) -> np.ndarray:
    """Fixed embedding of a class token (zero) and side² patches: columns first, sines before cosines."""
    frequency = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
    rows, columns = np.divmod(np.arange(side * side), side)
    halves = [[np.sin(np.outer(at, frequency)), np.cos(np.outer(at, frequency))] for at in (columns, rows)]
    return np.concatenate([np.zeros((1, dim)), np.concatenate([*halves[0], *halves[1]], axis=1)])[None]


@pytest.fixture
def begin(small: Any, data: Any) -> Callable[..., Any]:
    """A state at a step with weights, moments and, of DINO, teacher and centre unlike those of a beginning."""

    def make(kind: str, step: int, **changes: Any) -> tuple[Any, TrainState, Batch]:
        recipe = small.RECIPES[kind](**changes)
        state, generator = TrainState(recipe, CPU), torch.Generator().manual_seed(5)
        tensors, values = state.to_checkpoint()
        tensors = {n: t.clone() for n, t in tensors.items()}
        for name, tensor in tensors.items():
            if kind == "dino" or not name.endswith("pos_embed"):
                tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
        updates = {}
        for name, parameter in state.objective.trained.named_parameters():
            if parameter.requires_grad and not (name.startswith("head.last_") and step < 3):
                updates[name] = 3.0
                for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
                    drawn = 0.02 * torch.randn(parameter.shape, generator=generator)
                    tensors[f"optimizer.{key}.{name}"] = drawn**power
        state.from_checkpoint(tensors, {**values, "updates": updates, "step": step})
        shapes = [(k.count, small.GLOBAL_BATCH, k.view_px, k.view_px, 3) for k in recipe.augment.kinds]
        views = tuple(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for shape in shapes)
        positions = np.arange(step * small.GLOBAL_BATCH, (step + 1) * small.GLOBAL_BATCH)
        plan = draw_plan(recipe.augment, recipe.seed, positions, **vars(state.objective.needs))
        return recipe, state, Batch.of(step, views, plan)

    return make


def _weights(state: TrainState) -> Weights:
    """All tensors of a state in float64."""
    return {name: tensor.double().numpy().copy() for name, tensor in state.to_checkpoint()[0].items()}


def _gradients(state: TrainState, batch: Batch, timeline: Timeline) -> Weights:
    """What autograd gives of the whole batch, before anything is clipped or dropped."""
    state.gradients.zero()
    tiles = Tiles(positions=batch.positions, views=batch.views, mask=batch.mask, drop_path=batch.drop_path)
    state.objective.loss(tiles, timeline.values(state.step).objective).backward()
    state.objective.forget()
    named = state.objective.trained.named_parameters()
    return {name: p.grad.double().numpy().copy() for name, p in named if p.requires_grad}


def _assert_gradients(loss: Callable[[Weights], float], w: Weights, prefix: str, gradients: Weights) -> None:
    rng = np.random.default_rng(0)
    for name, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        direction *= 1e-5 / np.linalg.norm(direction)
        up, down = (loss({**w, prefix + name: w[prefix + name] + sign * direction}) for sign in (1, -1))
        error = abs((up - down) / 2 - (gradient * direction).sum())
        assert error <= GRADIENT * max(np.linalg.norm(gradient), 1e-3) * 1e-5, name


def _updated(recipe: Any, w: Weights, prefix: str, name: str, gradient: np.ndarray, values: Any) -> np.ndarray:
    """AdamW's fourth update of a parameter, its gradient clipped by its own norm."""
    (b1, b2), clip = recipe.optim.betas, recipe.optim.clip
    if clip is not None:
        gradient = gradient * min(1.0, clip / (np.linalg.norm(gradient) + 1e-6))
    first = b1 * w[f"optimizer.exp_avg.{name}"] + (1 - b1) * gradient
    second = b2 * w[f"optimizer.exp_avg_sq.{name}"] + (1 - b2) * gradient**2
    decay = 0.0 if name.endswith("bias") or gradient.ndim == 1 else values.weight_decay
    shrunk = w[prefix + name] * (1 - values.lr * decay)
    return shrunk - values.lr * (first / (1 - b1**4)) / (np.sqrt(second / (1 - b2**4)) + 1e-8)


def _assert_near(found: np.ndarray, wanted: np.ndarray, told: str) -> None:
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-7, err_msg=told)


def _check_dino(small, data, begin, step, *, learnt_lengths=False):
    """Train a step both ways; at step 2 the last layer is still frozen."""
    plain = small.dino_recipe()
    head = replace(plain.objective.head, norm_last_layer=not learnt_lengths)
    optim = replace(plain.optim, clip=0.05)  # so that many tensors are clipped, and others not
    recipe, state, batch = begin("dino", step, objective=replace(plain.objective, head=head), optim=optim)
    timeline, w, numpy = Timeline(recipe, data.schedule), _weights(state), _Dino(recipe, batch)
    values = timeline.values(step)
    assert values.objective.last_layer_frozen == (step < 3)
    assert values.lr > 0

    gradients = _gradients(state, batch, timeline)
    assert ("head.last_g" in gradients) == learnt_lengths
    _assert_gradients(numpy.loss, w, "student.", gradients)
    norms = [np.linalg.norm(g) for g in gradients.values()]
    assert min(norms) < 0.05 < max(norms)

    record = train_step(state, batch, recipe, timeline, Collectives(), CPU)
    assert record["loss"] == pytest.approx(numpy.loss(w), rel=LOSS)
    logits, q = numpy.targets(w)
    assert record["teacher_entropy"] == pytest.approx(-(q * np.log(q + 1e-300)).sum(-1).mean(), rel=1e-4)
    after = _weights(state)
    free = {n: g for n, g in gradients.items() if not (n.startswith("head.last_") and step < 3)}
    assert record["grad_norm"] == pytest.approx(np.sqrt(sum((g**2).sum() for g in free.values())), rel=1e-5)
    for name in gradients:
        if name in free:
            wanted = _updated(recipe, w, "student.", name, gradients[name], values)
            assert not np.array_equal(after[f"student.{name}"], w[f"student.{name}"]), name
        else:
            wanted = w[f"student.{name}"]
            assert f"optimizer.exp_avg.{name}" not in after
            assert state.objective.trained.get_parameter(name).grad is None
        _assert_near(after[f"student.{name}"], wanted, name)
        momentum = values.objective.momentum
        teacher = momentum * w[f"teacher.{name}"] + (1 - momentum) * after[f"student.{name}"]
        _assert_near(after[f"teacher.{name}"], teacher, name)
    assert all(p.grad is None for p in state.objective.module["teacher"].parameters())
    _assert_near(after["center"], 0.9 * w["center"] + 0.1 * logits.mean((0, 1)), "center")


def _check_mae(data, begin):
    recipe, state, batch = begin("mae", 6)
    timeline, w, numpy = Timeline(recipe, data.schedule), _weights(state), _Mae(recipe, batch)
    values = timeline.values(6)
    assert values.lr > 0
    w["decoder_position"] = _sincos(recipe.objective.decoder.embed_dim, 4)
    _assert_near(w["encoder.vit.pos_embed"], _sincos(recipe.encoder.embed_dim, 4), "position embedding")

    gradients = _gradients(state, batch, timeline)
    _assert_gradients(numpy.loss, w, "", gradients)
    record = train_step(state, batch, recipe, timeline, Collectives(), CPU)
    assert record["loss"] == pytest.approx(numpy.loss(w), rel=LOSS)
    after = _weights(state)
    for name, gradient in gradients.items():
        _assert_near(after[name], _updated(recipe, w, "", name, gradient, values), name)
    assert np.array_equal(after["encoder.vit.pos_embed"], w["encoder.vit.pos_embed"])


@pytest.mark.parametrize("step", [2, 6])
@pytest.mark.parametrize("learnt_lengths", [False, True])
def test_a_step_of_dino(small, data, begin, step, learnt_lengths):
    """With `learnt_lengths` those of the last layer's rows are parameters, too, and frozen as long."""
    _check_dino(small, data, begin, step, learnt_lengths=learnt_lengths)


def test_a_step_of_mae(data, begin):
    _check_mae(data, begin)


def _clipped_together(parameters, max_norm):
    return float(torch.nn.utils.clip_grad_norm_(list(parameters), max_norm))


def _frozen_by_a_zero(self, values):
    """The gradient is 0 where it should be none: weight decay and moments move the layer on."""
    if values.last_layer_frozen:
        self.trained["head"].last_v.grad.zero_()


def _resampled_to_the_size(position, native, grid):
    patches = position[None, 1:].reshape(1, *native, -1).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, size=grid, mode="bicubic")
    return torch.cat([position[:1], patches[0].permute(1, 2, 0).flatten(0, 1)])


def _all_decay(self, values):
    for group in self.optimizer.param_groups:
        group["lr"], group["weight_decay"] = values.lr, values.weight_decay


def _with_the_biased_variance(predictions, images, mask, patch_px):
    target = patchify(images, patch_px)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    return (predictions - target).square().mean(-1)[mask].mean()


@pytest.mark.parametrize(
    ("where", "broken"),
    [
        ("hpcssl.train.step.clip_each", _clipped_together),
        ("hpcssl.objectives.dino.dino_objective.Dino.before_update", _frozen_by_a_zero),
        ("hpcssl.models.encoder.resample_position", _resampled_to_the_size),
        ("hpcssl.train.state.TrainState.set_values", _all_decay),
        (
            "hpcssl.objectives.dino.dino_objective.update_center",
            lambda center, total, count, m: center * (1 - m) + total / count * m,
        ),
        ("hpcssl.objectives.dino.dino_objective.residual_scale", lambda keep, rates: keep.float()),
    ],
)
def test_another_step_of_dino_is_noticed(small, data, begin, monkeypatch, where, broken):
    monkeypatch.setattr(where, broken)
    with pytest.raises(AssertionError):
        _check_dino(small, data, begin, 2)


@pytest.mark.parametrize(
    ("where", "broken"),
    [
        ("hpcssl.objectives.mae.mae_objective.mae_loss", _with_the_biased_variance),
        ("hpcssl.train.state.TrainState.set_values", _all_decay),
    ],
)
def test_another_step_of_mae_is_noticed(data, begin, monkeypatch, where, broken):
    monkeypatch.setattr(where, broken)
    with pytest.raises(AssertionError):
        _check_mae(data, begin)
