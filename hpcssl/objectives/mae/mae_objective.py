"""MAE: what an encoder makes of the visible patches lets a small decoder paint the rest (He et al., CVPR 2022)."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hpcssl.core.config import fixed, settings
from hpcssl.core.errors import ConfigError
from hpcssl.models.decoder import MaeDecoderConfig, MaskedAutoencoder
from hpcssl.models.encoder import Encoder, normalised
from hpcssl.objectives.contract import Objective, ObjectiveConfig, Tiles
from hpcssl.objectives.mae.mae_loss import mae_loss
from hpcssl.plan.draw import PlanNeeds
from hpcssl.plan.recipe import AugmentRecipe


@settings
class MaeConfig(ObjectiveConfig):
    """Settings of MAE; the defaults are the paper's."""

    hides_patches: ClassVar[bool] = True
    peaks_after_warmup: ClassVar[bool] = True

    kind: Literal["mae"] = fixed("mae")
    decoder: MaeDecoderConfig = field(default_factory=MaeDecoderConfig)

    def check_views(self, augment: AugmentRecipe) -> None:
        """Raise ConfigError unless there is one view, of which patches are hidden."""
        if augment.num_views != 1:
            raise ConfigError(
                f"recipe: objective mae takes one view, augment has {augment.num_views}; leave one global view"
            )
        super().check_views(augment)


class Mae(Objective):
    """The masked autoencoder, and the mean squared error over the hidden patches."""

    title = "MAE"

    def __init__(self, config: MaeConfig, encoder: Encoder, augment: AugmentRecipe, device: torch.device):
        self.module: nn.Module = MaskedAutoencoder(encoder, config.decoder).to(device)
        self.trained = self.module
        self.needs = PlanNeeds(num_patches=encoder.grid_size[0] * encoder.grid_size[1])
        self._patch_px = encoder.patch_px
        view_px, image_px = augment.global_views.view_px, encoder.config.image_px
        if view_px != image_px:
            raise ConfigError(f"recipe: MAE's view of {view_px} px; expected encoder.image_px = {image_px} px")

    def loss(self, tiles: Tiles, values: None) -> Tensor:
        """Return the mean squared error over the hidden patches."""
        assert tiles.mask is not None, "the plan of an MAE recipe holds masks"
        images = normalised(tiles.views[0][0])
        return mae_loss(self.module(images, tiles.mask), images, tiles.mask.to(images.device), self._patch_px)
