"""NumPy twins, plain torch peers and cases of the kernels for which `miniflamingo` has no function.

The resampler's attention exists there only inside a module, and decoding is image-causal attention
with L = 1. `compare.py` puts all of it beside the kernels. Letters as in their files.
"""

from itertools import pairwise

import numpy as np

from miniflamingo import functional, xattn
from miniflamingo.attention import attention, attention_backward

from ..common.runtime import torch

# --- the resampler's attention ------------------------------------------------------------------


def resampler_attention(q, k_x, v_x, k_l, v_l, offsets):
    """Image by image, attention of q [R, H, K] to concat([features, latents]) -> [B, R, H, K]."""
    out = np.empty_like(q)
    for b in range(len(q)):
        k, v = _joined(k_x, k_l, offsets, b), _joined(v_x, v_l, offsets, b)
        out[b] = attention(q[b].swapaxes(0, 1), k, v).swapaxes(0, 1)
    return out


def resampler_attention_backward(dout, q, k_x, v_x, k_l, v_l, offsets):
    """-> dq, dk_x, dv_x, dk_l, dv_l."""
    dq, dk_x, dv_x, dk_l, dv_l = (np.zeros_like(x) for x in (q, k_x, v_x, k_l, v_l))
    for b in range(len(q)):
        k, v = _joined(k_x, k_l, offsets, b), _joined(v_x, v_l, offsets, b)
        heads = (x[b].swapaxes(0, 1) for x in (dout, q))
        grads = (x.swapaxes(0, 1) for x in attention_backward(*heads, k, v))
        dq[b], dk, dv = grads
        rows, M = slice(offsets[b], offsets[b + 1]), offsets[b + 1] - offsets[b]
        dk_x[rows], dk_l[b], dv_x[rows], dv_l[b] = dk[:M], dk[M:], dv[:M], dv[M:]
    return dq, dk_x, dv_x, dk_l, dv_l


def _joined(x, latents, offsets, b):  # [total, H, K], [B, R, H, K] -> [H, M + R, K] of image b
    return np.concatenate([x[offsets[b] : offsets[b + 1]], latents[b]]).swapaxes(0, 1)


def concatenated_attention(q, k_x, v_x, k_l, v_l, offsets):
    """The same in plain torch, in the precision of its inputs."""
    outs, offsets = [], offsets.tolist()
    for b, (begin, end) in enumerate(pairwise(offsets)):
        k = torch.cat([k_x[begin:end], k_l[b]]).transpose(0, 1)  # [H, M + R, K]
        v = torch.cat([v_x[begin:end], v_l[b]]).transpose(0, 1)
        scores = q[b].transpose(0, 1) @ k.mT * q.shape[-1] ** -0.5
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.stack(outs)


def resampler_case(*counts, R=64, H=1, K=64, strided=False):
    """A function of a generator that draws the arguments for images with these many features."""
    offsets = np.cumsum([0, *counts]).astype(np.int32)
    latents, features = (len(counts), R, H, K), (offsets[-1], H, K)

    def draw(rng):
        shapes = (latents, features, features, latents, latents)
        args = [rng.normal(size=shape) for shape in shapes]
        if strided:  # as from one projection of [.., 3, K]: only the last axis is contiguous
            args = [np.repeat(x[..., None, :], 3, axis=-2)[..., 1, :] for x in args]
        return *args, offsets

    return draw


RESAMPLER_CASES = {
    "one image": resampler_case(100),
    "images and a clip": resampler_case(36, 288, 36, R=16, K=32),
    "an image without features": resampler_case(0, 25, 0, R=16, H=2, K=16),
    "no features at all": resampler_case(0, 0, R=16, K=16),
    "unequal, M = 1": resampler_case(1, 63, 64, 65, R=8, H=2, K=16),
    "split over the features": resampler_case(270, 3, R=64, K=64),
    "split, unequal, R = 20": resampler_case(300, 0, 200, R=20, K=40),
    "R = 1, features": resampler_case(40, 7, R=1, K=16),
    "R = 100, K = 80, features": resampler_case(60, R=100, K=80),
    "R = 256, K = 128, features": resampler_case(40, R=256, K=128),
    "K = 128, features": resampler_case(150, R=64, K=128),
    "strided features": resampler_case(30, 140, R=16, H=2, K=32, strided=True),
}

# --- decoding -----------------------------------------------------------------------------------


def decode_attention(q, k, v, phi):
    """xattn.image_causal_attention for one token: q [B, H, K], phi int[B] -> [B, H, K]."""
    return xattn.image_causal_attention(q[:, None], k, v, phi[:, None])[:, 0]


def gathered_attention(q, k, v, phi):
    """The same in plain torch: each row's image is copied out, then a batched product."""
    rows, image = torch.arange(len(q), device=q.device), (phi.long() - 1).clamp(min=0)
    k, v = (x[rows, image].transpose(1, 2) for x in (k, v))  # [B, H, R, K]
    scores = k @ q[..., None] * q.shape[-1] ** -0.5  # [B, H, R, 1]
    out = (v * scores.softmax(dim=2)).sum(2)
    return torch.where(phi[:, None, None] > 0, out, 0)


def decode_case(*phi, N=3, R=64, H=2, K=64, strided=False):
    """A function of a generator that draws q, k, v for phi, one number a row."""
    phi = np.array(phi, np.int32)

    def draw(rng):
        B = len(phi)
        q, k, v = (rng.normal(size=s) for s in ((B, H, K), (B, N, R, H, K), (B, N, R, H, K)))
        if strided:
            q, k, v = (np.repeat(x[..., None, :], 3, axis=-2)[..., 1, :] for x in (q, k, v))
        return q, k, v, phi

    return draw


DECODE_CASES = {
    "rows at different images": decode_case(1, 3, 0, 2),
    "no row has an image yet": decode_case(0, 0, R=8, K=16),
    "one row": decode_case(5, N=5),
    "decoding, R = 1": decode_case(1, 2, R=1, K=16),
    "decoding, R = 37, K = 40": decode_case(0, 2, 3, R=37, K=40),
    "decoding, R = 256, K = 128": decode_case(2, 1, R=256, K=128, H=1),
    "decoding, strided": decode_case(2, 0, 1, R=20, K=32, strided=True),
}

# --- the gated product ----------------------------------------------------------------------------


def gated_linear(x, a, alpha, weight):
    """x + tanh(alpha) * (a @ weight^T)."""
    return xattn.tanh_gate(x, alpha, functional.linear(a, weight))


def gated_linear_backward(dout, x, a, alpha, weight):
    """-> dx, da, dalpha, dweight."""
    branch = functional.linear(a, weight)
    dx, dalpha, dbranch = xattn.tanh_gate_backward(dout, x, alpha, branch)
    da, dweight, _ = functional.linear_backward(dbranch, a, weight)
    return dx, da, np.asarray(dalpha), dweight


def gated_linear_scales(dout, x, a, alpha, weight):
    """For dalpha, the root of the summed squares of what is summed up; 0 for the others."""
    terms = (1 - np.tanh(alpha) ** 2) * dout * functional.linear(a, weight)
    return 0, 0, np.linalg.norm(terms), 0


def torch_gated_linear(x, a, alpha, weight):
    """The same in plain torch, as the paper writes it."""
    return x + alpha.tanh() * torch.nn.functional.linear(a, weight)


def spread(x):
    """The same numbers, every row with as many unused ones behind it."""
    return np.concatenate([x, np.zeros_like(x)], axis=-1)[..., : x.shape[-1]]


def gated_case(*leading, D, I, alpha=0.5, strided=False):
    """x [*leading, D], a [*leading, I], alpha, weight [D, I]."""

    def draw(rng):
        x, a = rng.normal(size=(*leading, D)), rng.normal(size=(*leading, I))
        weight = rng.normal(size=(D, I)) * max(I, 1) ** -0.5
        x, a, weight = map(spread, (x, a, weight)) if strided else (x, a, weight)
        return x, a, np.array(alpha), weight

    return draw


GATED_CASES = {
    "one tile": gated_case(2, 8, D=16, I=32),
    "tiles and a rest": gated_case(3, 47, D=150, I=70),
    "more inputs than outputs": gated_case(20, D=24, I=200),
    "a shut gate": gated_case(2, 9, D=20, I=24, alpha=0.0),
    "a gate nearly shut": gated_case(30, D=20, I=24, alpha=-1e-3),
    "a gate wide open": gated_case(30, D=20, I=24, alpha=3.0),
    "one row, one input": gated_case(1, D=5, I=1),
    "gate, strided inputs": gated_case(2, 19, D=40, I=33, strided=True),
}
