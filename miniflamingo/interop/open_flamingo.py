"""OpenFlamingo (Awadalla et al., 2023): the bridge alone, or with its decoder and eye a Flamingo.

Its checkpoints have no config. Here it is a dict of what its `create_model_and_transforms` is
given:

    {"cross_attn_every_n_layers": 1, "lang_config": config.json of the decoder,
     "vision_config": open_clip's vision_cfg, "dim_head": 64}

With both configs, and all weights, `build` gives a Flamingo; without them a Bridge. A decoder is an
MPT, an OPT or a Llama. The gated layers stand before blocks n - 1, 2 n - 1, ...
"""

import re
from dataclasses import replace

import numpy as np

from miniflamingo.dialects import DIALECTS
from miniflamingo.flamingo import Flamingo, FlamingoConfig
from miniflamingo.interop import clip, llama, loading, mpt, opt
from miniflamingo.interop.bridge import (
    GATED,
    RESAMPLER,
    Bridge,
    BridgeConfig,
    gated_sizes,
    heads_of,
    resampler_sizes,
)
from miniflamingo.interop.names import Renamed, below, places

DECODERS = {"mpt": mpt, "mosaic_gpt": mpt, "opt": opt} | dict.fromkeys(llama.MODEL_TYPES, llama)
# a gated layer, the decoder's block after it, and both inside one, which gives each several names
CANONICAL = (
    (r"lang_encoder\.gated_cross_attn_layers\.(\d+)\.(.*)", "gated.#.#"),
    (r"lang_encoder\..*\.(\d+)\.gated_cross_attn_layer\.(.*)", "gated.#.#"),
    (r"lang_encoder\.old_decoder_blocks\..*", None),
    (r"lang_encoder\.(.*)\.decoder_layer\.(.*)", "lm.#.#"),
    (r"lang_encoder\.(.*)", "lm.#"),
    (r"((?:perceiver|vision_encoder)\..*)", "#"),
)
GATE = r"gated\.(\d+)\.attn_gate"


def matches(config, shapes):
    """Whether this is an OpenFlamingo, with its decoder or without."""
    names = r"lang_encoder\..*gated_cross_attn_layers?\.(\d+\.)?attn_gate|perceiver\.latents"
    return any(re.fullmatch(names, n) for n in shapes)


def _layers(names):
    """The blocks that have a gated layer before them, in order."""
    return sorted(int(m[1]) for n in names if (m := re.fullmatch(GATE, n)))


def config_of(config, shapes):
    """The dict above and {their name: shape} -> FlamingoConfig, or BridgeConfig without a decoder.

    ValueError for sizes that do not fit one another, and for a decoder that is none of ours.
    """
    shapes = {ours: shapes[of[0][0]] for ours, of in places(shapes, CANONICAL).items()}
    layers = _layers(shapes)
    sizes, hidden = gated_sizes(shapes, f"gated.{layers[0]}.") if layers else ({}, None)
    sizes = {**resampler_sizes(shapes, r"perceiver\."), **sizes}
    if not sizes:
        raise ValueError("neither perceiver.latents nor a gated layer's attn_gate is here")
    d = replace(
        DIALECTS["open-flamingo"], hidden=hidden, time_embeddings="perceiver.frame_embs" in shapes,
        media_embeddings=shapes.get("perceiver.media_time_embs", (None,))[0],
    )  # fmt: skip
    head_dim = config.get("dim_head", 64)
    sizes |= dict(heads=heads_of(shapes, head_dim), head_dim=head_dim, num_layers=len(layers))
    bridge = BridgeConfig(d, **sizes)
    return _whole(config, shapes, bridge, layers) if config.get("lang_config") else bridge


def _whole(config, shapes, bridge, layers):
    """The FlamingoConfig of a bridge with its decoder and eye."""
    kind = config["lang_config"].get("model_type")
    if kind not in DECODERS:
        raise ValueError(f"a decoder {kind!r} is none of {', '.join(DECODERS)}")
    own = {n.removeprefix("lm."): shape for n, shape in shapes.items() if n.startswith("lm.")}
    lm = DECODERS[kind].config_of(config["lang_config"], own)
    every = config.get("cross_attn_every_n_layers", layers[0] + 1)
    if layers != list(range(every - 1, lm.depth, every)):
        raise ValueError(f"cross_attn_every_n_layers = {every}, but gated layers stand at {layers}")
    if not bridge.num_latents or bridge.resampler_ffw_mult != 4:
        raise ValueError("a whole OpenFlamingo needs its perceiver, with an ff_mult of 4")
    return FlamingoConfig(
        clip.open_config_of(*loading.need(config, "vision_config")), lm, bridge.media_dim,
        "perceiver", bridge.num_latents, bridge.resampler_depth, bridge.heads, bridge.head_dim,
        bridge.num_frames, spatial_embeddings=False, xattn_every=every, xattn_heads=bridge.heads,
        xattn_head_dim=bridge.head_dim, dialect=replace(bridge.dialect, offset=every - 1),
        eoc_token=config.get("eoc_token_id", lm.vocab_size - 2),
        image_token=config.get("media_token_id", lm.vocab_size - 1),
    )  # fmt: skip


def _decoder(names):
    """The module that reads the decoder whose embedding is among the canonical names."""
    found = [d for d in (mpt, opt, llama) if f"lm.{d.EMBEDDING}" in names]
    if not found:
        raise ValueError("no embedding of an MPT, an OPT or a Llama is in the checkpoint")
    return found[0]


def state_of(state, config):
    """Their {name: array} -> ours, for what config_of gave."""
    state = Renamed(state, CANONICAL)
    rules = [*below(r"perceiver\.", RESAMPLER, "resampler.")]
    for j, i in enumerate(_layers(state)):
        rules += below(rf"gated\.{i}\.", GATED, f"gated_xattn.{j}.")
    if not isinstance(config, FlamingoConfig):
        return Renamed(state, [*rules, (r"(?:lm|vision_encoder)\..*", None)])
    rules += below(r"lm\.", _decoder(state).NAMES, "lm.")
    rules += below(r"vision_encoder\.", clip.OPEN_NAMES, "vision_encoder.")
    ours = Renamed(state, rules)
    return ours.without("lm.head.weight") if config.lm.tie_embeddings else ours


def zeros_of(state):
    """A pattern of our names that the decoder in {their name: array} need not have, or None."""
    zeros = _decoder(Renamed(state, CANONICAL)).ZEROS
    return zeros and rf"lm\.{zeros}"


def build(config, state, dtype=np.float32):
    """A Flamingo, or a Bridge, from the dict above and {name: array}; ValueError if unfit."""
    ours = config_of(config, loading.shapes_of(state))
    if not isinstance(ours, FlamingoConfig):
        return loading.build(Bridge, ours, state_of(state, ours), dtype)
    return loading.build(Flamingo, ours, state_of(state, ours), dtype, zeros_of(state))
