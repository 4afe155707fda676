"""From logits to text: greedy, sampling, beam search, and ranking by log-likelihood.

All of them drive one `Decoder`, which reads a prompt and then token after token. With a cache it
keeps each layer's keys and values of the past tokens AND each image's projected keys and values, so
that a new token costs one row of work; without one it reads everything again, and must agree.

Letters: B batch, L tokens, M new tokens, V words, W beams, C candidates.
"""

from dataclasses import dataclass

import numpy as np

from miniflamingo.attention import KeyValueCache
from miniflamingo.functional import log_softmax, softmax
from miniflamingo.prompt import BOS, EOC, IMAGE, PAD
from miniflamingo.xattn import compute_phi


@dataclass
class DecodingCache:
    """The past tokens' keys and values and each image's projected ones, for `length` tokens."""

    tokens: list  # a KeyValueCache for each LM block
    media: list  # (k, v), [B, N, R, H, K] each, for each inserted layer
    length: int

    @classmethod
    def of(cls, model, media, length):
        """Room for `length` tokens; media [B, N, R, D_m] is projected once, here."""
        lm = model.config.lm
        shape = (len(media), length, *lm.kv_shape, media.dtype)
        projected = [layer.project_media(media) for layer in model.gated_xattn]
        return cls([KeyValueCache(*shape) for _ in range(lm.depth)], projected, length)

    def select(self, rows):
        """Keep (or repeat) the given batch rows."""
        for cache in self.tokens:
            cache.select(rows)
        self.media = [(k[rows], v[rows]) for k, v in self.media]


class Decoder:
    """A batch of sequences being written: B rows, each with its own length, images and phi.

    `logits` [B, V] is what the model says of each row's next token. A row that writes `<image>`
    moves on to its next image; the others are not touched. ValueError when it has no further one.
    """

    def __init__(self, model, batch, max_new_tokens, cached=True):
        self.model, self.num_images = model, np.asarray(batch.num_images)
        there = np.arange(batch.pixels.shape[1]) < self.num_images[:, None]
        features = model.encode(batch.pixels, np.where(there, batch.num_frames, 0))
        self.media = model.resampler(features, batch.num_frames)
        B, L = batch.tokens.shape
        self.tokens = np.full((B, L + max_new_tokens), PAD)
        self.tokens[:, :L], self.lengths = batch.tokens, np.zeros(B, int)
        self.cache = DecodingCache.of(model, self.media, L + max_new_tokens) if cached else None
        logits = self.extend(batch.tokens)
        # the padding behind a row's end was read too; what comes next takes its place
        self.lengths = np.array(batch.lengths)
        self.logits = logits[np.arange(B), self.lengths - 1]

    def extend(self, new):
        """Append new int[B, M] to the rows; returns the logits behind each of them, [B, M, V]."""
        rows, M = np.arange(len(new))[:, None], new.shape[1]
        positions = self.lengths[:, None] + np.arange(M)
        tokens = self.tokens.copy()
        tokens[rows, positions] = new
        phi = compute_phi(tokens, IMAGE, num_images=self.num_images)
        self.tokens, self.lengths = tokens, self.lengths + M
        if self.cache is None:
            logits = self.model.read(self.tokens, self.media, phi)[rows, positions]
        else:
            logits = self.model.read(new, None, phi[rows, positions], self.cache, positions)
        self.logits = logits[:, -1]
        return logits

    def allowed_logits(self):
        """logits [B, V]; -inf for `<pad>`, `<BOS>`, and `<image>` in rows without a next one."""
        logits = self.logits.copy()
        logits[:, [PAD, BOS]] = -np.inf
        tags = (self.tokens == IMAGE).sum(axis=1)
        logits[tags >= self.num_images, IMAGE] = -np.inf
        return logits

    def select(self, rows):
        """Keep (or repeat) the given rows, for beams and candidates."""
        for name in ("num_images", "media", "tokens", "lengths", "logits"):
            setattr(self, name, getattr(self, name)[rows])
        if self.cache is not None:
            self.cache.select(rows)


# --- how to choose a token: (logits [B, V], rng) -> int[B] ----------------------------------------


def greedy(logits, rng=None):
    """The most likely token."""
    return logits.argmax(axis=-1)


def temperature(t=1.0):
    """Sample from softmax(logits / t); ValueError unless t > 0."""
    _check_temperature(t)
    return lambda logits, rng: _sample(softmax(logits / t), rng)


def _check_temperature(t):
    if not t > 0:
        raise ValueError(f"temperature must be above 0, got {t}")


def top_k(k, t=1.0):
    """Sample among the k most likely tokens; ValueError unless k >= 1 and t > 0."""
    _check_temperature(t)
    if k < 1:
        raise ValueError(f"top-k needs k >= 1, got {k}")

    def choose(logits, rng):
        least = np.sort(logits, axis=-1)[:, -min(k, logits.shape[-1])][:, None]
        return temperature(t)(np.where(logits >= least, logits, -np.inf), rng)

    return choose


def nucleus(p, t=1.0):
    """Sample among the fewest tokens whose probabilities reach p (Holtzman et al., 2020).

    ValueError unless 0 < p <= 1 and t > 0.
    """
    _check_temperature(t)
    if not 0 < p <= 1:
        raise ValueError(f"nucleus sampling needs 0 < p <= 1, got {p}")

    def choose(logits, rng):
        probabilities = softmax(logits / t)
        order = np.argsort(-probabilities, axis=-1)
        ordered = np.take_along_axis(probabilities, order, axis=-1)
        keep = np.cumsum(ordered, axis=-1) - ordered < p  # what comes before has not reached p
        kept = np.zeros_like(probabilities)
        np.put_along_axis(kept, order, ordered * keep, axis=-1)
        return _sample(kept / kept.sum(axis=-1, keepdims=True), rng)

    return choose


def _sample(probabilities, rng):  # [B, V] -> int[B]
    """Invert the cumulative distribution at one uniform number a row."""
    cumulative = np.cumsum(probabilities, axis=-1)
    u = rng.random((len(probabilities), 1)) * cumulative[:, -1:]
    return (cumulative <= u).sum(axis=-1)


# --- whole answers ------------------------------------------------------------------------------


def stream(model, batch, max_new_tokens=20, choose=greedy, cached=True, rng=None):
    """Yield each row's next token, int[B], one step at a time; `<pad>` behind a row's `<EOC>`.

    Ends when every row has written `<EOC>`, or after max_new_tokens. choose is greedy,
    temperature(t), top_k(k, t) or nucleus(p, t); the last three need an rng. ValueError unless
    max_new_tokens >= 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    decoder = Decoder(model, batch, max_new_tokens, cached)
    done = np.zeros(len(batch.tokens), bool)
    for step in range(max_new_tokens):
        token = np.where(done, PAD, choose(decoder.allowed_logits(), rng))
        yield token
        done |= token == EOC
        if done.all() or step == max_new_tokens - 1:
            return
        decoder.extend(token[:, None])


def generate(model, batch, max_new_tokens=20, choose=greedy, cached=True, rng=None):
    """What `stream` writes, as a list of ids for each row, without `<EOC>`."""
    steps = list(stream(model, batch, max_new_tokens, choose, cached, rng))
    return [[int(i) for i in row if i not in (PAD, EOC)] for row in np.transpose(steps)]


def beam_search(model, batch, max_new_tokens=20, width=3, cached=True):
    """The paper's open-ended decoding: keep the `width` most likely beginnings of every row.

    Returns ids (without `<EOC>`) and log-probability (with it) of the best: [(ids, float)] * B.
    """
    if width < 1:
        raise ValueError(f"beam search needs width >= 1, got {width}")
    B, W, V = len(batch.tokens), width, model.config.lm.vocab_size
    decoder = Decoder(model, batch, max_new_tokens, cached)
    decoder.select(np.repeat(np.arange(B), W))
    written, done = np.zeros((B * W, 0), int), np.zeros(B * W, bool)
    scores = np.tile([0.0] + [-np.inf] * (W - 1), (B, 1))  # the beams of a row start out equal
    for step in range(max_new_tokens):
        logp = log_softmax(decoder.allowed_logits().astype(np.float64))
        logp[done] = np.where(np.arange(V) == PAD, 0, -np.inf)  # a finished beam stays as it is
        total = (scores[:, :, None] + logp.reshape(B, W, V)).reshape(B, W * V)
        best = np.argsort(-total, axis=1, kind="stable")[:, :W]
        scores = np.take_along_axis(total, best, axis=1)
        rows = (np.arange(B)[:, None] * W + best // V).ravel()
        # with fewer ways to go on than beams, a beam that cannot be is left over: it ends here
        token = np.where(np.isneginf(scores), EOC, best % V).ravel()
        written = np.concatenate([written[rows], token[:, None]], axis=1)
        done = done[rows] | (token == EOC)
        if done.all() or step == max_new_tokens - 1:
            break
        decoder.select(rows)
        decoder.extend(np.where(done, PAD, token)[:, None])
    best_beam = written.reshape(B, W, -1)[:, 0]  # beams are sorted by score
    answers = [[int(i) for i in row if i not in (PAD, EOC)] for row in best_beam]
    return list(zip(answers, scores[:, 0].tolist()))


def log_likelihood(model, batch, candidates, cached=True):
    """log p(candidate | prompt) of C candidates (lists of ids), [B, C]; ValueError if one is empty.

    The paper's close-ended evaluation ranks the answers by it. Put `<EOC>` at the end of a
    candidate to count that it ends there.
    """
    if not all(len(candidate) for candidate in candidates):
        raise ValueError(f"a candidate needs at least one token, got {candidates}")
    B, C, M = len(batch.tokens), len(candidates), max(map(len, candidates))
    tokens = np.full((C, M), PAD)
    for row, candidate in zip(tokens, candidates):
        row[: len(candidate)] = candidate
    counted = np.arange(M) < np.array([len(candidate) for candidate in candidates])[:, None]
    decoder = Decoder(model, batch, M, cached)
    decoder.select(np.repeat(np.arange(B), C))
    tokens, counted = np.tile(tokens, (B, 1)), np.tile(counted, (B, 1))
    first = decoder.logits[:, None]
    logits = np.concatenate([first, decoder.extend(tokens)[:, :-1]], axis=1)
    logp = np.take_along_axis(log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
    return (logp * counted).sum(axis=1).reshape(B, C)
