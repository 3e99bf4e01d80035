"""The masked autoencoder's reconstruction loss (He et al., CVPR 2022).

Shapes: B images of C channels and H × W pixels, N patches, P = patch² · C values of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(images_BCHW: Tensor, patch_px: int) -> Tensor:
    """Cut images into patches, row after row, [B, N, P]; a patch's values in the order row, column, channel.

    >>> import torch
    >>> patchify(torch.arange(16).reshape(1, 1, 4, 4), 2)[0].tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    """
    batch, channels, height, width = images_BCHW.shape
    cut = images_BCHW.reshape(batch, channels, height // patch_px, patch_px, width // patch_px, patch_px)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def mae_loss(predictions_BNP: Tensor, images_BCHW: Tensor, mask_BN: Tensor, patch_px: int) -> Tensor:
    """Return the mean squared error over the masked patches, a scalar, computed in float32 or finer.

    The target is each patch's pixels, normalised and ordered as `patchify` does, less their mean over the root of their
    unbiased variance + 1e-6. The mask is True where masked.
    """
    fine = torch.promote_types(images_BCHW.dtype, torch.float32)
    target_BNP = patchify(images_BCHW.to(fine), patch_px)
    variance = target_BNP.var(-1, keepdim=True)
    target_BNP = (target_BNP - target_BNP.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
    error_BN = (predictions_BNP.to(fine) - target_BNP).square().mean(-1)
    masked_BN = mask_BN.to(error_BN)
    return (error_BN * masked_BN).sum() / masked_BN.sum()
