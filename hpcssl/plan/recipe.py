"""How views are distributed: the augmentation part of a training recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hpcssl.core.config import AtLeast0, AtLeast1, Below1, NotNegative, Share, fixed, settings
from hpcssl.core.errors import ConfigError

_MOST_SIGMA = 1000


@settings
class ViewRecipe:
    """Distribution of one kind of view; probabilities in [0, 1].

    Attributes
    ----------
    count : views of this kind in every planned tile
    view_px : side of the square view in pixels
    scale : area of the crop as a share of the tile's, uniform between the two
    flip : probability of a horizontal flip
    jitter : probability of colour jitter (its strengths are the recipe's)
    grey : probability of greyscale
    blur : probability of a Gaussian blur, one for each view of this kind
    solarize : probability of solarisation, one for each view of this kind
    flip_vertical : probability of a vertical flip; tissue has no upright, DINO's and MAE's photographs have
    quarter_turns : whether views are turned by 0 to 3 right angles, each as likely
    stain : probability of stain jitter (its strengths are the recipe's)
    """

    count: AtLeast0 = fixed()
    view_px: AtLeast1 = fixed()
    scale: tuple[Share, Share] = fixed()
    flip: Share = fixed(0.5)
    jitter: Share = fixed(0.0)
    grey: Share = fixed(0.0)
    blur: tuple[Share, ...] = fixed(())
    solarize: tuple[Share, ...] = fixed(())
    flip_vertical: Share = fixed(0.0)
    quarter_turns: bool = fixed(False)
    stain: Share = fixed(0.0)

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"views: scale = {list(self.scale)}; expected two shares, 0 < low <= high <= 1")
        for name in ("blur", "solarize"):
            if len(getattr(self, name)) not in (0, self.count):
                raise ConfigError(f"views: {name} has {len(getattr(self, name))} probabilities for {self.count} views")


@settings
class AugmentRecipe:
    """Views of a planned tile and what they share; defaults are DINO's (Caron et al. 2021), which the paper kept.

    The stain jitter is that of Tellez et al., "Whole-slide mitosis detection in H&E breast histology using PHH3 as a
    reference to train distilled stain-invariant convolutional networks" (IEEE TMI 37(9), 2018, arXiv 1808.05896,
    equations 5 to 7): every stain's amount s becomes s · factor + shift. Their strength for both is 0.05, which Tellez
    et al., "Quantifying the effects of data augmentation and stain color normalization in convolutional neural networks
    for computational pathology" (Medical Image Analysis 58, 2019, arXiv 1902.06543) call HED-light; HED-strong is 0.2.

    Attributes
    ----------
    global_views : the global crops
    local_views : the local crops; None for MAE
    brightness, contrast, saturation : factors are uniform in [1 - value, 1 + value]
    hue : shift uniform in [-value, value] turns
    blur_sigma : pixels, uniform between the two
    mask_ratio : share of the patches that MAE hides; 0 = no masks
    stain_alpha : factors of haematoxylin, eosin and DAB are uniform in [1 - value, 1 + value]
    stain_beta : shifts of the three are uniform in [-value, value], in units of natural optical density
    """

    global_views: ViewRecipe
    local_views: ViewRecipe | None = None
    brightness: Share = fixed(0.4)
    contrast: Share = fixed(0.4)
    saturation: Share = fixed(0.2)
    hue: Annotated[float, Field(ge=0, le=0.5)] = fixed(0.1)
    blur_sigma: tuple[NotNegative, NotNegative] = fixed((0.1, 2.0))
    mask_ratio: Below1 = fixed(0.0)
    stain_alpha: Share = fixed(0.05)
    stain_beta: Share = fixed(0.05)

    def __post_init__(self) -> None:
        low, high = self.blur_sigma
        if not low <= high <= _MOST_SIGMA:
            raise ConfigError(f"augment: blur_sigma = {[low, high]}; expected 0 <= low <= high <= {_MOST_SIGMA} pixels")

    @property
    def kinds(self) -> tuple[ViewRecipe, ...]:
        """The kinds of view, global first."""
        return (self.global_views,) if self.local_views is None else (self.global_views, self.local_views)

    @property
    def num_views(self) -> int:
        """Views of every tile."""
        return sum(kind.count for kind in self.kinds)


def dino_augment() -> AugmentRecipe:
    """Return the published DINO multi-crop: 2 × 224 px and 8 × 96 px."""
    return AugmentRecipe(
        global_views=ViewRecipe(
            count=2, view_px=224, scale=(0.4, 1.0), jitter=0.8, grey=0.2, blur=(1.0, 0.1), solarize=(0.0, 0.2)
        ),
        local_views=ViewRecipe(count=8, view_px=96, scale=(0.05, 0.4), jitter=0.8, grey=0.2, blur=(0.5,) * 8),
    )


def mae_augment() -> AugmentRecipe:
    """Return the published MAE augmentation: one 224 px crop and a flip; 75 % of the patches hidden."""
    return AugmentRecipe(global_views=ViewRecipe(count=1, view_px=224, scale=(0.2, 1.0)), mask_ratio=0.75)
