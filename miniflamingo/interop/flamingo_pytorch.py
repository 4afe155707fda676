"""flamingo-pytorch (Phil Wang, 2022), the first public Flamingo: its two parts as a Bridge.

    bridge = build({"dim_head": 64}, state)   # of a PerceiverResampler, of a
    bridge.resampler, bridge.gated_xattn      # GatedCrossAttentionBlock, or of a FlamingoPaLM

Of FlamingoPaLM the bridge is read, and nothing else: its PaLM has blocks whose two halves run side
by side. A checkpoint does not say how wide a head is; dim_head is 64 there unless chosen otherwise.
"""

import re
from dataclasses import replace

import numpy as np

from miniflamingo.dialects import DIALECTS
from miniflamingo.interop import loading
from miniflamingo.interop.bridge import (
    GATED,
    RESAMPLER,
    Bridge,
    BridgeConfig,
    gated_sizes,
    heads_of,
    resampler_sizes,
)
from miniflamingo.interop.names import Renamed, below

PREFIX = "perceiver_resampler."  # in a FlamingoPaLM
NOT_OURS = r"token_emb\.weight|to_logits\..*|img_encoder\..*|layers\.\d+\.0\.fn\..*"


def matches(config, shapes):
    """Whether this holds a flamingo-pytorch resampler or gated layer."""
    names = r"(perceiver_resampler\.)?media_pos_emb|(layers\.\d+\.1\.)?attn_gate"
    return any(re.fullmatch(names, n) for n in shapes)


def _prefix(names):
    """A pattern of what the resampler's names begin with."""
    return re.escape(PREFIX) if any(n.startswith(PREFIX) for n in names) else ""


def _gated(names):
    """The beginnings of the gated layers' names, in their order."""
    found = {m[1] or "" for n in names if (m := re.fullmatch(r"(layers\.\d+\.1\.)?attn_gate", n))}
    return sorted(found, key=lambda prefix: int(prefix.split(".")[1]) if prefix else 0)


def config_of(config, shapes):
    """{"dim_head": int} (64 if not there) and {their name: shape} -> BridgeConfig.

    ValueError for sizes that do not fit one another.
    """
    head_dim, layers, d = config.get("dim_head", 64), _gated(shapes), DIALECTS["flamingo-pytorch"]
    sizes, hidden = gated_sizes(shapes, layers[0]) if layers else ({}, None)
    sizes = {**resampler_sizes(shapes, _prefix(shapes)), **sizes}
    places = [s[0] for n, s in shapes.items() if n.endswith("media_pos_emb")]
    time = any(n.endswith("video_frame_pos_emb") for n in shapes)
    d = replace(d, hidden=hidden, media_embeddings=(*places, None)[0], time_embeddings=time)
    sizes |= dict(heads=heads_of(shapes, head_dim), head_dim=head_dim, num_layers=len(layers))
    if not layers:
        sizes["dim"] = sizes["media_dim"]
    if "video_frame_pos_emb" in shapes:
        sizes["num_frames"] = shapes["video_frame_pos_emb"][0]
    return BridgeConfig(d, **sizes)


def state_of(state, config=None):
    """Their {name: array} -> ours."""
    gated = [
        rule
        for j, prefix in enumerate(_gated(state))
        for rule in below(re.escape(prefix), GATED, f"gated_xattn.{j}.")
    ]
    rules = (
        *gated, *below(_prefix(state), RESAMPLER, "resampler."),
        (r"video_frame_pos_emb", "resampler.time_embeddings"), (NOT_OURS, None),
    )  # fmt: skip
    return Renamed(state, rules)


def build(config, state, dtype=np.float32):
    """A Bridge from {"dim_head": int} and {name: array}; ValueError if unfit."""
    ours = config_of(config, loading.shapes_of(state))
    return loading.build(Bridge, ours, state_of(state, ours), dtype)
