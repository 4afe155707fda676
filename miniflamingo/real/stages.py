"""What is trained, in NumPy (training.Run) or in torch (kernels/model/real.py), with the same
losses, batches and log.

    warm     the resampler alone: pictures against the frozen language model's own vectors of their
             names, contrastively (paper, appendix B.1.3), with no language model in the loop
    real     the bridge: resampler and gated layers, gates from 0, by the mixture of documents
"""

from collections import namedtuple
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from miniflamingo import runs
from miniflamingo.checks import check_at_least, check_lengths, check_range, check_types
from miniflamingo.functional import concat, cross_entropy, exp
from miniflamingo.module import Module, Parameter, save_tensors
from miniflamingo.real import model as models
from miniflamingo.real.documents import BOS, Mixture, build
from miniflamingo.real.features import Features, save
from miniflamingo.real.pictures import Concepts
from miniflamingo.tensorfile import TensorFile
from miniflamingo.training import OptimiserConfig, Stage, check_weights
from miniflamingo.vision import contrastive_loss, l2_normalise
from miniflamingo.worlds.datasets import IGNORED

Datasets = namedtuple("Datasets", "captions questions kinds binding clips")
WARM = OptimiserConfig(steps=400, rate=1e-3, warmup=30)
REAL = OptimiserConfig(steps=1000, rate=3e-3, warmup=20, alpha_rate=6.0, resampler_rate=0.03)
TEXT_BLOCKS = (8, 24)  # of SmolLM2's 30: its stream before them stands for what a name means


# --- text vectors ---------------------------------------------------------------------------------


def text_vectors(folder, concepts, lm, words, dim):
    """float32 [concepts, dim]: what the frozen language model makes of names and keywords.

    The mean of the residual stream over the tokens, before two of its blocks, one beside the other;
    the streams are computed once and kept in the folder. Rotated and scaled by what the seen
    concepts vary in, so that no direction drowns the others (`whiten`).
    """
    path = Path(folder) / "text-vectors.npy"
    if not path.is_file():
        save(path, _streams(concepts, lm, words))
    return whiten(np.load(path), concepts.seen, dim)


def _streams(concepts, lm, words, rows=64):
    """[concepts, len(TEXT_BLOCKS) D]; texts of one length are read together."""
    texts = [words.encode(f" {c['name']}: {', '.join(c['keywords'])}") for c in concepts.all]
    of_length = {}
    for i, ids in enumerate(texts):
        of_length.setdefault(len(ids), []).append(i)
    vectors = np.zeros((len(texts), len(TEXT_BLOCKS), lm.config.dim), np.float32)
    for same in of_length.values():
        for some in (same[first : first + rows] for first in range(0, len(same), rows)):
            streams = list(models.residual_stream(lm, [[BOS, *texts[i]] for i in some]))
            for k, block in enumerate(TEXT_BLOCKS):
                vectors[some, k] = streams[min(block, len(streams) - 1)][:, 1:].mean(axis=1)
    return vectors.reshape(len(texts), -1)


def whiten(x, rows, dim, ridge=0.3):
    """x [n, D] -> [n, dim]: the directions in which x[rows] varies most, nearly alike in size.

    A direction is divided by its deviation plus `ridge` times the largest one's.
    """
    x = (x - x[rows].mean(axis=0)) / x[rows].std(axis=0)
    deviations, directions = np.linalg.svd(x[rows], full_matrices=False)[1:]
    dim = min(dim, len(deviations))
    scale = deviations[:dim] + ridge * deviations[0]
    return np.float32(x @ (directions[:dim].T / scale) * np.sqrt(len(rows)))


# --- the warm start -------------------------------------------------------------------------------


@dataclass(frozen=True)
class WarmRun:
    """Pictures against names, contrastively; noise is the share of features and of the vectors'
    components that are left out at random: what cannot be known by heart is learned."""

    optimiser: OptimiserConfig = WARM
    batch: int = 128
    feature_noise: float = 0.5
    text_noise: float = 0.3
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        check_at_least(self, 2, "batch")
        check_at_least(self, 0, "seed")
        check_range(self, 0, 1, "feature_noise", "text_noise", below=1)


class Aligned(Module):
    """The resampler, whose latents' mean is compared with the vectors of names, which are fixed:
    trained with it, they would fit the seen concepts and leave the others."""

    def __init__(self, bridge, resampler, dim):
        self.bridge, self.resampler = bridge, resampler  # a FlamingoConfig, and its resampler
        self.dim = dim  # of the vectors, at most the visual tokens'
        self.log_inverse_temperature = Parameter(np.array(2.5, np.float32))

    def embed_images(self, features):  # [B, S, D_v] -> [B, D], unit length
        """The mean of the visual tokens."""
        media = self.resampler(features[:, None, None])
        return l2_normalise(media.mean(axis=2).reshape(len(features), -1)[:, : self.dim])

    def embed_texts(self, vectors):  # [B, D] -> [B, D], unit length
        """The names' vectors."""
        return l2_normalise(vectors)

    def forward(self, features, vectors):  # -> the loss, []
        """Row i of one belongs to row i of the other."""
        images, texts = self.embed_images(features), self.embed_texts(vectors)
        return contrastive_loss(images, texts, exp(self.log_inverse_temperature))


class WarmStage(Stage):
    """The contrastive warm start; `folder` holds the parts and the features."""

    name = "warm"

    def __init__(self, config, folder):
        self.config, self.weights = config, {"pictures": 1.0}
        self.concepts, self.features = Concepts(Path(folder)), Features(folder)
        bridge, words = models.assemble(folder, seed=config.seed, scale=0)
        dim = bridge.config.media_dim
        self.vectors = text_vectors(folder, self.concepts, bridge.lm, words, dim)
        self.model = Aligned(bridge.config, bridge.resampler, self.vectors.shape[1])
        self.mixture = Mixture(self.concepts, words)

    def draw(self, dataset, rng):
        c = self.config
        seen = self.mixture.seen
        chosen = rng.choice(seen, min(c.batch, len(seen)), replace=False)
        features = self.features.get([self.mixture.picture(i, rng) for i in chosen])
        return (_without(features, c.feature_noise, rng),
                _without(self.vectors[chosen], c.text_noise, rng))  # fmt: skip

    def count(self, batch):
        return len(batch[0])

    def loss(self, batch):
        return self.model(*batch)

    def save(self, path):
        save_tensors(path, {n: p.data for n, p in self.model.named_parameters()})


def _without(x, share, rng):
    """x with a share of its numbers set to 0, and the others raised to make up for it."""
    kept = rng.random(x.shape, np.float32) >= share
    return x * (kept / np.float32(1 - share))


# --- the bridge -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RealRun:
    """The paper's objective over five datasets: weights are lambda_m, rows those of each batch, in
    the order of Datasets' fields. scale: see model.scale_branches."""

    optimiser: OptimiserConfig = REAL
    weights: tuple[float, ...] = (1.0, 0.5, 0.15, 0.3, 0.15)
    rows: tuple[int, ...] = (5, 2, 1, 1, 1)
    scale: float = 0.3
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        check_lengths(self, len(Datasets._fields), "weights", "rows")
        check_at_least(self, 1, "rows")
        check_at_least(self, 0, "seed", "scale")
        check_weights(Datasets(*self.weights)._asdict())


class RealBatch(namedtuple("RealBatch", "tokens targets phi shares lengths places stills clips")):
    """Documents of all datasets in one: tokens, targets, phi int[B, L], shares [B, L] (what each
    target counts: lambda_m over the targets of its dataset), lengths int[B], stills float32
    [P, 1, 49, 1280], clips [Q, T, 49, 1280], and places int[B, N] among these P + Q."""

    def groups(self):
        """Yield (rows, L), the shorter documents and the longer ones, so that least is padded."""
        order, B = np.argsort(self.lengths, kind="stable"), len(self.lengths)
        lengths = self.lengths[order]
        short = min(range(1, B + 1), key=lambda k: k * lengths[k - 1] + (B - k) * lengths[-1])
        for rows in (order[:short], order[short:]):
            if len(rows):
                yield rows, int(self.lengths[rows].max())


def see(model, places, stills, clips):
    """What RealBatch has of pictures -> their visual tokens [B, N, R, D_m]."""
    media = concat(*(model.resampler(x[:, None]) for x in (stills, clips) if len(x)), axis=0)
    return media.reshape(len(media), *media.shape[2:])[places]


class RealStage(Stage):
    """The paper's training (section 3.2), the eye and the language model frozen.

    One pass reads the documents of all datasets; each counts lambda_m times its mean, which is what
    a pass for each would add up to. warm: the file of a WarmStage, or None to begin from chance.
    """

    name = "real"

    def __init__(self, config, folder, warm=None):
        self.config, self.weights, self.folder = config, {"documents": 1.0}, Path(folder)
        self.model, self.words = models.assemble(folder, seed=config.seed, scale=config.scale)
        self.warm = warm and runs.file_digest(warm)
        if warm:
            state = TensorFile(warm).arrays()
            for name, parameter in self.model.resampler.named_parameters():
                parameter.data = state[f"resampler.{name}"]

    @cached_property
    def features(self):
        """The pictures' features, read when they are first asked for."""
        return Features(self.folder, self.model.vision_encoder)

    @cached_property
    def mixture(self):
        """What draws the documents."""
        return Mixture(Concepts(self.folder), self.words)

    def identity(self):
        return super().identity() | {"warm": self.warm}

    def gates(self):
        return self.model.alphas()

    def state(self):
        return models.trained(self.model)

    def draw(self, dataset, rng):
        c, documents, lambdas = self.config, [], []
        for name, weight, rows in zip(Datasets._fields, c.weights, c.rows):
            if weight:
                drawn = [getattr(self.mixture, name)(rng) for _ in range(rows)]
                documents += drawn
                lambdas += [weight / build(drawn, self.words).count()] * rows
        return self.batch(documents, lambdas)

    def batch(self, documents, lambdas):
        """Documents and what each of their targets counts -> RealBatch."""
        batch = build(documents, self.words)
        learned = batch.targets != IGNORED
        shares = np.where(learned, np.array(lambdas, np.float32)[:, None], np.float32(0))
        pictures = self.features.stacked(batch.pictures)
        return RealBatch(batch.tokens, batch.targets, batch.phi, shares, batch.lengths, *pictures)

    def count(self, batch):
        return 1

    def loss(self, batch):
        media, loss = see(self.model, batch.places, batch.stills, batch.clips), 0.0
        for rows, L in batch.groups():
            tokens, targets, phi, shares = (x[rows, :L] for x in batch[:4])
            learned = targets != IGNORED
            logits = self.model.read(tokens, media[rows], phi, keep=learned)
            targets, shares = targets[learned], shares[learned]
            for share in np.unique(shares):  # a dataset's
                of = np.flatnonzero(shares == share)
                mean = cross_entropy(logits[of], targets[of])
                loss = loss + mean * (share * np.float32(len(of)))
        return loss

    def save(self, path):
        models.save_bridge(path, self.model, self.identity())
