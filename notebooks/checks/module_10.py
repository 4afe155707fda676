"""Checks of module 10: a prompt, ranking, RICES, the standard error, ensembling."""

import numpy as np

from miniflamingo.functional import log_softmax
from miniflamingo.prompt import BOS, EOC, IMAGE

from .core import UNDERFLOW, apart, call, exercise, expect, expect_stable, first, named, several

# --- 10.1: the prompt -----------------------------------------------------------------------------

NAMES = np.array([[20, 21, 20, 22], [30, 31, 32, 33]])  # the last column is the query's own


@exercise("10.1")
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


# --- 10.2: ranking --------------------------------------------------------------------------------


def ranking_case(seed=0):
    """Logits [A, L, V] of prompt and candidates, tokens int[A, L], start, lengths int[A]."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, 9, (4, 8))
    start, lengths = 4 - seed, np.array([5, 6, 8, 6])
    tokens[:, :start] = tokens[0, :start]  # one prompt
    tokens[np.arange(8) >= lengths[:, None]] = 0
    return 2 * rng.normal(size=(4, 8, 9)), tokens, start, lengths


@exercise("10.2")
def ranking(answer):
    """answer(logits [A, L, V], tokens int[A, L], start, lengths int[A]) -> [A]."""
    for seed in (0, 1):
        case = ranking_case(seed)
        expect(call(answer, *case), scored(*case), _ranking_mistakes(*case))
    case = 800 * case[0], *case[1:]
    expect_stable(call(answer, *case), scored(*case), infinite=UNDERFLOW)


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
    shortest = scored(logits, tokens, start, 0 * lengths + lengths.min())
    yield "each candidate has a length of its own, not the shortest's", shortest
    yield "the last token of each candidate is left out", scored(*case[:3], lengths - 1)
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


# --- 10.4: RICES, from a support set to a prompt --------------------------------------------------

PROMPTS = "a pair (tokens [B, 4 k + 3], pictures [B, k + 1])"


@exercise("10.4")
def rices(answer):
    """answer(features [n, D], names int[n], query int[B], k, this) -> tokens, pictures."""
    for seed, n, k in ((0, 12, 3), (1, 12, 4), (3, 1500, 300)):
        rng = np.random.default_rng(seed)
        features = rng.normal(size=(n, 5)) * rng.uniform(0.2, 5, (n, 1))
        case = features, rng.integers(20, 90, n), np.array([7, 0, 11]), k, 9
        right = chosen_prompts(*case)
        tokens, pictures = several(call(answer, *case), right, PROMPTS)
        for got, number, name in ((pictures, 1, "pictures"), (tokens, 0, "tokens")):
            mistakes = [(words, chosen_prompts(*case, **how)[number])
                        for words, how in RICES_MISTAKES[name]]  # fmt: skip
            explain = _order_in_words if number else _token_in_words
            expect(got, right[number], mistakes, explain)


def similar(features, query, k, unit=True, itself=False, sign=1, first=False, far=False):
    """Equation (4): indices of the k most similar, the most similar last; places for mistakes."""
    x = features / np.linalg.norm(features, axis=1, keepdims=True) if unit else features
    likeness = sign * x[query] @ x.T
    if far:
        likeness = -((features[query][:, None] - features) ** 2).sum(axis=-1)
    if not itself:
        likeness[np.arange(len(query)), query] = -np.inf
    best = np.argsort(likeness, axis=1)[:, -k:]
    return best[:, ::-1] if first else best


def chosen_prompts(features, names, query, k, this, labels="own", query_first=False, **how):
    """The tokens and the pictures of a prompt by RICES; places for mistakes."""
    shots = similar(features, query, k, **how)
    own = query[:, None]
    pictures = np.concatenate([own, shots] if query_first else [shots, own], axis=1)
    said = names[np.sort(shots, axis=1) if labels == "sorted" else shots]
    said = said[:, ::-1] if labels == "turned" else said
    said = np.broadcast_to(names[:k], said.shape) if labels == "first" else said
    said = np.broadcast_to(names[query][:, None], said.shape) if labels == "query" else said
    chunks = np.empty((*said.shape, 4), int)
    chunks[:] = IMAGE, this, 0, EOC
    chunks[..., 2] = said
    B = len(query)
    start, end = np.full((B, 1), BOS), np.tile([IMAGE, this], (B, 1))
    return np.concatenate([start, chunks.reshape(B, -1), end], axis=1), pictures


RICES_MISTAKES = {
    "pictures": [
        ("the query picks itself: its own picture, label and all, is in the prompt",
         {"itself": True}),
        ("the query picks itself, and the most similar stands first: it must come LAST",
         {"itself": True, "first": True}),
        ("the most similar stands first: it must come LAST, next to the query", {"first": True}),
        ("the query's own picture comes last, behind the shots", {"query_first": True}),
        ("these are the LEAST similar pictures", {"sign": -1}),
        ("these are the LEAST similar pictures", {"sign": -1, "first": True}),
        ("inner products: divide by both lengths, or long features win", {"unit": False}),
        ("inner products, and the query itself is in: divide by the lengths",
         {"unit": False, "itself": True}),
        ("Euclidean distance: likeness is the cosine here", {"far": True}),
        ("Euclidean distance: likeness is the cosine here", {"far": True, "itself": True}),
    ],
    "tokens": [
        ("a shot has another picture's name: the names must follow the order of the pictures",
         {"labels": "sorted"}),
        ("a shot has another picture's name: the names are turned round", {"labels": "turned"}),
        ("these are the names of the first k pictures, not of the chosen ones",
         {"labels": "first"}),
        ("every shot has the QUERY's name: the answer is given away", {"labels": "query"}),
    ],
}  # fmt: skip


def _order_in_words(got, right):
    if np.array_equal(np.sort(got, axis=1), np.sort(right, axis=1)):
        return (
            "the right pictures in the wrong order: sort ALL k by likeness, the most similar last"
        )
    place = first(got != right)
    wanted, found = apart(right[tuple(place)], got[tuple(place)])
    return f"wrong picture at {place}: {wanted} is right, got {found}"


def _token_in_words(got, right):
    row, place = first(got != right)
    part = "<BOS>" if place == 0 else ("<image>", "`this`", "the name", "<EOC>")[(place - 1) % 4]
    wanted, found = right[row, place], got[row, place]
    return f"tokens[{row}, {place}] should be {part}: {wanted} is right, got {found}"


# --- 10.3: the standard error ---------------------------------------------------------------------


@exercise("10.3")
def standard_error(answer):
    """answer(correct bool[E, n]) -> [E]."""
    for seed, shape in ((0, (3, 40)), (1, (2, 150)), (2, (4, 20))):
        rng = np.random.default_rng(seed)
        correct = rng.random(shape) < np.array([0.9, 0.5, 0.2, 1.1])[: shape[0], None]
        expect(call(answer, correct), error_of(correct), _error_mistakes(correct))


def error_of(correct):
    """Equation (3)."""
    p = correct.mean(axis=-1)
    return np.sqrt(p * (1 - p) / correct.shape[-1])


def _error_mistakes(correct):
    p, n = correct.mean(axis=-1), correct.shape[-1]
    q = correct.mean(axis=0)
    yield "the square root is missing: this is a variance", p * (1 - p) / n
    yield (
        "equation (3) divides by n, this by n - 1 (ddof=1)",
        np.sqrt(p * (1 - p) / (n - 1)),
    )
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


# --- 10.5: ensembling -----------------------------------------------------------------------------


def orders_case(seed, O=5, B=12, k=4, V=6):
    """A model that minds the order, shots int[B, k], orders int[O, k].

    It may be sure of the wrong word, and find a word impossible.
    """
    rng = np.random.default_rng(seed)
    table = 2 * rng.standard_t(2, size=(k, 40, V))
    shots = rng.permuted(np.tile(np.arange(40), (B, 1)), axis=1)[:, :k]
    orders = rng.permuted(np.tile(np.arange(k), (O, 1)), axis=1)

    def ask(rows):
        logits = table[np.arange(k), np.asarray(rows)].sum(axis=1)
        return log_softmax(np.where(logits < -15, -np.inf, logits))

    return ask, shots, orders


@exercise("10.5")
def ensemble(answer):
    """answer(ask, shots int[B, k], orders int[O, k]) -> (int[B], float[B])."""
    for seed, sizes in enumerate(({}, {"O": 6, "k": 5}, {"O": 4, "B": 9, "k": 3})):
        ask, shots, orders = orders_case(seed, **sizes)
        words, agree = several(
            call(answer, ask, shots, orders),
            ensemble_of(asked(ask, shots, orders)),
            "the pair (words, agree)",
            shapes=False,
        )
        logp = asked(ask, shots, orders)
        right = ensemble_of(logp)
        others = list(_order_mistakes(ask, shots, orders))
        mistakes = [(text, made.mean(axis=0).argmax(axis=-1)) for text, made in others]
        expect(words, right[0], [*_ensemble_mistakes(logp), *mistakes])
        expect(agree, right[1], _agree_mistakes(logp), named("the second, agree"))


def asked(ask, shots, orders):
    """The log-probabilities [O, B, V] of all orders."""
    return np.stack([ask(shots[:, order]) for order in orders])


def ensemble_of(logp):
    """Equation (5), and the share of the orders that say the same alone."""
    words = logp.mean(axis=0).argmax(axis=-1)
    return words, (logp.argmax(axis=-1) == words).mean(axis=0)


def _order_mistakes(ask, shots, orders):
    """What a model is asked by mistake."""
    yield (
        "the model is asked with the shots in one and the same order each time: shots[:, order]",
        asked(ask, shots, np.arange(shots.shape[1]) + 0 * orders),
    )
    yield (
        "order says which shot comes at each place, not where each shot goes: shots[:, order]",
        asked(ask, shots, np.argsort(orders, axis=1)),
    )
    yield (
        "these shots are shuffled again and again: every order begins with `shots` as given",
        np.stack([ask(rows) for rows in _shuffled_on(shots, orders)]),
    )


def _shuffled_on(shots, orders):
    for order in orders:
        shots = shots[:, order]
        yield shots


def _agree_mistakes(logp):
    words, right = ensemble_of(logp)
    best = logp.argmax(axis=-1)
    yield "this is how many orders do NOT agree", 1 - right
    yield "a share is wanted, between 0 and 1, not a number of orders", right * len(logp)
    yield (
        "agreement with the vote: compare each order with the word that the MEAN has chosen",
        (best == votes(logp)).mean(axis=0),
    )
    yield (
        "agreement with the first order: compare each order with the word that the mean has chosen",
        (best == best[0]).mean(axis=0),
    )
    yield (
        "this is how many DIFFERENT words the orders say",
        np.array([len({*column}) for column in best.T.tolist()]),
    )
    chosen = np.take_along_axis(np.exp(logp), words[None, :, None], axis=2)[..., 0]
    yield "this is the word's mean probability; count the orders that say it", chosen.mean(axis=0)
    yield "whether ALL orders agree; the share that does is wanted", right == 1
    yield "one share for each episode is wanted: mean over the orders, axis 0", np.mean(right)
    yield "one share for each episode, not for each order: axis 0", (best == words).mean(axis=1)


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
    yield "the order that is least sure of a word has a veto: the mean", logp.min(axis=0).argmax(-1)
    yield "a median: take the mean", np.median(logp, axis=0).argmax(-1)
    yield "the surest order alone: the mean is wanted", logp.max(axis=0).argmax(axis=-1)
    yield "the least likely word: argmax is wanted", logp.mean(axis=0).argmin(axis=-1)
    yield "one word for each row is wanted, not for each order", logp.argmax(axis=-1)
    yield "the mean runs over the orders, axis 0, not over the rows", logp.mean(axis=1).argmax(-1)
    yield "these are the mean scores; the best word of each row is wanted", logp.mean(axis=0)
