"""The two trained parts alone, of projects whose language model or eye is not in the checkpoint.

flamingo-pytorch and OpenFlamingo share these names and shapes: keys and values in one matrix, gates
as arrays of one number, feed-forwards as a sequence of norm, linear, GELU, linear.
"""

import re
from dataclasses import dataclass, field

from miniflamingo.checks import check_at_least, check_types
from miniflamingo.dialects import Dialect
from miniflamingo.interop.names import below, scalar
from miniflamingo.module import Module
from miniflamingo.perceiver import PerceiverResampler
from miniflamingo.xattn import GatedCrossAttentionDense


def feed_forward(theirs, ours):
    """The rules for torch's Sequential(LayerNorm, Linear, GELU, Linear)."""
    return (
        (theirs + r"0\.(weight|bias)", ours + "norm.#"),
        (theirs + r"1\.weight", ours + "up.weight"),
        (theirs + r"3\.weight", ours + "down.weight"),
    )


ATTENTION = (
    (r"to_q\.weight", "q_proj.weight"),
    (r"to_kv\.weight", ("k_proj.weight", "v_proj.weight")),
    (r"to_out\.weight", "out_proj.weight"),
)
GATED = (
    (r"attn\.norm\.(weight|bias)", "norm.#"),
    *below(r"attn\.", ATTENTION, "attention."),
    (r"attn_gate", "alpha_xattn", scalar),
    *feed_forward(r"ff\.", "ffw."),
    (r"ff_gate", "alpha_dense", scalar),
)
RESAMPLER = (
    (r"latents", "latents"),
    (r"media_(?:pos_emb|time_embs)", "media_embeddings", lambda x: x.reshape(len(x), -1)),
    (r"frame_embs", "time_embeddings"),
    (r"layers\.(\d+)\.0\.norm_media\.(weight|bias)", "layers.#.input_norm.#"),
    (r"layers\.(\d+)\.0\.norm_latents\.(weight|bias)", "layers.#.latent_norm.#"),
    *below(r"layers\.(\d+)\.0\.", ATTENTION, "layers.#.attention."),
    *feed_forward(r"layers\.(\d+)\.1\.", "layers.#.ffw."),
    (r"norm\.(weight|bias)", "final_norm.#"),
)


@dataclass(frozen=True)
class BridgeConfig:
    """The sizes of a resampler (none where num_latents is 0) and of num_layers gated layers (which
    may be 0); ValueError for a value that cannot work."""

    dialect: Dialect = field(default_factory=Dialect)
    dim: int = 64
    media_dim: int = 64
    num_layers: int = 0
    heads: int = 8
    head_dim: int = 64
    num_latents: int = 0
    resampler_depth: int = 1
    resampler_ffw_mult: int = 4
    num_frames: int = 1

    def __post_init__(self):
        check_types(self)
        check_at_least(self, 1, "dim", "media_dim", "heads", "head_dim", "resampler_depth")
        check_at_least(self, 1, "resampler_ffw_mult", "num_frames")
        check_at_least(self, 0, "num_layers", "num_latents")


class Bridge(Module):
    """A resampler and gated layers, under the names that they have in Flamingo."""

    def __init__(self, config, *, rng):
        c = self.config = config
        self.resampler = None
        if c.num_latents:
            self.resampler = PerceiverResampler(
                c.media_dim, c.media_dim, c.num_latents, c.resampler_depth, c.heads, c.head_dim,
                c.resampler_ffw_mult, c.num_frames, dialect=c.dialect, rng=rng,
            )  # fmt: skip
        sizes = (c.dim, c.media_dim, c.heads, c.head_dim)
        self.gated_xattn = [
            GatedCrossAttentionDense(*sizes, dialect=c.dialect, rng=rng)
            for _ in range(c.num_layers)
        ]


def resampler_sizes(shapes, prefix):
    """The fields of BridgeConfig that a resampler's {name: shape} tell, {} where there is none;
    prefix is a pattern of what its names start with."""
    found = {re.sub(f"^{prefix}", "", n): s for n, s in shapes.items() if re.match(prefix, n)}
    if "latents" not in found:
        return {}
    latents, width = found["latents"]
    depth = 1 + max((int(m[1]) for n in found if (m := re.match(r"layers\.(\d+)\.", n))), default=0)
    hidden = found.get("layers.0.1.1.weight", (4 * width,))[0]
    sizes = dict(num_latents=latents, media_dim=width, resampler_depth=depth)
    frames = found.get("frame_embs", found.get("video_frame_pos_emb", (1,)))[0]
    return sizes | dict(resampler_ffw_mult=hidden // width, num_frames=frames)


def gated_sizes(shapes, prefix):
    """The same for gated layers, prefix being that of one of them."""
    q, kv, up = (
        shapes.get(prefix + name)
        for name in ("attn.to_q.weight", "attn.to_kv.weight", "ff.1.weight")
    )
    if q is None or kv is None or up is None:
        raise ValueError(f"{prefix or 'the layer'} lacks attn.to_q, attn.to_kv or ff.1")
    return dict(dim=q[1], media_dim=kv[1]), up[0]


def heads_of(shapes, head_dim):
    """How many heads of this width the queries of {name: shape} have; ValueError if no number."""
    inner = next(s[0] for n, s in shapes.items() if n.endswith("to_q.weight"))
    if inner % head_dim:
        raise ValueError(f"queries of {inner} are no heads of dim_head = {head_dim} each")
    return inner // head_dim
