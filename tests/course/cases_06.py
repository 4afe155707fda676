"""Right and wrong answers to the exercises of module 06, for test_checks.py."""

import numpy as np

from miniflamingo.course.checks.module_06 import beams, drawn, nucleus_of, probabilities_of, sum_of
from miniflamingo.functional import log_softmax, softmax
from miniflamingo.language import LanguageConfig, LanguageModel

# --- 6.1 ------------------------------------------------------------------------------------------

LM = LanguageModel(
    LanguageConfig(vocab_size=4, dim=8, depth=1, heads=1), rng=np.random.default_rng(0)
)


def sees(positions, n):
    return positions[:, :, None] >= np.arange(n)


def sees_by_the_library(positions, n):
    return np.isfinite(LM.causality(positions, n)[:, 0])


# --- 6.2 and 5.3 ----------------------------------------------------------------------------------


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


def top_k_that_overflows(logits, k, t):
    kept = np.exp(logits / t) * (logits >= np.sort(logits, axis=-1)[:, -k, None])
    return kept / kept.sum(axis=-1, keepdims=True)


def nucleus_that_overflows(logits, p):
    q = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return nucleus_of(np.log(q), p)


def nucleus_of_one_size(logits, p):
    order = np.argsort(-logits, axis=-1)
    ranked = np.take_along_axis(softmax(logits), order, axis=-1)
    largest = (np.cumsum(ranked, axis=-1) < p).sum(axis=-1).max() + 1
    kept = np.zeros_like(logits)
    np.put_along_axis(kept, order[:, :largest], ranked[:, :largest], axis=-1)
    return kept / kept.sum(axis=-1, keepdims=True)


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


def nucleus_and(z, p, u, kept=nucleus_of, draw=drawn):
    """An answer of two parts, with a place for each mistake."""
    return kept(z, p), draw(nucleus_of(z, p), u)


def nucleus_one_by_one(z, p, u):
    """Both parts by loops; the words as a list."""
    kept, words = nucleus_by_a_loop(z, p), []
    for row, x in zip(kept, u):
        word, end = 0, row[0]
        while end <= x:
            word += 1
            end += row[word]
        words.append(word)
    return kept, words


def nucleus_by_search(z, p, u):
    kept = nucleus_by_a_loop(z, p)
    ends = np.cumsum(kept, axis=1)
    return [kept, np.array([np.searchsorted(e, x, side="right") for e, x in zip(ends, u)])]


def by_likelihood(q, u, words=True):
    order = np.argsort(-q, axis=-1, kind="stable")
    ranks = drawn(np.take_along_axis(q, order, axis=-1), u)
    return order[np.arange(len(q)), ranks] if words else ranks


def before_u(q, u):
    return [np.searchsorted(np.cumsum(row), x, side="left") for row, x in zip(q, u)]


def only(kept):
    return lambda z, p, u: nucleus_and(z, p, u, kept=kept)


def drawing(draw):
    return lambda z, p, u: nucleus_and(z, p, u, draw=draw)


def nucleus_in_place(z, p, u):
    z -= z.max(axis=1, keepdims=True)
    return nucleus_and(z, p, u)


# --- 6.4 ------------------------------------------------------------------------------------------


def beam_by_lists(logp_of, W, eoc, most):
    beams = [((), 0.0)]
    for _ in range(most):
        ways = []
        for text, score in beams:
            if text and text[-1] == eoc:
                ways.append((score, (*text, eoc)))
                continue
            logp = logp_of(np.array([text], int))[0]
            ways += [(score + x, (*text, word)) for word, x in enumerate(logp)]
        beams = [(text, score) for score, text in sorted(ways, reverse=True)[:W]]
    return np.array([text for text, _ in beams]), np.array([score for _, score in beams])


def turned_round(*case):
    texts, scores = beams(*case)
    return texts[::-1], scores[::-1]


def by_the_length(*case):
    texts, scores = beams(*case)
    ended = texts == case[2]
    length = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, texts.shape[1])
    return texts, scores / length


# --- 6.5 ------------------------------------------------------------------------------------------


def likelihood_by_loops(first, logits, tokens, lengths, of=log_softmax):
    out = np.zeros(len(tokens))
    for c, n in enumerate(lengths):
        z = first
        for i in range(n):
            out[c] += of(z)[tokens[c, i]]
            z = logits[c, i]
    return out


RIGHT = [
    ("6.4", beams),
    ("6.4", beam_by_lists),
    ("6.1", sees),
    ("6.1", sees_by_the_library),
    ("6.2", probabilities_of),
    ("6.2", top_k),
    ("6.3", nucleus_and),
    ("6.3", nucleus_one_by_one),
    ("6.3", nucleus_by_search),
    ("6.5", sum_of),
    ("6.5", likelihood_by_loops),
]

WRONG = [
    ("6.4", lambda *a: beams(*a, done="ignored"), "a finished text goes on"),
    ("6.4", lambda *a: beams(*a, done="pays"), "a finished text pays"),
    ("6.4", lambda *a: beams(*a, done="lost"), "a finished text is lost"),
    ("6.4", lambda *a: beams(*a, add=False), "the scores so far are missing"),
    ("6.4", lambda *a: beams(*a, own=True), "each beam keeps its own best"),
    ("6.4", lambda *a: beams(*a, follow=False), "behind the wrong beginnings"),
    ("6.4", lambda *a: beams(*a, sign=-1), "the WORST"),
    ("6.4", turned_round, "in rising order"),
    ("6.4", by_the_length, "not means"),
    ("6.4", lambda *a: beams(*a)[0], "a pair (texts [W, most], scores [W]) is wanted"),
    ("6.4", lambda *a: (beams(*a)[0], beams(*a)[1] + 1), "the texts are right, the score of"),
    ("6.4", lambda *a: (beams(*a)[0] + 1, beams(*a)[1]), "wrong text in beam 0"),
    ("6.4", lambda p, W, e, n: beams(p, 1, e, n), "wrong shape of number 1"),
    ("6.1", lambda p, n: p[:, :, None] > np.arange(n), "a token sees itself, too"),
    ("6.1", lambda p, n: p[:, :, None] + 1 >= np.arange(n), "sees the one after it"),
    ("6.1", lambda p, n: p[:, :, None] <= np.arange(n), "shows the future"),
    ("6.1", lambda p, n: p[:, :, None] < np.arange(n), "True means visible"),
    ("6.1", lambda p, n: p[:, None] >= np.arange(n)[:, None], "the axes are exchanged"),
    ("6.1", lambda p, n: sees(np.arange(p.shape[1]) + 0 * p, n), "not its place among the new"),
    ("6.1", lambda p, n: sees(p[:1] + 0 * p, n), "this uses those of row 0"),
    ("6.1", lambda p, n: sees(p, n) * 1.0, "wrong dtype: bool is wanted"),
    ("6.2", lambda z, k, t: softmax(z / t), "nothing is cut"),
    ("6.2", lambda z, k, t: top_k(z, k, t, again=False), "not shared out anew"),
    ("6.2", lambda z, k, t: top_k(z, k, 1), "the temperature is missing"),
    ("6.2", lambda z, k, t: top_k(z, k, t, by=np.multiply), "multiplied by t"),
    ("6.2", lambda z, k, t: top_k(z, k, t, fill=0), "not a logit of 0"),
    ("6.2", lambda z, k, t: top_k(z, k, t, shift=1), "one word too many"),
    ("6.2", lambda z, k, t: top_k(z, k, t, shift=-1), "one word too few"),
    ("6.2", lambda z, k, t: -np.sort(-top_k(z, k, t))[:, :k], "wrong shape: [2, 7] is wanted"),
    ("6.3", only(lambda z, p: nucleus_by_a_loop(z, p, before=False)), "one word too few"),
    ("6.3", only(lambda z, p: nucleus_by_a_loop(z, p, share=False)), "not shared out anew"),
    ("6.3", only(lambda z, p: softmax(z)), "nothing is cut"),
    ("6.3", only(lambda z, p: nucleus_of(z, p, order=np.argsort(z))), "sorted upwards"),
    (
        "6.3",
        only(lambda z, p: nucleus_of(z, p, order=np.arange(8) + np.zeros((3, 1), int))),
        "not sorted",
    ),
    ("6.3", only(lambda z, p: -np.sort(-nucleus_of(z, p))), "in the order of likelihood"),
    ("6.3", only(lambda z, p: softmax(z) * (softmax(z) >= p)), "p bounds the SUM"),
    ("6.5", lambda *a: sum_of(*a, padded=True), "the padding is counted"),
    ("6.5", lambda *a: sum_of(*a, shift=0), "not shifted"),
    ("6.5", lambda *a: likelihood_by_loops(*a, of=lambda z: z), "sums of logits"),
    ("6.5", lambda *a: likelihood_by_loops(*a, of=softmax), "sums of probabilities"),
    ("6.5", lambda *a: np.exp(sum_of(*a)), "the logarithm is missing"),
    ("6.5", lambda *a: sum_of(*a) / a[3], "a mean over the length"),
    ("6.5", lambda *a: -sum_of(*a), "minus"),
    ("6.5", lambda *a: sum_of(*a).sum(), "one number for each candidate"),
    ("6.1", lambda p, n: sees(p.max(axis=0) + 0 * p, n), "this uses the batch's largest"),
    (
        "6.2",
        lambda z, k, t: softmax(np.where(z >= np.sort(z)[:, -k].min(), z, -np.inf) / t),
        "for all rows",
    ),
    (
        "6.2",
        lambda z, k, t: softmax(np.where(z >= np.sort(z)[0, -k], z, -np.inf) / t),
        "for all rows",
    ),
    ("6.2", top_k_that_overflows, "subtract the row's maximum before exp"),
    ("6.3", lambda z, p, u: nucleus_of(z, p), "the pair (probabilities [B, V], words int [B])"),
    ("6.3", drawing(lambda q, u: q.argmax(axis=-1)), "the likeliest word each time"),
    ("6.3", lambda z, p, u: (nucleus_of(z, p), drawn(softmax(z), u)), "drawn from all words"),
    ("6.3", drawing(before_u), "at u = 0 a word of probability 0"),
    ("6.3", drawing(by_likelihood), "yours lie from the likeliest"),
    ("6.3", drawing(lambda q, u: by_likelihood(q, u, words=False)), "ranks, not words"),
    ("6.3", drawing(lambda q, u: drawn(q, u) + 1), "one too far"),
    ("6.3", drawing(lambda q, u: drawn(q, u) - 1), "LAST word whose end"),
    ("6.3", drawing(lambda q, u: drawn(q, u[0])), "a number u of its own"),
    ("6.3", drawing(lambda q, u: (q.cumsum(axis=0) <= u[:, None]).sum(-1)), "not down the batch"),
    ("6.3", drawing(lambda q, u: q[range(len(q)), drawn(q, u)]), "not the words"),
    ("6.3", drawing(lambda q, u: drawn(q, u) / 1), "right but for that: .astype(int)"),
    ("6.3", nucleus_in_place, "changes its argument number 1 in place"),
    ("6.3", only(nucleus_that_overflows), "subtract the row's maximum before exp"),
    ("6.3", only(nucleus_of_one_size), "a nucleus of its own size"),
    (
        "6.3",
        only(lambda z, p: nucleus_of(z, p, lambda before, after, p: before <= p)),
        "reached exactly",
    ),
    ("6.3", drawing(lambda q, u: 7 - drawn(q[:, ::-1], u)), "begins with word 0"),
    ("6.5", lambda f, x, t, n: sum_of(f, x, t, 0 * n + n.min()), "a length of its own"),
    ("6.5", lambda f, x, t, n: sum_of(f, x, t, n - 1), "the last token of each is left out"),
    ("6.5", lambda *a: likelihood_by_loops(*a, of=lambda z: np.log(softmax(z))), "takes no log of"),
]
