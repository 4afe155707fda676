"""IDEFICS (Hugging Face, 2023), the public Flamingo: its checkpoints run in miniflamingo.Flamingo.

    model = build(config, state)             # its config.json as a dict, {its name: array}
    logits = model(tokens, pixels, phi=phi)  # phi = phi_of(image_attention_mask)

Where it departs from the paper: LLaMA with rotary positions and SwiGLU as the frozen LM, CLIP's
Vision Transformer as the eye, and the "idefics" row of dialects.py in the two trained parts.
"""

from dataclasses import replace

import numpy as np

from miniflamingo.dialects import DIALECTS
from miniflamingo.flamingo import Flamingo, FlamingoConfig
from miniflamingo.interop import clip, llama, loading
from miniflamingo.interop.names import Renamed, below, vector_or_scalar

RESAMPLER = (
    (r"latents", "latents"),
    (r"blocks\.(\d+)\.0\.context_layer_norm\.(weight|bias)", "layers.#.input_norm.#"),
    (r"blocks\.(\d+)\.0\.latents_layer_norm\.(weight|bias)", "layers.#.latent_norm.#"),
    (r"blocks\.(\d+)\.0\.([qk])_layer_norm\.(weight|bias)", "layers.#.attention.#_norm.#"),
    (r"blocks\.(\d+)\.0\.([qkv])_proj\.weight", "layers.#.attention.#_proj.weight"),
    (r"blocks\.(\d+)\.0\.output_proj\.weight", "layers.#.attention.out_proj.weight"),
    (r"blocks\.(\d+)\.1\.ln\.(weight|bias)", "layers.#.ffw.norm.#"),
    (r"blocks\.(\d+)\.1\.fc\.weight", "layers.#.ffw.up.weight"),
    (r"blocks\.(\d+)\.1\.c_proj\.weight", "layers.#.ffw.down.weight"),
    (r"layer_norm\.(weight|bias)", "final_norm.#"),
)
GATED = (
    (r"input_layernorm\.weight", "norm.weight"),
    (r"post_attention_layernorm\.weight", "ffw.norm.weight"),
    (r"cross_attn\.([qkv])_proj\.weight", "attention.#_proj.weight"),
    (r"cross_attn\.o_proj\.weight", "attention.out_proj.weight"),
    (r"cross_attn\.([qk])_layer_norm\.weight", "attention.#_norm.weight"),
    (r"cross_attn\.rotary_emb\.inv_freq", None),
    (r"mlp\.(gate|up|down)_proj\.weight", "ffw.#.weight"),
    (r"alpha_cross_attn", "alpha_xattn", vector_or_scalar),
    (r"alpha_dense", "alpha_dense", vector_or_scalar),
)
NAMES = (
    *below(r"model\.gated_cross_attn_layers\.(\d+)\.", GATED, "gated_xattn.#."),
    *below(r"model\.perceiver_resampler\.", RESAMPLER, "resampler."),
    *below(r"model\.vision_model\.", clip.VISION, "vision_encoder."),
    # the words that were added lie apart, behind those of LLaMA
    (r"model\.embed_tokens\.additional_embedding\.weight", "lm.embedding.weight+"),
    (r"lm_head\.additional_fc\.weight", "lm.head.weight+"),
    *below("", llama.NAMES, "lm."),
)


def matches(config, shapes):
    """Whether this is an IDEFICS (the first: later ones are no Flamingos)."""
    return any(n.startswith("model.gated_cross_attn_layers.") for n in shapes)


def config_of(config, shapes):
    """A config.json (a dict) and {their name: shape} -> FlamingoConfig.

    ValueError for a field that is missing, or says what Flamingo cannot do. image_token is the last
    of the words that IDEFICS added.
    """
    eye, lm = clip.config_of(config, shapes), _language(config, shapes)
    every, hidden = loading.need(config, "cross_layer_interval", "intermediate_size")
    resampler = config.get("perceiver_config") or {}
    dialect = replace(
        DIALECTS["idefics"], hidden=hidden, norm_eps=lm.block.norm_eps,
        qk_norm="rms" if config.get("qk_layer_norms") else None,
        vector_alpha=config.get("alpha_type") == "vector",
        resampler_qk_norm="layer" if resampler.get("qk_layer_norms_perceiver") else None,
    )  # fmt: skip
    sizes = {"resampler": "none"}
    if config.get("use_resampler"):
        given = loading.need(resampler, *RESAMPLER_SIZES.values())
        sizes = dict(zip(RESAMPLER_SIZES, given))
    return FlamingoConfig(
        eye, lm, eye.dim, **sizes, spatial_embeddings=False, xattn_every=every,
        xattn_heads=lm.heads, xattn_head_dim=lm.dim // lm.heads, dialect=dialect,
        image_token=lm.vocab_size - 1, eoc_token=min(2, lm.vocab_size - 1),
    )  # fmt: skip


RESAMPLER_SIZES = {
    "num_latents": "resampler_n_latents",
    "resampler_depth": "resampler_depth",
    "resampler_heads": "resampler_n_heads",
    "resampler_head_dim": "resampler_head_dim",
}


def _language(config, shapes):
    """The LanguageConfig, with the added words."""
    lm = llama.config_of(config, {n: s for n, s in shapes.items() if "vision_model" not in n})
    tables = [s for n, s in shapes.items() if n.startswith("model.embed_tokens.")]
    words = sum(shape[0] for shape in tables)
    given = loading.need(config, "vocab_size")[0] + config.get("additional_vocab_size", 0)
    if tables and words != given:
        raise ValueError(f"the config has {given} words, the embeddings have {words}")
    return replace(lm, vocab_size=given)


def state_of(state, config):
    """Their {name: array} -> ours, for the FlamingoConfig that config_of gave."""
    ours = Renamed(state, NAMES)
    return ours.without("lm.head.weight") if config.lm.tie_embeddings else ours


def build(config, state, dtype=np.float32):
    """A Flamingo from their config.json (a dict) and {name: array}; ValueError if unfit."""
    ours = config_of(config, loading.shapes_of(state))
    return loading.build(Flamingo, ours, state_of(state, ours), dtype)


def phi_of(image_attention_mask):  # [B, L, N] of 0 and 1 -> int [B, L]
    """The image, from 1, that each token looks at, 0 for none; ValueError where it is several."""
    mask = np.asarray(image_attention_mask) != 0
    if (mask.sum(axis=-1) > 1).any():
        b, t = np.argwhere(mask.sum(axis=-1) > 1)[0]
        raise ValueError(f"token {t} of row {b} looks at {mask[b, t].sum()} images: phi is of one")
    return mask @ np.arange(1, mask.shape[-1] + 1)
