"""Right and wrong answers to the exercises of module 00, for test_checks.py."""

from itertools import pairwise

import numpy as np

from miniflamingo.course.checks.module_00 import learned, prompt_of
from miniflamingo.evaluation import coverage
from miniflamingo.prompt import BOS, EOC, IMAGE
from miniflamingo.worlds.grammar import document, phrase

PHI = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def phi_by_a_loop(words):
    return [words[: i + 1].count("<image>") for i in range(len(words))]


def teach(names, this, eoc=True, query=(IMAGE, "this"), end=(), order=("image", "this", "name")):
    """An answer as students write it, with a place for each mistake."""
    tokens = [BOS]
    for name in names:
        tokens += [{"image": IMAGE, "this": this, "name": name}[part] for part in order]
        tokens += [EOC] * eoc
    return np.array([*tokens, *(this if t == "this" else t for t in query), *end])


def by_concatenating(names, this):  # without a shot, NumPy's empty list makes floats of all
    shots = np.array([[IMAGE, this, name, EOC] for name in names]).ravel()
    return np.concatenate([[BOS], shots, [IMAGE, this]])


def teach_by_the_library(names, this):
    whole = document(phrase("<image>", np.array([this] * len(names), int), names, "<EOC>")[None])
    return np.append(whole[0], [IMAGE, this])


def learn(tokens, classes, this, start=0, missing=-1):
    """An answer as students write it, with a place for each mistake."""
    phi, names = start, {}
    for token, following in pairwise(tokens):
        if token == IMAGE:
            phi += 1
        if token == this and phi > start:
            names[classes[(phi - 1) % len(classes)]] = following
    return names.get(classes[-1], missing)


def all_names(tokens, classes, this):
    tokens = list(tokens)
    return [b for a, b in pairwise(tokens[tokens.index(IMAGE) :]) if a == this] or [-1]


def learn_with_numpy(tokens, classes, this):
    tokens = np.asarray(tokens)
    phi = np.cumsum(tokens == IMAGE)
    at = np.flatnonzero((tokens[:-1] == this) & (phi[:-1] > 0))
    fits = at[np.asarray(classes)[phi[at] - 1] == classes[-1]]
    return tokens[fits[-1] + 1] if len(fits) else -1


def by_place(tokens, classes, this):
    names = {int(c): int(n) for c, n in zip(classes[:-1], tokens[3::4])}
    return names.get(int(classes[-1]), -1)


def changes_classes(tokens, classes, this):
    query = classes[-1]
    classes[-1] = -1
    return learned(tokens, np.append(classes[:-1], query), this)


RIGHT = [
    ("0.1", lambda q: np.array([BOS, IMAGE, *q])),
    ("0.1", lambda q: np.concatenate([[1, 3], q])),
    ("0.2", lambda words: PHI),
    ("0.2", phi_by_a_loop),
    ("0.3", teach),
    ("0.3", prompt_of),
    ("0.3", teach_by_the_library),
    ("0.4", coverage),
    ("0.4", lambda w, k: [1 - np.prod(np.full(n, 1 - 1 / w)) for n in k]),
    ("0.5", learn),
    ("0.5", learn_with_numpy),
    ("0.5", learned),
    ("0.1", lambda q: [BOS, IMAGE, *map(int, q)]),
    ("0.3", by_concatenating),
]

WRONG = [
    ("0.1", lambda q: [BOS, IMAGE, *q, EOC], "the prompt must stay open"),
    ("0.1", lambda q: [BOS, *q, IMAGE], "<image> comes too late"),
    ("0.1", lambda q: [IMAGE, *q], "<BOS> is missing"),
    ("0.1", lambda q: [BOS, *q], "<image> is missing"),
    ("0.1", lambda q: [IMAGE, BOS, *q], "<BOS> opens the prompt"),
    ("0.1", lambda q: [BOS, IMAGE, EOC, *q], "no <EOC> between an image and its text"),
    ("0.1", lambda q: [BOS, IMAGE, *q, 20], "wrong shape: [5] is wanted, got [6]"),
    ("0.2", lambda w: [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2], "off by one at <image>"),
    ("0.2", lambda w: [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2], "belongs to the chunk that it closes"),
    ("0.2", lambda w: [n - 1 for n in PHI], "counted from 1"),
    ("0.2", lambda w: [max(n, 1) for n in PHI], "text before any image looks at nothing"),
    ("0.2", lambda w: [int(x == "<image>") for x in w], "marks the <image> tokens alone"),
    ("0.2", lambda w: [1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0], "this is the NEXT image"),
    ("0.2", lambda w: [n + 1 for n in PHI], "this counts the chunks"),
    ("0.2", lambda w: [2] * 12, "not all at the last of the page"),
    ("0.2", lambda w: PHI[:-1], "wrong shape: [12] is wanted, got [11]"),
    ("0.3", lambda *a: teach(*a, end=[EOC]), "the last chunk must stay open"),
    ("0.3", lambda *a: teach(*a, eoc=False), "<EOC> is missing between the chunks"),
    ("0.3", lambda *a: teach(*a, query=()), "the query is missing"),
    ("0.3", lambda *a: teach(*a, query=(IMAGE,)), "the query has no `this`"),
    ("0.3", lambda *a: teach(*a, query=("this",)), "the query's own <image> is missing"),
    ("0.3", lambda *a: teach(*a)[1:], "<BOS> is missing"),
    ("0.3", lambda *a: teach(*a, order=("image", "name", "this")), "`this` comes before the name"),
    ("0.3", lambda n, t: teach(n, 7), "the argument, not always 7"),
    ("0.3", lambda n, t: [*teach(n, t), *n[-1:]], "gives the query's name away"),
    ("0.4", lambda w, k: ((w - 1) / w) ** k, "NOT shown"),
    ("0.4", lambda w, k: 1 - k * (w - 1) / w, "a power, not a product"),
    ("0.4", lambda w, k: k / w, "not k / w"),
    ("0.4", lambda w, k: np.minimum(1, k / w), "not k / w"),
    ("0.4", lambda w, k: 1 - (1 / w) ** k, "MISSES with probability"),
    ("0.4", lambda w, k: 1.0 - ((w - 1) // w) ** k, "rounded down"),
    ("0.4", lambda w, k: coverage(w, k)[-1], "the last number of shots only"),
    ("0.4", lambda w, k: coverage(w, k + 1), "one shot too many"),
    ("0.1", lambda q: [EOC, IMAGE, *q], "what opens a prompt is <BOS>"),
    ("0.1", lambda q: [BOS, IMAGE, IMAGE, *q], "<image> stands there once"),
    ("0.1", lambda q: [BOS, IMAGE, q], "parts of different shapes: join them into one"),
    ("0.1", lambda q: ["<BOS>", "<image>", *q], "an array of numbers is wanted, got list of words"),
    ("0.2", lambda w: [str(n) for n in PHI], "got list of words"),
    ("0.3", lambda n, t: teach(n[:-1], t), "the last shot is missing"),
    ("0.3", lambda n, t: [BOS, [IMAGE, t, n, EOC], IMAGE, t], "join them into one"),
    ("0.4", lambda w, k: 100 * coverage(w, k), "every number is 100 times the right one"),
    ("0.5", lambda *a: learn(*a, start=1), "is phi off by one"),
    ("0.5", lambda *a: learn(*a, missing=0), "nobody can know: -1"),
    ("0.5", lambda *a: all_names(*a)[-1], "the LAST name of the prompt"),
    ("0.5", lambda *a: all_names(*a)[0], "the FIRST name"),
    ("0.5", lambda *a: -1, "-1 everywhere"),
    ("0.5", lambda t, c, this: c[-1], "this is the query's CLASS"),
    ("0.5", by_place, "look for <image> and `this`"),
    ("0.5", lambda *a: learn(*a, missing=None), "your function returns nothing"),
    ("0.5", changes_classes, "changes its argument number 2 in place"),
    ("0.5", lambda *a: [learn(*a)], "wrong shape: [10] is wanted, got [10, 1]"),
]
