"""Right and wrong answers to the exercises of module 03, for test_checks.py."""

import numpy as np

from miniflamingo.attention import attention
from miniflamingo.course.checks.module_03 import fourier, read_inputs, turns
from miniflamingo.functional import softmax

# --- 3.1: counting --------------------------------------------------------------------------------


def count_by_loops(M, R, T, P):
    total = np.zeros(M.shape, int)
    for _ in range(T):
        total += M * R
        for _ in range(P):
            total += R * R
    return total


# --- 3.2: reading ---------------------------------------------------------------------------------


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


# --- 3.3: turns -----------------------------------------------------------------------------------


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


def overflowing(scores):
    e = np.exp(scores)
    return e / e.sum(axis=-1, keepdims=True)


# --- 3.4: pictures with their places --------------------------------------------------------------


def placed(pictures, F, code=None, low=-1, rows=None, columns=None, order=(0, 1, 2)):
    """An answer as students write it, with a place for each mistake."""
    B, h, w, C = pictures.shape
    code = (lambda u: codes(u, F)) if code is None else code
    of_row, of_column = code(np.linspace(low, 1, h)), code(np.linspace(low, 1, w))
    of_row = of_row.repeat(w, axis=0) if rows is None else rows(of_row, w)
    of_column = np.tile(of_column, (h, 1)) if columns is None else columns(of_column, h)
    parts = [pictures.reshape(B, h * w, C)]
    parts += [np.stack([x] * B) for x in (of_row, of_column)]
    return np.concatenate([parts[i] for i in order], axis=-1)


def codes(u, F):
    return fourier(u, np.arange(1, F + 1))


def placed_by_loops(pictures, F):
    B, h, w, C = pictures.shape
    out = np.zeros((B, h * w, C + 2 * (2 * F + 1)))
    for b, y, x in np.ndindex(B, h, w):
        row = list(pictures[b, y, x])
        for u in (2 * y / (h - 1) - 1, 2 * x / (w - 1) - 1):
            waves = [wave(f * np.pi * u) for wave in (np.sin, np.cos) for f in range(1, F + 1)]
            row += [u, *waves]
        out[b, y * w + x] = row
    return out


def placed_on_a_grid(pictures, F):
    B, h, w, _ = pictures.shape
    grid = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
    parts = [pictures]
    for u in grid:
        a = np.pi * u[..., None] * np.arange(1, F + 1)
        code = np.concatenate([u[..., None], np.sin(a), np.cos(a)], axis=-1)
        parts.append(np.broadcast_to(code, (B, *code.shape)))
    return np.concatenate(parts, axis=-1).reshape(B, h * w, -1)


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


def by(code):
    return lambda pictures, F: placed(pictures, F, lambda u: code(u, F))


def in_place(pictures, F):
    pictures -= 0.5
    return placed(pictures, F)


RIGHT = [
    ("3.1", lambda M, R, T, P: T * (M * R + P * R**2)),
    ("3.1", lambda M, R, T, P: T * R * (M + P * R)),
    ("3.1", count_by_loops),
    ("3.1", lambda M, R, T, P: T * (M * R + P * R**2) / 1),
    ("3.2", read),
    ("3.2", read_inputs),
    ("3.2", read_by_loops),
    ("3.3", turns),
    ("3.3", turns_by_index),
    ("3.3", turns_by_recursion),
    ("3.4", placed),
    ("3.4", placed_by_loops),
    ("3.4", placed_on_a_grid),
]

WRONG = [
    ("3.1", lambda M, R, T, P: T * (M**2 + P * R**2), "this is self-attention over the inputs"),
    ("3.1", lambda M, R, T, P: M**2, "this is self-attention over the inputs"),
    ("3.1", lambda M, R, T, P: T * (1 + P) * M * R, "the self-attentions never see M"),
    ("3.1", lambda M, R, T, P: M * R + P * R**2, "the turns are missing"),
    ("3.1", lambda M, R, T, P: M * R + T * P * R**2, "the latents read once in EVERY turn"),
    ("3.1", lambda M, R, T, P: T * M * R + P * R**2, "its own self-attentions"),
    ("3.1", lambda M, R, T, P: T * (M * R + R**2), "P self-attentions, not one"),
    ("3.1", lambda M, R, T, P: T * P * (M * R + R**2), "one cross-attention, not P"),
    ("3.1", lambda M, R, T, P: T * (M * R + P * R), "R^2 scores, not R"),
    ("3.2", lambda *a: read(*a, residual=False), "the residual is missing"),
    ("3.2", lambda *a: read(*a, scale=lambda K: 1), "the scale is missing"),
    ("3.2", lambda *a: read(*a, scale=lambda K: K**0.5), "yours multiplies"),
    ("3.2", lambda *a: read(*a, scale=lambda K: 1 / K), "sqrt(K), not by K"),
    ("3.2", lambda *a: read(*a, scale=lambda K: a[0].shape[1] ** -0.5), "not of latents or inputs"),
    ("3.2", lambda *a: read(*a, axis=1), "yours compete for each input"),
    ("3.2", lambda *a: read(*a, weights=lambda s: s), "the softmax is missing"),
    ("3.2", exchanged, "the roles are exchanged"),
    ("3.2", first_row, "the first row of the batch for all"),
    ("3.2", lambda *a: read(*a, weights=lambda s: s * 0 + 1 / s.shape[2]), "the inputs' mean"),
    ("3.2", lambda z, x, Wq, Wk, Wv: z @ Wq.T @ x.T, "your code stops with ValueError"),
    ("3.2", lambda *a: read(*a)[0], "wrong shape: [2, 3, 6] is wanted, got [3, 6]"),
    ("3.3", indented_too_far, "one turn only"),
    ("3.3", lambda *a: turns(*a, again=True), "from the FIRST latents"),
    ("3.3", lambda *a: turns(*a, feed=True), "the inputs are lost after turn 1"),
    ("3.3", lambda z, x, c, b: turns(z, x, c, [[] for _ in b]), "the blocks are missing"),
    ("3.3", readings_first, "all readings first"),
    ("3.3", lambda z, x, c, b: turns(z, x, c, [p[:1] for p in b]), "one block of each turn"),
    ("3.3", thinking_first, "think after reading"),
    ("3.3", lambda z, x, c, b: turns(z, x, c[:1] * 2, b[:1] * 2), "the first turn's functions"),
    ("3.3", lambda z, x, c, b: turns(z, x, c[::-1], b[::-1]), "the turns run backwards"),
    ("3.3", lambda z, x, c, b: z, "nothing is read or thought"),
    ("3.3", lambda z, x, c, b: turns(z, x, c, b)[0], "wrong shape: [1, 3, 4] is wanted"),
    ("3.3", lambda z, x, c, b: turns(z, x, c, b) + 1, "wrong value at [0, 0, 0]"),
    ("3.1", lambda M, R, T, P: 2 * T * (M * R + P * R**2), "every number is 2 times the right one"),
    ("3.2", lambda *a: read(*a, weights=overflowing), "subtract the row's maximum before exp"),
    ("3.2", lambda z, *a: z + read(z, *a), "the residual is there twice"),
    (
        "3.3",
        lambda z, x, c, b: turns(z, x, [lambda z, x, f=f: z + f(z, x) for f in c], b),
        "without another z +",
    ),
    ("3.4", by(lambda u, F: fourier(u, np.arange(1, F + 1), 1)), "pi is missing"),
    ("3.4", by(lambda u, F: fourier(u, np.arange(1, F + 1), 2 * np.pi)), "pi, not 2 pi"),
    ("3.4", by(lambda u, F: fourier(u, np.arange(F))), "yours begin at 0"),
    ("3.4", by(lambda u, F: fourier(u, 2 ** np.arange(F))), "yours are powers of two"),
    ("3.4", by(lambda u, F: codes(u, F)[:, 1:]), "u itself is missing"),
    ("3.4", by(lambda u, F: np.roll(codes(u, F), -1, axis=1)), "u itself is the FIRST"),
    ("3.4", by(cosines_first), "the sines come before the cosines"),
    ("3.4", by(alternating), "yours alternate"),
    ("3.4", by(sines_twice), "sines twice"),
    ("3.4", lambda *a: placed(*a, low=0), "yours from 0 to 1"),
    ("3.4", lambda *a: placed(*a, order=(0, 2, 1)), "the codes of the ROW come first"),
    ("3.4", lambda *a: placed(*a, order=(1, 2, 0)), "the colours come first"),
    ("3.4", lambda *a: placed(*a, order=(0, 1)), "the codes of the columns are missing"),
    (
        "3.4",
        lambda *a: placed(
            *a,
            rows=lambda x, w: np.tile(x, (w, 1)),
            columns=lambda x, h: x.repeat(h, axis=0),
        ),
        "REPEAT the row's code",
    ),
    ("3.4", lambda *a: placed(*a)[0], "wrong shape: [2, 20, 13] is wanted"),
    ("3.4", in_place, "changes its argument number 1 in place"),
]
