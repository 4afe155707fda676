"""The vision encoders a Flamingo can have: the paper's, CLIP's, and a small one from ImageNet."""

from miniflamingo.efficientnet import EfficientNetConfig, EfficientNetLite
from miniflamingo.vision import NormalizerFreeResNet, VisionConfig
from miniflamingo.vit import VisionTransformer, ViTConfig

EYES = {
    VisionConfig: NormalizerFreeResNet,
    ViTConfig: VisionTransformer,
    EfficientNetConfig: EfficientNetLite,
}


def build_eye(config, *, rng):
    """The vision encoder of a config: images [B, height, width, 3] in [0, 1] -> [B, S, D_v]."""
    return EYES[type(config)](config, rng=rng)
