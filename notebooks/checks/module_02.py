"""Checks of module 02: counting scores, reading inputs, taking turns, position codes."""

import numpy as np

from miniflamingo.attention import attention
from miniflamingo.functional import softmax

from .core import call, exercise, expect

# --- 2.1: counting --------------------------------------------------------------------------------


@exercise("2.1")
def scores(answer):
    """answer(M int[...], R, T, P) -> int[...]."""
    for M, R, T, P in (([100, 700, 5000], 8, 3, 5), ([[64], [90]], 16, 2, 4)):
        M = np.array(M)
        right = T * (M * R + P * R * R)
        expect(call(answer, M, R, T, P), right, _count_mistakes(M, R, T, P))


def _count_mistakes(M, R, T, P):
    yield (
        "this is self-attention over the inputs: the latents read them, M R",
        T * (M**2 + P * R**2),
    )
    yield "this is self-attention over the inputs: the latents read them, M R", M**2
    yield "the self-attentions never see M: R^2 each", T * (M * R + P * M * R)
    yield "the self-attentions never see M: R^2 each", T * (M * R + P * M**2)
    yield "the turns are missing: T times both terms", M * R + P * R**2
    yield "the latents read once in EVERY turn: T times M R, too", M * R + T * P * R**2
    yield "every turn has its own self-attentions: T times P R^2", T * M * R + P * R**2
    yield "a turn has P self-attentions, not one", T * (M * R + R**2)
    yield "a turn has one cross-attention, not P", T * P * (M * R + R**2)
    yield "the latents alone: the inputs are missing", M * 0 + T * P * R**2
    yield "a self-attention of R latents has R^2 scores, not R", T * (M * R + P * R)


# --- 2.2: reading ---------------------------------------------------------------------------------


def read_case(seed=0, B=2, R=3, D=6, M=5, C=4, K=4):
    """latents [R, D], inputs [B, M, C], Wq [K, D], Wk [K, C], Wv [D, C]: float64, random."""
    shapes = (R, D), (B, M, C), (K, D), (K, C), (D, C)
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=shape) for shape in shapes)


def projected(latents, inputs, Wq, Wk, Wv):
    """q [R, K], k [B, M, K], v [B, M, D]."""
    return latents @ Wq.T, inputs @ Wk.T, inputs @ Wv.T


def read_inputs(latents, *others):
    """Equation (1)."""
    return latents + attention(*projected(latents, *others))


@exercise("2.2")
def read(answer):
    """answer(latents [R, D], inputs [B, M, C], Wq [K, D], Wk [K, C], Wv [D, C]) -> [B, R, D]."""
    for case in (read_case(), read_case(1, 3, 2, 8, 7, 5, 4)):
        expect(call(answer, *case), read_inputs(*case), _read_mistakes(*case))


def _read_mistakes(latents, *others):
    q, k, v = projected(latents, *others)
    K, s = q.shape[-1], q @ k.swapaxes(1, 2)
    yield "the residual is missing: latents + what they read", attention(q, k, v)
    yield "the residual is the LATENT, not its query", _added(q, attention(q, k, v))
    yield "the scale is missing: divide the scores by sqrt(K)", latents + softmax(s) @ v
    yield (
        "wrong scale: DIVIDE by sqrt(K), yours multiplies",
        latents + softmax(s * np.sqrt(K)) @ v,
    )
    yield "wrong scale: divide by sqrt(K), not by K", latents + softmax(s / K) @ v
    for width in (latents.shape[1], others[0].shape[2]):
        words = "wrong scale: K is the width of queries and keys, not of latents or inputs"
        yield words, latents + softmax(s / np.sqrt(width)) @ v
    s = s / np.sqrt(K)
    yield (
        "wrong softmax axis: each latent shares itself out over the INPUTS, yours compete for each "
        "input",
        latents + softmax(s.swapaxes(1, 2)).swapaxes(1, 2) @ v,
    )
    yield "the softmax is missing", latents + s @ v
    yield (
        "the roles are exchanged: the LATENTS ask; the output has R rows, not M",
        attention(k, np.broadcast_to(q, (len(k), *q.shape)), np.stack([latents] * len(k))),
    )
    yield (
        "this is the first row of the batch for all",
        np.broadcast_to((latents + attention(q, k[:1], v[:1])), (len(k), *latents.shape)),
    )
    yield "the inputs' mean: the weights are missing", latents + v.mean(axis=1, keepdims=True)


def _added(q, read):
    return q + read if q.shape[-1] == read.shape[-1] else np.full(1, np.nan)


# --- 2.3: turns -----------------------------------------------------------------------------------


def turns_case(seed=0, T=2, P=3):
    """latents [1, R, D], inputs [1, M, D], T readings, T lists of P thoughts: small functions."""
    rng = np.random.default_rng(seed)
    latents, inputs = rng.normal(size=(1, 3, 4)), rng.normal(size=(1, 6, 4))

    def reading(W):
        return lambda z, x: z + attention(z @ W, x, x)

    def thought(W):
        return lambda z: z + np.tanh(attention(z, z, z) @ W)

    cross = [reading(rng.normal(size=(4, 4))) for _ in range(T)]
    blocks = [[thought(rng.normal(size=(4, 4))) for _ in range(P)] for _ in range(T)]
    return latents, inputs, cross, blocks


@exercise("2.3")
def perceive(answer):
    """answer(latents, inputs, cross, blocks) -> latents [B, R, D] after all turns."""
    for case in (turns_case(), turns_case(1, 3, 1), turns_case(2, 2, 0)):
        expect(call(answer, *case), turns(*case), _turn_mistakes(*case))


def turns(z, x, cross, blocks, again=False, feed=False):
    """Equation (2); again: every turn from the first latents; feed: they replace the inputs."""
    first = z
    for read_them, thoughts in zip(cross, blocks):
        z = read_them(first if again else z, x)
        for think in thoughts:
            z = think(z)
        x = z if feed else x
    return z


def _turn_mistakes(z, x, cross, blocks):
    flat = [think for thoughts in blocks for think in thoughts]
    none = [[] for _ in blocks]
    yield "one turn only: go through all T of them", turns(z, x, cross[:1], blocks[:1])
    yield (
        "every turn starts from the FIRST latents: hand the new ones on",
        turns(z, x, cross, blocks, again=True),
    )
    yield (
        "the inputs are lost after turn 1: every turn reads the same, unchanged inputs",
        turns(z, x, cross, blocks, feed=True),
    )
    yield "the latents read, but never think: the blocks are missing", turns(z, x, cross, none)
    yield (
        "all readings first, then all blocks: each turn reads AND thinks",
        turns(z, x, cross, [*none[1:], flat]),
    )
    yield (
        "one block of each turn: a turn has P of them",
        turns(z, x, cross, [b[:1] for b in blocks]),
    )
    yield (
        "one block of each turn: a turn has P of them",
        turns(z, x, cross, [b[-1:] for b in blocks]),
    )
    yield (
        "think after reading, not before",
        _thinking_first(z, x, cross, blocks),
    )
    yield (
        "the first turn's functions in every turn",
        turns(z, x, cross[:1] * len(cross), blocks[:1] * len(cross)),
    )
    yield "the turns run backwards", turns(z, x, cross[::-1], blocks[::-1])
    yield "nothing is read or thought: these are the latents as they came", z


def _thinking_first(z, x, cross, blocks):
    for read_them, thoughts in zip(cross, blocks):
        for think in thoughts:
            z = think(z)
        z = read_them(z, x)
    return z


# --- 2.4: position codes --------------------------------------------------------------------------


@exercise("2.4")
def codes(answer):
    """answer(u [M], F) -> [M, 2F + 1]."""
    for u, F in ((np.linspace(-0.9, 1, 7), 3), (np.array([0.3, -0.2]), 2)):
        expect(call(answer, u, F), fourier(u, np.arange(1, F + 1)), _code_mistakes(u, F))


def fourier(u, frequencies, turn=np.pi):
    """Equation (4), for any frequencies."""
    angles = turn * u[:, None] * frequencies
    return np.concatenate([u[:, None], np.sin(angles), np.cos(angles)], axis=1)


def _code_mistakes(u, F):
    f = np.arange(1, F + 1)
    right = fourier(u, f)
    yield "pi is missing: sin(f pi u)", fourier(u, f, 1)
    yield "pi, not 2 pi: u runs from -1 to 1, one wave at f = 1", fourier(u, f, 2 * np.pi)
    yield "the frequencies are 1 to F: yours begin at 0", fourier(u, f - 1)
    yield (
        "the frequencies are 1 to F, evenly spaced: yours are powers of two",
        fourier(u, 2 ** (f - 1)),
    )
    yield "the frequencies are 1 to F, evenly spaced: yours are powers of two", fourier(u, 2**f)
    yield "u itself is missing: it is the first column", right[:, 1:]
    yield "u itself is the FIRST column", np.roll(right, -1, axis=1)
    yield "the cosines are missing", right[:, : F + 1]
    yield (
        "the sines come before the cosines",
        right[:, [0, *range(F + 1, 2 * F + 1), *range(1, F + 1)]],
    )
    pairs = np.stack([right[:, 1 : F + 1], right[:, F + 1 :]], axis=2).reshape(len(u), -1)
    yield (
        "first all sines, then all cosines: yours alternate",
        np.concatenate([u[:, None], pairs], axis=1),
    )
    yield "the axes are exchanged: [M, 2F + 1], a row for each position", right.T
    yield "sines twice: the second half is cosines", right[:, [*range(F + 1), *range(1, F + 1)]]
