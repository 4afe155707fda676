"""Checks of module 05: sight with a cache, top-k, the nucleus, a beam's step, log-likelihood."""

import numpy as np

from miniflamingo.functional import log_softmax, softmax

from .core import call, exercise, expect

# --- 5.1: sight -----------------------------------------------------------------------------------


@exercise("5.1")
def sight(answer):
    """answer(positions int[B, L], num_keys) -> bool[B, L, Lk]."""
    for positions, n in (([[2, 3], [5, 6]], 8), ([[0, 1, 2, 3]], 4), ([[4], [1], [0]], 6)):
        positions = np.array(positions)
        right = positions[:, :, None] >= np.arange(n)
        expect(call(answer, positions, n), right, _sight_mistakes(positions, n))


def _sight_mistakes(positions, n):
    place, keys = positions[:, :, None], np.arange(n)
    B, L = positions.shape
    yield "off by one: a token sees itself, too", place > keys
    yield (
        "off by one: the token sees the one after it, which is what it is to predict",
        (place + 1 >= keys),
    )
    yield "upside down: this shows the future and hides the past", place <= keys
    yield "upside down: True means visible", place < keys
    yield "the axes are exchanged: [B, L, Lk], tokens before keys", (place >= keys).swapaxes(1, 2)
    own = np.broadcast_to(np.arange(L)[None, :, None] >= keys, (B, L, n))
    yield "the token's position counts, not its place among the new ones", own
    first = np.broadcast_to(place[:1] >= keys, (B, L, n))
    yield "each row has positions of its own: this uses those of row 0", first
    yield "everything is visible", np.ones((B, L, n), bool)
    yield "only itself: the past is visible, too", place == keys


# --- 5.2: temperature and top-k -------------------------------------------------------------------


@exercise("5.2")
def top_k(answer):
    """answer(logits [B, V], k, t) -> [B, V]."""
    for seed, (k, t) in enumerate(((3, 0.5), (2, 2.0), (7, 1.0), (1, 0.7))):
        logits = np.random.default_rng(seed).normal(0, 2, (2, 7))
        right = probabilities_of(logits, k, t)
        expect(call(answer, logits, k, t), right, _top_k_mistakes(logits, k, t))


def probabilities_of(logits, k, t):
    """Equation (3) with the k likeliest words."""
    least = np.sort(logits, axis=-1)[:, -k, None]
    return softmax(np.where(logits >= least, logits, -np.inf) / t)


def _top_k_mistakes(logits, k, t):
    ranked, V = np.sort(logits, axis=-1), logits.shape[1]
    kept, p = logits >= ranked[:, -k, None], softmax(logits / t)
    yield "not shared out anew: the k probabilities must sum to 1", p * kept
    yield "nothing is cut: only the k likeliest may be chosen", p
    yield "the temperature is missing", probabilities_of(logits, k, 1)
    yield "multiplied by t: divide, a small t makes it sharper", probabilities_of(logits, k, 1 / t)
    yield (
        "a cut word gets -inf, not a logit of 0: that is a word like others",
        softmax(np.where(kept, logits, 0) / t),
    )
    yield (
        "these are the k LEAST likely words",
        softmax(np.where(logits <= ranked[:, k - 1, None], logits, -np.inf) / t),
    )
    if k < V:
        yield "one word too many: the k-th largest is [:, -k]", probabilities_of(logits, k + 1, t)
    if k > 1:
        yield "one word too few: the k-th largest is kept, too", probabilities_of(logits, k - 1, t)
    flat = np.sort(logits.ravel())[-k]
    with np.errstate(all="ignore"):
        whole = np.where(logits >= flat, np.exp(logits / t), 0)
        yield (
            "k words of EACH row: this cuts across the batch",
            whole / whole.sum(-1, keepdims=True),
        )
    divided = softmax(logits) * kept / t
    yield "the temperature divides the logits, not the probabilities", divided
    share = softmax(logits) * kept
    yield "the temperature is missing", share / share.sum(axis=-1, keepdims=True)
    yield "these are logits: probabilities are wanted", np.where(kept, logits, -np.inf) / t


# --- 5.3: the nucleus -----------------------------------------------------------------------------


@exercise("5.3")
def nucleus(answer):
    """answer(logits [B, V], p) -> [B, V]."""
    for seed, p in enumerate((0.3, 0.9, 0.7, 1.0)):
        logits = np.random.default_rng(seed + 10).normal(0, 1.5, (3, 8))
        expect(call(answer, logits, p), nucleus_of(logits, p), _nucleus_mistakes(logits, p))


def nucleus_of(logits, p, keep=lambda before, after, p: before < p, order=None, share=True):
    """The distribution of a nucleus; what may vary are the typical mistakes."""
    q = softmax(logits)
    order = np.argsort(-q, axis=-1) if order is None else order
    ranked = np.take_along_axis(q, order, axis=-1)
    after = np.cumsum(ranked, axis=-1)
    kept = np.zeros_like(q)
    np.put_along_axis(kept, order, ranked * keep(after - ranked, after, p), axis=-1)
    with np.errstate(invalid="ignore"):
        return kept / kept.sum(axis=-1, keepdims=True) if share else kept


def _nucleus_mistakes(logits, p):
    q, V = softmax(logits), logits.shape[1]
    message = "one word too few: the word with which p is reached belongs to the nucleus"
    few = nucleus_of(logits, p, lambda before, after, p: after < p)
    yield message, few
    yield message, np.nan_to_num(few)  # a row of which nothing is left
    yield (
        "not shared out anew: the kept probabilities must sum to 1",
        nucleus_of(logits, p, share=False),
    )
    yield "nothing is cut", q
    rising = np.argsort(q, axis=-1)
    yield "sorted upwards: begin with the likeliest word", nucleus_of(logits, p, order=rising)
    plain = np.broadcast_to(np.arange(V), q.shape)
    yield "not sorted: add up from the likeliest word downwards", nucleus_of(logits, p, order=plain)
    right = nucleus_of(logits, p)
    yield (
        "in the order of likelihood: put them back into that of the vocabulary",
        (-np.sort(-right, axis=-1)),
    )
    yield (
        "order is where each rank comes FROM: put_along_axis puts it back",
        np.take_along_axis(-np.sort(-right, axis=-1), np.argsort(-q, axis=-1), axis=-1),
    )
    large = q * (q >= p)
    yield "p bounds the SUM of the kept probabilities, not each of them", large
    with np.errstate(invalid="ignore"):
        yield (
            "p bounds the SUM of the kept probabilities, not each of them",
            large / large.sum(axis=-1, keepdims=True),
        )
    small = q * (q >= 1 - p)
    yield (
        "p bounds the SUM: a threshold of 1 - p for each word is another method",
        small / np.maximum(small.sum(axis=-1, keepdims=True), 1e-30),
    )


# --- 5.4: a step of a beam ------------------------------------------------------------------------


@exercise("5.4")
def beam_step(answer):
    """answer(scores [W], logp [W, V]) -> int[W, 2]."""
    for seed, (W, V) in enumerate(((3, 6), (2, 5), (4, 4))):
        rng = np.random.default_rng(seed + 3)
        logp, scores = log_softmax(rng.normal(0, 2, (W, V))), -np.arange(W) * 0.9 - 0.3
        right = step_of_beam(scores, logp)
        expect(call(answer, scores, logp), right, _beam_mistakes(scores, logp))
    first = np.array([0.0, -np.inf, -np.inf])  # all beams are equal at the start: only one counts
    logp = np.tile(logp[:1], (3, 1))
    mistakes = [
        ("beams of -inf must not come into it", np.stack([[0, 1, 2], [logp[0].argmax()] * 3], 1))
    ]
    expect(call(answer, first, logp), step_of_beam(first, logp), mistakes)


def step_of_beam(scores, logp, most=None):
    """The `most` (W by default) best ways to go on, best first: int[most, 2], (beam, word)."""
    total = (scores[:, None] + logp).ravel()
    best = np.argsort(-total, kind="stable")[: most or len(scores)]
    return np.stack(np.divmod(best, logp.shape[1]), axis=1)


def _beam_mistakes(scores, logp):
    (W, V), right = logp.shape, step_of_beam(scores, logp)
    total = scores[:, None] + logp
    flat = np.argsort(-total.ravel())[:W]
    yield "the scores so far are missing: add them", step_of_beam(0 * scores, logp)
    yield (
        "add log-probabilities: a product of logarithms is none",
        step_of_beam(0 * scores, scores[:, None] * logp),
    )
    own = np.stack([np.arange(W), total.argmax(axis=1)], axis=1)
    yield "each beam keeps its own best: the W best of ALL W * V are wanted", own
    best_first = own[np.argsort(-total.max(axis=1))]
    yield "each beam keeps its own best: the W best of ALL W * V are wanted", best_first
    worst = np.stack(np.divmod(np.argsort(total.ravel())[:W], V), axis=1)
    yield "these are the WORST ways to go on", worst
    yield "best first: these are in rising order", right[::-1]
    yield "(beam, word), in this order", right[:, ::-1]
    yield "places in the flat array: divide by V, with the rest as the word", flat
    yield "divide by V, the number of words, not by W", np.stack(np.divmod(flat, W), axis=1)
    yield "[W, 2] is wanted: one row for each new beam", right.T
    column = np.stack([total.argmax(axis=0), np.arange(V)], axis=1)[:W]
    yield "this is the best beam for each word", column


# --- 5.5: log-likelihood --------------------------------------------------------------------------


@exercise("5.5")
def likelihood(answer):
    """answer(first [V], logits [C, M, V], tokens int[C, M], lengths int[C]) -> [C]."""
    for seed, lengths in enumerate(([3, 1, 2], [4, 4], [1, 2, 2, 1])):
        rng, lengths = np.random.default_rng(seed), np.array(lengths)
        C, M, V = len(lengths), lengths.max(), 6
        case = rng.normal(size=V), rng.normal(size=(C, M, V)), rng.integers(0, V, (C, M)), lengths
        expect(call(answer, *case), sum_of(*case), _likelihood_mistakes(*case))


def sum_of(first, logits, tokens, lengths, of=log_softmax, shift=1, reduce="sum", padded=False):
    """Equation (1); what may vary are the typical mistakes."""
    (C, M, V), before = logits.shape, logits
    if shift:
        before = np.concatenate([np.broadcast_to(first, (C, 1, V)), logits[:, :-1]], axis=1)
    own = np.take_along_axis(of(before), tokens[..., None], axis=-1)[..., 0]
    counted = np.ones((C, M), bool) if padded else np.arange(M) < lengths[:, None]
    if reduce == "product":
        return np.where(counted, own, 1).prod(axis=1)
    return (own * counted).sum(axis=1) / (lengths if reduce == "mean" else 1)


def _likelihood_mistakes(first, logits, tokens, lengths):
    case = first, logits, tokens, lengths
    yield "the padding is counted: only the first lengths[c] tokens", sum_of(*case, padded=True)
    yield "not shifted: the logits AT a token speak of the next one", sum_of(*case, shift=0)
    yield "these are sums of logits: take log_softmax first", sum_of(*case, of=lambda z: z)
    yield "these are sums of probabilities: their logarithms are wanted", sum_of(*case, of=softmax)
    yield (
        "the logarithm is missing: this is the probability",
        sum_of(*case, of=softmax, reduce="product"),
    )
    yield "a mean over the length; equation (1) is a sum", sum_of(*case, reduce="mean")
    yield "minus: the LOSS is negative, the log-likelihood is not turned round", -sum_of(*case)
    yield (
        "softmax over the wrong axis: over the V words",
        sum_of(*case, of=lambda z: log_softmax(z.swapaxes(1, 2)).swapaxes(1, 2)),
    )
    start = log_softmax(first)[tokens[:, 0]]
    yield "the first token is left out: `first` speaks of it", sum_of(*case) - start
    yield "only the first token is counted", start
    best = log_softmax(logits).max(axis=-1)
    yield "this scores the likeliest words; those of the candidate are wanted", best.sum(axis=1)
    yield "one number for each candidate, not for all", sum_of(*case).sum()
