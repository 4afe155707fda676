"""Right and wrong answers to the exercises of module 05, for test_checks.py."""

import numpy as np

from miniflamingo.course.checks.module_05 import nucleus_of, probabilities_of, step_of_beam, sum_of
from miniflamingo.functional import log_softmax, softmax
from miniflamingo.language import LanguageConfig, LanguageModel

# --- 5.1 ------------------------------------------------------------------------------------------

LM = LanguageModel(
    LanguageConfig(vocab_size=4, dim=8, depth=1, heads=1), rng=np.random.default_rng(0)
)


def sees(positions, n):
    return positions[:, :, None] >= np.arange(n)


def sees_by_the_library(positions, n):
    return np.isfinite(LM.causality(positions, n)[:, 0])


# --- 5.2 and 5.3 ----------------------------------------------------------------------------------


def top_k(logits, k, t, fill=-np.inf, shift=0, again=True, by=np.divide):
    """An answer as students write it, with a place for each mistake."""
    out = np.zeros_like(logits)
    for row, z in zip(out, logits):
        best = np.argsort(-z)[: k + shift]
        cut = np.full_like(z, fill)
        cut[best] = z[best]
        p = softmax(by(cut if again else z, t))
        row[:] = p if again else np.where(np.isfinite(cut), p, 0)
    return out


def nucleus_by_a_loop(logits, p, before=True, share=True):
    out = np.zeros_like(logits)
    for row, q in zip(out, softmax(logits)):
        total = 0.0
        for v in np.argsort(-q):
            if (total if before else total + q[v]) >= p:
                break
            row[v] = q[v]
            total += q[v]
        row /= row.sum() if share and row.sum() else 1
    return out


# --- 5.4 ------------------------------------------------------------------------------------------


def beam_by_sorting(scores, logp):
    ways = [(s + x, b, v) for b, s in enumerate(scores) for v, x in enumerate(logp[b])]
    return [(b, v) for _, b, v in sorted(ways, reverse=True)[: len(scores)]]


def own_best(scores, logp):
    return np.stack([np.arange(len(scores)), logp.argmax(axis=1)], axis=1)


def flat(scores, logp):
    return np.argsort(-(scores[:, None] + logp).ravel())[: len(scores)]


# --- 5.5 ------------------------------------------------------------------------------------------


def likelihood_by_loops(first, logits, tokens, lengths, of=log_softmax):
    out = np.zeros(len(tokens))
    for c, n in enumerate(lengths):
        z = first
        for i in range(n):
            out[c] += of(z)[tokens[c, i]]
            z = logits[c, i]
    return out


RIGHT = [
    ("5.1", sees),
    ("5.1", sees_by_the_library),
    ("5.2", probabilities_of),
    ("5.2", top_k),
    ("5.3", nucleus_of),
    ("5.3", nucleus_by_a_loop),
    ("5.4", step_of_beam),
    ("5.4", beam_by_sorting),
    ("5.5", sum_of),
    ("5.5", likelihood_by_loops),
]

WRONG = [
    ("5.1", lambda p, n: p[:, :, None] > np.arange(n), "a token sees itself, too"),
    ("5.1", lambda p, n: p[:, :, None] + 1 >= np.arange(n), "sees the one after it"),
    ("5.1", lambda p, n: p[:, :, None] <= np.arange(n), "shows the future"),
    ("5.1", lambda p, n: p[:, :, None] < np.arange(n), "True means visible"),
    ("5.1", lambda p, n: p[:, None] >= np.arange(n)[:, None], "the axes are exchanged"),
    ("5.1", lambda p, n: sees(np.arange(p.shape[1]) + 0 * p, n), "not its place among the new"),
    ("5.1", lambda p, n: sees(p[:1] + 0 * p, n), "this uses those of row 0"),
    ("5.1", lambda p, n: sees(p, n) * 1.0, "wrong dtype: bool is wanted"),
    ("5.2", lambda z, k, t: softmax(z / t), "nothing is cut"),
    ("5.2", lambda z, k, t: top_k(z, k, t, again=False), "not shared out anew"),
    ("5.2", lambda z, k, t: top_k(z, k, 1), "the temperature is missing"),
    ("5.2", lambda z, k, t: top_k(z, k, t, by=np.multiply), "multiplied by t"),
    ("5.2", lambda z, k, t: top_k(z, k, t, fill=0), "not a logit of 0"),
    ("5.2", lambda z, k, t: top_k(z, k, t, shift=1), "one word too many"),
    ("5.2", lambda z, k, t: top_k(z, k, t, shift=-1), "one word too few"),
    ("5.2", lambda z, k, t: -np.sort(-top_k(z, k, t))[:, :k], "wrong shape: [2, 7] is wanted"),
    ("5.3", lambda z, p: nucleus_by_a_loop(z, p, before=False), "one word too few"),
    ("5.3", lambda z, p: nucleus_by_a_loop(z, p, share=False), "not shared out anew"),
    ("5.3", lambda z, p: softmax(z), "nothing is cut"),
    ("5.3", lambda z, p: nucleus_of(z, p, order=np.argsort(z)), "sorted upwards"),
    (
        "5.3",
        lambda z, p: nucleus_of(z, p, order=np.arange(8) + np.zeros((3, 1), int)),
        "not sorted",
    ),
    ("5.3", lambda z, p: -np.sort(-nucleus_of(z, p)), "in the order of likelihood"),
    ("5.3", lambda z, p: softmax(z) * (softmax(z) >= p), "p bounds the SUM"),
    ("5.4", own_best, "each beam keeps its own best"),
    ("5.4", lambda s, x: step_of_beam(0 * s, x), "the scores so far are missing"),
    ("5.4", lambda s, x: step_of_beam(0 * s, s[:, None] * x), "a product of logarithms"),
    ("5.4", lambda s, x: step_of_beam(-s, -x), "the WORST"),
    ("5.4", lambda s, x: step_of_beam(s, x)[::-1], "best first"),
    ("5.4", lambda s, x: step_of_beam(s, x)[:, ::-1], "(beam, word), in this order"),
    ("5.4", flat, "places in the flat array"),
    ("5.4", lambda s, x: np.stack(np.divmod(flat(s, x), len(s)), 1), "not by W"),
    ("5.5", lambda *a: sum_of(*a, padded=True), "the padding is counted"),
    ("5.5", lambda *a: sum_of(*a, shift=0), "not shifted"),
    ("5.5", lambda *a: likelihood_by_loops(*a, of=lambda z: z), "sums of logits"),
    ("5.5", lambda *a: likelihood_by_loops(*a, of=softmax), "sums of probabilities"),
    ("5.5", lambda *a: np.exp(sum_of(*a)), "the logarithm is missing"),
    ("5.5", lambda *a: sum_of(*a) / a[3], "a mean over the length"),
    ("5.5", lambda *a: -sum_of(*a), "minus"),
    ("5.5", lambda *a: sum_of(*a).sum(), "one number for each candidate"),
]
