"""What `python -m miniflamingo bench` times: shapes, arguments, and the work counted by hand.

To add an entry, add an Entry to ENTRIES; its implementations are in `peers.py`. Letters: B batch, L
text tokens, N images, R visual tokens of an image, H heads, K head width, D and D_m the widths of
text and visual tokens, I images or clips of a batch, M features of each; of a product F inputs and
D outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from . import peers

DIRECTIONS = ("forward", "forward + backward")


@dataclass(frozen=True)
class Entry:
    """Something that is timed: its shapes, arguments, reference, implementations and counted work.

    shapes {"cuda": [shape], "cpu": [shape]}, a shape {letter: size} with a "phi" where there is
    one; make(shape, draw) -> args, where draw(*size, scale=1) gives normal numbers and
    draw.place(tensor) moves one; reference(shape)(*args) -> output; implementations(shape) ->
    [peers.Implementation]; work(shape, args, backward) -> (elements moved, flops). The output is
    shaped like the first argument.
    """

    name: str
    shapes: dict
    make: Callable
    reference: Callable
    implementations: Callable
    work: Callable
    directions: tuple = DIRECTIONS


def make_phi(shape):
    """phi int32[B, L]: "even", N equal runs; "random", N images before random tokens of a row."""
    B, L, N = shape["B"], shape["L"], shape["N"]
    if shape["phi"] == "even":
        return torch.from_numpy(np.tile(np.arange(L) * N // L + 1, (B, 1)).astype(np.int32))
    rng, tags = np.random.default_rng(0), np.zeros((B, L), np.int32)
    for row in tags:
        row[rng.choice(L, N, replace=False)] = 1
    return torch.from_numpy(tags.cumsum(1, dtype=np.int32))


def make_attention(shape, draw):
    """q, k, v, phi."""
    B, L, N, R, H, K = (shape[letter] for letter in "BLNRHK")
    return draw(B, L, H, K), draw(B, N, R, H, K), draw(B, N, R, H, K), draw.place(make_phi(shape))


def make_decoding(shape, draw):
    """The same for one token a row, each of which looks at a random image."""
    phi = np.random.default_rng(0).integers(1, shape["N"] + 1, (shape["B"], 1), dtype=np.int32)
    q, k, v, _ = make_attention({**shape, "L": 1, "phi": "even"}, draw)
    return q, k, v, draw.place(torch.from_numpy(phi))


def make_resampler(shape, draw):
    """q; keys and values of the features; keys and values of the latents."""
    I, M, R, H, K = (shape[letter] for letter in "IMRHK")
    sizes = (I, R, H, K), (I, M, H, K), (I, M, H, K), (I, R, H, K), (I, R, H, K)
    return tuple(draw(*size) for size in sizes)


def make_block(shape, draw):
    """y, media, phi, weights: norms near the identity, gates half open, products of order 1."""
    B, L, N, R, D, D_m = (shape[letter] for letter in ("B", "L", "N", "R", "D", "D_m"))
    weights = []
    for name, p in peers.block_module(shape).named_parameters():
        if p.ndim == 2:
            weights.append(draw(*p.shape, scale=p.shape[1] ** -0.5))
        else:
            center = 0.5 if "alpha" in name else 1.0 if name.endswith("weight") else 0.0
            weights.append(draw(*p.shape, scale=0.1) + center)
    return draw(B, L, D), draw(B, N, R, D_m), draw.place(make_phi(shape)), *weights


def attention_work(shape, args, backward=False):
    """Elements moved and flops of image-causal attention, for the tokens and images that take part.

    Forward: q, k, v in, out out; two products of 2*R*K flops a token and head. Backward: q, k, v,
    dout in, dq, dk, dv out; five products (the scores are made again).
    """
    q, k, _, phi = args
    H, K, R = *q.shape[2:], k.shape[2]
    looking = int((phi > 0).sum())
    images = sum(len(row.unique()) for row in phi.where(phi > 0, 0)) - int((phi == 0).any(1).sum())
    rows, seen = looking * H * K, images * R * H * K
    moved, flops = rows + q.numel() + 2 * seen, 4 * R * K * H * looking
    if backward:
        moved += 2 * rows + q.numel() + 2 * seen + 2 * k.numel()
        flops += 10 * R * K * H * looking
    return moved, flops


def resampler_work(shape, args, backward=False):
    """As attention_work: R queries over M + R keys."""
    I, M, R, H, K = (shape[letter] for letter in "IMRHK")
    queries, keys, product = I * R * H * K, I * (M + R) * H * K, 2 * I * H * R * (M + R) * K
    if backward:
        return 2 * queries + 2 * keys + 3 * queries + 4 * keys, 7 * product
    return 2 * queries + 2 * keys, 2 * product


def block_work(shape, args, backward=False):
    """All arguments in, y out, and in the backward pass all gradients too; products, attention.

    The backward of a product is two products of its size. What lies between the products
    (activations) could stay on the chip as far as this floor is concerned.
    """
    B, L, N, R, H, K, D, D_m = (shape[x] for x in ("B", "L", "N", "R", "H", "K", "D", "D_m"))
    tensors = sum(x.numel() for x in args if x.is_floating_point())
    attended = torch.empty(B, L, H, K, device="meta"), torch.empty(B, N, R, H, K, device="meta")
    attention = attention_work(shape, (*attended, None, args[2]), backward)[1]
    flops = 2 * B * L * D * H * K * 2 + 2 * B * N * R * D_m * 2 * H * K + 2 * B * L * D * 4 * D * 2
    moved = tensors + B * L * D
    if backward:
        moved, flops = 3 * tensors + 2 * B * L * D, 3 * flops
    return moved, flops + attention


def attention_shapes(B, L, R, heads, Ns):
    """Shapes {letter: size}, for every number of images and both kinds of phi."""
    return [
        dict(B=B, L=L, N=N, R=R, H=H, K=K, phi=phi)
        for H, K in heads
        for phi in ("even", "random")
        for N in Ns
    ]


# Flamingo-3B's heads x width first, then 9B's, 80B's, and a narrow one
HEADS = ((16, 128), (32, 128), (64, 128), (16, 64))

ENTRIES = [
    Entry(
        "image_causal_attention",
        {
            "cuda": attention_shapes(8, 2048, 64, HEADS, (1, 5, 32)),
            "cpu": attention_shapes(2, 64, 8, ((2, 16),), (1, 2, 5)),
        },
        make_attention,
        lambda shape: peers.reference_attention,
        peers.attention_implementations,
        attention_work,
    ),
    Entry(
        "gated_xattn_dense",
        {
            "cuda": [
                dict(B=8, L=2048, N=N, R=64, H=D // 128, K=128, D=D, D_m=1536, phi="even")
                for D in (2048, 4096, 8192)
                for N in (32, 5)
            ],
            "cpu": [dict(B=2, L=32, N=2, R=8, H=2, K=16, D=32, D_m=24, phi="even")],
        },
        make_block,
        peers.reference_block,
        peers.block_implementations,
        block_work,
    ),
    Entry(
        "resampler_attention",
        {  # 100 features an image, 8 frames a clip
            "cuda": [
                dict(I=I, M=M, R=64, H=16, K=128)
                for I, M in ((40, 100), (8, 800), (1, 100), (1, 800))
            ],
            "cpu": [dict(I=2, M=M, R=8, H=2, K=16) for M in (9, 72)],
        },
        make_resampler,
        lambda shape: peers.reference_resampler,
        peers.resampler_implementations,
        resampler_work,
    ),
    Entry(
        "decode_attention",
        {
            "cuda": [dict(B=B, N=32, R=64, H=H, K=K) for H, K in HEADS[:3] for B in (8, 1)],
            "cpu": [dict(B=2, N=5, R=8, H=2, K=16)],
        },
        make_decoding,
        lambda shape: peers.reference_attention,
        peers.decoding_implementations,
        attention_work,
        DIRECTIONS[:1],
    ),
]
