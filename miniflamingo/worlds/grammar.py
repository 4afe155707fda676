"""The words of the small world, and the texts that the language model learns from before it sees.

    a small red circle <EOC>                                     captions
    a small red circle what color ? red <EOC>                    questions, about one object or two
    a large blue bar moving left <EOC>                           motion
    red circle dax <EOC> blue bar wug <EOC> red circle dax       BINDING: names invented on the spot

In a binding episode a name means something in that episode alone, so it can only be read off the
examples: that is what few-shot learning asks for. The name stands right after its key, which a
small model learns within some hundred steps ("red circle is dax" takes it many times longer).

Texts are arrays of token ids [B, L]. colour, shape and size are int[...] of one shape.
"""

from typing import NamedTuple

import numpy as np

from miniflamingo.prompt import BOS, EOC, PAD, SPECIAL_TOKENS, WordTokenizer, split_words
from miniflamingo.worlds.shapes import (
    COLOURS,
    DIRECTIONS,
    NUM_GEOMETRIC,
    SHAPES,
    SIZES,
    TURNED,
)

NAMES = split_words(
    "dax wug blick toma fep zorp kiki bouba mip lorp gazz tiv nurf pim sref quib vosh yalt cheg "
    "dorv hix jast klib ront"
)
KINDS = ("color", "shape", "size")  # what a question can ask for
FUNCTION_WORDS = split_words("a and is this what ? moving")
WORDS = (*FUNCTION_WORDS, *KINDS, *COLOURS, *SHAPES, *SIZES, *DIRECTIONS, *NAMES)
TOKENIZER = WordTokenizer(WORDS)


def ids_of(words):  # n words -> int[n]
    """The token ids of some words, as an array to be indexed by class."""
    return np.array([TOKENIZER.ids[word] for word in words])


COLOUR_IDS, SHAPE_IDS, SIZE_IDS = ids_of(COLOURS), ids_of(SHAPES), ids_of(SIZES)
DIRECTION_IDS, NAME_IDS, KIND_IDS = ids_of(DIRECTIONS), ids_of(NAMES), ids_of(KINDS)


def phrase(*parts):
    """Put words (str, of any number) and ids (int[...]) side by side -> int[..., words].

    phrase("a", SIZE_IDS[size], COLOUR_IDS[colour], SHAPE_IDS[shape], "<EOC>")
    """
    columns = []
    for part in parts:
        columns += TOKENIZER.encode(part) if isinstance(part, str) else [part]
    return np.stack(np.broadcast_arrays(*columns), axis=-1)


def document(chunks):  # int[B, n, words] -> int[B, 1 + n * words]
    """`<BOS>`, then the n chunks of each row, one after the other."""
    B, n, words = chunks.shape
    return np.concatenate([np.full((B, 1), BOS), chunks.reshape(B, n * words)], axis=1)


def stack_rows(texts):  # int[B_i, L_i] each -> int[sum B_i, max L_i]
    """Texts of several lengths as one array, padded at the end with `<pad>`."""
    L = max(text.shape[1] for text in texts)
    padded = [np.pad(t, ((0, 0), (0, L - t.shape[1])), constant_values=PAD) for t in texts]
    return np.concatenate(padded)


# --- which classes --------------------------------------------------------------------------------

ANY = np.ones((len(COLOURS), len(SHAPES)), bool)  # bool[colour, shape]
GEOMETRIC = ANY & (np.arange(len(SHAPES)) < NUM_GEOMETRIC)
DIGIT = ~GEOMETRIC
# never shown while bridging: a quarter of the coloured shapes, and the digits 7, 8 and 9
HELD_OUT_SHAPES = GEOMETRIC & ((np.add.outer(np.arange(8), np.arange(len(SHAPES))) % 4) == 0)
HELD_OUT_DIGITS = DIGIT & (np.arange(len(SHAPES)) >= len(SHAPES) - 3)
HELD_OUT = HELD_OUT_SHAPES | HELD_OUT_DIGITS
# bool[colour, turned shape]: upright, it is seen in that colour
TURNED_SEEN = ~HELD_OUT[:, [SHAPES.index(word) for word, _ in TURNED]]


def draw_attributes(shape, allowed, rng):  # -> colour, shape, size, int[shape] each
    """One object for each place of an array of the given shape."""
    pairs = np.argwhere(allowed)
    colour, kind = np.moveaxis(pairs[rng.integers(0, len(pairs), shape)], -1, 0)
    return colour, kind, rng.integers(0, len(SIZES), shape)


def draw_pair_attributes(shape, allowed, rng):  # -> colour, shape, size, int[*shape, 2] each
    """Two geometric objects of different shapes, so that "the color of the circle" is one color."""
    colour, kind, size = draw_attributes((*shape, 2), allowed & GEOMETRIC, rng)
    while (same := kind[..., 0] == kind[..., 1]).any():
        again = draw_attributes((same.sum(), 2), allowed & GEOMETRIC, rng)
        colour[same], kind[same], size[same] = again
    return colour, kind, size


class Episode(NamedTuple):
    """n shots over a few classes: colour, shape, name (token ids) and class index, int[B, n]."""

    colour: np.ndarray
    shape: np.ndarray
    name: np.ndarray
    index: np.ndarray


MODES = ("pair", "colour", "shape")  # what tells the classes of an episode apart


def draw_episode(B, n, ways, rng, allowed=ANY, mode=None):
    """Draw `ways` classes and invented names for each of B rows, and n shots of them -> Episode.

    mode "pair": a class is a colour and a shape; "colour" or "shape": the other one is held
    constant within the episode. By default each row draws its own mode. allowed is
    bool[colour, shape], or one such table a row; a row with fewer than `ways` classes in its table
    uses those that there are. A table may have more columns than SHAPES: those of TURNED.
    """
    mode = rng.integers(0, 3, B) if mode is None else np.full(B, MODES.index(mode))
    allowed = np.broadcast_to(allowed, (B, *np.shape(allowed)[-2:]))
    order = np.where(allowed, rng.random(allowed.shape), np.inf)  # classes in a random order
    order[mode == 1] += _all_but_one(order[mode == 1], 1, rng)  # one shape: colours tell apart
    order[mode == 2] += _all_but_one(order[mode == 2], 2, rng)  # one colour: shapes tell apart
    order = order.reshape(B, np.prod(allowed.shape[1:]))
    chosen = np.argsort(order, axis=1)[:, :ways]
    found = np.minimum(np.isfinite(order).sum(axis=1), ways)
    index = (rng.random((B, n)) * found[:, None]).astype(int)
    colour, shape = np.divmod(np.take_along_axis(chosen, index, axis=1), allowed.shape[-1])
    names = NAME_IDS[np.argsort(rng.random((B, len(NAMES))), axis=1)[:, :ways]]
    return Episode(colour, shape, np.take_along_axis(names, index, axis=1), index)


def _all_but_one(order, axis, rng):  # [B, colour, shape] -> 0 in one row or column, else inf
    """Choose, among the rows (axis 2) or columns (axis 1) with at least two classes, one."""
    count = np.isfinite(order).sum(axis=axis)
    kept = np.argmax(np.where(count >= 2, rng.random(count.shape), -1), axis=1)
    kept = np.arange(count.shape[1]) == kept[:, None]
    return np.where(np.expand_dims(kept, axis), 0, np.inf)


# --- sentences: int[...] -> int[..., words] -------------------------------------------------------


def caption(colour, shape, size):
    """a small red circle"""
    return phrase("a", SIZE_IDS[size], COLOUR_IDS[colour], SHAPE_IDS[shape])


def pair_caption(colour, shape, size):  # int[..., 2] each
    """a small red circle and a large blue bar"""
    first, second = (caption(colour[..., i], shape[..., i], size[..., i]) for i in (0, 1))
    return np.concatenate([first, phrase("and", second[..., 0])[..., :1], second], axis=-1)


def question(colour, shape, size, kind):
    """what color ? red <EOC>, or what shape ? ..., what size ? ...; kind int[...] indexes KINDS."""
    answers = np.stack([COLOUR_IDS[colour], SHAPE_IDS[shape], SIZE_IDS[size]])
    answer = np.take_along_axis(answers, kind[None], axis=0)[0]
    return phrase("what", KIND_IDS[kind], "?", answer, "<EOC>")


def pair_question(colour, shape, which):  # int[..., 2], int[..., 2], int[...]
    """what color is circle ? red <EOC>, about the first or the second of two objects."""
    colour, shape = (np.take_along_axis(a, which[..., None], -1)[..., 0] for a in (colour, shape))
    return phrase("what color is", SHAPE_IDS[shape], "?", COLOUR_IDS[colour], "<EOC>")


def motion(direction):
    """moving left"""
    return phrase("moving", DIRECTION_IDS[direction])


def binding(episode):  # Episode of [B, n] -> int[B, 1 + 4 n]
    """red circle dax <EOC>, n times."""
    keys = COLOUR_IDS[episode.colour], SHAPE_IDS[episode.shape]
    return document(phrase(*keys, episode.name, "<EOC>"))


def any_binding(B, n, ways, rng):  # -> int[B, 1 + 4 n]
    """up thing dax <EOC>: binding whose keys are any two words, so that it is learned as such.

    What a language model reads in a picture it has no word for is no pair of a colour and a shape.
    """
    first = len(SPECIAL_TOKENS)
    keys = rng.integers(first, len(TOKENIZER), (B, ways, 2))
    names = NAME_IDS[np.argsort(rng.random((B, len(NAMES))), axis=1)[:, :ways]]
    classes = np.concatenate([keys, names[..., None]], axis=-1)  # [B, ways, 3]
    index = rng.integers(0, ways, (B, n, 1))
    return document(phrase(*np.moveaxis(np.take_along_axis(classes, index, 1), -1, 0), "<EOC>"))


def _closed(sentences):  # int[B, n, words] -> int[B, 1 + n * (words + 1)]
    end = np.full((*sentences.shape[:-1], 1), EOC)
    return document(np.concatenate([sentences, end], axis=-1))


# --- what the language model reads ----------------------------------------------------------------


def text_batch(B, rng, length=48, any_keys=0.0):
    """A batch of texts int[B, L], L <= length: 60 % binding of 2, 3 and up to 6 classes, a share
    `any_keys` of it with any words as keys; the rest captions, questions about one object and about
    two, and motion."""
    shots = (length - 1) // 4
    rows = np.diff(np.round(np.linspace(0, 0.6 * B, 4)).astype(int))
    ways, texts = (2, 3, int(rng.integers(2, 7))), []
    for b, w in zip(rows, ways):
        free = round(b * any_keys)
        texts.append(binding(draw_episode(b - free, shots, w, rng)))
        texts.append(any_binding(free, shots, w, rng))
    rows = np.diff(np.round(np.linspace(0, B - rows.sum(), 5)).astype(int))
    texts.append(_closed(caption(*draw_attributes((rows[0], (length - 1) // 5), ANY, rng))))
    one = draw_attributes((rows[1], (length - 1) // 9), ANY, rng)
    kind = rng.integers(0, len(KINDS), one[0].shape)
    texts.append(document(np.concatenate([caption(*one), question(*one, kind)], axis=-1)))
    two = draw_pair_attributes((rows[2], (length - 1) // 16), ANY, rng)
    which = rng.integers(0, 2, two[0].shape[:-1])
    asked = pair_question(*two[:2], which)
    texts.append(document(np.concatenate([pair_caption(*two), asked], axis=-1)))
    one = draw_attributes((rows[3], (length - 1) // 7), ANY, rng)
    moving = motion(rng.integers(0, len(DIRECTIONS), one[0].shape))
    texts.append(_closed(np.concatenate([caption(*one), moving], axis=-1)))
    return stack_rows(texts)


def long_text_batch(B, rng, any_keys=0.0):
    """Binding alone, 8 to 33 shots of 2 to 8 classes: what 32 shots later rest on."""
    shots, ways, free = int(rng.integers(8, 34)), int(rng.integers(2, 9)), round(B * any_keys)
    words = binding(draw_episode(B - free, shots, ways, rng))
    return np.concatenate([words, any_binding(free, shots, ways, rng)])
