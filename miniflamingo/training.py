"""Training: a weighted mixture of datasets, one optimiser, three stages, and runs that survive.

    language model   next word, on text alone                                   (then frozen)
    vision encoder   pictures against captions, contrastively                   (then frozen)
    bridge           resampler and GATED XATTN-DENSE between the two            (the paper's part)

The bridge minimises  sum_m lambda_m E_m[ -sum_l log p(y_l | y_<l, x_<=l) ]  over M datasets (paper,
equation 2): each step takes one batch from EACH dataset, adds up the gradients times lambda_m and
makes ONE update (section 3.2). A run writes a log line a step and a checkpoint now and then;
killed at any moment, it goes on from the last checkpoint as if nothing had happened, bit for bit
(with as many BLAS threads as before).
"""

import json
import os
import signal
import threading
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from miniflamingo import runs
from miniflamingo.autograd import Tape
from miniflamingo.checkpoints import load_model
from miniflamingo.checks import (
    LATER,
    check_above_zero,
    check_at_least,
    check_lengths,
    check_range,
    check_types,
    from_json,
    with_later,
)
from miniflamingo.command import Interrupted, some
from miniflamingo.flamingo import PRESETS, Flamingo, FlamingoConfig
from miniflamingo.functional import cross_entropy
from miniflamingo.language import LanguageConfig, LanguageModel
from miniflamingo.module import load_tensors, save_tensors  # noqa: F401 (load_tensors: for users)
from miniflamingo.prompt import IMAGE, PAD
from miniflamingo.tensorfile import TensorFile, misfits
from miniflamingo.vision import ContrastiveModel, NormalizerFreeResNet, TextEncoder, VisionConfig
from miniflamingo.worlds import datasets, glyph_documents, glyph_texts, glyphs, grammar, shapes
from miniflamingo.worlds.datasets import IGNORED
from miniflamingo.xattn import compute_phi

WEIGHTS = Path(__file__).with_name("weights")  # the runs that are shipped, one folder a stage

# --- the optimiser --------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW with a warm-up. schedule is "cosine" (down to 5 %) or "constant" (the paper's).

    alpha_rate and resampler_rate multiply the rate of the gates and of the resampler. ValueError
    for values that cannot work.
    """

    steps: int = 1000
    rate: float = 2e-3
    warmup: int = 100
    schedule: str = "cosine"
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    alpha_rate: float = 1.0
    resampler_rate: float = field(default=1.0, metadata=LATER)

    def __post_init__(self):
        check_types(self)
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f'schedule must be "cosine" or "constant", got {self.schedule!r}')
        check_above_zero(self, "steps", "rate", "clip")
        check_at_least(self, 0, "warmup", "weight_decay", "alpha_rate", "resampler_rate")
        check_range(self, 0, 1, "beta1", "beta2", below=1)


def scheduled_rate(config, step):
    """The learning rate of update `step`, counted from 0."""
    warm = min(1, (step + 1) / max(1, config.warmup))
    if config.schedule == "constant":
        return config.rate * warm
    return config.rate * warm * max(0.05, 0.5 * (1 + np.cos(np.pi * step / config.steps)))


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), on one flat vector.

    The trainable parameters become views into `weights` [P], so that an update is a few operations
    on long vectors. Decay acts on matrices, but not on the resampler (paper, appendix B.1.2), nor
    on gates, norms and other vectors.
    """

    def __init__(self, model, config):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.config, self.step = config, 0
        self.names, self.parameters = [n for n, _ in named], [p for _, p in named]
        self.ends = np.cumsum([p.size for p in self.parameters])
        self.weights = np.concatenate([p.data.ravel() for p in self.parameters])
        self.mean, self.square = np.zeros_like(self.weights), np.zeros_like(self.weights)
        self.decay, self.rate_scale = np.zeros_like(self.weights), np.ones_like(self.weights)
        views = zip(self.parts(self.weights), self.parts(self.decay), self.parts(self.rate_scale))
        for (name, parameter), (weights, decay, rate_scale) in zip(named, views):
            parameter.data = weights
            if parameter.ndim > 1 and not name.startswith("resampler."):
                decay[...] = config.weight_decay
            if name.endswith(("alpha_xattn", "alpha_dense")):
                rate_scale[...] = config.alpha_rate
            if name.startswith("resampler."):
                rate_scale[...] = config.resampler_rate

    def parts(self, vector):
        """Views of a vector [P], one for each parameter and of its shape."""
        pieces = np.split(vector, self.ends[:-1])
        return [piece.reshape(p.shape) for piece, p in zip(pieces, self.parameters)]

    def gradient(self):
        """The parameters' gradients as one vector [P], zeros where there is none."""
        grads = [np.zeros(p.shape) if p.grad is None else p.grad for p in self.parameters]
        return np.concatenate([g.ravel() for g in grads]).astype(self.weights.dtype, copy=False)

    def largest(self, gradient):
        """(name, value) of the largest component; NaN counts as the largest."""
        i = int(np.argmax(np.abs(gradient)))
        return self.names[int(np.searchsorted(self.ends, i, side="right"))], float(gradient[i])

    def update(self, gradient):
        """One step with a gradient [P], scaled to a norm of at most `clip`; -> (norm, rate)."""
        c, rate = self.config, scheduled_rate(self.config, self.step)
        norm = float(np.sqrt(np.dot(gradient, gradient)))
        gradient = gradient * min(1, c.clip / max(norm, 1e-12))
        self.step += 1
        self.mean += (1 - c.beta1) * (gradient - self.mean)
        self.square += (1 - c.beta2) * (gradient * gradient - self.square)
        unbiased = np.sqrt(self.square / (1 - c.beta2**self.step))
        direction = self.mean / (1 - c.beta1**self.step) / (unbiased + 1e-8)
        self.weights -= rate * self.rate_scale * (direction + self.decay * self.weights)
        return norm, rate

    def state(self):
        """{name: array}, the moments of each parameter."""
        moments = (("adamw.mean.", self.mean), ("adamw.square.", self.square))
        return {prefix + name: part for prefix, vector in moments
                for name, part in zip(self.names, self.parts(vector))}  # fmt: skip

    def load(self, state, step):
        """Take up the moments of a checkpoint."""
        self.step = step
        for name, part in self.state().items():
            part[...] = state[name]


# --- the mixture ----------------------------------------------------------------------------------

STRATEGIES = ("accumulate", "round_robin", "merge")


def check_weights(weights):
    """Return {dataset: lambda}; ValueError unless all are >= 0, finite, and some are above 0."""
    values = list(weights.values())
    if not all(np.isfinite(v) and v >= 0 for v in values) or not sum(values) > 0:
        raise ValueError(f"dataset weights must be >= 0 and not all 0, got {weights}")
    return weights


def learned(weights):
    """{dataset: lambda} without the datasets of weight 0, which are left out."""
    return {name: weight for name, weight in weights.items() if weight != 0}


def step_weights(strategy, weights, step, counts):
    """What each dataset's mean loss counts in update `step`: {dataset: weight}, without zeros.

    "accumulate" (the paper's choice): lambda_m, all datasets in every step. "round_robin": one
    dataset after the other. "merge": one batch of all examples, so every token counts the same;
    counts {dataset: int} says how many there are.
    """
    if strategy == "round_robin":
        name = list(weights)[step % len(weights)]
        return {name: weights[name]}
    if strategy == "merge":
        return {name: counts[name] / sum(counts.values()) for name in weights}
    return dict(weights)


class Stage:
    """What a Run trains: `model`, `config` (with .optimiser and .seed), {dataset: lambda}.

    A stage draws a batch of a dataset from an rng, counts its targets, and gives its mean loss.
    """

    name, strategy = "", "accumulate"

    def draw(self, dataset, rng):
        """A batch of one dataset."""
        raise NotImplementedError

    def count(self, batch):
        """How many targets a batch has."""
        raise NotImplementedError

    def loss(self, batch):
        """The mean loss of a batch, []."""
        raise NotImplementedError

    def backward(self, batch, weight):
        """Add weight times the gradient of a batch's loss to the parameters' `grad` -> the loss."""
        with Tape() as tape:
            loss = self.loss(batch)
        if np.isfinite(loss.data):
            tape.backward(loss, np.asarray(weight, loss.dtype))
        return float(loss.data)

    def identity(self):
        """What must be the same for a run to be resumed, as JSON values."""
        return {"stage": self.name, **asdict(self.config)}

    def gates(self):
        """What of the gates goes into the log: {} where there are none."""
        return {}

    def state(self):
        """{name: array}, what a checkpoint has of the model: all of it, or what is not frozen."""
        return self.model.state_dict()


# --- runs -----------------------------------------------------------------------------------------

CHECKPOINT, MODEL = "checkpoint.safetensors", "model.safetensors"


class Run:
    """A stage being trained into a folder: checkpoint.safetensors, log.jsonl, model.safetensors.

    ValueError when the folder cannot be written to, is another process's, holds a run that is not
    to be resumed, or holds one that is damaged or has another config.
    """

    def __init__(self, stage, out, resume=False, checkpoint_every=100, threads=1):
        if checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
        self.stage, self.out, self.checkpoint_every = stage, Path(out), checkpoint_every
        self.resume = resume
        self.threads = threads  # of BLAS: so small products gain little from more
        self.weights = check_weights(learned(stage.weights))
        self.optimiser = AdamW(stage.model, stage.config.optimiser)
        self.rng = np.random.default_rng([stage.config.seed, 1])
        self.last_gradient = None
        self.checkpoint, self.log_path = self.out / CHECKPOINT, self.out / "log.jsonl"
        self.costs, self.parts, self.saved = runs.Costs(), [], None
        self.lock = runs.Lock(self.out)
        try:
            self.begin(resume)
        except BaseException:
            self.lock.release()
            raise

    def begin(self, resume):
        """Take up what lies in the folder, and clear away what killed processes left there."""
        if self.checkpoint.exists() and resume:
            self.load()
            steps = self.stage.config.optimiser.steps
            runs.check_unfinished(self.out, self.optimiser.step, steps)
        else:
            runs.check_free(self.out, resume, self.checkpoint_every)
            runs.cut_log(self.log_path, 0)
        runs.sweep(self.out)

    def train(self, progress=True):
        """Go on until the last step; returns True when that was reached, False when interrupted.

        Writes model.safetensors at the end. FloatingPointError when the loss or the gradient is not
        finite: the last checkpoint stays.
        """
        self.lock.acquire()
        try:
            finished = self._train(progress)
        finally:
            self.lock.release()
        return finished

    def _train(self, progress):
        steps, done = self.stage.config.optimiser.steps, self.optimiser.step
        bar = tqdm(total=steps, initial=done, desc=self.stage.name, disable=not progress)
        blas = threadpool_limits(self.threads)
        with blas, bar, open(self.log_path, "a", encoding="utf-8") as log, asked_to_stop() as stop:
            while self.optimiser.step < steps and not stop.is_set():
                record = self.step()
                log.write(json.dumps(record) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{record['loss']:.3f}", rate=f"{record['rate']:.1e}")
                bar.update()
                if self.optimiser.step % self.checkpoint_every == 0:
                    self.save(log)
            self.save(log)
        if self.optimiser.step < steps:
            done = self.optimiser.step
            how = (
                "the same command goes on"
                if self.resume
                else f"go on with --resume --out {self.out}"
            )
            print(f"Interrupted after step {done}; {how}")
            return False
        if not (model := self.out / MODEL).exists():  # else it was finished before
            self.stage.save(model)
        return True

    def step(self):
        """One update; returns its log record."""
        stage, step = self.stage, self.optimiser.step
        batches = {name: stage.draw(name, self.rng) for name in self.weights}
        counts = {name: stage.count(batch) for name, batch in batches.items()}
        weights = step_weights(stage.strategy, self.weights, step, counts)
        stage.model.zero_grad()
        losses = {}
        for name, weight in weights.items():
            losses[name] = stage.backward(batches[name], weight)
            if not np.isfinite(losses[name]):
                self._stop(f"the loss of dataset {name!r} is {losses[name]}", self.last_gradient)
        gradient = self.optimiser.gradient()
        if not np.isfinite(gradient).all():
            self._stop(f"the gradient of datasets {', '.join(weights)} is not finite", gradient)
        norm, rate = self.optimiser.update(gradient)
        self.last_gradient = gradient
        parts = {name: weights[name] * losses[name] for name in losses}
        return {
            "step": step + 1, "loss": sum(parts.values()), "losses": losses, "weighted": parts,
            "gradient_norm": norm, "rate": float(rate), **stage.gates(),
        }  # fmt: skip

    def _stop(self, what, gradient):
        step = self.optimiser.step + 1
        largest = "there was none before"
        if gradient is not None:
            largest = "{1:.3g}, in {0}".format(*self.optimiser.largest(gradient))
        kept = f"the last checkpoint is in {self.out}" if self.checkpoint.exists() else "none saved"
        raise FloatingPointError(f"step {step}: {what}; largest gradient: {largest}; {kept}")

    def save(self, log):
        """Write the checkpoint: weights, moments, rng, step and config, whole or not at all.

        The lines of the open file `log` reach the disk before it. Nothing happens where this step
        is saved already.
        """
        if self.saved == self.optimiser.step:
            return
        os.fsync(log.fileno())
        self.parts = self.costs.parts(self.costs.seconds())
        metadata = {
            "step": str(self.optimiser.step),
            "rng": json.dumps(self.rng.bit_generator.state),
            "config": json.dumps(self.stage.identity()),
            "parts": json.dumps(self.parts),
        }
        state = self.tensors()
        metadata["sha256"] = _digest(state, metadata)
        save_tensors(self.checkpoint, state, metadata)
        self.saved = self.optimiser.step

    def tensors(self):
        """{name: array} of a checkpoint: the model's, and the moments."""
        return self.stage.state() | self.optimiser.state()

    def load(self):
        """Take up the checkpoint; ValueError for another config and for what is not as saved.

        All is looked at before any is taken up.
        """
        file, own = TensorFile(self.checkpoint), self.tensors()
        about = {key: self._metadata(file, key) for key in ("config", "step", "rng", "parts")}
        theirs = with_later(about["config"], self.stage.config)
        runs.check_identity(self.out, theirs, self.stage.identity())
        step = runs.checked_step(about["step"], self.stage.config.optimiser.steps, file.path)
        rng = runs.checked_rng(about["rng"], file.path)
        self._check_header(file, own)
        state = _checked_arrays(file)
        self.costs.load(about["parts"], file.path)
        runs.cut_log(self.log_path, step)
        parameters = dict(self.stage.model.named_parameters())
        for name in self.stage.state():
            parameters[name].data[...] = state[name]
        self.optimiser.load(state, step)
        self.rng.bit_generator.state = rng
        self.saved, self.parts = step, about["parts"]

    def _metadata(self, file, key):
        if key == "parts" and "sha256" not in file.metadata:
            return []  # as in the first edition's checkpoints
        if key not in file.metadata:
            raise ValueError(f"{file.path} is no checkpoint of a run: its metadata has no {key!r}")
        return from_json(file.metadata[key], f"{file.path}: {key}")

    def _check_header(self, file, own):
        faults = misfits({name: array.shape for name, array in own.items()}, file.shapes)
        kinds = {"float16": "F16", "float32": "F32", "float64": "F64"}
        for name in own.keys() & file.dtypes.keys():
            if (expected := kinds[own[name].dtype.name]) != file.dtypes[name]:
                faults.append(f"{name} must be {expected}, got {file.dtypes[name]}")
        if faults:
            raise ValueError(f"{file.path} does not fit the run: {some(sorted(faults), '; ')}")


def finish(stage, folder, progress=True, threads=1):
    """Train a stage into a folder, or go on there -> the parts of its cost (see runs.Costs), or
    None when it was interrupted.

    What is at its end is not trained again, nor is a model that somebody has put there without a
    checkpoint: its cost is not known, []. ValueError as Run's, so where the folder holds a run of
    another config; FloatingPointError as Run.train's.
    """
    folder = Path(folder)
    if (folder / MODEL).is_file() and not (folder / CHECKPOINT).is_file():
        return []
    run = Run(stage, folder, resume=True, threads=threads)
    if run.optimiser.step == stage.config.optimiser.steps and (folder / MODEL).is_file():
        run.lock.release()
        return run.parts
    return run.parts if run.train(progress) else None


def _checked_arrays(file):
    """The arrays of a checkpoint; ValueError unless they are finite, and as they were saved."""
    state = file.arrays()
    for name, array in state.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{file.path}: {name} is not finite")
        if name.startswith("adamw.square.") and (array < 0).any():
            raise ValueError(f"{file.path}: {name} has values below 0")
    first_edition = file.metadata.keys().isdisjoint(("sha256", "parts"))
    if not first_edition and file.metadata.get("sha256") != _digest(state, file.metadata):
        raise ValueError(f"{file.path} is damaged: it does not hold what its sha256 stands for")
    return state


def _digest(state, metadata):
    """sha256 of a checkpoint's numbers and metadata, which a flipped bit changes."""
    texts = (f"{key}={metadata[key]}".encode() for key in sorted(metadata.keys() - {"sha256"}))
    arrays = (part for n in sorted(state) for part in (n.encode(), state[n].tobytes()))
    return runs.digest([*texts, *arrays])


@contextmanager
def asked_to_stop():
    """An event that Ctrl-C or SIGTERM sets, so that the step in progress ends whole.

    Asked twice, it ends at once, with what the last checkpoint holds.
    """
    stop = threading.Event()

    def ask(*_):
        if stop.is_set():
            raise Interrupted
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread alone
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(s, ask) for s in signals]
    try:
        yield stop
    finally:
        for s, handler in zip(signals, before):
            signal.signal(s, handler)


# --- stage 1: the language model ------------------------------------------------------------------


MINI_LM = replace(PRESETS["mini"].lm, vocab_size=len(grammar.TOKENIZER))
WORLDS = namedtuple("Worlds", "shapes glyphs")  # what a stage learns of each counts so much
MINI_VISION = PRESETS["mini"].vision


@dataclass(frozen=True)
class LanguageRun:
    """Texts of the small world; one batch in five holds long binding episodes.

    any_keys: the share of binding whose keys are any words (see grammar.any_binding). weights is
    lambda_m of the texts of shapes and of those of glyphs (see glyph_texts). noise: so much of the
    embeddings' own size is added to each in training, Gaussian noise, so that what a visual token
    only resembles is understood, too (after NEFTune, Jain et al., 2023, whose noise is uniform).
    """

    optimiser: OptimiserConfig = OptimiserConfig(steps=2000)
    model: LanguageConfig = MINI_LM
    batch: int = 48
    length: int = 48
    long_share: float = 0.2
    any_keys: float = 0.33
    seed: int = 0
    weights: tuple[float, ...] = field(default=(1.0, 0.0), metadata=LATER)
    noise: float = field(default=0.0, metadata=LATER)

    def __post_init__(self):
        check_types(self)
        check_worlds(self)
        check_range(self, 0, 1, "long_share", "any_keys")
        check_at_least(self, 0, "seed", "noise")
        check_at_least(self, 4 if self.long_share else 1, "batch")  # a long batch has a quarter
        check_at_least(self, 5, "length")  # the shortest text that asks for a word


def check_worlds(config):
    """ValueError unless a config's weights are lambda_m of the two worlds."""
    check_lengths(config, len(WORLDS._fields), "weights")
    check_weights(WORLDS(*config.weights)._asdict())


def check_vocabulary(config, of_glyphs=False):
    """ValueError unless a LanguageConfig has a row for each word of the small world, and for each
    word about glyphs where these are learned."""
    words = len((glyph_texts if of_glyphs else grammar).TOKENIZER)
    if config.vocab_size < words:
        raise ValueError(f"vocab_size must be at least {words} words, got {config.vocab_size}")


class Texts(NamedTuple):
    """tokens int[B, L]; noise [B, L - 1, D] for all but the last of each, or None."""

    tokens: np.ndarray
    noise: np.ndarray | None


class LanguageStage(Stage):
    """Next-word prediction (Vaswani et al., 2017)."""

    name = "lm"

    def __init__(self, config):
        weights = WORLDS(*config.weights)
        check_vocabulary(config.model, weights.glyphs > 0)
        self.config = config
        self.weights = learned({"text": weights.shapes, "glyphs": weights.glyphs})
        self.model = LanguageModel(config.model, rng=np.random.default_rng([config.seed, 0]))

    def draw(self, dataset, rng):
        tokens, noise = self._tokens(dataset, rng), None
        if self.config.noise:
            embeddings, (B, L) = self.model.embedding.weight.data, tokens.shape
            size = self.config.noise * np.sqrt((embeddings**2).mean())
            noise = size * rng.standard_normal((B, L - 1, embeddings.shape[1]), np.float32)
        return Texts(tokens, noise)

    def _tokens(self, dataset, rng):
        c, is_long = self.config, rng.random() < self.config.long_share
        if dataset == "glyphs":
            if is_long:
                return glyph_texts.long_text_batch(c.batch // 4, rng)
            return glyph_texts.text_batch(c.batch, rng, c.length)
        if is_long:
            return grammar.long_text_batch(c.batch // 4, rng, c.any_keys)
        return grammar.text_batch(c.batch, rng, c.length, c.any_keys)

    def count(self, batch):
        return int((batch.tokens[:, 1:] != PAD).sum())

    def loss(self, batch):
        targets = np.where(batch.tokens == PAD, IGNORED, batch.tokens)[:, 1:]
        return cross_entropy(self.model(batch.tokens[:, :-1], noise=batch.noise), targets)

    def save(self, path):
        self.model.save(path, {"lm": json.dumps(asdict(self.config.model))})


# --- stage 2: the vision encoder ------------------------------------------------------------------


@dataclass(frozen=True)
class VisionRun:
    """Pictures and captions, contrastively, with a text encoder that is thrown away afterwards.

    weights is lambda_m of shapes and of glyphs. These have no captions here: of each of glyph_batch
    classes (of `classes` in all, None: every one) two pictures are found among all. clutter: see
    shapes.background.
    """

    optimiser: OptimiserConfig = OptimiserConfig(
        steps=2000, warmup=50, weight_decay=1e-3, beta2=0.999
    )
    model: VisionConfig = MINI_VISION
    batch: int = 96
    text_dim: int = 64
    joint_dim: int = 64
    label_smoothing: float = 0.0
    seed: int = 0
    weights: tuple[float, ...] = field(default=(1.0, 0.0), metadata=LATER)
    glyph_batch: int = field(default=96, metadata=LATER)
    classes: int | None = field(default=None, metadata=LATER)
    clutter: int = field(default=0, metadata=LATER)

    def __post_init__(self):
        check_types(self)
        check_worlds(self)
        check_at_least(self, 0, "clutter")
        check_at_least(self, 2, "batch", "glyph_batch")  # a picture is told from the others
        check_at_least(self, 2, "classes")
        check_at_least(self, 1, "text_dim", "joint_dim")
        check_range(self, 0, 1, "label_smoothing", below=1)
        check_at_least(self, 0, "seed")
        if self.text_dim % 4:
            raise ValueError(f"text_dim must be a multiple of 4 heads, got {self.text_dim}")
        check_image_size(self.model)


def check_image_size(config):
    """ValueError unless a VisionConfig is made for the pictures of the small world."""
    if config.image_size != shapes.WIDTH:
        raise ValueError(f"image_size must be {shapes.WIDTH}, got {config.image_size}")


class VisionStage(Stage):
    """The two-term contrastive loss (paper, appendix B.1.3)."""

    name = "vision"

    def __init__(self, config):
        weights = WORLDS(*config.weights)
        self.config = config
        self.weights = learned({"pictures": weights.shapes, "glyphs": weights.glyphs})
        self.classes = glyphs.classes("train", config.classes) if weights.glyphs else None
        rng = np.random.default_rng([config.seed, 0])
        encoder = NormalizerFreeResNet(config.model, rng=rng)
        text = TextEncoder(len(grammar.TOKENIZER), config.text_dim, rng=rng)
        self.model = ContrastiveModel(encoder, text, config.text_dim, config.joint_dim, rng=rng)

    def draw(self, dataset, rng):
        if dataset == "glyphs":
            return glyph_documents.contrastive_batch(self.config.glyph_batch, self.classes, rng)
        return datasets.contrastive_batch(self.config.batch, rng, self.config.clutter)

    def count(self, batch):
        return len(batch[0])

    def loss(self, batch):
        return self.model(*batch, label_smoothing=self.config.label_smoothing)

    def save(self, path):
        self.model.vision_encoder.save(path, {"vision": json.dumps(asdict(self.config.model))})


# --- stage 3: the bridge --------------------------------------------------------------------------

Lambda = namedtuple("Lambda", "documents captions pairs clips")
GLYPHS = ("glyphs", "glyph_captions")
MINI_BRIDGE = replace(PRESETS["mini"], skip_without_image=True)


@dataclass(frozen=True)
class BridgeRun:
    """Interleaved documents of 5 pictures, captions, captions of two objects, clips.

    weights is lambda_m and batches the number of rows, in the order of Lambda's fields. p_next: the
    share of documents in which the text stands before its picture and tokens get the NEXT picture.
    caption_noise: see caption_documents; wordless: see interleaved_documents; clutter: see
    shapes.background. pool_...: how many pictures are drawn and encoded, once.

    glyph_weights and glyph_batches are the same of binding documents and of captions of glyphs, of
    `classes` classes (None: every one); ways, bursts: see glyph_documents. A dataset of weight 0 is
    left out, and so are its pictures.
    """

    optimiser: OptimiserConfig = OptimiserConfig(steps=1800, rate=3e-3, alpha_rate=10.0)
    model: FlamingoConfig = MINI_BRIDGE
    weights: tuple[float, ...] = (1.0, 0.2, 0.4, 0.5)
    batches: tuple[int, ...] = (32, 16, 16, 12)
    pictures: int = 5
    strategy: str = "accumulate"
    p_next: float = 0.0
    caption_noise: float = 0.3
    wordless: float = 0.25
    pool_per_class: int = 100
    pool_per_turned: int = 30
    pool_pairs: int = 4000
    pool_clips: int = 1200
    seed: int = 0
    glyph_weights: tuple[float, ...] = field(default=(0.0, 0.0), metadata=LATER)
    glyph_batches: tuple[int, ...] = field(default=(48, 64), metadata=LATER)
    ways: tuple[int, ...] = field(default=(2, 3, 4, 4), metadata=LATER)
    bursts: float = field(default=1.0, metadata=LATER)
    classes: int | None = field(default=None, metadata=LATER)
    pool_glyphs: int = field(default=60_000, metadata=LATER)
    clutter: int = field(default=0, metadata=LATER)

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {STRATEGIES}, got {self.strategy!r}")
        check_types(self)
        check_lengths(self, len(Lambda._fields), "weights", "batches")
        check_at_least(self, 1, "batches", "pictures", "pool_per_class", "pool_pairs", "pool_clips")
        check_at_least(self, int(self.wordless > 0), "pool_per_turned")
        check_range(self, 0, 1, "p_next", "caption_noise", "wordless")
        check_at_least(self, 0, "seed", "clutter")
        check_lengths(self, len(GLYPHS), "glyph_weights", "glyph_batches")
        check_weights(self.mixture())
        check_at_least(self, 1, "glyph_batches", "classes", "pool_glyphs")
        check_at_least(self, 1, "ways")
        check_range(self, 0, 1, "bursts")

    def mixture(self):
        """{dataset: lambda_m}."""
        return dict(zip((*Lambda._fields, *GLYPHS), (*self.weights, *self.glyph_weights)))


class BridgeStage(Stage):
    """The paper's training: everything pre-trained is frozen, the two new parts learn.

    lm and vision are the folders of the two earlier stages.
    """

    name = "flamingo"

    def __init__(self, config, lm, vision, progress=False):
        paths = {"lm": Path(lm) / "model.safetensors", "vision": Path(vision) / "model.safetensors"}
        self.config, self.strategy = config, config.strategy
        self.model = assemble(config.model, paths["lm"], paths["vision"], config.seed)
        self.frozen = {n: runs.file_digest(p) for n, p in paths.items()}
        self.weights = learned(config.mixture())
        self.batches = dict(zip(config.mixture(), (*config.batches, *config.glyph_batches)))
        check_vocabulary(self.model.config.lm, any(config.glyph_weights))
        self.progress = progress

    def bar(self, work):
        """Show how the drawing goes on."""
        return tqdm(work, desc="pictures") if self.progress else work

    @cached_property
    def pool(self):
        """Pictures of the training split and their features; drawn when first asked for."""
        c = self.config
        return datasets.Pool.draw(
            self.model.vision_encoder, [c.seed, 2], "train", c.pool_per_class, c.pool_pairs,
            c.pool_clips, datasets.SEEN, c.pool_per_turned, self.bar, distinct=False,
            clutter=c.clutter,
        )  # fmt: skip

    @cached_property
    def glyph_pool(self):
        """The same of glyphs."""
        c, classes = self.config, glyphs.classes("train", self.config.classes)
        return glyph_documents.GlyphPool.draw(
            self.model.vision_encoder, [c.seed, 3], classes, max(1, c.pool_glyphs // len(classes)),
            self.bar, distinct=False,
        )  # fmt: skip

    def features(self, batch):
        """What the frozen encoder saw in a batch's pictures, [B, N, T, S, D_v]."""
        pool = self.glyph_pool if batch.source == "glyphs" else self.pool
        return getattr(pool, batch.source)[batch.pictures]

    def identity(self):
        return super().identity() | {"frozen": self.frozen}

    def gates(self):
        return self.model.alphas()

    def draw(self, dataset, rng):
        c, B = self.config, self.batches[dataset]
        if dataset == "glyphs":
            return glyph_documents.glyph_documents(
                self.glyph_pool, B, rng, c.pictures, c.ways, c.bursts
            )
        if dataset == "glyph_captions":
            return glyph_documents.glyph_captions(self.glyph_pool, B, rng)
        if dataset == "captions":
            return datasets.caption_documents(self.pool, B, 1, rng, noise=c.caption_noise)
        if dataset == "pairs":
            return datasets.pair_caption_documents(self.pool, B, 1, rng)
        if dataset == "clips":
            return datasets.clip_documents(self.pool, B, 1, rng)
        batch = datasets.interleaved_documents(
            self.pool, B, rng, c.pictures, c.caption_noise, c.wordless
        )
        return datasets.text_first(batch, rng.random(B) < c.p_next)

    def count(self, batch):
        return int((batch.targets[:, 1:] != IGNORED).sum())

    def loss(self, batch):
        features = self.features(batch)
        phi = compute_phi(batch.tokens, IMAGE, batch.use_next)
        media = self.model.resampler(features)
        loss, count = 0.0, self.count(batch)
        for rows, L in by_length(batch.tokens):
            tokens, targets = batch.tokens[rows, : L - 1], batch.targets[rows, 1:L]
            logits = self.model.read(tokens, media[rows], phi[rows, : L - 1])
            share = np.asarray((targets != IGNORED).sum() / count, features.dtype)
            loss = loss + cross_entropy(logits, targets) * share
        return loss

    def save(self, path):
        save_flamingo(path, self.model)


def by_length(tokens):
    """Neighbouring rows of one length: yield (slice, length). Reading them apart, without the
    padding that longer rows bring, saves a tenth of a step."""
    lengths = (tokens != PAD).sum(axis=1)
    starts = np.flatnonzero(np.diff(lengths, prepend=0))
    for start, end in zip(starts, [*starts[1:], len(tokens)]):
        yield slice(start, end), lengths[start]


def assemble(config, lm, vision, seed):
    """A Flamingo around a trained LM and a trained vision encoder (files of the two stages)."""
    lm, vision = load_model(lm, "lm"), load_model(vision, "vision")
    check_vocabulary(lm.config)
    check_image_size(vision.config)
    config = replace(config, lm=lm.config, vision=vision.config)
    model = Flamingo(config, rng=np.random.default_rng([seed, 0]))
    model.lm.load_state_dict(lm.state_dict())
    model.vision_encoder.load_state_dict(vision.state_dict())
    return model


def save_flamingo(path, model):
    """Write a Flamingo with its config, for load_flamingo."""
    model.save(path, {"flamingo": json.dumps(asdict(model.config))})


def load_flamingo(path):
    """The Flamingo in a file of save_flamingo; ValueError as load_model's."""
    return load_model(path, "flamingo")
