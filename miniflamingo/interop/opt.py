"""OPT (Zhang et al., 2022) as LanguageModel: the decoder of several OpenFlamingos.

Learned positions, whose table starts with two rows that are never used; layer norms, biases, ReLU.
"""

import numpy as np

from miniflamingo.dialects import BlockConfig
from miniflamingo.interop import loading
from miniflamingo.interop.names import Renamed, below
from miniflamingo.language import LanguageConfig, LanguageModel

UNUSED_POSITIONS = 2

EMBEDDING = "model.decoder.embed_tokens.weight"
ZEROS = None
BLOCK = (
    (r"self_attn_layer_norm\.(weight|bias)", "norm.#"),
    (r"self_attn\.([qkv])_proj\.(weight|bias)", "attention.#_proj.#"),
    (r"self_attn\.out_proj\.(weight|bias)", "attention.out_proj.#"),
    (r"final_layer_norm\.(weight|bias)", "ffw.norm.#"),
    (r"fc1\.(weight|bias)", "ffw.up.#"),
    (r"fc2\.(weight|bias)", "ffw.down.#"),
)
NAMES = (
    *below(r"model\.decoder\.layers\.(\d+)\.", BLOCK, "blocks.#."),
    (r"model\.decoder\.embed_tokens\.weight", "embedding.weight"),
    (r"model\.decoder\.embed_positions\.weight", "positions", lambda x: x[UNUSED_POSITIONS:]),
    (r"model\.decoder\.final_layer_norm\.(weight|bias)", "norm.#"),
    (r"lm_head\.weight", "head.weight"),
)


def matches(config, shapes):
    """Whether this is an OPT's checkpoint."""
    return config.get("model_type") == "opt" and EMBEDDING in shapes


def config_of(config, shapes):
    """A config.json (a dict) and {their name: shape} -> LanguageConfig.

    ValueError for a field that is missing, or says what LanguageModel cannot do.
    """
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim")
    dim, depth, heads, hidden = loading.need(config, *names)
    loading.refuse(
        config, do_layer_norm_before=True, word_embed_proj_dim=dim, enable_bias=True,
        layer_norm_elementwise_affine=True, _remove_final_layer_norm=False,
    )  # fmt: skip
    act = loading.activation(config.get("activation_function", "relu"))
    table = shapes.get(EMBEDDING)
    tied = config.get("tie_word_embeddings", True) or "lm_head.weight" not in shapes
    return LanguageConfig(
        table[0] if table else loading.need(config, "vocab_size")[0], dim, depth, heads,
        positions="learned", max_positions=config.get("max_position_embeddings", 2048),
        tie_embeddings=tied, block=BlockConfig(act, hidden=hidden, norm="layer", bias=True),
    )  # fmt: skip


def state_of(state, config):
    """Their {name: array} -> ours, for the LanguageConfig that config_of gave."""
    ours = Renamed(state, NAMES)
    return ours.without("head.weight") if config.tie_embeddings else ours


def build(config, state, dtype=np.float32):
    """A LanguageModel from their config.json (a dict) and {name: array}; ValueError if unfit."""
    ours = config_of(config, loading.shapes_of(state))
    return loading.build(LanguageModel, ours, state_of(state, ours), dtype)
