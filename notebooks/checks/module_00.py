"""Checks of module 00: prompts as tokens, phi by hand, the ceiling, and who is the model."""

from itertools import pairwise

import numpy as np

from miniflamingo.prompt import BOS, EOC, IMAGE, split_words

from .core import as_array, call, exercise, expect

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
    yield "<EOC> closes a chunk; what opens a prompt is <BOS>", [EOC, IMAGE, *question]
    yield "one image is asked about: <image> stands there once", [BOS, IMAGE, IMAGE, *question]
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
        out = call(answer, np.array(names, int), this)
        # an empty list of NumPy's makes floats of all: no mistake of the student's
        expect(out, right, _teach_mistakes(names, this), whole=not names)


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
    yield "the last shot is missing: all k names have one", prompt_of(names[:-1], this)
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


# --- 0.5: be the model ----------------------------------------------------------------------------

THIS = 7
SHOTS = (  # names of the shots, classes of all images; the query's is the last
    ((44, 45), (3, 5, 5)), ((44, 45), (3, 5, 3)), ((50, 44, 50), (2, 0, 2, 0)), ((44,), (1, 2)),
    ((), (4,)), ((51, 44, 45), (1, 2, 3, 1)), ((45, 44, 46), (0, 6, 1, 6)),
)  # fmt: skip


def learned(tokens, classes, this):
    """The name that the query's class has, or -1."""
    phi, names = 0, {}
    for i, token in enumerate(tokens):
        phi += token == IMAGE
        if token == this and phi and i + 1 < len(tokens):
            names[int(classes[phi - 1])] = int(tokens[i + 1])
    return names.get(int(classes[-1]), -1)


def episodes():
    """(tokens, classes): plain prompts, and two with text before and between the images."""
    for names, classes in SHOTS:
        yield prompt_of(names, THIS), np.array(classes)
    (names, classes), a_word = SHOTS[1], 30
    tokens = prompt_of(names, THIS)
    yield np.insert(tokens, 1, [a_word, a_word, EOC]), np.array(classes)
    yield np.insert(tokens, 1, [THIS, 46, EOC]), np.array(SHOTS[3][1] + (2,))
    yield np.insert(tokens, 5, [a_word, EOC]), np.array(classes)


@exercise("0.5")
def best_answer(answer):
    """answer(tokens int[L], classes int[k + 1], this) -> the name's id, or -1."""
    cases = list(episodes())
    got = [call(answer, *case, THIS) for case in cases]
    if not any(one is None or one is ... for one in got):  # else it is not done yet
        got = [as_array(one) for one in got]
    right = [learned(*case, THIS) for case in cases]
    expect(got, right, _learner_mistakes(cases, right), whole=True)


def _learner_mistakes(cases, right):
    def each(function):
        return [function(*case) for case in cases]

    def names_of(tokens):
        behind = list(tokens).index(IMAGE)
        return [int(b) for a, b in pairwise(tokens[behind:]) if a == THIS]

    last = each(lambda t, c: (names_of(t) or [-1])[-1])
    yield (
        "this is always the LAST name of the prompt: is phi off by one? The first image shows "
        "classes[0], so take classes[phi - 1]",
        last,
    )
    first = each(lambda t, c: (names_of(t) or [-1])[0])
    yield "this is the FIRST name of the prompt: which image had the query's class?", first
    unknown = "where no shot shows the query's class, nobody can know: -1"
    yield unknown, [0 if r == -1 else r for r in right]
    yield unknown, [name if r == -1 else r for r, name in zip(right, last)]
    yield unknown, [name if r == -1 else r for r, name in zip(right, first)]
    yield "-1 everywhere: a class is known where a shot shows it", [-1] * len(right)
    yield "this is the query's CLASS: its name is asked for", each(lambda t, c: int(c[-1]))
    places = each(_by_place)
    yield "text may stand before and between: look for <image> and `this`, not for places", places


def _by_place(tokens, classes):
    names = {int(c): int(n) for c, n in zip(classes[:-1], tokens[3::4])}
    return names.get(int(classes[-1]), -1)
