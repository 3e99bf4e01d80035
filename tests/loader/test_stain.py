"""Stain jitter against scikit-image's definition of HED, computed anew in float64."""

from __future__ import annotations

import numpy as np
import pytest

from hpcssl.loader.stain import stain_jitter

# scikit-image's unit of a stain's amount: rgb2hed divides the natural logarithm by that of its floor
UNIT = -np.log(1e-6)
RGB_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
NOTHING = (np.ones(3), np.zeros(3))


def rgb2hed(rgb: np.ndarray) -> np.ndarray:
    """scikit-image's, without its cut of negative amounts at 0."""
    return np.log(np.maximum(rgb / 255, 1e-6)) / np.log(1e-6) @ np.linalg.inv(RGB_FROM_HED)


def hed2rgb(hed: np.ndarray) -> np.ndarray:
    return np.clip(np.exp(-(hed * UNIT) @ RGB_FROM_HED), 0, 1) * 255


def levels(least: int = 0) -> np.ndarray:
    """Colours all over the gamut, and every grey."""
    drawn = np.random.default_rng(0).integers(least, 256, (300, 100, 3))
    return np.concatenate([drawn, np.arange(least, 256)[:100, None, None].repeat(100, 1).repeat(3, 2)]).astype(np.uint8)


def jitters(strength: float, count: int = 20) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [(1 + rng.uniform(-strength, strength, 3), rng.uniform(-strength, strength, 3)) for _ in range(count)]


def largest_difference(strength: float, unit: float = UNIT) -> float:
    """Levels between ours and scikit-image's, at the worst of the colours and jitters; colours without a 0."""
    rgb = levels(least=1)
    wanted = (hed2rgb(rgb2hed(rgb) * factors + shifts / unit) for factors, shifts in jitters(strength))
    found = (stain_jitter(rgb, factors, shifts) for factors, shifts in jitters(strength))
    return max(float(np.abs(a - b).max()) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("strength", [0.05, 0.2])
def test_it_is_the_change_of_scikit_images_amounts(strength: float) -> None:
    assert largest_difference(strength) <= 0.5 + 1e-3, "more than rounding"
    assert largest_difference(strength, unit=0.9 * UNIT) > 0.6, "the comparison notices another unit of the shifts"


def test_without_jitter_every_colour_comes_back() -> None:
    rgb = levels()
    same = stain_jitter(rgb, *NOTHING)
    assert same.dtype == np.uint8
    assert np.abs(same.astype(int) - rgb).max() <= 1
    np.testing.assert_array_equal(same[rgb > 0], rgb[rgb > 0])


def test_a_tint_without_stain_does_not_come_back_from_cut_amounts() -> None:
    """Green is no mixture of the three stains: scikit-image's cut would change it though nothing is jittered."""
    green = np.array([[[60, 200, 90]]], np.uint8)
    assert np.abs(hed2rgb(np.maximum(rgb2hed(green), 0)) - green).max() > 20
    np.testing.assert_array_equal(stain_jitter(green, *NOTHING), green)


@pytest.mark.parametrize("stain", range(3))
def test_more_of_a_stain_darkens_what_it_absorbs_most(stain: int) -> None:
    amounts = np.full(3, 0.4)
    rgb = np.rint(np.exp(-amounts @ RGB_FROM_HED) * 255).astype(np.uint8)
    more = np.ones(3)
    more[stain] = 1.5
    change = np.log(rgb / 255.0) - np.log(stain_jitter(rgb, more, np.zeros(3)) / 255.0)
    np.testing.assert_allclose(change, 0.2 * RGB_FROM_HED[stain], atol=0.01)
    shifted = stain_jitter(rgb, np.ones(3), np.eye(3)[stain] * 0.2)
    np.testing.assert_allclose(shifted, stain_jitter(rgb, more, np.zeros(3)), atol=1)


def test_factors_keep_white_white_and_shifts_tint_it() -> None:
    white = np.full((2, 2, 3), 255, np.uint8)
    for factors, _ in jitters(0.2):
        np.testing.assert_array_equal(stain_jitter(white, factors, np.zeros(3)), white)
    assert stain_jitter(white, np.ones(3), [0.1, 0, 0])[0, 0].tolist() == [239, 238, 248]
    np.testing.assert_array_equal(stain_jitter(white, np.ones(3), [-0.1, 0, 0]), white)


def test_one_black_channel_does_not_outweigh_the_others() -> None:
    """A level of 0 stands for half a level: a pixel that touches it changes as its neighbour at level 1 does."""
    dark = np.array([[[0, 120, 120], [1, 120, 120]]], np.uint8)

    def largest_step(changed: list[np.ndarray]) -> float:
        return max(float(np.abs(pixels[0, 0].astype(float) - pixels[0, 1]).max()) for pixels in changed)

    assert largest_step([stain_jitter(dark, factors, shifts) for factors, shifts in jitters(0.05)]) <= 12
    floor_of_a_millionth = [hed2rgb(rgb2hed(dark) * factors) for factors, _ in jitters(0.05)]
    assert largest_step(floor_of_a_millionth) > 40


def test_the_strongest_jitter_of_any_recipe_stays_in_range() -> None:
    rgb = levels()
    for factors in ([0, 0, 0], [2, 2, 2], [0, 2, 0], [2, 0, 2]):
        for shift in (-1, 1):
            with np.errstate(all="raise", under="ignore"):
                assert stain_jitter(rgb, factors, [shift] * 3).shape == rgb.shape
