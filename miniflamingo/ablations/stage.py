"""Train one row with one seed, and ask it.

Every row of a seed starts from the same frozen parts, reads the same pictures, and is asked the
same, about other pictures. They are cluttered: what the resampler has to leave out.
"""

from functools import cached_property
from pathlib import Path

import numpy as np

from miniflamingo.ablations.rows import ALL, STEPS, config
from miniflamingo.attention import TransformerBlock
from miniflamingo.flamingo import Flamingo, ShapesOnly
from miniflamingo.functional import norm_named
from miniflamingo.language import LanguageModel
from miniflamingo.prompt import IMAGE
from miniflamingo.training import BridgeStage
from miniflamingo.vision import NormalizerFreeResNet
from miniflamingo.worlds import datasets, grammar
from miniflamingo.worlds.datasets import SEEN, Pool
from miniflamingo.worlds.grammar import GEOMETRIC
from miniflamingo.xattn import compute_phi, tanh_gate

CLASSES, SHOTS = SEEN & GEOMETRIC, (1, 4, 8, 16)

# --- models that no config describes --------------------------------------------------------------


class VanillaFlamingo(Flamingo):
    """Cross-attention inside the frozen blocks, as in the original Transformer's decoder: between
    self-attention and feed-forward, gated, without a feed-forward of its own."""

    def read(self, tokens, media, phi):
        """As Flamingo.read, without a cache."""
        positions = np.arange(tokens.shape[1])[None]
        bias, x = self.lm.causality(positions, tokens.shape[1]), self.lm.embed(tokens, positions)
        for layer, block in zip(self.gated_xattn, self.lm.blocks):
            x = x + block.attention(block.norm(x), None, None, bias, None, positions)
            seen = layer.attention(layer.norm(x), layer.project_media(media), phi)
            x = tanh_gate(x, layer.alpha_xattn, seen)
            x = x + block.ffw(x)
        return self.lm.predict(x)


class GraftedFlamingo(Flamingo):
    """New layers on top of the whole frozen LM: a gated layer and a block of its own, for each."""

    def read(self, tokens, media, phi):
        """As Flamingo.read, without a cache."""
        positions = np.arange(tokens.shape[1])[None]
        bias, x = self.lm.causality(positions, tokens.shape[1]), self.lm.embed(tokens, positions)
        for block in self.lm.blocks:
            x = block(x, None, bias, None, positions)
        for layer, block in zip(self.gated_xattn, self.grafted):
            x = block(layer(x, media, phi), None, bias, None, positions)
        return self.lm.predict(x)


def _as(kind, model):
    """A Flamingo of another kind with the parts of this one."""
    new = kind(model.config, rng=ShapesOnly())
    for part in ("vision_encoder", "resampler", "gated_xattn", "lm"):
        setattr(new, part, getattr(model, part))
    return new


def vanilla(model, rng):
    """A VanillaFlamingo of a Flamingo's parts; what it does not use is not trained."""
    model = _as(VanillaFlamingo, model)
    for layer in model.gated_xattn:
        layer.ffw.freeze()
        layer.alpha_dense.requires_grad = False
    return model


def grafted(model, rng):
    """A GraftedFlamingo of a Flamingo's parts."""
    lm, model = model.lm.config, _as(GraftedFlamingo, model)
    norm = norm_named(*lm.block_norm)
    model.grafted = [
        TransformerBlock(lm.dim, lm.heads, norm=norm, out_scale=(4 * lm.depth) ** -0.5,
                         **lm.block_options(), rng=rng)
        for _ in model.gated_xattn
    ]  # fmt: skip
    return model


def no_gate(model, rng):
    """tanh(20) = 1, and never trained."""
    for alpha in (a for g in model.gated_xattn for a in (g.alpha_xattn, g.alpha_dense)):
        alpha.data, alpha.requires_grad = np.full((), 20, np.float32), False
    return model


def lm_tuned(model, rng):
    """The language model learns, too."""
    model.lm.unfreeze()
    return model


def lm_from_scratch(model, rng):
    """The language model knows nothing at first, and learns."""
    model.lm = LanguageModel(model.config.lm, rng=rng)
    return model


def encoder_random(model, rng):
    """The encoder knows nothing, and stays so."""
    model.vision_encoder = NormalizerFreeResNet(model.config.vision, rng=rng).freeze()
    return model


def encoder_tuned(model, rng):
    """The encoder learns, too."""
    model.vision_encoder.unfreeze()
    return model


def no_time_embeddings(model, rng):
    """Frames are a set."""
    table = model.resampler.time_embeddings
    table.data, table.requires_grad = np.zeros_like(table.data), False
    return model


CHANGES = {
    "vanilla": vanilla, "grafting": grafted, "no gate": no_gate, "LM tuned": lm_tuned,
    "LM from scratch": lm_from_scratch, "encoder random": encoder_random,
    "encoder tuned": encoder_tuned, "no time embeddings": no_time_embeddings,
}  # fmt: skip


# --- the stage ------------------------------------------------------------------------------------


class Ablation(BridgeStage):
    """The stage that trains one row. parts: the folder of the frozen parts, `lm3`, `lm6`, `lm12`
    and `vision`. ValueError for an unknown row.
    """

    def __init__(self, row, parts, seed=0, steps=STEPS, progress=False):
        if row not in ALL:
            raise ValueError(f"row must be one of {', '.join(ALL)}, got {row!r}")
        self.row, lm = row, parts / f"lm{ALL[row].depth}"
        super().__init__(config(row, seed, steps), lm, parts / "vision", progress)
        if change := CHANGES.get(ALL[row].kind):
            self.model = change(self.model, np.random.default_rng([seed, 3]))

    def identity(self):
        return super().identity() | {"row": self.row}

    @property
    def has_twin(self):
        """Whether the model is one that torch has, too, and its encoder frozen."""
        standard = type(self.model) is Flamingo and self.config.model.resampler == "perceiver"
        return standard and not self.sees

    @property
    def sees(self):
        """Whether the encoder learns: then the pool has pictures and no features."""
        return any(p.requires_grad for p in self.model.vision_encoder.parameters())

    @cached_property
    def pool(self):
        return self.draw_pool([self.config.seed, 2], "train", self.config.pool_per_class)

    def draw_pool(self, seed, split, per_class, distinct=False):
        """A Pool of this row's encoder, or of pictures."""
        c = self.config
        encoder = (lambda pictures: pictures) if self.sees else self.model.vision_encoder
        turned = c.pool_per_turned if split == "train" else 0
        return Pool.draw(encoder, seed, split, per_class, c.pool_pairs, c.pool_clips, SEEN, turned,
                         self.bar, distinct, clutter=c.clutter)  # fmt: skip

    def features(self, batch):
        seen = super().features(batch)
        return self.look(seen) if self.sees else seen

    def look(self, pictures):
        """[B, N, T, 24, 24, 3] -> [B, N, T, S, D_v]."""
        features = self.model.vision_encoder(pictures.reshape(-1, *pictures.shape[-3:]))
        return features.reshape(*pictures.shape[:3], *features.shape[1:])


# --- what is asked --------------------------------------------------------------------------------

TASKS = ("caption", "one of two", "4-way, 16 shots", "motion")  # their mean is the overall score


class Examiner:
    """Asks one trained row about fresh pictures; a share of `samples` right for each question."""

    def __init__(self, stage, samples, seed=7_000_000):
        self.model, self.samples = stage.model, samples
        self.pool = stage.draw_pool([seed, 0], "test", max(SHOTS) + 1, distinct=True)
        self.media = {source: self._media(stage, getattr(self.pool, source))
                      for source in ("images", "videos")}  # fmt: skip
        self.rng = np.random.default_rng([seed, 1])

    def _media(self, stage, seen, rows=128):
        parts = []
        for x in (seen[i : i + rows, None] for i in range(0, len(seen), rows)):
            parts.append(self.model.resampler(stage.look(x) if stage.sees else x)[:, 0])
        return np.concatenate(parts)

    def says(self, tokens, media, rows=250):
        """The likeliest next word at each place, int[B, L]."""
        phi, read = compute_phi(tokens, IMAGE), self.model.read
        parts = [read(*(a[i : i + rows] for a in (tokens, media, phi))).argmax(axis=-1)
                 for i in range(0, len(tokens), rows)]  # fmt: skip
        return np.concatenate(parts)

    def _right(self, documents):
        """Which words of documents are the likeliest behind what precedes, bool[B, L - 1]."""
        media = self.media[documents.source][documents.pictures]
        return self.says(documents.tokens, media)[:, :-1] == documents.tokens[:, 1:]

    def captions(self):
        """{"caption", "colour", "shape"}: "a small red circle" behind the last of three captioned
        pictures, whole, and two of its words."""
        asked = datasets.caption_documents(self.pool, self.samples, 3, self.rng, CLASSES)
        right = self._right(asked)[:, -5:-1]
        return {"caption": right.all(axis=1), "colour": right[:, 2], "shape": right[:, 3]}

    def pairs(self):
        """{"one of two"}: the colour of one of two objects."""
        asked = datasets.pair_question_documents(self.pool, self.samples, 1, self.rng)
        return {"one of two": self._right(asked)[:, -2]}

    def motion(self):
        """{"motion"}: where the object of a clip moves."""
        asked = datasets.clip_documents(self.pool, self.samples, 1, self.rng)
        return {"motion": self._right(asked)[:, -2]}

    def binding(self):
        """{"4-way, k shots"}: the invented name of the last picture's class."""
        asked, episode = datasets.binding_documents(
            self.pool, self.samples, max(SHOTS) + 1, 4, self.rng, CLASSES, "pair"
        )
        said = self.says(asked.tokens, self.media["images"][asked.pictures])[:, 2::4]
        return {f"4-way, {k} shots": said[:, k] == episode.name[:, k] for k in SHOTS}

    def text(self):
        """{"text"}: binding in text alone, 8 shots: what is left of the language model."""
        episode = grammar.draw_episode(self.samples, 9, 4, self.rng, GEOMETRIC, "pair")
        tokens = grammar.binding(episode)[:, :-2]
        media = np.zeros((len(tokens), 1, *self.media["images"].shape[1:]), np.float32)
        return {"text": self.says(tokens, media)[:, -1] == episode.name[:, -1]}

    def ask(self):
        """{question: share}; "overall" is the mean of TASKS."""
        found = {}
        for question in (self.captions, self.pairs, self.motion, self.binding, self.text):
            found |= {name: float(np.mean(right)) for name, right in question().items()}
        return found | {"overall": float(np.mean([found[task] for task in TASKS]))}


CHANCE = {"caption": 1 / (2 * 8 * 6), "colour": 1 / 8, "shape": 1 / 6, "one of two": 1 / 2,
          "motion": 1 / 4, "text": 1 / 4} | {f"4-way, {k} shots": 1 / 4 for k in SHOTS}  # fmt: skip


def folder_of(run, row, seed):
    """Where a row of one seed is trained, below the folder `run`."""
    return Path(run) / str(seed) / "".join(c if c.isalnum() else "-" for c in row)
