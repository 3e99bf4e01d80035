"""Vision transformers of timm, with planned drop-path and DINO's position embedding for other image sizes.

Shapes: B images, C channels, H × W pixels, N tokens (the class token first), D embedding, L residual branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from hpcssl.core.config import AtLeast1, Below1, fixed, nearest, settings
from hpcssl.core.errors import ConfigError
from hpcssl.models.blocks import Execution, choose_attention, run_blocks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the papers normalise
_PLAIN = Execution()


@settings
class EncoderConfig:
    """A vision transformer: a name of timm's and what differs from it.

    name : timm's name of a plain vision transformer with a class token; the paper's: vit_small_patch16_224 for DINO,
        vit_large_patch16_224 for MAE
    image_px : side of the image that the position embedding is made for, in pixels; others are resampled to
    drop_path : probability that the last block's residual branches are dropped, per sample; 0 at the first block and
        linear between. MAE has none
    patch_px : side of a patch (a token), in pixels; None: timm's
    embed_dim : length of a token; None: timm's
    depth : number of blocks; None: timm's
    num_heads : attention heads of a block, a divisor of embed_dim; None: timm's
    """

    name: str = fixed("vit_small_patch16_224")
    image_px: AtLeast1 = fixed(224)
    drop_path: Below1 = fixed(0.1)
    patch_px: AtLeast1 | None = fixed(None)
    embed_dim: AtLeast1 | None = fixed(None)
    depth: AtLeast1 | None = fixed(None)
    num_heads: AtLeast1 | None = fixed(None)


class Encoder(nn.Module):
    """A timm vision transformer run by an explicit forward; nothing in it is random.

    `vit` is timm's own module: the state dict without the prefix `vit.` loads into `timm.create_model` of the same
    configuration. `config` is the configuration with every None replaced by timm's value, `execution` how the blocks
    are computed.
    """

    def __init__(self, config: EncoderConfig, execution: Execution = _PLAIN) -> None:
        super().__init__()
        self.vit = _create(config)
        self.execution, blocks = execution, self.vit.blocks
        choose_attention(blocks, execution)
        self.patch_px: int = self.vit.patch_embed.patch_size[0]
        self.embed_dim: int = self.vit.embed_dim
        self.grid_size: tuple[int, int] = self.vit.patch_embed.grid_size
        sizes = {"patch_px": self.patch_px, "embed_dim": self.embed_dim}
        self.config = replace(config, **sizes, depth=len(blocks), num_heads=blocks[0].attn.num_heads)
        nn.init.trunc_normal_(self.vit.cls_token, std=0.02)  # as DINO and MAE do; timm's 1e-6 is all but zero

    def forward(self, images_BCHW: Tensor, residual_scale_BL: Tensor | None = None) -> Tensor:
        """Return the class token after the last norm, [B, D]; arguments as of `tokens`."""
        return self.tokens(images_BCHW, residual_scale_BL)[:, 0]

    def tokens(self, images_BCHW: Tensor, residual_scale_BL: Tensor | None = None) -> Tensor:
        """Return all tokens after the last norm, [B, N, D], the class token first.

        Parameters
        ----------
        images_BCHW : normalised images; sides divisible by the patch
        residual_scale_BL : factor of every sample's residual branches (see `residual_scale`), two columns a block:
            attention, then MLP; None for 1
        """
        patches_BND, position_ND = self.embed(images_BCHW)
        x_BND = self.with_class_token(patches_BND + position_ND[1:], position_ND)
        return self.blocks(x_BND, residual_scale_BL)

    def embed(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the patches' tokens without position, [B, N-1, D], and the position embedding, [N, D].

        ConfigError where a side is not divisible by the patch.
        """
        height, width = images_BCHW.shape[-2:]
        if height % self.patch_px or width % self.patch_px:
            raise ConfigError(
                f"image of {height} x {width} px: expected sides divisible by the patch of {self.patch_px} px; "
                "change the crop size or the encoder's patch_px"
            )
        grid = (height // self.patch_px, width // self.patch_px)
        patches_BND = self.vit.patch_embed.proj(images_BCHW).flatten(2).transpose(1, 2)
        return self.vit.patch_embed.norm(patches_BND), resample_position(self.vit.pos_embed[0], self.grid_size, grid)

    def with_class_token(self, patches_BND: Tensor, position_ND: Tensor) -> Tensor:
        """Put the class token, its position added, before the patches."""
        cls_11D = self.vit.cls_token + position_ND[:1]
        return torch.cat([cls_11D.expand(len(patches_BND), -1, -1), patches_BND], dim=1)

    def blocks(self, x_BND: Tensor, residual_scale_BL: Tensor | None = None) -> Tensor:
        """Run the blocks and the last norm."""
        return self.vit.norm(run_blocks(self.vit.blocks, x_BND, self.execution, residual_scale_BL))


def build_encoder(config: EncoderConfig, execution: Execution = _PLAIN) -> Encoder:
    """Return an encoder with fresh weights, drawn from torch's default generator (which the caller seeds).

    ConfigError unless timm has such a model, it is a plain vision transformer with a class token, and sizes fit.
    """
    return Encoder(config, execution)


def normalised(pixels: Tensor) -> Tensor:
    """Return uint8 images (B, px, px, 3) as float32 (B, 3, px, px), less ImageNet's mean, over its deviation."""
    mean = torch.tensor(MEAN, device=pixels.device) * 255
    std = torch.tensor(STD, device=pixels.device) * 255
    return ((pixels.float() - mean) / std).permute(0, 3, 1, 2)


def drop_path_rates(config: EncoderConfig) -> list[float]:
    """Return the drop probability of each residual branch, two a block, rising linearly from 0 to `drop_path`."""
    with torch.device("meta"):  # no weights, nothing drawn
        depth = config.depth or len(_create(config).blocks)
    return [rate for rate in torch.linspace(0, config.drop_path, depth, device="cpu").tolist() for _ in range(2)]


def residual_scale(keep_BL: Tensor, rates_L: Sequence[float] | Tensor) -> Tensor:
    """Return the factors of the residual branches: 0 where dropped, 1 / (1 - rate) where kept; float32 [B, L].

    So the expected output of a branch is that without drop-path (Huang et al., ECCV 2016).
    """
    rates = torch.as_tensor(rates_L, dtype=torch.float32, device=keep_BL.device)
    return keep_BL.to(torch.float32) / (1 - rates)


def resample_position(position_ND: Tensor, native: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Resample a position embedding to another grid of patches, the class token's (the first) untouched.

    The same numbers as DINO's published bicubic interpolation with scale factor (side + 0.1) / native side, no
    antialias, but written as two weighted sums: the gradient of the bicubic kernel is not deterministic on GPUs.
    """
    if grid == native:
        return position_ND
    patches_IJD = position_ND[1:].reshape(*native, -1)
    rows_HI, columns_WJ = (_bicubic_weights(a, b, position_ND) for a, b in zip(native, grid))
    # products and sums, not matmul: exact float32 under autocast and where TF32 is on
    rows_HJD = (rows_HI[:, :, None, None] * patches_IJD).sum(1)
    patches_HWD = (columns_WJ[None, :, :, None] * rows_HJD[:, None]).sum(2)
    return torch.cat([position_ND[:1], patches_HWD.flatten(0, 1)])


def _bicubic_weights(native: int, side: int, like: Tensor) -> Tensor:
    """Return the [side, native] matrix of a bicubic interpolation along one axis: its response to unit impulses."""
    impulses = torch.eye(native, dtype=like.dtype, device=like.device).reshape(1, native, native, 1)
    response = F.interpolate(impulses, scale_factor=((side + 0.1) / native, 1.0), mode="bicubic")
    return response[0, :, :, 0].T


def _create(config: EncoderConfig) -> Any:
    """Return timm's module (of type Any: timm declares its parts as plain modules)."""
    if not timm.is_model(config.name):
        known = [name for name in timm.list_models("vit_*_patch*") if name.count("_") == 3]
        raise ConfigError(f"encoder {config.name}: timm has no such model; {nearest(config.name, known)}")
    overrides = {"patch_size": config.patch_px} | {k: getattr(config, k) for k in ("embed_dim", "depth", "num_heads")}
    kwargs = {key: value for key, value in overrides.items() if value is not None}
    try:
        vit: Any = timm.create_model(
            config.name, pretrained=False, num_classes=0, img_size=config.image_px, global_pool="token", **kwargs
        )
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"encoder {config.name} with {overrides}: timm cannot build it ({reason})") from error
    plain = (
        type(vit) is VisionTransformer
        and all(type(block) is Block for block in vit.blocks)
        and vit.num_prefix_tokens == 1
        and not vit.no_embed_class
        and isinstance(vit.norm_pre, nn.Identity)
    )
    if not plain:
        raise ConfigError(
            f"encoder {config.name}: expected a plain vision transformer with one class token and a learned position "
            "embedding, such as vit_small_patch16_224"
        )
    patch_px = vit.patch_embed.patch_size[0]
    if config.image_px % patch_px:
        raise ConfigError(f"encoder image_px {config.image_px}: expected a multiple of the patch of {patch_px} px")
    return vit
