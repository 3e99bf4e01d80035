"""DINO's projection head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl.core.config import AtLeast1, fixed, settings


@settings
class DinoHeadConfig:
    """Sizes of the head; the defaults are the paper's.

    out_dim : number of prototypes (logits)
    hidden_dim : width of the two hidden layers
    bottleneck_dim : length of the vector that is L2-normalised before the last layer
    norm_last_layer : keep every prototype at length 1; False learns the lengths
    """

    out_dim: AtLeast1 = fixed(65536)
    hidden_dim: AtLeast1 = fixed(2048)
    bottleneck_dim: AtLeast1 = fixed(256)
    norm_last_layer: bool = fixed(True)


class DinoHead(nn.Module):
    """Three-layer MLP, L2 norm, weight-normalised linear layer (Caron et al., ICCV 2021, appendix C).

    Parameters are `mlp.{0,2,4}.{weight,bias}`, and of the last layer `last_v` [out_dim, bottleneck_dim], its rows'
    directions, and `last_g` [out_dim, 1], their lengths, which exists only without `norm_last_layer`. Both names of
    the last layer begin with `last_`: its gradients are dropped in the first pseudo-epoch.
    """

    last_g: nn.Parameter | None
    _ones: Tensor

    def __init__(self, in_dim: int, config: DinoHeadConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, config.hidden_dim),
            nn.GELU(),
            nn.Linear(config.hidden_dim, config.hidden_dim),
            nn.GELU(),
            nn.Linear(config.hidden_dim, config.bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        bound = config.bottleneck_dim**-0.5
        self.last_v = nn.Parameter(torch.empty(config.out_dim, config.bottleneck_dim).uniform_(-bound, bound))
        lengths = None if config.norm_last_layer else nn.Parameter(torch.ones(config.out_dim, 1))
        self.register_parameter("last_g", lengths)
        self.register_buffer("_ones", torch.ones(config.out_dim, 1), persistent=False)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return the logits, [B, out_dim]; without `last_g` they are cosines."""
        z_BE = F.normalize(self.mlp(x_BD), dim=-1)
        # torch's fused weight norm: of autograd's way through F.normalize the backward pass alone takes longer than all
        # matrix products of the head
        weight_KE = torch._weight_norm(self.last_v, self._ones if self.last_g is None else self.last_g, 0)
        return F.linear(z_BE, weight_KE)
