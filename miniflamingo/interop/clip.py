"""CLIP's Vision Transformer, from transformers or from open_clip, as VisionTransformer.

transformers gives the last block's output, the class token's first; open_clip, as OpenFlamingo uses
it, the patches alone, after a last norm.
"""

import re

import numpy as np

from miniflamingo.interop import loading
from miniflamingo.interop.names import Renamed, below
from miniflamingo.vit import VisionTransformer, ViTConfig

BLOCK = (
    (r"layer_norm1\.(weight|bias)", "norm.#"),
    (r"layer_norm2\.(weight|bias)", "ffw.norm.#"),
    (r"self_attn\.([qkv])_proj\.(weight|bias)", "attention.#_proj.#"),
    (r"self_attn\.out_proj\.(weight|bias)", "attention.out_proj.#"),
    (r"mlp\.fc1\.(weight|bias)", "ffw.up.#"),
    (r"mlp\.fc2\.(weight|bias)", "ffw.down.#"),
)
VISION = (
    *below(r"encoder\.layers\.(\d+)\.", BLOCK, "blocks.#."),
    (r"embeddings\.class_embedding", "class_token"),
    (r"embeddings\.patch_embedding\.weight", "patch"),
    (r"embeddings\.position_embedding\.weight", "positions"),
    (r"embeddings\.position_ids", None),
    (r"pre_layrnorm\.(weight|bias)", "pre_norm.#"),  # their spelling
    (r"post_layernorm\.(weight|bias)", None),  # of the class token alone, for the contrast
)
NAMES = (
    *below(r"(?:vision_model\.)?", VISION),
    (r"text_model\..*|(?:text|visual)_projection\.weight|logit_scale", None),
)

OPEN_BLOCK = (
    (r"ln_1\.(weight|bias)", "norm.#"),
    (r"ln_2\.(weight|bias)", "ffw.norm.#"),
    (r"attn\.in_proj_weight", tuple(f"attention.{x}_proj.weight" for x in "qkv")),
    (r"attn\.in_proj_bias", tuple(f"attention.{x}_proj.bias" for x in "qkv")),
    (r"attn\.out_proj\.(weight|bias)", "attention.out_proj.#"),
    (r"mlp\.c_fc\.(weight|bias)", "ffw.up.#"),
    (r"mlp\.c_proj\.(weight|bias)", "ffw.down.#"),
)
OPEN_NAMES = (
    *below(r"transformer\.resblocks\.(\d+)\.", OPEN_BLOCK, "blocks.#."),
    (r"class_embedding", "class_token"),
    (r"conv1\.weight", "patch"),
    (r"positional_embedding", "positions"),
    (r"ln_pre\.(weight|bias)", "pre_norm.#"),
    (r"ln_post\.(weight|bias)", "final_norm.#"),
    (r"proj", None),
)


def matches(config, shapes):
    """Whether this is a CLIP of transformers, or its vision half."""
    return any(re.fullmatch(r"(vision_model\.)?embeddings\.class_embedding", n) for n in shapes)


def config_of(config, shapes=None):
    """A config.json (a dict) of transformers -> ViTConfig; ValueError for what is missing."""
    c = config.get("vision_config") or config
    names = ("image_size", "patch_size", "num_hidden_layers", "num_attention_heads")
    image, patch, depth, heads = loading.need(c, *names)
    dim = loading.need(c, "embed_dim" if "embed_dim" in c else "hidden_size")[0]
    loading.refuse(c, num_channels=3)
    return ViTConfig(
        image, patch, dim, depth, heads, *loading.need(c, "intermediate_size"),
        activation=loading.activation(c.get("hidden_act", "quick_gelu")),
        norm_eps=c.get("layer_norm_eps", 1e-5),
    )  # fmt: skip


def open_config_of(config):
    """open_clip's vision_cfg (a dict), with its model's quick_gelu, -> ViTConfig of its patches."""
    width, depth, patch = loading.need(config, "width", "layers", "patch_size")
    image, head_width = config.get("image_size", 224), config.get("head_width", 64)
    loading.refuse(config, attentional_pool=False, no_ln_pre=False, pos_embed_type="learnable")
    loading.refuse(config, ls_init_value=None, final_ln_after_pool=False, pool_type="tok")
    return ViTConfig(
        image, patch, width, depth, width // head_width, int(width * config.get("mlp_ratio", 4)),
        "quick_gelu" if config.get("quick_gelu") else "gelu_exact",
        class_feature=False, final_norm=True,
    )  # fmt: skip


def state_of(state, config):
    """transformers' {name: array} -> ours."""
    return Renamed(state, NAMES)


def build(config, state, dtype=np.float32):
    """A VisionTransformer from their config.json (a dict) and {name: array}."""
    ours = config_of(config, loading.shapes_of(state))
    return loading.build(VisionTransformer, ours, state_of(state, ours), dtype)
