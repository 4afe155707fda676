"""Numbers, flops and bytes of a Flamingo, by formula; tests count them in the real modules.

Three kinds of function, each for a config (FlamingoConfig) of the paper's kind:

    parameters   how many numbers each part holds: what `sizes` counts by building the model
    flops        of the matrix products of one sequence: forward, backward, forward again
    kept         how many numbers the backward pass wants of each forward pass, for one sequence

A product of [n, i] and [i, o] costs 2 n i o flops, a multiplication and an addition each. Norms,
activations, softmax and gates are left out: they have no matrix. Causal self-attention is counted
as it is computed, all L^2 pairs. Letters: L text tokens, N images or videos of a sequence, T frames
of one, S features of a frame, M = T S, R latents, H heads, K head width, D, D_m, D_v the widths of
text, visual tokens and features, V words. Sources: the paper (v1) section 3.1 for the parts;
Kaplan et al. (2020), table 1, for 2 P flops a token; Korthikanti et al. (2022), section 4, for what
a layer keeps; each with the differences that its function names.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from miniflamingo.checks import check_at_least, check_types
from miniflamingo.dialects import BlockConfig, Dialect
from miniflamingo.vision import VisionConfig


@dataclass(frozen=True)
class Sequence:
    """What one sequence of a data set holds: tokens (padding counts), images, frames of each.
    ValueError for less than a token or a frame."""

    tokens: int
    images: int
    frames: int = 1

    def __post_init__(self):
        check_types(self)
        check_at_least(self, 1, "tokens", "frames")
        check_at_least(self, 0, "images")


def check_config(config):
    """ValueError unless the config is of the paper's kind, which the formulas are for."""
    c, expected = config, {"dialect": Dialect(), "resampler": "perceiver", "only_last": True}
    wrong = {name: getattr(c, name) for name in expected if getattr(c, name) != expected[name]}
    if c.lm.block != BlockConfig():
        wrong["lm.block"] = c.lm.block
    if not isinstance(c.vision, VisionConfig):
        wrong["vision"] = type(c.vision).__name__
    for name, value in wrong.items():
        raise ValueError(f"only models of the paper's kind are counted, got {name} = {value}")


# --- parameters -----------------------------------------------------------------------------------


def lm_block(c):
    """4 matrices D x D of the attention, two of the feed-forward, two norms without a bias."""
    return (4 + 2 * c.lm.ffw_mult) * c.lm.dim**2 + 2 * c.lm.dim


def gated_block(c):
    """Module 15, equation (1): attention from D to D_m, feed-forward of 4D, three layer norms, two
    gates."""
    D, wide = c.lm.dim, c.xattn_heads * c.xattn_head_dim
    attention = 2 * D * wide + 2 * c.media_dim * wide
    return attention + 8 * D**2 + 4 * D + 2 * c.media_dim + 2


def resampler_layer(c):
    """4 matrices D_m x HK, a feed-forward of 4 D_m, three layer norms."""
    D, wide = c.media_dim, c.resampler_heads * c.resampler_head_dim
    return 4 * D * wide + 8 * D**2 + 6 * D


def parameters(config):
    """{part: numbers}, the parts and sums of miniflamingo.flamingo.count_parameters."""
    check_config(config)
    c, lm = config, config.lm
    tables = lm.vocab_size * (1 if lm.tie_embeddings else 2)
    positions = lm.max_positions if lm.positions == "learned" else 0
    rows = c.num_latents + c.num_frames + c.vision.num_features * c.spatial_embeddings
    counts = {
        "vision_encoder": vision_parameters(c.vision),
        "resampler": (rows + input_rows(c) + 2) * c.media_dim
        + c.resampler_depth * resampler_layer(c),
        "gated_xattn": len(c.layers()) * gated_block(c),
        "lm": (tables + positions + 1) * lm.dim + lm.depth * lm_block(c),
    }
    if c.train_eoc:
        counts |= {"eoc_embedding": lm.dim}
        counts |= {} if lm.tie_embeddings else {"eoc_head": lm.dim}
    return counts


def input_rows(c):
    """Rows of the resampler's input projection: D_v, or none where the widths are the same."""
    return c.vision.out_dim if c.vision.out_dim != c.media_dim else 0


class Conv(NamedTuple):
    """A convolution: its weight's numbers, its output's channels and side, as it runs."""

    numbers: int
    width: int
    side: int


def convolutions(v):
    """Yield every Conv of a VisionConfig's network, in order."""
    side, before = v.image_size, 3
    for width, stride in zip(v.stem, v.stem_strides):
        side //= stride
        yield Conv(before * width * 9, width, side)
        before = width
    for width, depth, stride in zip(v.widths, v.depths, v.strides):
        for i in range(depth):
            yield from _block_convolutions(v, before, width, side, stride if i == 0 else 1)
            side, before = side // (stride if i == 0 else 1), width
    if v.final_width:
        yield Conv(before * v.final_width, v.final_width, side)


def _block_convolutions(v, before, width, side, stride):
    """Of a residual block (vision.NFBlock) that reads `before` channels on a grid of `side`."""
    inner = width if v.bottleneck is None else int(width * v.bottleneck)
    groups = inner // v.group_size if v.group_size else 1
    small = side // stride
    if stride > 1 or before != width:
        yield Conv(before * width, width, small)
    if v.bottleneck is None:
        yield Conv(before // groups * inner * 9, inner, small)
        yield Conv(inner // groups * width * 9, width, small)
        return
    yield Conv(before * inner, inner, side)
    for _ in range(2):
        yield Conv(inner // groups * inner * 9, inner, small)
    yield Conv(inner * width, width, small)


def squeezes(v):
    """(channels, hidden) of every squeeze-and-excite of a VisionConfig's network."""
    if not v.squeeze_excite:
        return []
    each = [(width, int(width * v.squeeze_excite)) for width in v.widths]
    return [pair for pair, depth in zip(each, v.depths) for _ in range(depth)]


def vision_parameters(v):
    """The eye's numbers: each convolution's weight, gain and bias, the gates, a gain a block."""
    convs = sum(conv.numbers + 2 * conv.width for conv in convolutions(v))
    gates = sum(2 * width * hidden + width + hidden for width, hidden in squeezes(v))
    return convs + gates + sum(v.depths)


# --- flops ----------------------------------------------------------------------------------------


class Flops(NamedTuple):
    """Of one sequence: the forward pass, the backward pass, and the forward pass that is made
    again where activations are recomputed."""

    forward: int = 0
    backward: int = 0
    again: int = 0

    def __add__(self, other):
        return Flops(*(a + b for a, b in zip(self, other)))

    def times(self, n):
        """Of n of them."""
        return Flops(*(n * x for x in self))


def product(n, inner, out, trained, wants_input=True):
    """Of [n, inner] @ [inner, out]: backward, one product for the input's gradient, one for the
    matrix's, each only where it is wanted: a frozen matrix has none."""
    forward = 2 * n * inner * out
    return Flops(forward, forward * (trained + wants_input), forward)


def attending(queries, keys, wide):
    """Of q k^T and p v: backward, four products of the same size. (A fused kernel makes one of the
    forward's again: not counted, as it is no part of the task.)"""
    forward = 4 * queries * keys * wide
    return Flops(forward, 2 * forward, forward)


def lm_flops(c, L):
    """Of the frozen blocks, for L tokens: no gradient of a matrix is wanted, but one of the input,
    on its way to the trained layers below."""
    D, lm = c.lm.dim, c.lm
    matrices = product(L, D, (4 + 2 * lm.ffw_mult) * D, trained=False)
    return (matrices + attending(L, L, D)).times(lm.depth)


def head_flops(c, L):
    """Of the logits. Where `<EOC>`'s row is trained, the gradient of the whole table is computed
    for that one row: its product is that of a trained head. Never made again."""
    forward, backward, _ = product(L, c.lm.dim, c.lm.vocab_size, trained=c.train_eoc)
    return Flops(forward, backward)


def gated_flops(c, s):
    """Of the trained GATED XATTN-DENSE layers, for a Sequence: each token attends to the R visual
    tokens of one image; keys and values are made of those of all N."""
    D, wide, R = c.lm.dim, c.xattn_heads * c.xattn_head_dim, c.num_latents
    text = product(s.tokens, D, 2 * wide + 8 * D, trained=True)
    media = product(s.images * R, c.media_dim, 2 * wide, trained=True)
    seen = attending(s.tokens, R, wide) if s.images else Flops()
    return (text + media + seen).times(len(c.layers()))


def resampler_flops(c, s):
    """Of the trained resampler, for a Sequence: O(M R) + O(R^2) in each layer. What comes from the
    frozen eye wants no gradient."""
    D, wide, R = c.media_dim, c.resampler_heads * c.resampler_head_dim, c.num_latents
    M = s.frames * c.vision.num_features
    begin = product(M, input_rows(c), D, trained=True, wants_input=False)
    begin += product(s.frames, c.num_frames, D, trained=True, wants_input=False)
    latents = product(R, D, 2 * wide + 8 * D, trained=True)
    both = product(M + R, D, 2 * wide, trained=True)
    layers = (latents + both + attending(R, M + R, wide)).times(c.resampler_depth)
    return (begin + layers).times(s.images)


def vision_flops(c, s):
    """Of the frozen eye, which nothing is asked of backward, for a Sequence."""
    frame = sum(2 * conv.numbers * conv.side**2 for conv in convolutions(c.vision))
    frame += sum(4 * width * hidden for width, hidden in squeezes(c.vision))
    return Flops(frame * s.images * s.frames)


def flops(config, sequence):
    """{part: Flops} of one Sequence; the parts of `parameters`, and the head for itself."""
    check_config(config)
    return {
        "vision_encoder": vision_flops(config, sequence),
        "resampler": resampler_flops(config, sequence),
        "gated_xattn": gated_flops(config, sequence),
        "lm": lm_flops(config, sequence.tokens),
        "head": head_flops(config, sequence.tokens),
    }


# --- what the backward pass wants -----------------------------------------------------------------


class Kept(NamedTuple):
    """Numbers that a forward pass leaves for the backward: `whole` on every device of a tensor-
    parallel group, `cut` along the heads or the hidden width."""

    whole: int = 0
    cut: int = 0

    def __add__(self, other):
        return Kept(*(a + b for a, b in zip(self, other)))

    def times(self, n):
        """Of n of them."""
        return Kept(*(n * x for x in self))


def lm_block_kept(c, L, fused=True):
    """Of one frozen block: what its two norms and its GELU read, and q, k, v and the attention's
    output. (Korthikanti's 34 bytes, or 17 numbers, a token and width, less what trained matrices
    read, 7, and dropout; with fused attention no L^2 weights: fused=False keeps them.)"""
    D, scores = c.lm.dim, 0 if fused else c.lm.heads * L * L
    return Kept(2 * L * D, (4 + c.lm.ffw_mult) * L * D + scores)


def gated_block_kept(c, s, fused=True):
    """Of one GATED XATTN-DENSE layer, as the paper writes it: what the norms, the trained matrices
    and the gates read, q, k, v and the attention's output, and of the squared ReLU both halves.
    (kernels/model/layers.py folds a gate into the matrix before it: it keeps a scaled matrix, D HK
    and 4 D^2 numbers a layer, in place of what the gates read, 2 L D.)"""
    D, wide, R = c.lm.dim, c.xattn_heads * c.xattn_head_dim, c.num_latents
    media, scores = s.images * R, 0 if fused else c.xattn_heads * s.tokens * R
    text = Kept(6 * s.tokens * D, s.tokens * (2 * wide + 8 * D) + scores)
    return text + Kept(2 * media * c.media_dim, 2 * media * wide)


def resampler_layer_kept(c, s, fused=True):
    """Of one layer of the resampler, for all images of a Sequence: the normalised features and
    latents in one, keys and values of both, and the latents' own."""
    D, wide, R = c.media_dim, c.resampler_heads * c.resampler_head_dim, c.num_latents
    M, scores = s.frames * c.vision.num_features, 0
    if not fused:
        scores = c.resampler_heads * R * (M + R)
    whole = (M + R) * D + 4 * R * D
    return Kept(whole, 2 * (M + R) * wide + R * (2 * wide + 8 * D) + scores).times(s.images)


def features_kept(c, s):
    """What all layers of the resampler read and, where they are projected, the eye's features."""
    return Kept(s.images * s.frames * c.vision.num_features * (input_rows(c) + c.media_dim))


def kept(config, sequence, recompute=False, fused=True):
    """Kept of a whole forward pass of one Sequence.

    recompute: each unit (an LM block, a gated layer, a layer of the resampler) keeps its input
    alone, and is computed again in the backward pass, one unit at a time (Chen et al., 2016).
    """
    check_config(config)
    c, s = config, sequence
    units = [(c.lm.depth, lm_block_kept(c, s.tokens, fused)),
             (len(c.layers()), gated_block_kept(c, s, fused)),
             (c.resampler_depth, resampler_layer_kept(c, s, fused))]  # fmt: skip
    begin, end = features_kept(c, s), Kept(s.tokens * c.lm.dim)  # end: what the last norm reads
    if not recompute:
        return sum((unit.times(n) for n, unit in units), begin + end)
    inputs = (c.lm.depth + len(c.layers())) * s.tokens * c.lm.dim
    media = (c.resampler_depth + 1) * s.images * c.num_latents * c.media_dim
    return begin + end + Kept(inputs + media) + max((unit for _, unit in units), key=sum)


def largest_map(v):
    """The most numbers of one frame in the eye at a time: an input and its convolution's output."""
    sizes = [3 * v.image_size**2, *(conv.width * conv.side**2 for conv in convolutions(v))]
    return max(a + b for a, b in pairwise(sizes))


def cached(config, sequence):
    """Numbers that answering keeps of one row: {"lm": keys and values of all tokens in all blocks,
    "gated_xattn": those of the R visual tokens of each image, made once}."""
    c, s = config, sequence
    wide = c.xattn_heads * c.xattn_head_dim
    return {
        "lm": 2 * c.lm.depth * s.tokens * c.lm.dim,
        "gated_xattn": 2 * len(c.layers()) * s.images * c.num_latents * wide,
    }
