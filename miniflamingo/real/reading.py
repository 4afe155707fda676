"""Asking a real Flamingo many things at once: likelihoods of answers, and answers."""

import numpy as np

from miniflamingo.decoding import DecodingCache
from miniflamingo.functional import log_softmax
from miniflamingo.real.documents import EOC, build
from miniflamingo.real.stages import see
from miniflamingo.worlds.datasets import IGNORED


class Reader:
    """A Flamingo of real parts, its tokenizer and the pictures' features.

    Documents are lists of Shown; those that are asked are read `rows` at a time, alike in length.
    """

    def __init__(self, model, words, features, rows=32):
        self.model, self.words, self.features, self.rows = model, words, features, rows

    def _batches(self, documents):
        """Yield (indices, Batch, media [B, N, R, D_m]), shorter documents first."""
        lengths = [sum(len(s.question) + len(s.answer or "") for s in d) for d in documents]
        order = np.argsort(lengths, kind="stable")
        for first in range(0, len(order), self.rows):
            chosen = order[first : first + self.rows]
            batch = build([documents[i] for i in chosen], self.words)
            yield chosen, batch, see(self.model, *self.features.stacked(batch.pictures))

    def nats(self, documents):
        """-> -log p of each document's targets, summed [n], and how many there are, int[n]."""
        nats, counts = np.zeros(len(documents)), np.zeros(len(documents), int)
        for chosen, batch, media in self._batches(documents):
            learned = batch.targets != IGNORED
            logits = self.model.read(batch.tokens, media, batch.phi, keep=learned)
            targets, each = batch.targets[learned], np.zeros(learned.shape)
            each[learned] = -log_softmax(logits)[np.arange(len(targets)), targets]
            nats[chosen], counts[chosen] = each.sum(axis=1), learned.sum(axis=1)
        return nats, counts

    def answers(self, documents, most=12):
        """What the model writes, greedily, behind documents whose last answer is None -> [str]."""
        answers = [""] * len(documents)
        for chosen, batch, media in self._batches(documents):
            for i, ids in zip(chosen, self._write(batch, media, most)):
                answers[i] = self.words.decode(ids).strip()
        return answers

    def _write(self, batch, media, most):
        """-> the ids of each row, up to `<EOC>`."""
        (B, L), rows = batch.tokens.shape, np.arange(len(batch))
        cache = DecodingCache.of(self.model, media, L + most)
        positions, last = np.tile(np.arange(L), (B, 1)), batch.lengths - 1
        keep = positions == last[:, None]
        logits = self.model.read(batch.tokens, None, batch.phi, cache, positions, keep=keep)
        phi, written = batch.phi[rows, last][:, None], np.full((B, most), EOC)
        for step in range(most):
            written[:, step] = logits.argmax(axis=-1)
            done = (written[:, : step + 1] == EOC).any(axis=1)
            if done.all() or step == most - 1:
                break
            positions = (batch.lengths + step)[:, None]
            logits = self.model.read(written[:, step : step + 1], None, phi, cache, positions)[:, 0]
        return [row[: np.argmax(row == EOC)] if (row == EOC).any() else row for row in written]
