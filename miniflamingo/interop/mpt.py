"""MPT (MosaicML, 2023) as LanguageModel: the decoder of most OpenFlamingos.

ALiBi as ours, layer norms without a bias (here one of 0), exact GELU, and queries, keys and values
in one matrix. Those of one billion (MosaicGPT, before it was MPT: other names, and no attn_config)
have a norm of all queries of a token, and of all its keys.
"""

import numpy as np

from miniflamingo.dialects import BlockConfig
from miniflamingo.interop import loading
from miniflamingo.interop.names import Renamed, below
from miniflamingo.language import LanguageConfig, LanguageModel

MODEL_TYPES = ("mpt", "mosaic_gpt")

EMBEDDING = "transformer.wte.weight"
BLOCK = (
    (r"(?:norm|ln)_1\.(weight|bias)", "norm.#"),
    (r"(?:norm|ln)_2\.(weight|bias)", "ffw.norm.#"),
    (r"attn\.([qk])_ln\.(weight|bias)", "attention.#_norm.#"),
    (r"attn\.Wqkv\.weight", tuple(f"attention.{x}_proj.weight" for x in "qkv")),
    (r"attn\.out_proj\.weight", "attention.out_proj.weight"),
    (r"ffn\.(up|down)_proj\.weight", "ffw.#.weight"),
    (r"mlp\.mlp_(up|down)\.weight", "ffw.#.weight"),
)
NAMES = (
    *below(r"transformer\.blocks\.(\d+)\.", BLOCK, "blocks.#."),
    (r"transformer\.wte\.weight", "embedding.weight"),
    (r"transformer\.(?:norm|ln)_f\.(weight|bias)", "norm.#"),
    (r"lm_head\.weight", None),  # that of the embedding
)
ZEROS = r"(.*[._])?norm\.bias"
# fields of attn_config that MosaicGPT has in its config itself
FLAT = ("attn_qk_ln", "attn_clip_qkv", "alibi", "alibi_bias_max", "softmax_scale", "prefix_lm")


def matches(config, shapes):
    """Whether this is an MPT's checkpoint."""
    return config.get("model_type") in MODEL_TYPES and EMBEDDING in shapes


def slopes_of(heads, largest=8):
    """MPT's ALiBi slopes: of the next power of two, every second first, where heads is none."""
    power = 2 ** int(np.ceil(np.log2(heads)))
    slopes = 2.0 ** (-largest / power * np.arange(1, power + 1))
    if power != heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:heads]
    return tuple(slopes.tolist())


def config_of(config, shapes):
    """A config.json (a dict) and {their name: shape} -> LanguageConfig.

    ValueError for a field that is missing, or says what LanguageModel cannot do.
    """
    dim, depth, heads = loading.need(config, "d_model", "n_layers", "n_heads")
    flat = {name.removeprefix("attn_"): config[name] for name in FLAT if name in config}
    attention = config.get("attn_config") or flat
    loading.refuse(attention, alibi=True, clip_qkv=None, prefix_lm=False)
    loading.refuse(attention, softmax_scale=None, attn_type="multihead_attention")
    loading.refuse(config, no_bias=True, learned_pos_emb=True, expansion_ratio=4, mlp_ratio=4)
    block = BlockConfig(
        "gelu_exact", hidden=4 * dim, norm="layer", qk_norm=bool(attention.get("qk_ln")),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
    )  # fmt: skip
    table = shapes.get(EMBEDDING)
    return LanguageConfig(
        table[0] if table else loading.need(config, "vocab_size")[0], dim, depth, heads,
        alibi_slopes=slopes_of(heads, attention.get("alibi_bias_max", 8)),
        tie_embeddings=True, block=block,
    )  # fmt: skip


def state_of(state, config):
    """Their {name: array} -> ours, for the LanguageConfig that config_of gave."""
    return Renamed(state, NAMES)


def build(config, state, dtype=np.float32):
    """A LanguageModel from their config.json (a dict) and {name: array}; ValueError if unfit."""
    ours = config_of(config, loading.shapes_of(state))
    return loading.build(LanguageModel, ours, state_of(state, ours), dtype, ZEROS)
