"""Masked autoencoder (He et al., CVPR 2022): the encoder sees the visible patches, a small decoder paints the rest.

Shapes: B images, N patches, D encoder's and E decoder's embedding, P values of a patch's pixels.
"""

from __future__ import annotations

import torch
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hpcssl.core.config import AtLeast1, fixed, settings
from hpcssl.core.errors import ConfigError
from hpcssl.models.blocks import choose_attention, run_blocks
from hpcssl.models.encoder import Encoder


@settings
class MaeDecoderConfig:
    """Sizes of the decoder; the defaults are the paper's.

    embed_dim : length of a token, a multiple of 4 (for the position embedding) and of num_heads
    depth : number of blocks
    num_heads : attention heads of a block
    """

    embed_dim: AtLeast1 = fixed(512)
    depth: AtLeast1 = fixed(8)
    num_heads: AtLeast1 = fixed(16)

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"decoder embed_dim {self.embed_dim}: expected a multiple of num_heads, which is {self.num_heads}"
            )


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder; both position embeddings are fixed sine-cosine ones, the encoder's overwritten.

    The decoder's blocks are computed as the encoder's `execution` says.

    All weights are drawn anew from torch's default generator: linear layers and the patch embedding Xavier-uniform,
    the class and the mask token normal with deviation 0.02. ConfigError where the encoder has drop-path, or an
    embedding is not a multiple of 4.
    """

    decoder_position: Tensor

    def __init__(self, encoder: Encoder, decoder: MaeDecoderConfig) -> None:
        super().__init__()
        if encoder.config.drop_path:
            raise ConfigError(f"encoder drop_path {encoder.config.drop_path}: MAE has none; set it to 0")
        self.encoder = encoder
        width = decoder.embed_dim
        self.decoder_embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_blocks = nn.Sequential(
            *[Block(width, decoder.num_heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(decoder.depth)]
        )
        choose_attention(self.decoder_blocks, encoder.execution)
        self.decoder_norm = LayerNorm(width)  # timm's, with its epsilon of 1e-6, as in the encoder
        self.decoder_pred = nn.Linear(width, 3 * encoder.patch_px**2)
        self.register_buffer("decoder_position", sincos_position(width, encoder.grid_size), persistent=False)
        self._initialise()

    def forward(self, images_BCHW: Tensor, mask_BN: Tensor) -> Tensor:
        """Return the predicted pixels of all patches, [B, N, P], each patch's values in the order row, column, channel.

        The images are normalised, of the encoder's native size. The mask is True where masked, as often in every row;
        it may lie on the CPU.
        """
        order_BN, num_visible = _visible_first(mask_BN)
        order_BN = order_BN.to(images_BCHW.device, non_blocking=True)
        patches_BND, position_ND = self.encoder.embed(images_BCHW)
        assert patches_BND.shape[1] == mask_BN.shape[1], (patches_BND.shape, mask_BN.shape)
        visible_BND = _take(patches_BND + position_ND[1:], order_BN[:, :num_visible])
        tokens_BND = self.encoder.blocks(self.encoder.with_class_token(visible_BND, position_ND))

        y_BNE = self.decoder_embed(tokens_BND)
        mask_tokens_BNE = self.mask_token.to(y_BNE.dtype).expand(len(y_BNE), mask_BN.shape[1] - num_visible, -1)
        patches_BNE = _take(torch.cat([y_BNE[:, 1:], mask_tokens_BNE], dim=1), order_BN.argsort(dim=1))
        y_BNE = torch.cat([y_BNE[:, :1], patches_BNE], dim=1) + self.decoder_position
        y_BNE = run_blocks(self.decoder_blocks, y_BNE, self.encoder.execution)
        return self.decoder_pred(self.decoder_norm(y_BNE))[:, 1:]

    def _initialise(self) -> None:
        vit = self.encoder.vit
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(vit.patch_embed.proj.weight.data.flatten(1))  # as the linear layer that it is
        nn.init.normal_(vit.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        vit.pos_embed.data.copy_(sincos_position(self.encoder.embed_dim, self.encoder.grid_size))
        vit.pos_embed.requires_grad_(False)


def sincos_position(embed_dim: int, grid: tuple[int, int]) -> Tensor:
    """Return the fixed position embedding of a class token (zero) and a grid of patches, [1, 1 + rows · columns, D].

    The first half of a patch's embedding encodes its column, the second its row, each as sines then cosines of
    the index at frequencies 10000^(-i / (D / 4)). ConfigError unless `embed_dim` is a multiple of 4.
    """
    if embed_dim % 4:
        raise ConfigError(f"MAE embed_dim {embed_dim}: expected a multiple of 4, for its 2-D position embedding")
    quarter = embed_dim // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    places_2N = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in grid)).T
    row, column = places_2N[:, :, None] * frequency
    patches = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
    return torch.cat([torch.zeros(1, embed_dim), patches.float()])[None]


def _visible_first(mask_BN: Tensor) -> tuple[Tensor, int]:
    """Return each row's patch numbers, the visible ones first and in order, and how many are visible."""
    visible = (~mask_BN).sum(1)
    fewest, most = torch.stack(torch.aminmax(visible)).tolist()
    assert fewest == most, f"rows with {fewest} and with {most} visible patches in one mask"
    return mask_BN.to(torch.uint8).argsort(dim=1, stable=True), fewest


def _take(x_BND: Tensor, index_BM: Tensor) -> Tensor:
    """Return tokens index_BM[b] of sample b, [B, M, D]."""
    return x_BND.gather(1, index_BM[:, :, None].expand(-1, -1, x_BND.shape[2]))
