from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcssl.objectives.mae.mae_loss import mae_loss, patchify


def _draw():
    rng = np.random.default_rng(2)
    mask = np.zeros((2, 6), bool)
    mask[0, [0, 2, 5]] = mask[1, [1, 2, 3]] = True
    return rng.normal(size=(2, 6, 48)), rng.normal(size=(2, 3, 8, 12)), mask


def _cut(image: np.ndarray, p: int) -> np.ndarray:
    rows, columns = image.shape[1] // p, image.shape[2] // p
    return np.stack(
        [
            [image[c, r * p + y, k * p + x] for y in range(p) for x in range(p) for c in range(3)]
            for r in range(rows)
            for k in range(columns)
        ]
    )


def test_patches_run_row_by_row_and_hold_row_column_channel():
    _, images, _ = _draw()
    ours = patchify(torch.from_numpy(images), 4).numpy()
    np.testing.assert_array_equal(ours, np.stack([_cut(image, 4) for image in images]))


def test_loss_is_that_of_the_paper_over_masked_patches():
    predictions, images, mask = _draw()
    target = np.stack([_cut(image, 4) for image in images])
    values = {}
    for ddof in (0, 1):
        spread = np.sqrt(target.var(-1, ddof=ddof, keepdims=True) + 1e-6)
        normalised = (target - target.mean(-1, keepdims=True)) / spread
        values[ddof] = ((predictions - normalised) ** 2).mean(-1)[mask].mean()
    loss = mae_loss(*(torch.from_numpy(a) for a in (predictions, images, mask)), 4).item()
    assert loss == pytest.approx(values[1], rel=1e-12)
    assert abs(loss - values[0]) > 1e-3  # the biased variance is another loss


def test_visible_patches_count_for_nothing():
    predictions, images, mask = (torch.from_numpy(a) for a in _draw())
    other = torch.where(mask[..., None], predictions, torch.full_like(predictions, 1e3))
    assert mae_loss(predictions, images, mask, 4) == mae_loss(other, images, mask, 4)


def test_a_flat_patch_and_half_predictions_give_a_finite_float32_loss():
    predictions, _, mask = _draw()
    loss = mae_loss(torch.from_numpy(predictions).half(), torch.full((2, 3, 8, 12), 0.3), torch.from_numpy(mask), 4)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
