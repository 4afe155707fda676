"""Llama-3.2-Vision ("mllama") as a Flamingo with a tiled Vision Transformer as its eye.

    model = build(config, state)
    media = beside(*(model.resampler(model.encode(canvas)) for canvas in canvases))  # an image each
    logits = model.read(tokens, media, phi)  # media [B, N, R, D]: cross_attention_states

A gated layer stands in its list of layers among the others. R counts the tokens of all tiles of an
image. No resampler, keys that several heads share, norms of queries and keys, and tokens without an
image pass its feed-forward by (skip_without_image). The text side alone has no eye.
"""

import re
from dataclasses import replace

import numpy as np

from miniflamingo.dialects import DIALECTS
from miniflamingo.eyes import NoEyeConfig
from miniflamingo.flamingo import Flamingo, FlamingoConfig
from miniflamingo.interop import idefics, llama, loading
from miniflamingo.interop.names import Renamed, below, scalar
from miniflamingo.tiled_vit import TiledViTConfig

MODEL_TYPES = ("mllama", "mllama_text_model")
# three generations of names
TEXT = r"(?:model\.language_model|language_model\.model|model)\."
GATED = (
    (r"input_layernorm\.weight", "norm.weight"),
    (r"post_attention_layernorm\.weight", "ffw.norm.weight"),
    (r"cross_attn\.([qkv])_proj\.weight", "attention.#_proj.weight"),
    (r"cross_attn\.o_proj\.weight", "attention.out_proj.weight"),
    (r"cross_attn\.([qk])_norm\.weight", "attention.#_norm.weight"),
    (r"mlp\.(gate|up|down)_proj\.weight", "ffw.#.weight"),
    (r"cross_attn_attn_gate", "alpha_xattn", scalar),
    (r"cross_attn_mlp_gate", "alpha_dense", scalar),
)
EYE_BLOCK = (
    (r"input_layernorm\.(weight|bias)", "norm.#"),
    (r"post_attention_layernorm\.(weight|bias)", "ffw.norm.#"),
    (r"self_attn\.([qkv])_proj\.weight", "attention.#_proj.weight"),
    (r"self_attn\.o_proj\.weight", "attention.out_proj.weight"),
    (r"mlp\.fc1\.(weight|bias)", "ffw.up.#"),
    (r"mlp\.fc2\.(weight|bias)", "ffw.down.#"),
    (r"gate_attn", "gate_attention", scalar),
    (r"gate_ffn", "gate_ffw", scalar),
)
EYE = (
    *below(r"transformer\.layers\.(\d+)\.", EYE_BLOCK, "blocks.#."),
    *below(r"global_transformer\.layers\.(\d+)\.", EYE_BLOCK, "gated_blocks.#."),
    (r"class_embedding", "class_token"),
    (r"patch_embedding\.weight", "patch"),
    (r"gated_positional_embedding\.embedding", "positions"),
    (r"gated_positional_embedding\.tile_embedding\.weight", "tile_positions"),
    (r"gated_positional_embedding\.gate", "gate_positions", scalar),
    (r"(pre|post)_tile_positional_embedding\.embedding\.weight", "#_tiles"),
    (r"(pre|post)_tile_positional_embedding\.gate", "gate_#", scalar),
    (r"layernorm_(pre|post)\.(weight|bias)", "#_norm.#"),
)
REST = (
    (TEXT + r"embed_tokens\.weight", "lm.embedding.weight"),
    (TEXT + r"norm\.weight", "lm.norm.weight"),
    (TEXT + r"rotary_emb\.inv_freq", None),
    (r"(?:language_model\.)?lm_head\.weight", "lm.head.weight"),
    (r"(?:model\.)?multi_modal_projector\.(weight|bias)", "resampler.proj.#"),
    *below(r"(?:model\.)?vision_model\.", EYE, "vision_encoder."),
)


def matches(config, shapes):
    """Whether this is a Llama-3.2-Vision, whole or its text side."""
    return any(n.endswith(".cross_attn_attn_gate") for n in shapes)


def spacing(layers, total):  # -> every, offset
    """Where Flamingo has the gated layers that stand at the places `layers` among all `total`.

    ValueError where they are not evenly spaced, each before a block.
    """
    blocks = [place - j for j, place in enumerate(layers)]  # the block that follows each
    depth = total - len(layers)
    every = blocks[1] - blocks[0] if len(blocks) > 1 else depth
    if not blocks or every < 1 or blocks != list(range(blocks[0], depth, every)):
        raise ValueError(f"cross_attention_layers {layers} of {total} are not evenly spaced")
    return every, blocks[0]


def config_of(config, shapes):
    """A config.json (a dict) and {their name: shape} -> FlamingoConfig.

    ValueError for a field that is missing, or says what Flamingo cannot do.
    """
    c = config.get("text_config") or config
    total, layers, words, hidden = loading.need(
        c, "num_hidden_layers", "cross_attention_layers", "vocab_size", "intermediate_size"
    )
    every, offset = spacing(layers, total)
    given = {**c, "num_hidden_layers": total - len(layers), "tie_word_embeddings": False}
    lm = llama.config_of({"rope_theta": 500_000.0, **given}, {})
    table = next((s for n, s in shapes.items() if n.endswith("embed_tokens.weight")), (words + 8,))
    lm = replace(lm, vocab_size=table[0], num_logits=words, tie_embeddings=False)
    dialect = replace(
        DIALECTS["mllama"], hidden=hidden, norm_eps=lm.block.norm_eps, offset=offset,
        kv_heads=lm.block.kv_heads,
    )  # fmt: skip
    return FlamingoConfig(
        eye_of(config, shapes, lm.dim), lm, lm.dim, "none", spatial_embeddings=False,
        xattn_every=every, xattn_heads=lm.heads, xattn_head_dim=lm.dim // lm.heads,
        skip_without_image=True, dialect=dialect, eoc_token=min(2, words - 1),
        image_token=config.get("image_token_index", min(words, table[0] - 1)),
    )  # fmt: skip


def eye_of(config, shapes, dim):
    """The TiledViTConfig of a config.json; where there are no weights of one, NoEyeConfig, of
    features as wide as they say, or as the text (dim)."""
    c = config.get("vision_config") or {}
    if not any(re.match(r"(model\.)?vision_model\.", name) for name in shapes):
        return NoEyeConfig(c.get("vision_output_dim", dim))
    image, patch, width, depth, gated, hidden = loading.need(
        c, "image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_global_layers",
        "intermediate_size",
    )  # fmt: skip
    heads = loading.need(c, "attention_heads" if "attention_heads" in c else "num_attention_heads")
    tiles, levels = loading.need(c, "max_num_tiles", "intermediate_layers_indices")
    levels = tuple(levels) if isinstance(levels, list) else levels
    eye = TiledViTConfig(
        image, patch, width, depth, gated, *heads, hidden,
        loading.activation(c.get("hidden_act", "gelu")), c.get("norm_eps", 1e-5), tiles, levels,
    )  # fmt: skip
    grids = [list(grid) for grid in eye.grids]
    loading.refuse(c, num_channels=3, supported_aspect_ratios=grids, vision_output_dim=eye.out_dim)
    return eye


def state_of(state, config):
    """Their {name: array} -> ours, for the FlamingoConfig that config_of gave."""
    every, offset, rules = config.xattn_every, config.dialect.offset, []
    for i in range(config.lm.depth):
        j, between = divmod(i - offset, every)
        place = i + j + 1  # of block i among all layers: j + 1 gated ones stand before it
        rules += below(TEXT + rf"layers\.{place}\.", llama.BLOCK, f"lm.blocks.{i}.")
        if not between:
            rules += below(TEXT + rf"layers\.{place - 1}\.", GATED, f"gated_xattn.{j}.")
    return Renamed(state, [*rules, *REST])


def build(config, state, dtype=np.float32):
    """A Flamingo from their config.json (a dict) and {name: array}; ValueError if unfit."""
    ours = config_of(config, loading.shapes_of(state))
    return loading.build(Flamingo, ours, state_of(state, ours), dtype)


def phi_of(cross_attention_mask):  # [B, L, N, tiles] of 0 and 1 -> int [B, L]
    """The image, from 1, that each token looks at, 0 for none; ValueError where it is several.

    Their processor lets text behind several images in a row see all of these: that is no phi.
    """
    return idefics.phi_of(np.asarray(cross_attention_mask).any(axis=-1))
