"""Checks of module 06: sight with a cache, top-k, the nucleus, beam search, log-likelihood."""

import numpy as np

from miniflamingo.functional import log_softmax, softmax

from .core import (
    UNDERFLOW,
    apart,
    call,
    close,
    exercise,
    expect,
    expect_stable,
    first,
    named,
    several,
)

# --- 6.1: sight -----------------------------------------------------------------------------------


@exercise("6.1")
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
    largest = np.broadcast_to(place.max(axis=0, keepdims=True) >= keys, (B, L, n))
    yield "each row has positions of its own: this uses the batch's largest", largest
    yield "everything is visible", np.ones((B, L, n), bool)
    yield "only itself: the past is visible, too", place == keys


# --- 6.2: temperature and top-k -------------------------------------------------------------------


@exercise("6.2")
def top_k(answer):
    """answer(logits [B, V], k, t) -> [B, V]."""
    for seed, (k, t) in enumerate(((3, 0.5), (2, 2.0), (7, 1.0), (1, 0.7))):
        logits = np.random.default_rng(seed).normal(0, 2, (2, 7))
        right = probabilities_of(logits, k, t)
        expect(call(answer, logits, k, t), right, _top_k_mistakes(logits, k, t))
    large = 2000 + 500 * logits
    expect_stable(call(answer, large, 3, t), probabilities_of(large, 3, t))


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
    yield from _one_threshold(logits, ranked[:, -k], t)
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


def _one_threshold(logits, least, t):
    for cut in (least.min(), least.max(), least[0]):
        kept = np.where(logits >= cut, np.exp(logits / t), 0)
        with np.errstate(all="ignore"):
            yield (
                "each row has a k-th largest logit of its own: yours is one for all rows",
                kept / kept.sum(axis=-1, keepdims=True),
            )


# --- 6.3: the nucleus -----------------------------------------------------------------------------


PAIR_OF_6_3 = "the pair (probabilities [B, V], words int [B])"


@exercise("6.3")
def nucleus(answer):
    """answer(logits [B, V], p, u [B]) -> ([B, V], int[B])."""
    for seed, p in enumerate((0.3, 0.9, 0.7, 1.0)):
        rng = np.random.default_rng(seed + 10)
        logits = rng.normal(0, 1.5, (3, 8))
        logits[0, 0] = -4  # the first word is not in the nucleus, and u = 0 must not draw it
        u = np.array([0.0, *rng.random(2)])
        right = nucleus_of(logits, p)
        out = call(answer, logits, p, u)
        kept, words = several(out, (right, u), PAIR_OF_6_3, shapes=False)
        expect(kept, right, _nucleus_mistakes(logits, p), named("the probabilities"))
        expect(words, drawn(right, u), _draw_mistakes(logits, right, u), named("the words"))
    large = 2000 + 500 * logits
    right = nucleus_of(large, 0.9)
    kept, words = several(call(answer, large, 0.9, u), (right, u), PAIR_OF_6_3)
    expect_stable(kept, right)
    expect(words, drawn(right, u), explain=named("the words"))
    # two of four equal words, whichever
    kept, _ = several(
        call(answer, np.zeros((2, 4)), 0.5, u[:2]), (right[:2, :4], u[:2]), PAIR_OF_6_3
    )
    mistakes = [
        (
            "one word too many where p is reached exactly: before < p, not <=",
            [[0, *[1 / 3] * 3]] * 2,
        )
    ]
    expect(np.sort(kept, axis=-1), [[0, 0, 0.5, 0.5]] * 2, mistakes)


def drawn(probabilities, u):
    """The first word of each row whose end, in a row of all probabilities, lies beyond u."""
    return (np.cumsum(probabilities, axis=-1) <= np.reshape(u, (-1, 1))).sum(axis=-1)


def _draw_mistakes(logits, right, u):
    ends, q = np.cumsum(right, axis=-1), softmax(logits)
    words = drawn(right, u)
    yield "the likeliest word each time: draw with u", q.argmax(axis=-1)
    yield "drawn from all words: draw from the nucleus", drawn(q, u)
    yield (
        "at u = 0 a word of probability 0 is drawn: count the ends that are <= u, not < u",
        (ends < u[:, None]).sum(axis=-1),
    )
    order = np.argsort(-right, axis=-1, kind="stable")
    ranks = drawn(np.take_along_axis(right, order, axis=-1), u)
    yield (
        "the words lie in the vocabulary's order here; yours lie from the likeliest downwards",
        np.take_along_axis(order, ranks[:, None], axis=-1)[:, 0],
    )
    yield "these are ranks, not words", ranks
    yield "one too far: the first word whose end is beyond u", np.minimum(words + 1, 7)
    yield "one too far: the first word whose end is beyond u", words + 1
    yield "this is the LAST word whose end is not beyond u; the next one is wanted", words - 1
    yield "each row has a number u of its own", drawn(right, u[:1])
    yield "each row has a number u of its own", drawn(right, u[-1:])
    yield (
        "the running sum is along a row, not down the batch: axis=-1",
        (np.cumsum(right, axis=0) <= u[:, None]).sum(axis=-1),
    )
    kept = np.where(right > 0, q, 0)
    yield "the kept probabilities must sum to 1 before u is looked up in them", drawn(kept, u)
    yield (
        "these are probabilities of words, not the words",
        np.take_along_axis(right, words[:, None], axis=-1)[:, 0],
    )
    backwards = drawn(right[:, ::-1], u)
    yield "the running sum begins with word 0, not with the last one", 7 - backwards


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
    yield from _one_size(q, (right > 0).sum(axis=1))
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


def _one_size(q, counts):
    ranked = -np.sort(-q, axis=-1)
    for count in sorted({*counts}):
        kept = np.where(q >= ranked[:, count - 1, None], q, 0)
        yield (
            "each row has a nucleus of its own size: yours keeps the same number of words in all",
            kept / kept.sum(axis=-1, keepdims=True),
        )


# --- 6.4: beam search -----------------------------------------------------------------------------

EOC = 0  # the word that ends a text, here
PAIR = "a pair (texts [W, most], scores [W])"


def invented_lm(seed, V=6):
    """A function texts int[B, n] -> log-probabilities of the next word, [B, V]: made up."""

    def logp_of(texts):
        keys = [[seed, len(text), *np.mod(text, 97).astype(int)] for text in np.asarray(texts)]
        return log_softmax(np.array([2 * np.random.default_rng(k).normal(size=V) for k in keys]))

    return logp_of


@exercise("6.4")
def beam(answer):
    """answer(logp_of, W, eoc, most) -> texts int[W, most], scores [W], best first."""
    for seed, W, most in ((2, 3, 4), (8, 2, 5), (86, 4, 3), (12, 3, 6)):
        case = invented_lm(seed), W, EOC, most
        right = beams(*case)
        texts, scores = several(call(answer, *case), right, PAIR)
        mistakes = [(words, _side_by_side(*beams(*case, **how))) for words, how in BEAM_MISTAKES]
        got = _side_by_side(texts, scores)
        mistakes.append(("best first: these are in rising order", _side_by_side(*right)[::-1]))
        mistakes.append(("scores are sums of log-probabilities, not means",
                         _side_by_side(right[0], right[1] / _length(right[0]))))  # fmt: skip
        expect(got, _side_by_side(*right), mistakes, _beam_in_words)


def beams(logp_of, W, eoc, most, done="stays", add=True, own=False, follow=True, sign=1):
    """Beam search, as in the notebook; what may vary are the typical mistakes."""
    texts, scores = np.zeros((1, 0), int), np.zeros(1)
    for _ in range(most):
        logp = logp_of(texts)
        ended = (texts[:, -1:] == eoc).any(axis=1)
        price = logp[ended, eoc] if done == "pays" else 0
        if done in ("stays", "pays"):
            logp[ended] = -np.inf
            logp[ended, eoc] = price
        if done == "lost":
            logp[ended] = -1e9
        total = scores[:, None] * add + logp
        if own and len(texts) == W:
            beam, word = np.arange(W), total.argmax(axis=1)
            order = np.argsort(-total[beam, word])
            beam, word = beam[order], word[order]
        else:
            beam, word = np.divmod(np.argsort(-sign * total.ravel())[:W], logp.shape[1])
        before = texts[beam] if follow or len(texts) < W else texts
        texts, scores = np.concatenate([before, word[:, None]], axis=1), total[beam, word]
    return texts, scores


BEAM_MISTAKES = [
    ("a finished text goes on: behind <EOC> only <EOC> may follow", {"done": "ignored"}),
    ("a finished text pays for each further <EOC>: its log-probability is 0", {"done": "pays"}),
    ("a finished text is lost: it stays in the beam, with its score", {"done": "lost"}),
    ("the scores so far are missing: add them", {"add": False}),
    ("each beam keeps its own best: the W best of ALL W * V are wanted", {"own": True}),
    ("the new words are put behind the wrong beginnings: texts[beam]", {"follow": False}),
    ("these are the WORST ways to go on", {"sign": -1}),
]


def _side_by_side(texts, scores):
    return np.concatenate([texts, np.reshape(scores, (-1, 1))], axis=1, dtype=float)


def _length(texts):
    """Words up to the first <EOC>, and it."""
    ended = texts == EOC
    return np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, texts.shape[1])


def step_of_beam(scores, logp, most=None):
    """The `most` (W by default) best ways to go on, best first: int[most, 2], (beam, word)."""
    total = (scores[:, None] + logp).ravel()
    best = np.argsort(-total, kind="stable")[: most or len(scores)]
    return np.stack(np.divmod(best, logp.shape[1]), axis=1)


def _beam_in_words(got, right):
    if not close(got[:, :-1], right[:, :-1]).all():
        beam = first((got[:, :-1] != right[:, :-1]).any(axis=1))[0]
        texts = [x[beam, :-1].astype(int).tolist() for x in (right, got)]
        return f"wrong text in beam {beam}: {texts[0]} is right, got {texts[1]}"
    beam = first(~close(got[:, -1], right[:, -1]))[0]
    wanted, found = apart(right[beam, -1], got[beam, -1])
    return f"the texts are right, the score of beam {beam} is not: {wanted} is right, got {found}"


# --- 6.5: log-likelihood --------------------------------------------------------------------------


@exercise("6.5")
def likelihood(answer):
    """answer(first [V], logits [A, L, V], tokens int[A, L], lengths int[A]) -> [A]."""
    for seed, lengths in enumerate(([4, 2, 3], [4, 4], [1, 2, 2, 1])):
        rng, lengths = np.random.default_rng(seed), np.array(lengths)
        A, L, V = len(lengths), lengths.max(), 6
        case = rng.normal(size=V), rng.normal(size=(A, L, V)), rng.integers(0, V, (A, L)), lengths
        expect(call(answer, *case), sum_of(*case), _likelihood_mistakes(*case))
    case = 800 * case[0], 800 * case[1], *case[2:]
    expect_stable(call(answer, *case), sum_of(*case), infinite=UNDERFLOW)


def sum_of(first, logits, tokens, lengths, of=log_softmax, shift=1, reduce="sum", padded=False):
    """Equation (1); what may vary are the typical mistakes."""
    (A, L, V), before = logits.shape, logits
    if shift:
        before = np.concatenate([np.broadcast_to(first, (A, 1, V)), logits[:, :-1]], axis=1)
    own = np.take_along_axis(of(before), tokens[..., None], axis=-1)[..., 0]
    counted = np.ones((A, L), bool) if padded else np.arange(L) < lengths[:, None]
    if reduce == "product":
        return np.where(counted, own, 1).prod(axis=1)
    return (own * counted).sum(axis=1) / (lengths if reduce == "mean" else 1)


def _likelihood_mistakes(first, logits, tokens, lengths):
    case = first, logits, tokens, lengths
    yield "the padding is counted: only the first lengths[a] tokens", sum_of(*case, padded=True)
    shortest = first, logits, tokens, 0 * lengths + lengths.min()
    yield "each candidate has a length of its own, not the shortest's", sum_of(*shortest)
    yield "the last token of each is left out", sum_of(first, logits, tokens, lengths - 1)
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
