"""Checks of module 09: a prompt, ranking, RICES, the standard error, ensembling."""

import numpy as np

from miniflamingo.functional import log_softmax
from miniflamingo.prompt import BOS, EOC, IMAGE

from .core import call, exercise, expect

# --- 9.1: the prompt ------------------------------------------------------------------------------

NAMES = np.array([[20, 21, 20, 22], [30, 31, 32, 33]])  # the last column is the query's own


@exercise("9.1")
def prompt(answer):
    """answer(names int[B, k + 1], this) -> int[B, 1 + 4 k + 2]."""
    for names, this in ((NAMES, 7), (NAMES[:, 1:], 9), (NAMES[:, 3:], 7)):
        mistakes = _prompt_mistakes(names, this)
        expect(call(answer, names, this), prompt_of(names, this), mistakes)


def prompt_of(names, this):
    """<BOS>, k chunks <image> this NAME <EOC>, and <image> this."""
    return _prompt(names[:, :-1], this, [IMAGE, this])


def _prompt(names, this, end, bos=True, chunk=(IMAGE, None, "name", EOC)):
    rows = []
    for row in names:
        tokens = [BOS] * bos
        for name in row:
            tokens += [{None: this, "name": name}.get(t, t) for t in chunk]
        rows.append(tokens + list(end))
    return np.array(rows, int)


def _prompt_mistakes(names, this):
    shots, end = names[:, :-1], [IMAGE, this]
    leak = np.concatenate([prompt_of(names, this), names[:, -1:]], axis=1)
    closed = np.pad(leak, ((0, 0), (0, 1)), constant_values=EOC)
    yield "the query's own name is in the prompt: the answer is given away", leak
    yield "the query's own name is in the prompt: the answer is given away", closed
    yield (
        "the query's name is among the shots: names[:, -1] is the answer, leave it out",
        _prompt(names, this, end),
    )
    yield (
        "the last shot is missing: k shots are all columns but the last",
        _prompt(names[:, :-2], this, end),
    )
    yield "the query is missing: end with <image> this", _prompt(shots, this, [])
    yield (
        "the query's <image> is missing: the model would look at the last shot's picture",
        _prompt(shots, this, [this]),
    )
    yield "the prompt must end with `this`: the name comes next", _prompt(shots, this, [IMAGE])
    yield "<BOS> is missing at the start", _prompt(shots, this, end, bos=False)
    yield (
        "<EOC> is missing at the end of each shot",
        _prompt(shots, this, end, chunk=(IMAGE, None, "name")),
    )
    yield (
        "<EOC> behind the query: a closed chunk is not gone on with",
        _prompt(shots, this, [*end, EOC]),
    )
    yield (
        "text before its picture: a chunk is <image> this NAME <EOC>",
        _prompt(shots, this, end, chunk=(None, "name", IMAGE, EOC)),
    )


# --- 9.2: ranking ---------------------------------------------------------------------------------


def ranking_case(seed=0):
    """Logits [C, L, V] of prompt and candidates, tokens int[C, L], start, lengths int[C]."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, 9, (4, 8))
    start, lengths = 4 - seed, np.array([5, 6, 8, 6])
    tokens[:, :start] = tokens[0, :start]  # one prompt
    tokens[np.arange(8) >= lengths[:, None]] = 0
    return 2 * rng.normal(size=(4, 8, 9)), tokens, start, lengths


@exercise("9.2")
def ranking(answer):
    """answer(logits [C, L, V], tokens int[C, L], start, lengths int[C]) -> [C]."""
    for seed in (0, 1):
        case = ranking_case(seed)
        expect(call(answer, *case), scored(*case), _ranking_mistakes(*case))


def scored(logits, tokens, start, lengths, shift=1, read=log_softmax, pad=False, of=np.sum):
    """Equation (2): the sum of each candidate's log-probabilities; places for mistakes."""
    scores = []
    for row, ids, length in zip(read(logits), tokens, lengths):
        places = np.arange(start, len(ids) if pad else length)
        scores.append(of(row[np.clip(places - shift, 0, len(ids) - 1), ids[places]]))
    return np.array(scores)


def _ranking_mistakes(*case):
    logits, tokens, start, lengths = case
    yield (
        "wrong offset: the logits at l say what comes at l + 1, so token l is scored at l - 1",
        scored(*case, shift=0),
    )
    yield "wrong offset: one place too far back", scored(*case, shift=2)
    yield "wrong offset, the other way: token l is scored at l - 1", scored(*case, shift=-1)
    yield "the padding behind a shorter candidate counts, too", scored(*case, pad=True)
    yield (
        "these are logits: log_softmax makes log-probabilities of them",
        scored(*case, read=lambda x: x),
    )
    yield (
        "a sum of probabilities: the log is missing",
        scored(*case, read=lambda x: np.exp(log_softmax(x))),
    )
    yield (
        "a probability; its log is wanted, or long candidates underflow",
        np.exp(scored(*case)),
    )
    yield "a mean over the tokens: equation (2) is a sum", scored(*case, of=np.mean)
    yield "minus sign: the log-likelihood is wanted, not the loss", -scored(*case)
    yield (
        "softmax runs over the words, the last axis",
        scored(*case, read=lambda x: np.stack([log_softmax(row.T).T for row in x])),
    )
    yield "the prompt's tokens count, too: begin at start", scored(logits, tokens, 1, lengths)
    yield "the candidate's first token is left out", scored(logits, tokens, start + 1, lengths)


# --- 9.4: RICES -----------------------------------------------------------------------------------


@exercise("9.4")
def rices(answer):
    """answer(features [n, D], query int[B], k) -> int[B, k], most similar last, never itself."""
    for seed, k in ((0, 3), (1, 4)):
        rng = np.random.default_rng(seed)
        features = rng.normal(size=(12, 5)) * rng.uniform(0.2, 5, (12, 1))
        query = np.array([7, 0, 11])
        right = similar(features, query, k)
        expect(call(answer, features, query, k), right, _rices_mistakes(features, query, k))


def similar(features, query, k, normalise=True, itself=False, sign=1):
    """Equation (3): indices of the k most similar, the most similar last; places for mistakes."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / length if normalise else features
    likeness = sign * unit[query] @ unit.T
    if not itself:
        likeness[np.arange(len(query)), query] = -np.inf
    return np.argsort(likeness, axis=1)[:, -k:]


def _rices_mistakes(features, query, k):
    case = features, query, k
    right = similar(*case)
    distance = -((features[query][:, None] - features) ** 2).sum(axis=-1)
    leaked = similar(*case, itself=True)
    yield "the query picks itself: its own picture, label and all, is in the prompt", leaked
    yield (
        "the query picks itself, and the most similar stands first: it must come LAST",
        leaked[:, ::-1],
    )
    yield "the most similar stands first: it must come LAST, next to the query", right[:, ::-1]
    yield "these are the LEAST similar pictures", similar(*case, sign=-1)
    yield "these are the LEAST similar pictures", similar(*case, sign=-1)[:, ::-1]
    yield (
        "inner products: divide by both lengths, or long features win",
        similar(*case, normalise=False),
    )
    yield (
        "inner products, and the query itself is in: divide by the lengths",
        similar(*case, normalise=False, itself=True),
    )
    for drop in (False, True):
        if drop:
            distance[np.arange(len(query)), query] = -np.inf
        yield (
            "Euclidean distance: likeness is the cosine here",
            np.argsort(distance, axis=1)[:, -k:],
        )
    full = np.argsort(np.where(np.eye(len(features), dtype=bool)[query], -np.inf, 0), axis=1)
    yield "this does not look at the features", full[:, -k:]
    yield f"k = {k} pictures are wanted, not all", np.argsort(_cosine(features, query), axis=1)


def _cosine(features, query):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return unit[query] @ unit.T


# --- 9.3: the standard error ----------------------------------------------------------------------


@exercise("9.3")
def standard_error(answer):
    """answer(correct bool[C, n]) -> [C]."""
    for seed, shape in ((0, (3, 40)), (1, (2, 150))):
        rng = np.random.default_rng(seed)
        correct = rng.random(shape) < np.array([0.9, 0.5, 0.2])[: shape[0], None]
        expect(call(answer, correct), error_of(correct), _error_mistakes(correct))


def error_of(correct):
    """Equation (4)."""
    p = correct.mean(axis=-1)
    return np.sqrt(p * (1 - p) / correct.shape[-1])


def _error_mistakes(correct):
    p, n = correct.mean(axis=-1), correct.shape[-1]
    q = correct.mean(axis=0)
    yield "the square root is missing: this is a variance", p * (1 - p) / n
    yield "divide by n under the root: this is the spread of ONE answer", np.sqrt(p * (1 - p))
    yield "divided by n outside the root: it is sqrt(n)", np.sqrt(p * (1 - p)) / n
    yield "this is the accuracy; its standard error is wanted", p
    yield "p / n: the variance of one answer is p (1 - p)", np.sqrt(p / n)
    yield "wrong axis: the n samples are the last one", np.sqrt(q * (1 - q) / len(correct))
    yield (
        "one number for all curves: keep the first axis",
        np.sqrt(correct.mean() * (1 - correct.mean()) / correct.size),
    )
    yield "n is the samples of one curve, not of all", np.sqrt(p * (1 - p) / correct.size)
    yield "that is the half-width of a 95 % interval: leave out 1.96", 1.96 * error_of(correct)


# --- 9.5: ensembling ------------------------------------------------------------------------------


def orders_case(seed):
    """Log-probabilities [orders, B, V]; an order may be sure of the wrong word."""
    rng = np.random.default_rng(seed)
    return log_softmax(3 * rng.standard_t(2, size=(5, 12, 6)))


@exercise("9.5")
def ensemble(answer):
    """answer(logp [orders, B, V]) -> int[B]."""
    for seed in (0, 1, 2):
        logp = orders_case(seed)
        right = logp.mean(axis=0).argmax(axis=-1)
        expect(call(answer, logp), right, _ensemble_mistakes(logp))


def votes(logp):
    """The word that most orders choose."""
    return np.array([np.bincount(v).argmax() for v in logp.argmax(axis=-1).T])


def _ensemble_mistakes(logp):
    yield "the first order alone", logp[0].argmax(axis=-1)
    yield "the last order alone: take the mean over axis 0", logp[-1].argmax(axis=-1)
    yield "a vote: take the mean of the log-likelihoods, then the best word", votes(logp)
    yield (
        "a mean of probabilities: the log-likelihoods are averaged, so every order has a veto",
        np.exp(logp).mean(axis=0).argmax(axis=-1),
    )
    yield "the surest order alone: the mean is wanted", logp.max(axis=0).argmax(axis=-1)
    yield "the least likely word: argmax is wanted", logp.mean(axis=0).argmin(axis=-1)
    yield "one word for each row is wanted, not for each order", logp.argmax(axis=-1)
    yield "the mean runs over the orders, axis 0, not over the rows", logp.mean(axis=1).argmax(-1)
    yield "these are the mean scores; the best word of each row is wanted", logp.mean(axis=0)
