"""Checks of module 00: a question and a few-shot prompt as tokens, phi by hand, the ceiling."""

import numpy as np

from miniflamingo.prompt import BOS, EOC, IMAGE, split_words

from .core import call, exercise, expect

# --- 0.1: a question ------------------------------------------------------------------------------


@exercise("0.1")
def ask_about(answer):
    """answer(question, n ids) -> int[2 + n]."""
    for question in ([8, 11, 9], [8, 11, 6, 22, 9]):
        right = np.array([BOS, IMAGE, *question])
        expect(call(answer, question), right, _question_mistakes(question))


def _question_mistakes(question):
    yield "the prompt must stay open: after <EOC> there is nothing left to say", [
        BOS, IMAGE, *question, EOC,
    ]  # fmt: skip
    yield "<image> comes too late: the question's words would look at no image", [
        BOS, *question, IMAGE,
    ]  # fmt: skip
    yield "<BOS> opens the prompt, before the image", [IMAGE, BOS, *question]
    yield "<BOS> is missing", [IMAGE, *question]
    yield "<image> is missing: there is nothing to look at", [BOS, *question]
    yield "no <EOC> between an image and its text", [BOS, IMAGE, EOC, *question]
    yield "the question is missing", [BOS, IMAGE]


# --- 0.2: phi by hand -----------------------------------------------------------------------------

PAGE = split_words("<BOS> two things <EOC> <image> this dax <EOC> <image> this wug <EOC>")


@exercise("0.2")
def phi_by_hand(answer):
    """answer(words, 12 strings) -> int[12]."""
    is_image = np.array([word == "<image>" for word in PAGE]).astype(int)
    right = np.cumsum(is_image)
    mistakes = [
        ("off by one at <image>: it already looks at its own image", right - is_image),
        ("<EOC> still belongs to the chunk that it closes, not to the next image",
         right + [w == "<EOC>" and i < 11 for i, w in enumerate(PAGE)]),
        ("images are counted from 1; 0 is for `no image yet`", right - 1),
        ("text before any image looks at nothing: phi = 0 there", np.maximum(right, 1)),
        ("this marks the <image> tokens alone: what follows an image looks at it, too", is_image),
        ("this is the NEXT image; the last one is asked for", [1] * 5 + [2] * 4 + [0] * 3),
        ("this counts the chunks; text without an image looks at none", 1 + right),
        ("each word looks at ONE image, the last before it: not all at the last of the page",
         np.full(12, 2)),
    ]  # fmt: skip
    expect(call(answer, PAGE), right, mistakes)


# --- 0.3: a prompt that teaches -------------------------------------------------------------------


@exercise("0.3")
def teach(answer):
    """answer(names int[k], this) -> int[4k + 3]."""
    for names, this in (([44, 45], 7), ([50, 44, 50], 9), ([], 7)):
        right = prompt_of(names, this)
        expect(call(answer, np.array(names, int), this), right, _teach_mistakes(names, this))


def prompt_of(names, this):
    """`<BOS>`, k named images, one without a name."""
    shots = [token for name in names for token in (IMAGE, this, int(name), EOC)]
    return np.array([BOS, *shots, IMAGE, this])


def _teach_mistakes(names, this):
    right = prompt_of(names, this)
    yield "the last chunk must stay open: no <EOC> behind it", np.append(right, EOC)
    yield "<EOC> is missing between the chunks", right[right != EOC]
    yield "the query is missing: one more <image> and `this`, without a name", right[:-2]
    yield "the query has no `this`: the name stands behind it", right[:-1]
    yield "the query's own <image> is missing", np.append(right[:-2], this)
    yield "<BOS> is missing", right[1:]
    bos = [t for name in names for t in (BOS, IMAGE, this, name, EOC)]
    yield "<BOS> opens the prompt once, not every chunk", [*bos, BOS, IMAGE, this]
    swapped = [t for name in names for t in (IMAGE, name, this, EOC)]
    yield "`this` comes before the name", [BOS, *swapped, IMAGE, this]
    late = [t for name in names for t in (this, name, IMAGE, EOC)]
    yield "the image comes before its text", [BOS, *late, this, IMAGE]
    yield "the images' tags are missing", right[right != IMAGE]
    yield "`this` is missing", right[right != this]
    if this != 7:
        yield "the id of the word `this` is the argument, not always 7", prompt_of(names, 7)
    if names:
        yield "that gives the query's name away", [*right, int(names[-1])]


# --- 0.4: the ceiling -----------------------------------------------------------------------------


@exercise("0.4")
def ceiling(answer):
    """answer(ways, shots int[n]) -> [n]."""
    for ways, shots in ((8, np.array([0, 1, 2, 4, 8, 16, 32])), (3, np.array([5, 1]))):
        expect(call(answer, ways, shots), 1 - ((ways - 1) / ways) ** shots,
               _ceiling_mistakes(ways, shots))  # fmt: skip


def _ceiling_mistakes(w, k):
    miss = (w - 1) / w
    yield "this is how often the class is NOT shown: 1 minus it", miss**k
    yield "a power, not a product: each shot may miss", 1 - miss * k
    yield "k shots may show one class twice: not k / w", k / w
    yield "k shots may show one class twice: not k / w", np.minimum(k / w, 1)
    yield "(1 / w)^k is how often ALL shots show it", (1 / w) ** k
    yield "1 - (1 / w)^k: a shot MISSES with probability (w - 1) / w", 1 - (1 / w) ** k
    yield "rounded down: divide with /, not with //", 1 - ((w - 1) // w) ** k
    yield "w and k are exchanged", 1 - ((k - 1.0) / np.maximum(k, 1)) ** w
    yield "the last number of shots only", (1 - miss**k)[-1]
    yield "one shot too many: k, not k + 1", 1 - miss ** (k + 1)
