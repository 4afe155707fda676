"""Language models of the Llama family (Llama, TinyLlama, SmolLM2, Mistral, Qwen2) as LanguageModel.

    model = build(config, state)  # their config.json as a dict, {their name: array}
    logits = model(tokens)

RMSNorm, rotary positions, SwiGLU, and keys that several heads share.
"""

import numpy as np

from miniflamingo.dialects import BlockConfig
from miniflamingo.interop import loading
from miniflamingo.interop.names import Renamed, below
from miniflamingo.language import LanguageConfig, LanguageModel

MODEL_TYPES = ("llama", "mistral", "qwen2")

EMBEDDING = "model.embed_tokens.weight"
BLOCK = (
    (r"input_layernorm\.weight", "norm.weight"),
    (r"post_attention_layernorm\.weight", "ffw.norm.weight"),
    (r"self_attn\.([qkv])_proj\.(weight|bias)", "attention.#_proj.#"),
    (r"self_attn\.o_proj\.(weight|bias)", "attention.out_proj.#"),
    (r"mlp\.(gate|up|down)_proj\.(weight|bias)", "ffw.#.#"),
    (r"self_attn\.rotary_emb\.inv_freq", None),
)
NAMES = (
    *below(r"model\.layers\.(\d+)\.", BLOCK, "blocks.#."),
    (r"model\.embed_tokens\.weight", "embedding.weight"),
    (r"model\.norm\.weight", "norm.weight"),
    (r"model\.rotary_emb\.inv_freq", None),
    (r"lm_head\.weight", "head.weight"),
)
# where only some of the projections have a bias (Qwen2's queries, keys and values), the others' is
# 0
ZEROS = r".*(_proj|\.gate|\.up|\.down)\.bias"


def matches(config, shapes):
    """Whether this is such a model's checkpoint."""
    return config.get("model_type") in MODEL_TYPES and EMBEDDING in shapes


def config_of(config, shapes):
    """A config.json (a dict) and {their name: shape} -> LanguageConfig.

    ValueError for a field that is missing, or says what LanguageModel cannot do.
    """
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    dim, depth, heads, hidden = loading.need(config, *names)
    if config.get("use_sliding_window", config.get("model_type") == "mistral"):
        loading.refuse(config, sliding_window=None)
    block = BlockConfig(
        loading.activation(config.get("hidden_act", "silu")), gated=True, hidden=hidden,
        norm_eps=config.get("rms_norm_eps", 1e-6), head_dim=config.get("head_dim"),
        kv_heads=config.get("num_key_value_heads"),
        bias=any(n.endswith("_proj.bias") for n in shapes),
    )  # fmt: skip
    table = shapes.get(EMBEDDING)
    vocab_size = table[0] if table else loading.need(config, "vocab_size")[0]
    tied = config.get("tie_word_embeddings", False) or "lm_head.weight" not in shapes
    return LanguageConfig(
        vocab_size, dim, depth, heads, positions="rotary", tie_embeddings=tied, block=block,
        rotary=loading.rotary_of(config),
    )  # fmt: skip


def state_of(state, config):
    """Their {name: array} -> ours, for the LanguageConfig that config_of gave."""
    ours = Renamed(state, NAMES)
    return ours.without("head.weight") if config.tie_embeddings else ours


def build(config, state, dtype=np.float32):
    """A LanguageModel from their config.json (a dict) and {name: array}; ValueError if unfit."""
    ours = config_of(config, loading.shapes_of(state))
    return loading.build(LanguageModel, ours, state_of(state, ours), dtype, ZEROS)
