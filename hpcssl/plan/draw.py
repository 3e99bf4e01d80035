"""From (seed, positions) to the parameters of every view: integers, the same bits on every machine.

Legend: P positions, V views of one kind, S stains (haematoxylin, eosin, DAB).
Every array is a function of (seed, position, view, stream); a batch is drawn in one call, in any size, in any order.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpcssl.core.rng import below, happens, uniforms
from hpcssl.plan.recipe import AugmentRecipe, ViewRecipe
from hpcssl.plan.tables import LOG_RATIO_ONE, ONE, ONE_BITS, area_table, half_exp_table, interpolate, ratio_limit_table

VERSION = 2
PURPOSE = "plan"
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # operations of the colour jitter
ORDERS = tuple(itertools.permutations(range(4)))  # of the four
Q16 = 1 << 16  # factors, sigmas and hue shifts are stored in units of 1/65536


class Stream(enum.IntEnum):
    """Named streams; a new draw takes a new number and shifts none of the others. 2^16 blocks of four words each."""

    CROP = 0
    FLIP = 1
    JITTER = 2
    JITTER_ORDER = 3
    GREY = 4
    BLUR = 5
    SOLARIZE = 6
    MASK = 7
    DROP_PATH = 8
    FLIP_VERTICAL = 9
    TURNS = 10
    STAIN = 11
    STAIN_SHIFT = 12

    @property
    def first_block(self) -> int:
        """Counter value of the stream's first block."""
        return int(self) << 16


@dataclass(frozen=True, kw_only=True)
class ViewParameters:
    """Parameters of one kind of view, each array (P, V), those of the stains (P, V, S).

    Attributes
    ----------
    area, ratio_half : int64, units of 1/2^30: the crop's share of the tile's area; square root of its aspect ratio
    place_x, place_y : uint32, the crop's corner within the slack, in units of 1/2^32
    flip, jitter, grey, blur, solarize : bool
    brightness, contrast, saturation, hue, sigma : int32, units of 1/65536; hue in turns, sigma in pixels
    order : uint8, one of the 24 `ORDERS` of (brightness, contrast, saturation, hue)
    flip_vertical : bool, after `flip`
    turns : uint8, right-angle turns counter-clockwise, 0 to 3, after the flips
    stain : bool, stain jitter, before the jitter of colours
    stain_factors, stain_shifts : int32, units of 1/65536; shifts in natural optical density (see `loader.stain`)

    What a recipe never does is not drawn, and its array says so: no flip, no turn, factors 1, shifts 0.
    """

    area: NDArray[np.int64]
    ratio_half: NDArray[np.int64]
    place_x: NDArray[np.uint32]
    place_y: NDArray[np.uint32]
    flip: NDArray[np.bool_]
    jitter: NDArray[np.bool_]
    brightness: NDArray[np.int32]
    contrast: NDArray[np.int32]
    saturation: NDArray[np.int32]
    hue: NDArray[np.int32]
    order: NDArray[np.uint8]
    grey: NDArray[np.bool_]
    blur: NDArray[np.bool_]
    sigma: NDArray[np.int32]
    solarize: NDArray[np.bool_]
    flip_vertical: NDArray[np.bool_]
    turns: NDArray[np.uint8]
    stain: NDArray[np.bool_]
    stain_factors: NDArray[np.int32]
    stain_shifts: NDArray[np.int32]

    def jitter_at(self, p: int, v: int) -> list[tuple[int, float]]:
        """Return the operations of a view's colour jitter in their order, each with its factor, or its turns of hue."""
        amounts = [int(each[p, v]) / Q16 for each in (self.brightness, self.contrast, self.saturation, self.hue)]
        return [(operation, amounts[operation]) for operation in ORDERS[self.order[p, v]]]

    def windows(self, tile_w: ArrayLike, tile_h: ArrayLike, at: int | slice = slice(None)) -> NDArray[np.int64]:
        """Return the crops of tiles in whole pixels, (P, V, 4): left, top, width, height.

        The tiles are of one size, or of one each, (P, 1). With an index `at`, those of one position, (V, 4).
        """
        tile_w, tile_h = np.asarray(tile_w, np.int64), np.asarray(tile_h, np.int64)
        # square roots are correctly rounded by IEEE 754, on every machine
        side = np.sqrt((self.area[at] * (tile_w * tile_h)).astype(np.float64) / ONE)
        stretch = self.ratio_half[at].astype(np.float64) / ONE
        width = np.clip(np.rint(side * stretch), 1, tile_w).astype(np.int64)
        height = np.clip(np.rint(side / stretch), 1, tile_h).astype(np.int64)
        left = below(self.place_x[at], tile_w - width + 1)
        top = below(self.place_y[at], tile_h - height + 1)
        return np.stack([left, top, width, height], axis=-1)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done to the tiles at some positions.

    Attributes
    ----------
    positions : (P,) int64
    kinds : the drawn parameters, one `ViewParameters` for each kind of view
    mask : (P, patches) bool, True = hidden; None without masks
    drop_path : for each kind of view (P, V, residual branches) bool, True = kept; () where none is dropped
    """

    positions: NDArray[np.int64]
    kinds: tuple[ViewParameters, ...]
    mask: NDArray[np.bool_] | None
    drop_path: tuple[NDArray[np.bool_], ...] = ()

    def digest(self) -> str:
        """Return a SHA-256 of the version and every array: equal digests, equal plans."""
        digest = hashlib.sha256(f"plan {VERSION}".encode())
        arrays = [self.positions, *(getattr(k, f.name) for k in self.kinds for f in fields(k))]
        for array in [*arrays, *([] if self.mask is None else [self.mask]), *self.drop_path]:
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class PlanNeeds:
    """What an objective and its encoder have drawn beside the views.

    Attributes
    ----------
    num_patches : patches of a global view; needed where the recipe masks
    drop_path : probability that each residual branch of the encoder is dropped; () = none is
    """

    num_patches: int = 0
    drop_path: tuple[float, ...] = ()


def draw_plan(
    recipe: AugmentRecipe, seed: int, positions: ArrayLike, *, num_patches: int = 0, drop_path: Sequence[float] = ()
) -> Plan:
    """Draw the plan of some global positions, (P,); for `num_patches` and `drop_path` see `PlanNeeds`."""
    at = np.asarray(positions, dtype=np.int64)
    first_view, kinds, kept = 0, [], []
    for kind in recipe.kinds:
        kinds.append(_draw_views(recipe, kind, seed, at, first_view))
        if drop_path:
            kept.append(draw_drop_path(seed, at, range(first_view, first_view + kind.count), drop_path))
        first_view += kind.count
    mask = draw_mask(seed, at, num_patches, recipe.mask_ratio) if recipe.mask_ratio else None
    return Plan(positions=at, kinds=tuple(kinds), mask=mask, drop_path=tuple(kept))


def draw_mask(seed: int, positions: NDArray[np.int64], num_patches: int, ratio: float) -> NDArray[np.bool_]:
    """Draw MAE masks, (P, num_patches) bool with the same number hidden in every row (He et al. 2022)."""
    order = np.argsort(_many(seed, positions, 0, Stream.MASK, num_patches), axis=1, kind="stable")
    mask = np.ones((len(positions), num_patches), bool)
    visible = int(num_patches * (1 - ratio))
    np.put_along_axis(mask, order[:, :visible], False, axis=1)
    return mask


def draw_drop_path(
    seed: int, positions: NDArray[np.int64], views: Sequence[int], rates: Sequence[float]
) -> NDArray[np.bool_]:
    """Draw which residual branches a view keeps (stochastic depth), (P, len(views), len(rates)) bool.

    `rates[i]` is the probability that branch i is dropped; the draw depends on (seed, position, view, branch) alone.
    """
    keep = np.empty((len(positions), len(views), len(rates)), bool)
    dropped_below = np.array([round(rate * 2**32) for rate in rates], np.uint64)
    for i, view in enumerate(views):
        keep[:, i] = _many(seed, positions, view, Stream.DROP_PATH, len(rates)) >= dropped_below
    return keep


def _draw_views(
    recipe: AugmentRecipe, kind: ViewRecipe, seed: int, positions: NDArray[np.int64], first_view: int
) -> ViewParameters:
    position, view = positions[:, None], first_view + np.arange(kind.count)[None, :]

    def words(stream: Stream) -> NDArray[np.uint32]:
        return uniforms(seed, PURPOSE, position, view, stream.first_block)

    crop, jitter, order = words(Stream.CROP), words(Stream.JITTER), words(Stream.JITTER_ORDER)
    blur, shape = words(Stream.BLUR), (len(positions), kind.count)
    area = interpolate(area_table(*kind.scale), _unit(crop[..., 0]))
    limit = interpolate(ratio_limit_table(), area)
    log_ratio = (limit * (2 * _unit(crop[..., 1]) - ONE)) >> ONE_BITS
    place_in_table = ((log_ratio + LOG_RATIO_ONE) << (ONE_BITS - 1)) // LOG_RATIO_ONE
    stain, stain_factors, stain_shifts = _draw_stain(recipe, kind, shape, words)
    never = np.zeros(shape, bool)
    return ViewParameters(
        area=area,
        ratio_half=interpolate(half_exp_table(), np.clip(place_in_table, 0, ONE)),
        place_x=crop[..., 2],
        place_y=crop[..., 3],
        flip=happens(words(Stream.FLIP)[..., 0], kind.flip),
        jitter=happens(order[..., 0], kind.jitter),
        brightness=_between(jitter[..., 0], 1 - recipe.brightness, 1 + recipe.brightness),
        contrast=_between(jitter[..., 1], 1 - recipe.contrast, 1 + recipe.contrast),
        saturation=_between(jitter[..., 2], 1 - recipe.saturation, 1 + recipe.saturation),
        hue=_between(jitter[..., 3], -recipe.hue, recipe.hue),
        order=below(order[..., 1], 24).astype(np.uint8),
        grey=happens(words(Stream.GREY)[..., 0], kind.grey),
        blur=_each(blur[..., 0], kind.blur, shape),
        sigma=_between(blur[..., 1], *recipe.blur_sigma),
        solarize=_each(words(Stream.SOLARIZE)[..., 0], kind.solarize, shape),
        flip_vertical=happens(words(Stream.FLIP_VERTICAL)[..., 0], kind.flip_vertical) if kind.flip_vertical else never,
        turns=below(words(Stream.TURNS)[..., 0], 4).astype(np.uint8) if kind.quarter_turns else never.astype(np.uint8),
        stain=stain,
        stain_factors=stain_factors,
        stain_shifts=stain_shifts,
    )


def _draw_stain(
    recipe: AugmentRecipe, kind: ViewRecipe, shape: tuple[int, int], words: Callable[[Stream], NDArray[np.uint32]]
) -> tuple[NDArray[np.bool_], NDArray[np.int32], NDArray[np.int32]]:
    """Return where stains are jittered, (P, V), and their factors and shifts, (P, V, S)."""
    if not kind.stain:
        return np.zeros(shape, bool), np.full((*shape, 3), Q16, np.int32), np.zeros((*shape, 3), np.int32)
    drawn, shift = words(Stream.STAIN), words(Stream.STAIN_SHIFT)
    factors = _between(drawn[..., 1:], 1 - recipe.stain_alpha, 1 + recipe.stain_alpha)
    return happens(drawn[..., 0], kind.stain), factors, _between(shift[..., :3], -recipe.stain_beta, recipe.stain_beta)


def _unit(words: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return words as numbers in [0, 1), in units of 1/ONE."""
    return (words >> np.uint32(32 - ONE_BITS)).astype(np.int64)


def _between(words: NDArray[np.uint32], low: float, high: float) -> NDArray[np.int32]:
    """Return uniform numbers between two, in units of 1/65536."""
    first, last = round(low * Q16), round(high * Q16)
    return (first + below(words, last - first + 1)).astype(np.int32)


def _each(words: NDArray[np.uint32], probabilities: Sequence[float], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return where events happen that have a probability for each view; none given = never."""
    if not probabilities:
        return np.zeros(shape, bool)
    return np.stack([happens(words[:, v], p) for v, p in enumerate(probabilities)], axis=1)


def _many(seed: int, positions: NDArray[np.int64], view: int, stream: Stream, count: int) -> NDArray[np.uint32]:
    """Return `count` words for every position, (P, count)."""
    blocks = stream.first_block + np.arange(-(-count // 4))
    words = uniforms(seed, PURPOSE, positions[:, None], view, blocks[None, :])
    return words.reshape(len(positions), -1)[:, :count]
