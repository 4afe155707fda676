"""Pictures of glyphs and words together: what the bridge learns names from, and what it is asked.

    <image> this dax <EOC><image> this wug <EOC> ... <image> this dax <EOC>       binding
    <image> tall light holed whole left level lopsided <EOC>                     captions

Letters: B rows, N pictures of a document, C classes, S features of a picture, D_v their width.
"""

from dataclasses import dataclass

import numpy as np

from miniflamingo.worlds import glyphs
from miniflamingo.worlds.datasets import CHUNK, documents_of, repeated, together
from miniflamingo.worlds.glyph_texts import NAME_IDS, descriptions, draw_different, names_for
from miniflamingo.worlds.grammar import phrase


@dataclass
class GlyphPool:
    """`per` pictures of each of some classes int[C], as features glyphs [C * per, 1, S, D_v].

    distinct: no document shows a picture twice, as in datasets.Pool.
    """

    classes: np.ndarray
    per: int
    glyphs: np.ndarray
    distinct: bool = True

    @classmethod
    def draw(cls, encoder, seed, classes, per, progress=lambda x: x, distinct=True):
        """Draw and encode; encoder maps [B, 24, 24, 3] to features [B, S, D_v]."""
        rng, every = np.random.default_rng(seed), np.repeat(classes, per)
        starts = progress(range(0, len(every), CHUNK))
        parts = [encoder(glyphs.draw(every[i : i + CHUNK], rng)) for i in starts]
        return cls(np.asarray(classes), per, np.concatenate(parts)[:, None], distinct)

    def pick(self, rows, rng):
        """Pictures of the pool's classes by their place in it: int[B, N] -> int[B, N].

        ValueError where a distinct pool has fewer pictures of a class than a row needs.
        """
        picked = rows * self.per + rng.integers(0, self.per, rows.shape)
        if not self.distinct:
            return picked
        needed = (rows[..., None] == rows[..., None, :]).sum(axis=-1).max()
        if needed > self.per:
            raise ValueError(
                f"a document needs {needed} different pictures of one class, the pool has "
                f"{self.per}: draw a pool with more per class"
            )
        while (again := repeated(picked)).any():
            picked[again] = rows[again] * self.per + rng.integers(0, self.per, again.sum())
        return picked


def contrastive_batch(B, classes, rng):
    """Two pictures of each of B of the classes int[C], [B, 24, 24, 3] * 2, and different classes as
    far as there are so many."""
    chosen = rng.permutation(classes)[:B]
    return glyphs.draw(chosen, rng), glyphs.draw(chosen, rng)


# --- episodes -------------------------------------------------------------------------------------


def draw_index(B, ways, shots, rng, each=False):  # -> int[B, shots + 1]
    """Which of a row's classes its shots are of, and the query behind them; each: the first shots
    are one of each class, in a random order."""
    index = rng.integers(0, ways, (B, shots + 1))
    if each:
        index[:, :ways] = np.argsort(rng.random((B, ways)), axis=1)
    return index


def binding_documents(pool, index, rng, names=None):
    """<image> this dax <EOC>, N times, of episodes index int[B, N] -> Documents, names int[B, N].

    Classes, their pictures and their names are drawn for each row; names int[C], where given, are
    the same in every row.
    """
    B, ways = len(index), int(index.max()) + 1
    rows = np.take_along_axis(draw_different(B, ways, len(pool.classes), rng), index, axis=1)
    drawn = names_for(B, ways, rng)
    said = np.take_along_axis(drawn, index, axis=1) if names is None else names[rows]
    chunks = phrase("<image> this", said, "<EOC>")
    return documents_of(chunks, pool.pick(rows, rng), source="glyphs"), said


def glyph_documents(pool, B, rng, N=5, ways=(2, 3, 4, 4), bursts=1.0):
    """Binding documents of N pictures for training -> Documents.

    A share `bursts` of the rows are episodes: few classes, shown again and again, with names for
    this row alone. They are of so many classes as `ways` says, in equal parts; with N - 1 classes
    each is shown once, and the last picture is of one of them. The other rows show N different
    classes, each under the name that it has in all of them.
    """
    bursty = round(bursts * B)
    rows = np.diff(np.round(np.linspace(0, bursty, len(ways) + 1)).astype(int))
    most, parts = len(pool.classes), []
    for b, w in zip(rows, ways):
        w = min(w, most)
        parts.append((draw_index(b, w, N - 1, rng, each=w == N - 1), None))
    if bursty < B:
        fixed = NAME_IDS[np.random.default_rng(1).integers(0, len(NAME_IDS), most)]
        each = np.tile(np.arange(min(N, most)), (B - bursty, N))[:, :N]
        parts.append((each, fixed))
    drawn = [binding_documents(pool, i, rng, fixed)[0] for i, fixed in parts if len(i)]
    return together(drawn)


def glyph_captions(pool, B, rng):
    """<image> tall light ... <EOC>, one picture a row -> Documents."""
    rows = rng.integers(0, len(pool.classes), (B, 1))
    said = descriptions()[pool.classes[rows]]
    chunks = phrase("<image>", *np.moveaxis(said, -1, 0), "<EOC>")
    return documents_of(chunks, pool.pick(rows, rng), source="glyphs")
