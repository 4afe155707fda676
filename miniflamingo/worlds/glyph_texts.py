"""The words of the glyphs, which have none of their own: what they look like, and invented names.

    tall light holed whole left level lopsided <EOC>          what a glyph looks like: captions
    heavy nine dax <EOC> up ring wug <EOC> heavy nine dax     BINDING: any two words and a name

The vocabulary goes on where the small world's ends, so that one model can speak of both; a model of
the small world alone knows its first words only. Letters: B rows, n shots, C classes, A attributes.
"""

from functools import cache

import numpy as np

from miniflamingo.prompt import SPECIAL_TOKENS, WordTokenizer, split_words
from miniflamingo.worlds import glyphs, grammar
from miniflamingo.worlds.datasets import repeated
from miniflamingo.worlds.grammar import phrase, stack_rows

MORE_NAMES = split_words(
    "plim grox wend yoop fash trill bexa noov kard sploo chim dret umba jolt vell quaz snerd pog "
    "thax rill bink moz zud flen"
)
# what is said of a glyph, in this order; the words left, right, up and down are the small world's
ATTRIBUTES = {
    "proportions": ("wide", "even", "tall"),
    "ink": ("light", "medium", "heavy"),
    "holes": ("open", "holed", "laced"),
    "parts": ("whole", "broken"),
    "across": ("left", "centred", "right"),
    "height": ("up", "level", "down"),
    "mirrored": ("lopsided", "alike", "twinned"),  # left and right
    "tumbled": ("leaning", "steady", "upended"),  # top and bottom
}
NEW = [w for words in ATTRIBUTES.values() for w in words if w not in grammar.WORDS]
TOKENIZER = WordTokenizer((*grammar.WORDS, *NEW, *MORE_NAMES))


def ids_of(words):  # n words -> int[n]
    """The token ids of some words, as an array to be indexed by class."""
    return np.array([TOKENIZER.ids[word] for word in words])


NAME_IDS = ids_of((*grammar.NAMES, *MORE_NAMES))
KEY_IDS = np.setdiff1d(np.arange(len(SPECIAL_TOKENS), len(TOKENIZER)), NAME_IDS)


def tokenizer_of(words):
    """The tokenizer of a model of so many words; ValueError for a number of neither world."""
    for tokenizer in (grammar.TOKENIZER, TOKENIZER):
        if len(tokenizer) == words:
            return tokenizer
    known = f"{len(grammar.TOKENIZER)} or {len(TOKENIZER)}"
    raise ValueError(f"expected a model of {known} words, got one of {words}")


@cache
def descriptions():  # -> int[C, A]
    """The token ids of the words for every class of glyphs.font()."""
    said = glyphs.font().said
    columns = [ids_of(words)[said[:, i]] for i, words in enumerate(ATTRIBUTES.values())]
    return np.stack(columns, axis=1)


# --- what the language model reads ----------------------------------------------------------------


def names_for(B, ways, rng):  # -> int[B, ways]
    """Different invented names for the classes of each row."""
    return NAME_IDS[np.argsort(rng.random((B, len(NAME_IDS))), axis=1)[:, :ways]]


def draw_different(B, n, number, rng):  # -> int[B, n]
    """In each row n different ones of 0, 1, ... number - 1."""
    chosen = rng.integers(0, number, (B, n))
    while (again := repeated(chosen)).any():
        chosen[again] = rng.integers(0, number, again.sum())
    return chosen


def binding(B, n, ways, rng, index=None):  # -> int[B, 1 + 4 n]
    """heavy nine dax <EOC>, n times; index int[B, n] says which of the row's classes, drawn by
    default."""
    pairs = draw_different(B, ways, len(KEY_IDS) ** 2, rng)
    keys = KEY_IDS[np.stack(np.divmod(pairs, len(KEY_IDS)), axis=-1)]
    index = rng.integers(0, ways, (B, n)) if index is None else index
    name = np.take_along_axis(names_for(B, ways, rng), index, axis=1)
    keys = np.take_along_axis(keys, index[..., None], axis=1)
    return grammar.document(phrase(*np.moveaxis(keys, -1, 0), name, "<EOC>"))


def captions(B, n, rng):  # -> int[B, 1 + (A + 1) n]
    """Descriptions of random training glyphs, n in a row."""
    said = descriptions()[rng.choice(glyphs.classes(), (B, n))]
    return grammar.document(phrase(*np.moveaxis(said, -1, 0), "<EOC>"))


def text_batch(B, rng, length=46):
    """A batch of texts int[B, L], L <= length: a fifth captions; binding of 2, 3, and up to 6
    classes."""
    A, shots = len(ATTRIBUTES), (length - 1) // 4
    rows = np.diff(np.round(np.linspace(0, 0.8 * B, 4)).astype(int))
    ways = (2, 3, int(rng.integers(2, 7)))
    texts = [binding(b, shots, w, rng) for b, w in zip(rows, ways)]
    texts.append(captions(B - rows.sum(), (length - 1) // (A + 1), rng))
    return stack_rows(texts)


def long_text_batch(B, rng):
    """Binding alone, 8 to 33 shots of 2 to 8 classes."""
    return binding(B, int(rng.integers(8, 34)), int(rng.integers(2, 9)), rng)
