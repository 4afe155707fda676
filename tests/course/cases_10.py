"""Right and wrong answers to the exercises of module 10, for test_checks.py."""

import numpy as np

from miniflamingo.course.checks.module_10 import chosen_prompts
from miniflamingo.functional import log_softmax, softmax
from miniflamingo.prompt import BOS, EOC, IMAGE
from miniflamingo.worlds.grammar import document, phrase

# --- 10.1: the prompt -----------------------------------------------------------------------------


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


# --- 10.2: ranking --------------------------------------------------------------------------------


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
        sum(log_softmax(logits[c, l - 1])[tokens[c, l]] for l in range(start, n))
        for c, n in enumerate(lengths)
    ]


# --- 10.4: RICES ----------------------------------------------------------------------------------


def prompts_by_loops(features, names, query, k, this):
    def cosine(a, b):
        return np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b))

    rows, pictures = [], []
    for q in query:
        others = [i for i in range(len(features)) if i != q]
        others.sort(key=lambda i: cosine(features[q], features[i]))
        shots = others[-k:]
        row = [BOS]
        for i in shots:
            row += [IMAGE, this, names[i], EOC]
        rows.append([*row, IMAGE, this])
        pictures.append([*shots, q])
    return np.array(rows), np.array(pictures)


def with_the_answer(features, names, query, k, this):
    tokens, pictures = chosen_prompts(features, names, query, k, this)
    return np.c_[tokens, names[query]], pictures


def with_shots_sorted(*case):
    tokens, pictures = chosen_prompts(*case)
    return tokens, np.c_[np.sort(pictures[:, :-1], axis=1), pictures[:, -1]]


# --- 10.3 and 9.5 ---------------------------------------------------------------------------------


def error(correct):
    p = correct.mean(axis=1)
    return np.sqrt(p * (1 - p) / correct.shape[1])


# --- 10.5: average over orders --------------------------------------------------------------------


def asked(ask, shots, orders):
    return np.array([ask(shots[:, order]) for order in orders])


def ensemble(ask, shots, orders, rule=lambda x: x.mean(axis=0).argmax(axis=-1), agree=None):
    """An answer with a place for another rule, and for another agreement."""
    logp = asked(ask, shots, orders)
    words, votes = rule(logp), logp.argmax(axis=-1)
    own = logp.mean(axis=0).argmax(axis=-1)
    return words, agree(logp, own) if agree else (votes == own).mean(axis=0)


def ensemble_in_one_call(ask, shots, orders):
    """All orders' prompts in one batch; by sums, as lists."""
    rows = [[row[place] for place in order] for order in orders.tolist() for row in shots.tolist()]
    logp = ask(np.array(rows)).reshape(len(orders), len(shots), -1)
    words = [int(scores.argmax()) for scores in logp.sum(axis=0)]
    return words, [sum(logp[:, b].argmax(-1) == w) / len(orders) for b, w in enumerate(words)]


def ensemble_by_a_running_sum(ask, shots, orders):
    total, votes = 0.0, []
    for order in orders:
        logp = ask(np.take_along_axis(shots, np.tile(order, (len(shots), 1)), axis=1))
        total = total + logp
        votes.append(np.argmax(logp, axis=1))
    words = np.argmax(total, axis=1)
    return words, np.mean([v == words for v in votes], axis=0)


def shuffled_on(ask, shots, orders):
    found = []
    for order in orders:
        shots = shots[:, order]
        found.append(ask(shots))
    return ensemble(lambda rows: found.pop(0), shots, orders)


def the_last_alone(ask, shots, orders):
    for order in orders:
        logp = ask(shots[:, order])
    return logp.argmax(axis=-1), ensemble(ask, shots, orders)[1]


def shuffled_in_place(ask, shots, orders):
    out = []
    for order in orders:
        shots[:] = shots[:, order]
        out.append(ask(shots))
    return ensemble(lambda rows: out.pop(0), shots, orders)


def agreement(agree):
    return lambda *a: ensemble(*a, agree=agree)


def by(rule):
    return lambda *a: ensemble(*a, rule=rule)


RIGHT = [
    ("10.4", chosen_prompts),
    ("10.4", prompts_by_loops),
    ("10.1", prompt),
    ("10.1", prompt_by_words),
    ("10.2", rank),
    ("10.2", rank_by_loops),
    ("10.3", error),
    ("10.3", lambda correct: correct.std(axis=1) / np.sqrt(correct.shape[1])),
    ("10.5", ensemble),
    ("10.5", ensemble_in_one_call),
    ("10.5", ensemble_by_a_running_sum),
]

WRONG = [
    ("10.4", lambda *a: chosen_prompts(*a, itself=True), "the query picks itself: its own"),
    ("10.4", lambda *a: chosen_prompts(*a, first=True), "the most similar stands first: it must"),
    ("10.4", lambda *a: chosen_prompts(*a, itself=True, first=True), "picks itself, and the most"),
    ("10.4", lambda *a: chosen_prompts(*a, query_first=True), "comes last, behind the shots"),
    ("10.4", lambda *a: chosen_prompts(*a, sign=-1), "the LEAST similar"),
    ("10.4", lambda *a: chosen_prompts(*a, unit=False), "inner products: divide"),
    ("10.4", lambda *a: chosen_prompts(*a, far=True), "Euclidean distance"),
    ("10.4", lambda *a: chosen_prompts(*a, labels="sorted"), "has another picture's name"),
    ("10.4", lambda *a: chosen_prompts(*a, labels="turned"), "the names are turned round"),
    ("10.4", lambda *a: chosen_prompts(*a, labels="first"), "names of the first k pictures"),
    ("10.4", lambda *a: chosen_prompts(*a, labels="query"), "the answer is given away"),
    ("10.4", with_shots_sorted, "the right pictures in the wrong order"),
    ("10.4", with_the_answer, "wrong shape of number 1 in a pair"),
    ("10.4", lambda *a: chosen_prompts(*a)[0], "a pair (tokens [B, 4 k + 3], pictures"),
    ("10.4", lambda *a: (chosen_prompts(*a)[0] + 1, chosen_prompts(*a)[1]), "should be <BOS>"),
    ("10.1", lambda n, t: prompt_by_words(np.c_[n, n[:, -1:]], t), "among the shots"),
    ("10.1", lambda n, t: np.c_[prompt(n, t), n[:, -1]], "the answer is given away"),
    ("10.1", lambda n, t: np.c_[prompt(n, t), n[:, -1], [EOC] * len(n)], "is given away"),
    ("10.1", lambda n, t: without(n, t, EOC), "<EOC> is missing"),
    ("10.1", lambda n, t: without(n, t, BOS), "<BOS> is missing"),
    ("10.1", lambda n, t: prompt(n, t)[:, :-1], "must end with `this`"),
    ("10.1", lambda n, t: prompt(n, t)[:, :-2], "the query is missing"),
    ("10.1", lambda n, t: np.c_[prompt(n, t)[:, :-2], [t] * len(n)], "query's <image> is missing"),
    ("10.1", lambda n, t: np.c_[prompt(n, t), [EOC] * len(n)], "<EOC> behind the query"),
    ("10.1", lambda n, t: prompt(n[:, :-1], t), "the last shot is missing"),
    ("10.1", lambda n, t: phrase("this", n), "wrong shape"),
    ("10.2", lambda *a: rank(*a, logp=lambda x: np.log(softmax(x))), "takes no log of a weight"),
    ("10.2", lambda *a: rank(*a, offset=0), "wrong offset: the logits at l say"),
    ("10.2", lambda *a: rank(*a, offset=2), "one place too far back"),
    ("10.2", lambda *a: rank(*a, pad=True), "the padding behind"),
    ("10.2", lambda *a: rank(*a, logp=lambda x: x), "these are logits"),
    ("10.2", lambda *a: rank(*a, logp=softmax), "the log is missing"),
    ("10.2", lambda *a: np.exp(rank(*a)), "its log is wanted"),
    ("10.2", lambda *a: rank(*a) / (a[3] - a[2]), "a mean over the tokens"),
    ("10.2", lambda *a: rank(*a, sign=-1), "minus sign"),
    ("10.2", lambda g, t, s, n: rank(g, t, 1, n), "the prompt's tokens count"),
    ("10.2", lambda g, t, s, n: rank(g, t, s + 1, n), "first token is left out"),
    ("10.2", lambda *a: rank(*a, logp=lambda x: log_softmax(x.swapaxes(1, 2)).swapaxes(1, 2)),
     "softmax runs over the words"),
    ("10.3", lambda c: error(c) ** 2, "the square root is missing"),
    ("10.3", lambda c: c.std(axis=1), "the spread of ONE answer"),
    ("10.3", lambda c: c.std(axis=1) / c.shape[1], "outside the root"),
    ("10.3", lambda c: c.mean(axis=1), "this is the accuracy"),
    ("10.3", lambda c: c.std(axis=0) / np.sqrt(len(c)), "wrong axis"),
    ("10.3", lambda c: c.std() / np.sqrt(c.size), "one number for all curves"),
    ("10.3", lambda c: 1.96 * error(c), "leave out 1.96"),
    ("10.5", by(lambda x: x[0].argmax(axis=-1)), "the first order alone"),
    ("10.5", by(lambda x: np.exp(x).mean(axis=0).argmax(axis=-1)), "a mean of probabilities"),
    ("10.5", by(lambda x: [np.bincount(v).argmax() for v in x.argmax(-1).T]), "a vote"),
    ("10.5", by(lambda x: x.max(axis=0).argmax(axis=-1)), "the surest order alone"),
    ("10.5", by(lambda x: x.mean(axis=0)), "these are the mean scores"),
    ("10.5", by(lambda x: x.argmax(axis=-1)), "not for each order"),
    ("10.5", by(lambda x: x.mean(axis=1).argmax(axis=-1)), "axis 0, not over the rows"),
    ("10.1", lambda n, t: prompt(n, t) / 1, "right but for that: .astype(int)"),
    ("10.2", lambda g, t, s, n: rank(g, t, s, 0 * n + n.min()), "a length of its own"),
    ("10.3", lambda c: c.std(axis=1, ddof=1) / np.sqrt(c.shape[1]), "this by n - 1 (ddof=1)"),
    ("10.3", lambda c: 100 * error(c), "every number is 100 times the right one"),
    ("10.5", the_last_alone, "the last order alone"),
    ("10.5", shuffled_on, "shuffled again and again"),
    ("10.5", shuffled_in_place, "changes its argument number 2 in place"),
    ("10.5", lambda ask, s, o: ensemble(ask, s, 0 * o + np.arange(s.shape[1])), "in one and the"),
    ("10.5", lambda ask, s, o: ensemble(ask, s, np.argsort(o, axis=1)), "at each place, not where"),
    ("10.5", lambda ask, s, o: ensemble(ask, s, o)[0], "the pair (words, agree) is wanted"),
    ("10.5", agreement(lambda x, w: (x.argmax(-1) == w).sum(axis=0)), "not a number of orders"),
    ("10.5", agreement(lambda x, w: (x.argmax(-1) != w).mean(axis=0)), "do NOT agree"),
    ("10.5", agreement(lambda x, w: (x.argmax(-1) == w).mean(axis=1)), "not for each order"),
    ("10.5", agreement(lambda x, w: (x.argmax(-1) == x[0].argmax(-1)).mean(0)), "the first order"),
    ("10.5", agreement(lambda x, w: (x.argmax(-1) == w).mean()), "mean over the orders, axis 0"),
    ("10.5", agreement(lambda x, w: (x.argmax(-1) == w).all(axis=0)), "whether ALL orders agree"),
    ("10.5", agreement(lambda x, w: np.exp(x).mean(0).max(-1)), "agree: wrong value"),
    ("10.5", by(lambda x: x.min(axis=0).argmax(axis=-1)), "has a veto"),
    ("10.5", by(lambda x: np.median(x, axis=0).argmax(axis=-1)), "a median"),
]  # fmt: skip
