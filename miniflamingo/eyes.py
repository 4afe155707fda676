"""The vision encoders a Flamingo can have: the paper's, CLIP's, Llama 3.2 Vision's, one from
ImageNet, or none."""

from dataclasses import dataclass

from miniflamingo.checks import check_at_least, check_types
from miniflamingo.efficientnet import EfficientNetConfig, EfficientNetLite
from miniflamingo.module import Module
from miniflamingo.tiled_vit import TiledViT, TiledViTConfig
from miniflamingo.vision import NormalizerFreeResNet, VisionConfig
from miniflamingo.vit import VisionTransformer, ViTConfig


@dataclass(frozen=True)
class NoEyeConfig:
    """No vision encoder: `Flamingo.read` is given visual tokens, or its resampler features of
    width out_dim that come from elsewhere."""

    out_dim: int = 64

    num_features = None

    def __post_init__(self):
        check_types(self)
        check_at_least(self, 1, "out_dim")

    @property
    def image_size(self):
        """There is none: ValueError."""
        raise ValueError("this Flamingo has no eye: give `read` the visual tokens of its images")


class NoEye(Module):
    """Stands where there is no vision encoder."""

    def __init__(self, config, *, rng):
        self.config = config

    def forward(self, pixels):
        """ValueError."""
        return self.config.image_size


EYES = {
    VisionConfig: NormalizerFreeResNet,
    ViTConfig: VisionTransformer,
    TiledViTConfig: TiledViT,
    EfficientNetConfig: EfficientNetLite,
    NoEyeConfig: NoEye,
}
EyeConfig = VisionConfig | ViTConfig | TiledViTConfig | EfficientNetConfig | NoEyeConfig


def build_eye(config, *, rng):
    """The vision encoder of a config: images [B, height, width, 3] in [0, 1] -> [B, S, D_v]."""
    return EYES[type(config)](config, rng=rng)
