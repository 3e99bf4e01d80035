"""A plan is a function of (seed, position, view): goldens, any batch, any processor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import hpcssl
from hpcssl.core.errors import ConfigError
from hpcssl.core.rng import uniforms
from hpcssl.plan import draw as draw_module
from hpcssl.plan.draw import Plan, Stream, ViewParameters, draw_drop_path, draw_plan
from hpcssl.plan.recipe import AugmentRecipe, ViewRecipe, dino_augment, mae_augment

POSITIONS = np.concatenate(
    [np.arange(40), 3_000_000_000 + np.arange(30), 2**32 - 15 + np.arange(30), 2**40 + np.arange(9)]
)
DrawPlan = Callable[[np.ndarray], Plan]


def dino(positions: np.ndarray, seed: int = 0) -> Plan:
    return draw_plan(dino_augment(), seed, positions)


def mae(positions: np.ndarray, seed: int = 0) -> Plan:
    return draw_plan(mae_augment(), seed, positions, num_patches=196)


def tissue_recipe(**changes: float) -> AugmentRecipe:
    """The published one with vertical flips, turns and stains."""
    changes = {"flip_vertical": 0.5, "quarter_turns": True, "stain": 0.8, **changes}
    recipe = dino_augment()
    return replace(recipe, global_views=replace(recipe.global_views, **changes))  # type: ignore[arg-type]


def tissue(positions: np.ndarray, seed: int = 0) -> Plan:
    return draw_plan(tissue_recipe(), seed, positions, drop_path=(0.0, 0.2))


def arrays_of(plan: Plan) -> dict[str, np.ndarray]:
    arrays = {
        f"{k}.{f.name}": getattr(views, f.name) for k, views in enumerate(plan.kinds) for f in fields(ViewParameters)
    }
    kept = {f"{k}.drop_path": kept for k, kept in enumerate(plan.drop_path)}
    return arrays | kept | ({} if plan.mask is None else {"mask": plan.mask}) | {"positions": plan.positions}


def row(views: ViewParameters, p: int, v: int) -> str:
    """One planned view of a 224 px tile, as a line."""
    left, top, width, height = views.windows(224, 224)[p, v].tolist()
    words = [f"{width}x{height}+{left}+{top}"]
    words += [name for name in ("flip", "jitter", "grey", "blur", "solarize") if getattr(views, name)[p, v]]
    numbers = [int(getattr(views, n)[p, v]) for n in ("brightness", "contrast", "saturation", "hue", "sigma", "order")]
    return " ".join([*words, *map(str, numbers)])


# goldens: a change of any of these changes every run that is going on; raise plan.draw.VERSION with it

DINO_GOLDEN = "9d4cf4eb14ee40d270253e71aa9f69addd4128bb5d89bd9bd150e08b8f268b8a"
# (position, view): window, what happens, brightness, contrast, saturation, hue, sigma in 1/65536, order
DINO_ROWS = {
    (0, 0): "209x186+2+1 jitter blur 85069 78637 58001 2979 65669 18",
    (0, 1): "144x148+9+51 flip jitter grey 68841 46291 73465 1308 64025 15",
    (0, 2): "111x135+90+46 jitter 46990 41923 59204 3374 91782 16",
    (0, 9): "82x71+55+88 jitter 62256 68341 54862 3124 57301 7",
    (1, 0): "209x213+7+5 flip jitter blur 76361 49075 65100 4505 127965 6",
    (31, 5): "72x62+10+21 jitter 75993 90603 59442 -5320 55275 8",
    (3_000_000_000, 1): "159x158+0+56 jitter 87065 84289 64175 6370 86989 4",
    (4_294_967_296, 0): "173x152+45+40 jitter grey blur 67710 58536 78207 3927 75165 19",
    (4_294_967_297, 3): "117x110+34+62 flip jitter grey 77263 86745 66716 -1733 32225 0",
}
MAE_GOLDEN = "4e452a20e54fb66e8f86739af3fb2148d81b5fec200b1f63bcd9cf1eb302f980"
MAE_ROWS = {
    0: "205x179+3+2 85069 78637 58001 2979 65669 18 visible 5 7 8 11 13 14 30 32",
    1: "205x211+8+6 flip 76361 49075 65100 4505 127965 6 visible 2 3 5 8 12 13 15 24",
    3_000_000_000: "205x155+19+31 54109 67053 67321 -3758 72402 8 visible 1 22 23 30 32 33 36 39",
    4_294_967_296: "147x130+68+53 67710 58536 78207 3927 75165 19 visible 6 8 11 13 15 27 32 33",
}


def dino_row(position: int, view: int) -> str:
    plan = dino(np.array([position]))
    return row(plan.kinds[0], 0, view) if view < 2 else row(plan.kinds[1], 0, view - 2)


def mae_row(position: int) -> str:
    plan = mae(np.array([position]))
    assert plan.mask is not None
    visible = " ".join(map(str, np.flatnonzero(~plan.mask[0])[:8]))
    return f"{row(plan.kinds[0], 0, 0)} visible {visible}"


def test_golden_rows_and_digests_of_32_positions() -> None:
    assert {at: dino_row(*at) for at in DINO_ROWS} == DINO_ROWS
    assert {p: mae_row(p) for p in MAE_ROWS} == MAE_ROWS
    assert dino(np.arange(32)).digest() == DINO_GOLDEN
    assert mae(np.arange(32)).digest() == MAE_GOLDEN


def test_golden_drop_path() -> None:
    keep = draw_drop_path(0, np.arange(6), [0, 1], [0.0, 0.25, 0.5, 0.75, 1.0])
    rows = ["".join(np.where(row, "x", ".")) for row in keep[:, 0]]
    assert rows == ["x....", "xx...", "x....", "x.x..", "xx...", "xx..."]


# any batch


def check_any_batch(draw: DrawPlan) -> None:
    """A position's plan is the same in any batch, at any offset, in any order, also above 2^32."""
    whole = arrays_of(draw(POSITIONS))
    for size in (1, 7, 32, len(POSITIONS)):
        parts = [arrays_of(draw(POSITIONS[i : i + size])) for i in range(0, len(POSITIONS), size)]
        for name, array in whole.items():
            assert (np.concatenate([part[name] for part in parts]) == array).all(), f"{name} in batches of {size}"
            assert parts[0][name].dtype == array.dtype
    order = np.random.default_rng(0).permutation(len(POSITIONS))
    shuffled = arrays_of(draw(POSITIONS[order]))
    for name, array in whole.items():
        assert (shuffled[name] == array[order]).all(), f"{name} in another order"


def check_ranks_agree(draw: Callable[[np.ndarray, int], Plan]) -> None:
    """The plans that W ranks draw of their slices are the plan of the whole batch, for each W."""
    whole = arrays_of(draw(np.arange(1000, 1024), 0))
    for size in (1, 2, 3, 4, 8):
        share = 24 // size
        parts = [arrays_of(draw(np.arange(1000 + r * share, 1000 + (r + 1) * share), r)) for r in range(size)]
        for name, array in whole.items():
            assert (np.concatenate([part[name] for part in parts]) == array).all(), f"{name} with {size} ranks"


@pytest.mark.parametrize("draw", [dino, mae, tissue])
def test_any_batch_and_any_world(draw: DrawPlan) -> None:
    check_any_batch(draw)
    check_ranks_agree(lambda positions, rank: draw(positions))


def test_the_checks_catch_rank_seeds_and_a_generator() -> None:
    with pytest.raises(AssertionError, match="with 2 ranks"):
        check_ranks_agree(lambda positions, rank: dino(positions, seed=0 + rank))

    def within_the_batch(positions: np.ndarray) -> Plan:
        return replace(dino(np.arange(len(positions))), positions=positions)

    def truncated_to_32_bits(positions: np.ndarray) -> Plan:
        return replace(dino(positions % 2**32), positions=positions)

    with pytest.raises(AssertionError, match="in batches of 1"):
        check_any_batch(within_the_batch)
    with pytest.raises(AssertionError, match="meet"):
        check_positions_differ(truncated_to_32_bits)


def check_positions_differ(draw: DrawPlan) -> None:
    """No two positions share their crops, also 2^32 apart."""
    far = np.concatenate([POSITIONS[:40], POSITIONS[:40] + 2**32, POSITIONS[:40] + 2**33])
    area = draw(far).kinds[0].area
    assert len(np.unique(area, axis=0)) == len(far), "plans meet"


@pytest.mark.parametrize("draw", [dino, mae])
def test_positions_differ(draw: DrawPlan) -> None:
    check_positions_differ(draw)


def test_drop_path_is_the_same_in_any_batch_and_for_any_views() -> None:
    rates = [0.0, 0.1, 0.3, 0.5, 0.5, 0.2, 0.9]
    whole = draw_drop_path(3, POSITIONS, range(10), rates)
    assert whole.shape == (len(POSITIONS), 10, 7)
    for i in range(0, len(POSITIONS), 7):
        assert (draw_drop_path(3, POSITIONS[i : i + 7], range(10), rates) == whole[i : i + 7]).all()
    assert (draw_drop_path(3, POSITIONS, [4, 2], rates) == whole[:, [4, 2]]).all()
    assert (draw_drop_path(3, POSITIONS, [4], rates[:3]) == whole[:, [4], :3]).all(), "a shallower net keeps its draws"


def test_views_stand_on_their_own() -> None:
    """The plan of a view depends on its number, not on which kinds stand around it."""
    recipe = dino_augment()
    one_kind = replace(recipe, local_views=None)
    alone = draw_plan(one_kind, 0, POSITIONS).kinds[0]
    beside = dino(POSITIONS).kinds[0]
    for f in fields(ViewParameters):
        assert (getattr(alone, f.name) == getattr(beside, f.name)).all(), f.name


def test_one_setting_shifts_no_other() -> None:
    base, recipe = tissue(POSITIONS).kinds[0], tissue_recipe()
    changes: dict[str, AugmentRecipe] = {
        "flip": replace(recipe, global_views=replace(recipe.global_views, flip=1.0)),
        "grey": replace(recipe, global_views=replace(recipe.global_views, grey=0.0)),
        "jitter": replace(recipe, global_views=replace(recipe.global_views, jitter=0.1)),
        "blur": replace(recipe, global_views=replace(recipe.global_views, blur=(0.0, 1.0))),
        "solarize": replace(recipe, global_views=replace(recipe.global_views, solarize=(1.0, 1.0))),
        "brightness": replace(recipe, brightness=0.1),
        "sigma": replace(recipe, blur_sigma=(1.0, 5.0)),
        "hue": replace(recipe, hue=0.5),
        "flip_vertical": tissue_recipe(flip_vertical=0.9),
        "turns": tissue_recipe(quarter_turns=False),
        "stain": tissue_recipe(stain=0.2),
        "stain_factors": replace(recipe, stain_alpha=0.3),
        "stain_shifts": replace(recipe, stain_beta=0.3),
    }
    for name, changed_recipe in changes.items():
        changed = draw_plan(changed_recipe, 0, POSITIONS).kinds[0]
        for f in fields(ViewParameters):
            same = (getattr(changed, f.name) == getattr(base, f.name)).all()
            assert same == (f.name != name), f"{f.name} when {name} is set otherwise"


def test_streams_have_their_own_blocks() -> None:
    blocks = [stream.first_block for stream in Stream]
    assert len(set(blocks)) == len(Stream)
    assert min(b - a for a, b in zip(sorted(blocks), sorted(blocks)[1:])) >= 2**16
    assert max(blocks) + 2**16 <= 2**32


# the digest


def test_the_digest_covers_every_array(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(dino(np.arange(4)), mask=np.zeros((4, 4), bool))
    seen = {plan.digest()}
    for k, views in enumerate(plan.kinds):
        for f in fields(ViewParameters):
            array = getattr(views, f.name).copy()
            array[-1, -1] = ~array[-1, -1] if array.dtype == bool else array[-1, -1] ^ 1
            kinds = list(plan.kinds)
            kinds[k] = replace(views, **{f.name: array})
            seen.add(replace(plan, kinds=tuple(kinds)).digest())
    seen.add(replace(plan, mask=np.eye(4, dtype=bool)).digest())
    seen.add(replace(plan, mask=None).digest())
    seen.add(replace(plan, drop_path=(np.zeros((4, 2, 3), bool),)).digest())
    seen.add(replace(plan, positions=plan.positions + 1).digest())
    monkeypatch.setattr(draw_module, "VERSION", draw_module.VERSION + 1)
    seen.add(plan.digest())
    assert len(seen) == 1 + 2 * len(fields(ViewParameters)) + 5


# any processor


DIGESTS = """
import hashlib, sys
from dataclasses import replace
import numpy as np
try:
    from numpy._core._multiarray_umath import __cpu_features__ as features
except ImportError:
    from numpy.core._multiarray_umath import __cpu_features__ as features
from hpcssl.plan.draw import draw_drop_path, draw_plan
from hpcssl.plan.recipe import dino_augment, mae_augment
assert not [name for name in sys.argv[1:] if features[name]], "still on"
at = np.concatenate([np.arange(4096), 3_000_000_000 + np.arange(64)])
dino, mae = draw_plan(dino_augment(), 5, at), draw_plan(mae_augment(), 5, at, num_patches=196)
windows = b"".join(k.windows(w, h).tobytes() for k in dino.kinds + mae.kinds for w, h in ((224, 224), (333, 77)))
turned = replace(dino_augment().global_views, flip_vertical=0.5, quarter_turns=True, stain=0.5)
histology = draw_plan(replace(dino_augment(), global_views=turned, stain_alpha=0.2), 5, at)
print(histology.digest())
print(dino.digest(), mae.digest(), hashlib.sha256(windows).hexdigest())
print(hashlib.sha256(draw_drop_path(5, at, [0, 3], [0.1] * 24).tobytes()).hexdigest())
print(hashlib.sha256(np.exp(np.linspace(-9, 9, 100_000)).tobytes()).hexdigest())
"""


def dispatched_features() -> list[str]:
    """Instruction sets beyond numpy's baseline that it would use on this processor."""
    try:
        from numpy._core import _multiarray_umath as umath  # type: ignore[attr-defined]
    except ImportError:
        from numpy.core import _multiarray_umath as umath
    return [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__.get(name)]


def digests_without(features: list[str]) -> list[str]:
    root = str(Path(hpcssl.__file__).parents[1])
    env = os.environ | {"PYTHONPATH": root, "NPY_DISABLE_CPU_FEATURES": " ".join(features)}
    command = [sys.executable, "-c", DIGESTS, *features]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()


def test_the_same_bits_on_a_processor_without_avx() -> None:
    features = dispatched_features()
    if not features:
        pytest.skip("numpy uses nothing here beyond its baseline instruction set, so nothing can be switched off")
    with_all, without = digests_without([]), digests_without(features)
    # the last is of np.exp, which does change its bits on most processors: why a plan may not use it
    assert with_all[:-1] == without[:-1]
    wide = [name for name in features if "512" in name or name == "X86_V4"]
    if wide and wide != features:
        assert with_all[:-1] == digests_without(wide)[:-1]


# recipes


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"count": -1}, "count = -1; expected at least 0"),
        ({"view_px": 0}, "view_px = 0"),
        ({"scale": (0.0, 1.0)}, "views: scale"),
        ({"scale": (0.5, 0.4)}, "views: scale"),
        ({"scale": (0.5, 1.1)}, "scale.1 = 1.1"),
        ({"jitter": -0.1}, "jitter = -0.1"),
        ({"blur": (0.5,)}, "blur has 1 probabilities for 2 views"),
        ({"solarize": (0.5, 2.0)}, "solarize.1 = 2.0; expected at most 1"),
    ],
)
def test_a_view_that_cannot_be_drawn_is_refused(change: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        replace(dino_augment().global_views, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [{"hue": 0.6}, {"blur_sigma": (2, 0.1)}, {"blur_sigma": (0.1, 1001)}, {"mask_ratio": 1.0}, {"contrast": np.nan}],
)
def test_an_augmentation_that_cannot_be_drawn_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(dino_augment(), **change)  # type: ignore[arg-type]


def test_the_published_recipes() -> None:
    recipe = dino_augment()
    assert recipe.num_views == 10
    assert [(k.count, k.view_px, k.scale) for k in recipe.kinds] == [(2, 224, (0.4, 1.0)), (8, 96, (0.05, 0.4))]
    assert [(k.flip, k.jitter, k.grey) for k in recipe.kinds] == [(0.5, 0.8, 0.2)] * 2
    assert (recipe.global_views.blur, recipe.global_views.solarize) == ((1.0, 0.1), (0.0, 0.2))
    assert recipe.local_views is not None
    assert (recipe.local_views.blur, recipe.local_views.solarize) == ((0.5,) * 8, ())
    assert (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (recipe.blur_sigma, recipe.mask_ratio) == ((0.1, 2.0), 0.0)
    assert [(k.flip_vertical, k.quarter_turns, k.stain) for k in recipe.kinds] == [(0.0, False, 0.0)] * 2
    plain = ViewRecipe(count=1, view_px=224, scale=(0.2, 1.0), flip=0.5)
    assert mae_augment().kinds == (plain,)
    assert mae_augment().mask_ratio == 0.75


def test_a_kind_that_draws_nothing_still_uses_the_identity() -> None:
    """What the arrays hold is a plain function of the words that the module promises."""
    words = uniforms(0, draw_module.PURPOSE, POSITIONS[:, None], np.arange(2)[None, :], Stream.FLIP.first_block)
    assert (dino(POSITIONS).kinds[0].flip == (words[..., 0] < 2**31)).all()
