"""Right and wrong answers to the exercises of module 02, for test_checks.py."""

import numpy as np

from miniflamingo.attention import attention
from miniflamingo.course.checks.module_02 import fourier, read_inputs, turns
from miniflamingo.functional import softmax

# --- 2.1: counting --------------------------------------------------------------------------------


def count_by_loops(M, R, T, P):
    total = np.zeros(M.shape, int)
    for _ in range(T):
        total += M * R
        for _ in range(P):
            total += R * R
    return total


# --- 2.2: reading ---------------------------------------------------------------------------------


def read(latents, inputs, Wq, Wk, Wv, scale=None, axis=-1, residual=True, weights=None):
    """An answer as students write it, with a place for each mistake."""
    K = len(Wq)
    s = latents @ Wq.T @ (inputs @ Wk.T).swapaxes(1, 2) * (K**-0.5 if scale is None else scale(K))
    e = np.exp(s - s.max(axis=axis, keepdims=True))
    p = e / e.sum(axis=axis, keepdims=True) if weights is None else weights(s)
    return p @ (inputs @ Wv.T) + (latents if residual else 0)


def read_by_loops(latents, inputs, Wq, Wk, Wv):
    out = []
    for x in inputs:
        p = softmax((latents @ Wq.T) @ (x @ Wk.T).T / np.sqrt(len(Wq)))
        out.append(latents + p @ x @ Wv.T)
    return out


def exchanged(latents, inputs, Wq, Wk, Wv):
    q = np.stack([latents @ Wq.T] * len(inputs))
    return attention(inputs @ Wk.T, q, np.stack([latents] * len(inputs)))


def first_row(latents, inputs, *W):
    return np.stack([read(latents, inputs[:1], *W)[0]] * len(inputs))


# --- 2.3: turns -----------------------------------------------------------------------------------


def turns_by_index(z, x, cross, blocks):
    for t in range(len(cross)):
        z = cross[t](z, x)
        for p in range(len(blocks[t])):
            z = blocks[t][p](z)
    return z


def turns_by_recursion(z, x, cross, blocks):
    if not cross:
        return z
    z = cross[0](z, x)
    for think in blocks[0]:
        z = think(z)
    return turns_by_recursion(z, x, cross[1:], blocks[1:])


def readings_first(z, x, cross, blocks):
    for read_them in cross:
        z = read_them(z, x)
    for thoughts in blocks:
        for think in thoughts:
            z = think(z)
    return z


def thinking_first(z, x, cross, blocks):
    for read_them, thoughts in zip(cross, blocks):
        for think in thoughts:
            z = think(z)
        z = read_them(z, x)
    return z


def indented_too_far(z, x, cross, blocks):
    for read_them, thoughts in zip(cross, blocks):
        z = read_them(z, x)
        for think in thoughts:
            z = think(z)
        return z


# --- 2.4: position codes --------------------------------------------------------------------------


def codes(u, F):
    return fourier(u, np.arange(1, F + 1))


def codes_by_loops(u, F):
    rows = []
    for x in u:
        waves = [wave(f * np.pi * x) for wave in (np.sin, np.cos) for f in range(1, F + 1)]
        rows.append([x, *waves])
    return rows


def alternating(u, F):
    columns = [u]
    for f in range(1, F + 1):
        columns += [np.sin(f * np.pi * u), np.cos(f * np.pi * u)]
    return np.stack(columns, axis=1)


def cosines_first(u, F):
    a = np.pi * u[:, None] * np.arange(1, F + 1)
    return np.concatenate([u[:, None], np.cos(a), np.sin(a)], axis=1)


def sines_twice(u, F):
    a = np.pi * u[:, None] * np.arange(1, F + 1)
    return np.concatenate([u[:, None], np.sin(a), np.sin(a)], axis=1)


RIGHT = [
    ("2.1", lambda M, R, T, P: T * (M * R + P * R**2)),
    ("2.1", lambda M, R, T, P: T * R * (M + P * R)),
    ("2.1", count_by_loops),
    ("2.2", read),
    ("2.2", read_inputs),
    ("2.2", read_by_loops),
    ("2.3", turns),
    ("2.3", turns_by_index),
    ("2.3", turns_by_recursion),
    ("2.4", codes),
    ("2.4", codes_by_loops),
]

WRONG = [
    ("2.1", lambda M, R, T, P: T * (M**2 + P * R**2), "this is self-attention over the inputs"),
    ("2.1", lambda M, R, T, P: M**2, "this is self-attention over the inputs"),
    ("2.1", lambda M, R, T, P: T * (1 + P) * M * R, "the self-attentions never see M"),
    ("2.1", lambda M, R, T, P: M * R + P * R**2, "the turns are missing"),
    ("2.1", lambda M, R, T, P: M * R + T * P * R**2, "the latents read once in EVERY turn"),
    ("2.1", lambda M, R, T, P: T * M * R + P * R**2, "its own self-attentions"),
    ("2.1", lambda M, R, T, P: T * (M * R + R**2), "P self-attentions, not one"),
    ("2.1", lambda M, R, T, P: T * P * (M * R + R**2), "one cross-attention, not P"),
    ("2.1", lambda M, R, T, P: T * (M * R + P * R), "R^2 scores, not R"),
    ("2.1", lambda M, R, T, P: T * (M * R + P * R**2) / 1, "wrong dtype: int is wanted"),
    ("2.2", lambda *a: read(*a, residual=False), "the residual is missing"),
    ("2.2", lambda *a: read(*a, scale=lambda K: 1), "the scale is missing"),
    ("2.2", lambda *a: read(*a, scale=lambda K: K**0.5), "yours multiplies"),
    ("2.2", lambda *a: read(*a, scale=lambda K: 1 / K), "sqrt(K), not by K"),
    ("2.2", lambda *a: read(*a, scale=lambda K: a[0].shape[1] ** -0.5), "not of latents or inputs"),
    ("2.2", lambda *a: read(*a, axis=1), "yours compete for each input"),
    ("2.2", lambda *a: read(*a, weights=lambda s: s), "the softmax is missing"),
    ("2.2", exchanged, "the roles are exchanged"),
    ("2.2", first_row, "the first row of the batch for all"),
    ("2.2", lambda *a: read(*a, weights=lambda s: s * 0 + 1 / s.shape[2]), "the inputs' mean"),
    ("2.2", lambda z, x, Wq, Wk, Wv: z @ Wq.T @ x.T, "your code stops with ValueError"),
    ("2.2", lambda *a: read(*a)[0], "wrong shape: [2, 3, 6] is wanted, got [3, 6]"),
    ("2.3", indented_too_far, "one turn only"),
    ("2.3", lambda *a: turns(*a, again=True), "from the FIRST latents"),
    ("2.3", lambda *a: turns(*a, feed=True), "the inputs are lost after turn 1"),
    ("2.3", lambda z, x, c, b: turns(z, x, c, [[] for _ in b]), "the blocks are missing"),
    ("2.3", readings_first, "all readings first"),
    ("2.3", lambda z, x, c, b: turns(z, x, c, [p[:1] for p in b]), "one block of each turn"),
    ("2.3", thinking_first, "think after reading"),
    ("2.3", lambda z, x, c, b: turns(z, x, c[:1] * 2, b[:1] * 2), "the first turn's functions"),
    ("2.3", lambda z, x, c, b: turns(z, x, c[::-1], b[::-1]), "the turns run backwards"),
    ("2.3", lambda z, x, c, b: z, "nothing is read or thought"),
    ("2.3", lambda z, x, c, b: turns(z, x, c, b)[0], "wrong shape: [1, 3, 4] is wanted"),
    ("2.3", lambda z, x, c, b: turns(z, x, c, b) + 1, "wrong value at [0, 0, 0]"),
    ("2.4", lambda u, F: fourier(u, np.arange(1, F + 1), 1), "pi is missing"),
    ("2.4", lambda u, F: fourier(u, np.arange(1, F + 1), 2 * np.pi), "pi, not 2 pi"),
    ("2.4", lambda u, F: fourier(u, np.arange(F)), "yours begin at 0"),
    ("2.4", lambda u, F: fourier(u, 2 ** np.arange(F)), "yours are powers of two"),
    ("2.4", lambda u, F: codes(u, F)[:, 1:], "u itself is missing"),
    ("2.4", lambda u, F: np.roll(codes(u, F), -1, axis=1), "u itself is the FIRST column"),
    ("2.4", lambda u, F: codes(u, F)[:, : F + 1], "the cosines are missing"),
    ("2.4", cosines_first, "the sines come before the cosines"),
    ("2.4", alternating, "yours alternate"),
    ("2.4", lambda u, F: codes(u, F).T, "the axes are exchanged"),
    ("2.4", sines_twice, "sines twice"),
    (
        "2.4",
        lambda u, F: np.sin(np.pi * u * np.arange(1, F + 1)),
        "your code stops with ValueError",
    ),
]
