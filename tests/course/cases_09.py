"""Right and wrong answers to the exercises of module 09, for test_checks.py."""

import numpy as np

from miniflamingo.functional import log_softmax, softmax
from miniflamingo.prompt import BOS, EOC, IMAGE
from miniflamingo.worlds.grammar import document, phrase

# --- 9.1: the prompt ------------------------------------------------------------------------------


def prompt(names, this):
    """By columns, as in the notebook."""
    B, k = names.shape[0], names.shape[1] - 1
    chunks = np.empty((B, k, 4), int)
    chunks[:] = IMAGE, this, 0, EOC
    chunks[..., 2] = names[:, :-1]
    start, end = np.full((B, 1), BOS), np.tile([IMAGE, this], (B, 1))
    return np.concatenate([start, chunks.reshape(B, 4 * k), end], axis=1)


def prompt_by_words(names, this):
    """By the library's document, cut before the query's name."""
    parts = np.stack(np.broadcast_arrays(IMAGE, this, names, EOC), axis=-1)
    return document(parts)[:, :-2]


def without(names, this, drop):
    """A prompt without some tokens."""
    rows = [[t for t in row if t != drop] for row in prompt(names, this).tolist()]
    return np.array(rows, int)


# --- 9.2: ranking ---------------------------------------------------------------------------------


def rank(logits, tokens, start, lengths, offset=1, logp=log_softmax, sign=1, pad=False):
    """By gathering, as in the notebook."""
    L, first = tokens.shape[1], start - offset
    scores = np.take_along_axis(
        logp(logits)[:, first : L - offset], tokens[:, start:, None], axis=2
    )
    counted = np.arange(start, L) < lengths[:, None]
    return sign * (scores[..., 0] * (counted | pad)).sum(axis=1)


def rank_by_loops(logits, tokens, start, lengths):
    return [
        sum(np.log(softmax(logits[c, l - 1]))[tokens[c, l]] for l in range(start, n))
        for c, n in enumerate(lengths)
    ]


# --- 9.4: RICES -----------------------------------------------------------------------------------


def rices(features, query, k, unit=True, itself=False):
    """As in the notebook."""
    x = features / np.linalg.norm(features, axis=1, keepdims=True) if unit else features
    likeness = x[query] @ x.T
    if not itself:
        likeness[range(len(query)), query] = -2
    return np.argsort(likeness, axis=1)[:, -k:]


def rices_by_loops(features, query, k):
    def cosine(a, b):
        return np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b))

    chosen = []
    for q in query:
        others = [i for i in range(len(features)) if i != q]
        others.sort(key=lambda i: cosine(features[q], features[i]))
        chosen.append(others[-k:])
    return chosen


def nearest(features, query, k):
    distance = np.linalg.norm(features[query][:, None] - features, axis=-1)
    return np.argsort(-distance, axis=1)[:, -k:]


# --- 9.3 and 9.5 ----------------------------------------------------------------------------------


def error(correct):
    p = correct.mean(axis=1)
    return np.sqrt(p * (1 - p) / correct.shape[1])


RIGHT = [
    ("9.1", prompt),
    ("9.1", prompt_by_words),
    ("9.2", rank),
    ("9.2", rank_by_loops),
    ("9.4", rices),
    ("9.4", rices_by_loops),
    ("9.3", error),
    ("9.3", lambda correct: correct.std(axis=1) / np.sqrt(correct.shape[1])),
    ("9.5", lambda logp: logp.mean(axis=0).argmax(axis=-1)),
    ("9.5", lambda logp: [int(np.argmax(row)) for row in logp.sum(axis=0)]),
]

WRONG = [
    ("9.1", lambda n, t: prompt_by_words(np.c_[n, n[:, -1:]], t), "among the shots"),
    ("9.1", lambda n, t: np.c_[prompt(n, t), n[:, -1]], "the answer is given away"),
    ("9.1", lambda n, t: np.c_[prompt(n, t), n[:, -1], [EOC] * len(n)], "is given away"),
    ("9.1", lambda n, t: without(n, t, EOC), "<EOC> is missing"),
    ("9.1", lambda n, t: without(n, t, BOS), "<BOS> is missing"),
    ("9.1", lambda n, t: prompt(n, t)[:, :-1], "must end with `this`"),
    ("9.1", lambda n, t: prompt(n, t)[:, :-2], "the query is missing"),
    ("9.1", lambda n, t: np.c_[prompt(n, t)[:, :-2], [t] * len(n)], "query's <image> is missing"),
    ("9.1", lambda n, t: np.c_[prompt(n, t), [EOC] * len(n)], "<EOC> behind the query"),
    ("9.1", lambda n, t: prompt(n[:, :-1], t), "the last shot is missing"),
    ("9.1", lambda n, t: phrase("this", n), "wrong shape"),
    ("9.2", lambda *a: rank(*a, offset=0), "wrong offset: the logits at l say"),
    ("9.2", lambda *a: rank(*a, offset=2), "one place too far back"),
    ("9.2", lambda *a: rank(*a, pad=True), "the padding behind"),
    ("9.2", lambda *a: rank(*a, logp=lambda x: x), "these are logits"),
    ("9.2", lambda *a: rank(*a, logp=softmax), "the log is missing"),
    ("9.2", lambda *a: np.exp(rank(*a)), "its log is wanted"),
    ("9.2", lambda *a: rank(*a) / (a[3] - a[2]), "a mean over the tokens"),
    ("9.2", lambda *a: rank(*a, sign=-1), "minus sign"),
    ("9.2", lambda g, t, s, n: rank(g, t, 1, n), "the prompt's tokens count"),
    ("9.2", lambda g, t, s, n: rank(g, t, s + 1, n), "first token is left out"),
    ("9.2", lambda *a: rank(*a, logp=lambda x: log_softmax(x.swapaxes(1, 2)).swapaxes(1, 2)),
     "softmax runs over the words"),
    ("9.4", lambda *a: rices(*a, itself=True), "the query picks itself: its own"),
    ("9.4", lambda *a: rices(*a)[:, ::-1], "the most similar stands first: it must"),
    ("9.4", lambda *a: rices(*a, itself=True)[:, ::-1], "picks itself, and the most"),
    ("9.4", lambda *a: rices(*a, unit=False), "inner products: divide"),
    ("9.4", nearest, "Euclidean distance"),
    ("9.4", lambda f, q, k: rices(f, q, len(f), itself=True), "pictures are wanted, not all"),
    ("9.4", lambda f, q, k: rices(f, q, len(f) - 1)[:, :k][:, ::-1], "the LEAST similar"),
    ("9.3", lambda c: error(c) ** 2, "the square root is missing"),
    ("9.3", lambda c: c.std(axis=1), "the spread of ONE answer"),
    ("9.3", lambda c: c.std(axis=1) / c.shape[1], "outside the root"),
    ("9.3", lambda c: c.mean(axis=1), "this is the accuracy"),
    ("9.3", lambda c: c.std(axis=0) / np.sqrt(len(c)), "wrong axis"),
    ("9.3", lambda c: c.std() / np.sqrt(c.size), "one number for all curves"),
    ("9.3", lambda c: 1.96 * error(c), "leave out 1.96"),
    ("9.5", lambda x: x[0].argmax(axis=-1), "the first order alone"),
    ("9.5", lambda x: np.exp(x).mean(axis=0).argmax(axis=-1), "a mean of probabilities"),
    ("9.5", lambda x: [np.bincount(v).argmax() for v in x.argmax(-1).T], "a vote"),
    ("9.5", lambda x: x.max(axis=0).argmax(axis=-1), "the surest order alone"),
    ("9.5", lambda x: x.mean(axis=0), "these are the mean scores"),
    ("9.5", lambda x: x.argmax(axis=-1), "not for each order"),
    ("9.5", lambda x: x.mean(axis=1).argmax(axis=-1), "axis 0, not over the rows"),
]  # fmt: skip
