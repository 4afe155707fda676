"""Pictures and words together: what the encoder, the bridge and the evaluation read.

The bridge only ever sees features of the frozen encoder, so a `Pool` of pictures is drawn and
encoded once, and every document points into it. A document is a row of tokens in which each
`<image>` stands for one picture of the pool. Letters: B batch, L tokens, N pictures in a document,
T frames, S features of a frame, D_v their width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from miniflamingo.prompt import IMAGE, PAD
from miniflamingo.worlds import shapes
from miniflamingo.worlds.grammar import (
    ANY,
    COLOUR_IDS,
    DIRECTION_IDS,
    HELD_OUT,
    KINDS,
    TURNED_SEEN,
    caption,
    document,
    draw_attributes,
    draw_episode,
    draw_pair_attributes,
    motion,
    pair_caption,
    pair_question,
    phrase,
    question,
    stack_rows,
)

IGNORED = -100  # a target that counts for nothing
SEEN = ~HELD_OUT  # bool[colour, shape], the classes that the bridge is trained on
WORDLESS = np.concatenate([SEEN, TURNED_SEEN], axis=1)  # and those that have no word, for binding
CHUNK = 256  # pictures that are encoded at a time
GROUP = 8  # rows of a contrastive batch that differ in one shape alone


# --- contrastive pairs ----------------------------------------------------------------------------


def contrastive_batch(B, rng, clutter=0):
    """Pictures [B, 24, 24, 3] and their captions int[B, L]: half one object, half two.

    A single object is placed in one quarter of the picture and its caption ends with "up left" and
    so on, so that the features keep the place: motion is read off it later. Rows come in groups of
    GROUP that differ in one shape alone; otherwise colour and place would tell most pictures of a
    batch apart, and shapes would hardly be learned.
    """
    half = B // 2
    colour, shape, size = draw_attributes((half,), ANY, rng)
    down, right = rng.integers(0, 2, (2, half))
    colour, size, down, right = (_same_in_group(a) for a in (colour, size, down, right))
    shape = _different_in_group(half, len(shapes.SHAPES), rng)
    low, high = rng.uniform(5.5, 8.5, (2, half)), rng.uniform(14.5, 17.5, (2, half))
    x, y = np.where([right, down], high, low)
    places = phrase(DIRECTION_IDS[2 + down], DIRECTION_IDS[right])
    singles = shapes.draw_objects(colour, shape, size, rng, centre=(x, y), clutter=clutter)
    two = _pair_groups(B - half, rng)
    pictures = np.concatenate([singles, shapes.draw_pairs(*two, rng, clutter=clutter)])
    texts = [np.concatenate([caption(colour, shape, size), places], axis=-1), pair_caption(*two)]
    return pictures, stack_rows(texts)


def _pair_groups(B, rng):
    """Attributes of two objects, int[B, 2] each; in a group, one object's shape is what differs."""
    colour, shape, size = (_same_in_group(a) for a in draw_pair_attributes((B,), ANY, rng))
    varied = _same_in_group(rng.integers(0, 2, B)), np.arange(B)
    shape[varied[::-1]] = _different_in_group(B, shapes.NUM_GEOMETRIC, rng)
    return colour, shape, size


def _same_in_group(values):  # [B, ...] -> each group has its first row's value
    return values[np.arange(len(values)) // GROUP * GROUP].copy()


def _different_in_group(B, classes, rng):  # -> int[B]
    """Random classes in [0, classes), each at most once (or as rarely as can be) in a group."""
    groups = -(-B // GROUP)
    order = np.argsort(rng.random((groups, classes)), axis=1)
    return np.tile(order, (1, -(-GROUP // classes)))[:, :GROUP].ravel()[:B]


# --- the pool -------------------------------------------------------------------------------------


@dataclass
class Pool:
    """Labelled pictures and the frozen encoder's features of them.

    counts int[colour, shape (+ turned)] says how many pictures of one object there are of each
    class; objects (colour, shape, size) int[n1] are their labels, class by class; pairs, the same,
    int[n2, 2]; clips (colour, shape, size, direction) int[n3]; images [n1 + n2, 1, S, D_v];
    videos [n3, T, S, D_v].

    distinct: no document shows a picture twice, so that none that is asked about has stood before,
    with its answer; nor, of one class, two pictures of the same handwritten digit. Evaluation needs
    that. Training may meet a picture again (distinct=False).
    """

    counts: np.ndarray
    objects: tuple
    pairs: tuple
    clips: tuple
    images: np.ndarray
    videos: np.ndarray
    distinct: bool = True

    @classmethod
    def draw(cls, encoder, seed, split="train", per_class=100, pairs=4000, clips=1200,
             classes=ANY, per_turned=0, progress=lambda x: x, distinct=True,
             clutter=0):  # fmt: skip
        """Draw and encode a pool of the classes bool[colour, shape], and of turned shapes.

        encoder maps pictures [B, 24, 24, 3] to features [B, S, D_v]. A distinct pool has no more
        pictures of a class than the split has handwritten images of it.
        """
        rng = np.random.default_rng(seed)
        counts = np.concatenate([per_class * classes, per_turned * TURNED_SEEN], axis=1)
        counts, glyph = _each_glyph_once(counts, split, rng) if distinct else (counts, None)
        every = np.repeat(np.arange(counts.size), counts.ravel())
        objects = (*np.divmod(every, counts.shape[1]), rng.integers(0, 2, len(every)))
        pairs = draw_pair_attributes((pairs,), classes, rng)
        moving = (*draw_attributes((clips,), classes, rng), rng.integers(0, 4, clips))
        kinds = ((shapes.draw_objects, objects), (shapes.draw_pairs, pairs),
                 (shapes.draw_clips, moving))  # fmt: skip
        work = [(draw, labels, slice(i, i + CHUNK))
                for draw, labels in kinds for i in range(0, len(labels[0]), CHUNK)]  # fmt: skip
        images, videos = [], []
        for draw, labels, rows in progress(work):
            chosen = {"glyph": glyph[rows]} if distinct and draw is shapes.draw_objects else {}
            chosen |= {"split": split, "clutter": clutter}
            pictures = draw(*(label[rows] for label in labels), rng, **chosen)
            (videos if draw is shapes.draw_clips else images).append(
                encode_pictures(encoder, pictures)
            )
        arrays = np.concatenate(images), np.concatenate(videos)
        return cls(counts, objects, pairs, moving, *arrays, distinct)

    def pick(self, colour, shape, rng):
        """Random pictures of one object of the given classes: indices into `images`, int[..., N].

        The last axis is a document. ValueError for a class with too few pictures for it.
        """
        place = colour * self.counts.shape[1] + shape
        counts = self.counts.ravel()
        starts, counts = (np.cumsum(counts) - counts)[place], counts[place]
        same = place[..., None] == place[..., None, :]
        needed = same.sum(axis=-1) if self.distinct else np.ones_like(counts)
        if (short := needed > counts).any():
            raise ValueError(
                f"a document needs {needed[short][0]} different pictures of one class, the pool "
                f"has {counts[short][0]}: draw a pool with more per class"
            )
        picked = starts + rng.integers(0, counts)
        return self._apart(picked, lambda again: starts[again] + rng.integers(0, counts[again]))

    def pick_pairs(self, size, rng, held_out=False):
        """Random pairs, both of whose classes are SEEN (or, held_out, not both): int[size]."""
        seen = SEEN[self.pairs[0], self.pairs[1]].all(axis=-1)
        return self._pick_any(np.flatnonzero(seen != held_out), size, rng)

    def pick_clips(self, size, rng):
        """Random clips, indices into `videos`, int[size]; size is (..., N)."""
        return self._pick_any(np.arange(len(self.clips[0])), size, rng)

    def _pick_any(self, candidates, size, rng):
        if self.distinct and size[-1] > (most := len(candidates)):
            raise ValueError(f"a document needs {size[-1]} different ones, the pool has {most}")
        picked = rng.choice(candidates, size)
        return self._apart(picked, lambda again: rng.choice(candidates, again.sum()))

    def _apart(self, picked, redraw):
        """Draw again what stands twice in a document, until nothing does.

        No picture is treated unlike another, so all choices without repetition are equally likely.
        """
        while self.distinct and (again := repeated(picked)).any():
            picked[again] = redraw(again)
        return picked


def repeated(pictures):  # int[..., N] -> bool[..., N]
    """Which pictures stand once more further to the right, in the same row."""
    same = pictures[..., :, None] == pictures[..., None, :]
    return np.triu(same, 1).any(axis=-1)


def _each_glyph_once(counts, split, rng):
    """Reduce counts int[colour, shape] to the handwritten images that there are, and choose one
    for every picture, none twice in a class -> counts, int[counts.sum()]."""
    most = np.broadcast_to(shapes.variety(split)[: counts.shape[1]], counts.shape)
    counts = np.minimum(counts, most)
    chosen = [rng.choice(m, n, replace=False) for m, n in zip(most.flat, counts.flat)]
    return counts, np.concatenate(chosen)


def encode_pictures(encoder, pictures):
    """Pictures [B, (T,) 24, 24, 3] -> features [B, T, S, D_v], T = 1 for images, chunk by chunk."""
    frames = pictures.reshape(-1, *pictures.shape[-3:])
    parts = [encoder(frames[i : i + CHUNK]) for i in range(0, len(frames), CHUNK)]
    return np.concatenate(parts).reshape(len(pictures), -1, *parts[0].shape[1:])


class Documents(NamedTuple):
    """Rows of tokens and the pictures that their `<image>` tags stand for.

    tokens int[B, L]; targets int[B, L], the tokens that count in the loss, IGNORED elsewhere;
    pictures int[B, N], indices into the pool's `source`, "images" or "videos"; use_next bool[B],
    the rows in which a text stands before its picture.
    """

    tokens: np.ndarray
    targets: np.ndarray
    pictures: np.ndarray
    source: str
    use_next: np.ndarray


def documents_of(chunks, pictures, uncounted=None, source="images"):
    """chunks int[B, N, words], one after each picture of int[B, N] -> Documents.

    No loss is taken on `<pad>` and `<image>`, nor where uncounted bool[B, N, words].
    """
    tokens = document(chunks)
    ignored = (tokens == PAD) | (tokens == IMAGE)
    if uncounted is not None:
        ignored[:, 1:] |= uncounted.reshape(ignored[:, 1:].shape)
    previous = np.zeros(len(tokens), bool)
    return Documents(tokens, np.where(ignored, IGNORED, tokens), pictures, source, previous)


def together(parts):
    """Several Documents of one source and of equally many pictures as one."""
    targets = [np.where(p.targets == IGNORED, PAD, p.targets) for p in parts]
    targets = np.where((padded := stack_rows(targets)) == PAD, IGNORED, padded)
    pictures, use_next = (np.concatenate([p[i] for p in parts]) for i in (2, 4))
    tokens = stack_rows([p.tokens for p in parts])
    return Documents(tokens, targets, pictures, parts[0].source, use_next)


def text_first(documents, rows):  # rows bool[B]
    """Put the texts of some rows before their pictures (the paper's augmentation, p_next).

    <BOS><image>dax<EOC><image>wug<EOC> becomes <BOS>dax<EOC><image>wug<EOC><image>.
    """
    tokens, targets = documents.tokens.copy(), documents.targets.copy()
    for b in np.flatnonzero(rows):
        end = 1 + np.flatnonzero(tokens[b] != PAD)[-1]
        for array in (tokens, targets):
            array[b, 1:end] = np.roll(array[b, 1:end], -1)
    use_next = documents.use_next | rows
    return documents._replace(tokens=tokens, targets=targets, use_next=use_next)


# --- datasets: N pictures a document --------------------------------------------------------------


def binding_documents(pool, B, N, ways, rng, allowed=SEEN, mode=None):
    """<image> this dax <EOC>, N times: the picture's twin of a binding episode, and the Episode."""
    episode = draw_episode(B, N, ways, rng, allowed, mode)
    pictures = pool.pick(episode.colour, episode.shape, rng)
    return documents_of(phrase("<image> this", episode.name, "<EOC>"), pictures), episode


def caption_documents(pool, B, N, rng, allowed=SEEN, noise=0.0):
    """<image> a small red circle <EOC>. With probability `noise` the colour word is another one.

    Such a word is not counted in the loss; what follows it must be read off the picture, not off
    the colours that a shape was seen in. That is what makes new combinations readable.
    """
    colour, shape, _ = draw_attributes((B, N), allowed, rng)
    pictures = pool.pick(colour, shape, rng)
    wrong = rng.random((B, N)) < noise
    said = np.where(wrong, rng.integers(0, len(COLOUR_IDS), (B, N)), colour)
    chunks = phrase("<image>", *np.moveaxis(caption(said, shape, pool.objects[2][pictures]), -1, 0),
                    "<EOC>")  # fmt: skip
    uncounted = np.zeros(chunks.shape, bool)
    uncounted[..., 3] = wrong
    return documents_of(chunks, pictures, uncounted)


def question_documents(pool, B, N, rng, allowed=SEEN, kind=None):
    """<image> what color ? red <EOC>; kind indexes KINDS, drawn by default."""
    colour, shape, _ = draw_attributes((B, N), allowed, rng)
    pictures = pool.pick(colour, shape, rng)
    kind = rng.integers(0, len(KINDS), (B, N)) if kind is None else np.full((B, N), kind)
    asked = question(colour, shape, pool.objects[2][pictures], kind)
    return documents_of(phrase("<image>", *np.moveaxis(asked, -1, 0)), pictures)


def pair_question_documents(pool, B, N, rng, held_out=False):
    """<image> what color is circle ? red <EOC>, of two objects; held_out: see Pool.pick_pairs."""
    chosen = pool.pick_pairs((B, N), rng, held_out)
    colour, shape, _ = (label[chosen] for label in pool.pairs)
    asked = pair_question(colour, shape, rng.integers(0, 2, (B, N)))
    chunks = phrase("<image>", *np.moveaxis(asked, -1, 0))
    return documents_of(chunks, len(pool.objects[0]) + chosen)


def pair_caption_documents(pool, B, N, rng, held_out=False):
    """<image> a small red circle and a large blue bar <EOC>; held_out: see Pool.pick_pairs."""
    chosen = pool.pick_pairs((B, N), rng, held_out)
    said = pair_caption(*(label[chosen] for label in pool.pairs))
    chunks = phrase("<image>", *np.moveaxis(said, -1, 0), "<EOC>")
    return documents_of(chunks, len(pool.objects[0]) + chosen)


def clip_documents(pool, B, N, rng):
    """<image> moving left <EOC>, of a clip."""
    chosen = pool.pick_clips((B, N), rng)
    said = motion(pool.clips[3][chosen])
    chunks = phrase("<image>", *np.moveaxis(said, -1, 0), "<EOC>")
    return documents_of(chunks, chosen, source="videos")


def interleaved_documents(pool, B, rng, N=5, noise=0.0, wordless=0.0):
    """The small world's web pages: N pictures each, half binding of 2, 3 or 5 classes; an eighth
    each captions and questions about one object; a quarter questions about one of two.

    A share `wordless` of the binding episodes has turned shapes among its classes, so that a name
    must be bound to what is seen and not to what it is called.
    """
    rows, parts = np.diff(np.round(np.linspace(0, B // 2, 4)).astype(int)), []
    turned = np.arange(WORDLESS.shape[1]) >= SEEN.shape[1]
    for b, ways in zip(rows, (2, 3, 5)):
        allowed = WORDLESS & ~(turned & (rng.random((b, 1, 1)) >= wordless))
        parts.append(binding_documents(pool, b, N, ways, rng, allowed)[0])
    rest = B - B // 2
    parts.append(caption_documents(pool, rest // 4, N, rng, noise=noise))
    parts.append(question_documents(pool, rest // 4, N, rng))
    parts.append(pair_question_documents(pool, rest - 2 * (rest // 4), N, rng))
    return together(parts)
