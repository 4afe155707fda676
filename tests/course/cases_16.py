"""Right and wrong answers to the exercises of module 16, for test_checks.py."""

import re

import numpy as np

from miniflamingo.course.checks.module_16 import (
    PARTS,
    first_is_least,
    gain_of,
    hits_of,
    open_blocks,
    ranked_of,
    renamed,
    scores_of,
    trained_numbers,
)

# --- 16.1: how much is trained --------------------------------------------------------------------


def by_loop(shapes, parts):
    own = every = 0
    for name, shape in shapes.items():
        size = 1
        for length in shape:
            size *= length
        every += size
        own += size * any(name.startswith(part) for part in parts)
    return [own, own / every]


def counted(size=lambda s: int(np.prod(s, dtype=int)), belongs=str.startswith, whole=False):
    def answer(shapes, parts):
        own = sum(size(s) for n, s in shapes.items() if any(belongs(n, p) for p in parts))
        every = sum(map(size, shapes.values()))
        return np.array([own, own / (every - own if whole else every)])

    return answer


# --- 16.2: gates ----------------------------------------------------------------------------------


def open_by_loop(alphas, blocks, least):
    return [b for a, b in zip(alphas[-1], blocks) if max(np.tanh(a), -np.tanh(a)) >= least]


def open_after(opening, row=-1):
    return lambda alphas, blocks, least: blocks[opening(alphas[row]) >= least]


def tanh_of_exp(a):
    return abs((np.exp(a) - np.exp(-a)) / (np.exp(a) + np.exp(-a)))


# --- 16.3: gain -----------------------------------------------------------------------------------


def gain_by_loop(right, another, tokens, rows):
    resampled = []
    for row in rows:
        saved = sum(another[i] - right[i] for i in row)
        resampled.append(saved / sum(tokens[i] for i in row))
    low, high = np.percentile(resampled, [2.5, 97.5])
    return [(another.sum() - right.sum()) / tokens.sum(), low, high]


def gain_with(ratio, at=(0.025, 0.975)):
    """ratio(saved, tokens, axis) of all pictures, and of each resample."""

    def answer(right, another, tokens, rows):
        saved = another - right
        drawn = ratio(saved[rows], tokens[rows], 1)
        return [ratio(saved, tokens, 0), *np.quantile(drawn, at)]

    return answer


def in_place(right, another, tokens, rows):
    another -= right
    return gain_of(0, another, tokens, rows)


# --- 16.4: ranking --------------------------------------------------------------------------------


def ranked_by_loop(nats, tokens, candidates, rows):
    hits = np.zeros((3, len(nats)))
    for p, (own, *others) in enumerate(candidates):
        rest = np.delete(nats, p, axis=0).mean(axis=0)
        for k, score in enumerate((nats[p], nats[p] / tokens, (nats[p] - rest) / tokens)):
            hits[k, p] = all(score[own] < score[other] for other in others)
    drawn = [hits[2, row].mean() - hits[1, row].mean() for row in rows]
    return (hits.mean(axis=1).tolist(), np.percentile(drawn, [2.5, 97.5]).tolist())


def with_interval(change):
    """The right shares, and change(hits [3, P], rows) for the interval."""

    def answer(nats, tokens, candidates, rows):
        hits = hits_of(nats, tokens, candidates).astype(float)
        return hits.mean(axis=1), change(hits, rows)

    return answer


def ends(x):
    return np.quantile(x, (0.025, 0.975))


def ranked_in_place(nats, tokens, candidates, rows):
    out = ranked_of(nats, tokens, candidates, rows)
    nats /= tokens
    return out


def third(score):
    """The first two shares right, the third by another score."""

    def answer(nats, tokens, candidates, rows):
        found = first_is_least(score(nats, tokens), candidates)
        shares, interval = ranked_of(nats, tokens, candidates, rows)
        return [*shares[:2], found], interval

    return answer


def each(hit):
    """hit(the candidates' scores [P, n]) -> bool[P], for all three scores."""

    def answer(nats, tokens, candidates, rows):
        scores = scores_of(nats, tokens)
        shares = [hit(np.take_along_axis(s, candidates, axis=1)).mean() for s in scores]
        return shares, ranked_of(nats, tokens, candidates, rows)[1]

    return answer


def among_all(nats, tokens, candidates, rows):
    found = [(s.argmin(axis=1) == candidates[:, 0]).mean() for s in scores_of(nats, tokens)]
    return found, rows[0, :2]


# --- 16.5: names ----------------------------------------------------------------------------------


def rename_in_steps(names, digits=r"\d+", strict=True, whole="$"):
    gated = {"input_layernorm": "norm", "post_attention_layernorm": "ffw.norm"}
    gated |= {f"cross_attn.{x}_proj": f"attention.{x}_proj" for x in "qkv"}
    gated |= {"cross_attn.o_proj": "attention.out_proj"}
    gated |= {f"mlp.{x}_proj": f"ffw.{x}" for x in ("gate", "up", "down")}
    gated = {f"{a}.weight": f"{b}.weight" for a, b in gated.items()}
    gated |= {"alpha_cross_attn": "alpha_xattn", "alpha_dense": "alpha_dense"}
    inner = {"0.context_layer_norm": "input_norm", "0.latents_layer_norm": "latent_norm"}
    inner |= {"1.ln": "ffw.norm"}
    inner = {f"{a}.{w}": f"{b}.{w}" for a, b in inner.items() for w in ("weight", "bias")}
    inner |= {f"0.{x}_proj.weight": f"attention.{x}_proj.weight" for x in "qkv"}
    inner |= {"0.output_proj.weight": "attention.out_proj.weight", "1.fc.weight": "ffw.up.weight",
              "1.c_proj.weight": "ffw.down.weight"}  # fmt: skip
    outer = {"latents": "latents", "layer_norm.weight": "final_norm.weight",
             "layer_norm.bias": "final_norm.bias"}  # fmt: skip
    ours = {}
    for name in names:
        if not name.startswith(("model.gated_cross_attn_layers.", "model.perceiver_resampler.")):
            continue
        found = None
        if m := re.match(rf"model\.gated_cross_attn_layers\.({digits})\.(.*)$", name):
            found = gated.get(m[2]) and f"gated_xattn.{m[1]}.{gated[m[2]]}"
        elif m := re.match(r"model\.perceiver_resampler\.blocks\.(\d+)\.(.*)$", name):
            found = inner.get(m[2]) and f"resampler.layers.{m[1]}.{inner[m[2]]}"
        elif (rest := name.removeprefix("model.perceiver_resampler.")) in outer:
            found = f"resampler.{outer[rest]}"
        if found:
            ours[found] = name
        elif strict:
            raise ValueError(f"unknown: {name}")
    return ours


def of_all(names):
    rest = {f"lm.{n}": n for n in names if n.startswith("model.layers.")}
    return renamed(names) | rest


def exchanged(first, second):
    """The right names, but for two of ours that changed places."""

    def answer(names):
        ours = renamed(names)
        if first in ours:
            ours[first], ours[second] = ours[second], ours[first]
        return ours

    return answer


def called(wrong):
    """The right names, but for a part of ours that is called otherwise: {right: wrong}."""
    (right, other), = wrong.items()  # fmt: skip
    return lambda names: {ours.replace(right, other): n for ours, n in renamed(names).items()}


def loose_latents(names):
    return renamed([n for n in names if not n.endswith("latents_of_text")])


RIGHT = [
    ("16.1", trained_numbers),
    ("16.1", by_loop),
    ("16.2", open_blocks),
    ("16.2", open_by_loop),
    ("16.3", gain_of),
    ("16.3", gain_by_loop),
    ("16.4", ranked_of),
    ("16.4", ranked_by_loop),
    ("16.4", third(lambda n, t: (n - n.mean(axis=0)) / t)),  # times (P - 1) / P, the same order
    ("16.5", renamed),
    ("16.5", rename_in_steps),
]

WRONG = [
    ("16.1", counted(size=lambda s: int(np.prod(s, dtype=int)) if s else 0), "is one number"),
    ("16.1", counted(belongs=lambda n, p: p in n), "BEGINS with"),
    ("16.1", counted(size=lambda s: 1), "not tensors"),
    ("16.1", counted(size=sum), "the PRODUCT of its sizes"),
    ("16.1", counted(whole=True), "not of the frozen ones"),
    ("16.1", lambda s, p: [trained_numbers(s, p)[0], 100 * trained_numbers(s, p)[1]], "per cent"),
    ("16.1", lambda s, p: trained_numbers({n: x for n, x in s.items() if n.startswith(PARTS)}, p),
     "wrong value at [1]"),
    ("16.1", lambda s, p: trained_numbers(s, p)[0], "two numbers are wanted"),
    ("16.2", open_after(np.tanh), "take the absolute value"),
    ("16.2", open_after(abs), "tanh(alpha)"),
    ("16.2", open_after(tanh_of_exp), "inf / inf is no number"),
    ("16.2", lambda a, b, least: np.flatnonzero(abs(np.tanh(a[-1])) >= least), "which BLOCKS"),
    ("16.2", lambda a, b, least: b[(abs(np.tanh(a)) >= least).any(axis=0)], "the last row"),
    ("16.2", open_after(lambda a: abs(np.tanh(a)), 0), "this is the first row"),
    ("16.2", lambda a, b, least: abs(np.tanh(a[-1])) >= least, "not a truth for each"),
    ("16.2", lambda a, b, least: b[abs(np.tanh(a[-1])) < least], "stayed shut"),
    ("16.3", lambda r, a, t, rows: gain_of(a, r, t, rows), "this is negative"),
    ("16.3", gain_with(lambda s, t, axis: (s / t).mean(axis)), "sums first, then the quotient"),
    ("16.3", gain_with(lambda s, t, axis: s.mean(axis)), "not by the pictures"),
    ("16.3", gain_with(lambda s, t, axis: s.sum(axis)), "are not divided yet"),
    ("16.3", gain_with(lambda s, t, axis: s.sum(axis) / t.sum(axis), (0.05, 0.95)), "0.975"),
    ("16.3", lambda r, a, t, rows: gain_of(r, a, t, rows)[[0, 2, 1]], "lower limit comes first"),
    ("16.3", lambda r, a, t, rows: [gain_of(r, a, t, rows)[0], *np.quantile(
        (a - r)[rows].sum(0) / t[rows].sum(0), (0.025, 0.975))], "axis=1"),
    ("16.3", lambda r, a, t, rows: gain_of(r, a, t, rows)[0], "three numbers are wanted"),
    ("16.3", in_place, "changes its argument number 2 in place"),
    ("16.4", each(lambda s: s[:, 0] > s[:, 1:].max(axis=1)), "the LEAST is the choice"),
    ("16.4", each(lambda s: s.argmin(axis=1) == 0), "a tie is no hit"),
    ("16.4", among_all, "not among all names"),
    ("16.4", lambda n, *a: (ranked_of(n, *a)[0] * len(n), a[2][:2, 0]), "not counts"),
    ("16.4", lambda *a: ranked_of(*a)[0], "the pair (shares [3], interval [2]) is wanted"),
    ("16.4", with_interval(lambda h, r: ends((h[1] - h[2])[r].mean(axis=1))), "s3 MINUS that of"),
    ("16.4", with_interval(lambda h, r: ends(h[2][r].mean(axis=1))), "of s3's share alone"),
    ("16.4", with_interval(lambda h, r: ends((h[2] - h[0])[r].mean(axis=1))), "not minus s1"),
    ("16.4", with_interval(lambda h, r: ends(h[2][r].mean(1)) - ends(h[1][r].mean(1))),
     "ends of two intervals are subtracted"),
    ("16.4", with_interval(lambda h, r: np.quantile((h[2] - h[1])[r].mean(1), (0.05, 0.95))),
     "these are 0.05 and 0.95"),
    ("16.4", with_interval(lambda h, r: ends((h[2] - h[1])[r].sum(axis=1))), "not counts: each"),
    ("16.4", with_interval(lambda h, r: ends((h[2] - h[1])[r])), "quantiles of single pictures"),
    ("16.4", with_interval(lambda h, r: ends((h[2] - h[1])[r].mean(axis=0))), "over the resamples"),
    ("16.4", with_interval(lambda h, r: ends((h[2] - h[1])[r].mean(1))[::-1]), "smaller quantile"),
    ("16.4", with_interval(lambda h, r: ends(h[2][r].mean(1) - h[1][r[::-1]].mean(1))), "the SAME"),
    ("16.4", ranked_in_place, "changes its argument number 1 in place"),
    ("16.4", third(lambda n, t: n - (n.sum(axis=0) - n) / (len(n) - 1)), "a token's, too"),
    ("16.4", third(lambda n, t: (n - n.mean(axis=1, keepdims=True)) / t), "not over the other na"),
    ("16.4", third(lambda n, t: n / ((n.sum(axis=0) - n) / (len(n) - 1))), "not divided by it"),
    ("16.4", lambda *a: (ranked_of(*a)[0][0], ranked_of(*a)[1]), "three shares are wanted"),
    ("16.4", lambda *a: (ranked_of(*a)[0][[1, 0, 2]], ranked_of(*a)[1]), "the order is"),
    ("16.5", of_all, "is of a frozen part"),
    ("16.5", lambda names: {b: a for a, b in renamed(names).items()}, "their names come first"),
    ("16.5", lambda names: rename_in_steps(names, digits=r"\d"), "layers.10."),
    ("16.5", lambda names: rename_in_steps(names, digits=r"\d", strict=False), "two digits"),
    ("16.5", lambda names: rename_in_steps(names, strict=False), "raise ValueError"),
    ("16.5", loose_latents, "latents_of_text stands in no table"),
    ("16.5", exchanged("gated_xattn.0.norm.weight", "gated_xattn.0.ffw.norm.weight"),
     "is model.gated_cross_attn_layers.0.input_layernorm.weight there"),
    ("16.5", called({"final_norm": "layer_norm"}), "is called resampler.final_norm.weight here"),
    ("16.5", lambda names: sorted(renamed(names)), "an array of numbers is wanted"),
]  # fmt: skip
