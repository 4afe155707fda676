"""Another project's checkpoint -> one of our models: looked at first, then filled, or streamed.

    model = load(open_checkpoint(path))                      # every number in memory
    model = load(open_checkpoint(path), layers := Layers())  # a layer's, while it works

A project's module (llama, idefics, ...) says what its config means (config_of) and how its tensors
are called here (state_of). Names and shapes are checked before a number is read.
"""

import re
import time
from collections.abc import Mapping

import numpy as np

from miniflamingo.checkpoints import check_size
from miniflamingo.command import some
from miniflamingo.flamingo import Flamingo, FlamingoConfig, ShapesOnly
from miniflamingo.interop import PROJECTS, config_of
from miniflamingo.interop.inspection import OURS, name_of
from miniflamingo.interop.loading import fill
from miniflamingo.language import LanguageConfig, LanguageModel
from miniflamingo.module import Module
from miniflamingo.tensorfile import misfits

MODELS = {LanguageConfig: LanguageModel, FlamingoConfig: Flamingo}


class _Shapes(Mapping):
    """{name: an array of its shape that takes no memory} of a Checkpoint."""

    def __init__(self, shapes):
        self.shapes = shapes

    def __getitem__(self, name):
        return np.broadcast_to(np.float32(0), self.shapes[name])

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


def text_config_of(checkpoint):
    """The LanguageConfig or FlamingoConfig of a Checkpoint.

    ValueError that names the checkpoint, and the field, for one of this project or without a model
    that writes text, and for a config that the tensors do not fit.
    """
    if (name := name_of(checkpoint)) == OURS:
        raise ValueError(f"{checkpoint.path} is a checkpoint of this project: --checkpoint")
    try:
        config = config_of(name, checkpoint.config, checkpoint.shapes)
        if type(config) not in MODELS:
            raise ValueError("these weights are no whole model that writes text; that of an "
                             "OpenFlamingo has a lang_config in its config.json")  # fmt: skip
        check_size(config, checkpoint)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None
    return config


def load(checkpoint, layers=None, change=lambda config: config):
    """The model of a Checkpoint: a LanguageModel or a Flamingo, in float32.

    layers: Layers, which then read their weights as they work. `change` may change the config
    before the model is built. ValueError that names the checkpoint as `text_config_of`, and the
    tensors that do not fit it or whose numbers are not finite.
    """
    config, module = change(text_config_of(checkpoint)), PROJECTS[name_of(checkpoint)]
    try:
        model, zeros = MODELS[type(config)](config, rng=ShapesOnly()), _zeros(module, checkpoint)
        _check(model, module.state_of(_Shapes(checkpoint.shapes), config), zeros)
        state = module.state_of(checkpoint, config)
        if layers is None:
            return fill(model, state, zeros=zeros)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None
    return layers.take(model, state, checkpoint.path)


def _zeros(module, checkpoint):
    """A pattern of the names that may be missing, and are 0 then, or None."""
    find = getattr(module, "zeros_of", None)
    return find(checkpoint) if find else getattr(module, "ZEROS", None)


def _check(model, state, zeros):
    """ValueError unless a model's names and shapes are those of a state; but see `fill`."""
    own = {name: parameter.shape for name, parameter in model.named_parameters()}
    own = {n: s for n, s in own.items() if n in state or not (zeros and re.fullmatch(zeros, n))}
    own = {state.source(n): shape for n, shape in own.items()}
    if faults := misfits(own, {state.source(n): state[n].shape for n in state}):
        raise ValueError(f"the checkpoint does not fit its config ({len(faults)} faults): "
                         f"{some(faults, '; ')}")  # fmt: skip


# --- larger than memory ---------------------------------------------------------------------------


class Layers:
    """The layers of a model, each of which reads its weights when it works and forgets them then.

    keep: bytes of weights that may stay (the first layers'). `seconds` and `read_bytes` are what
    reading has taken so far; progress() is called after every layer.
    """

    def __init__(self, keep=0, progress=lambda: None):
        self.keep, self.progress = keep, progress
        self.seconds, self.read_bytes, self.layers = 0.0, 0, []

    def take(self, model, state, path):
        """Let the layers of a model stream from `state` {name: array}, and read what is in none.

        Returns the model. ValueError that names `path` for numbers that are not finite, now or when
        a layer works.
        """
        self.path = path
        rest = dict(model.named_parameters())
        for name, module in _layers(model):
            own = {f"{name}.{n}": parameter for n, parameter in module.named_parameters()}
            self.layers.append(_Layer(self, name, module, own, state))
            rest = {n: parameter for n, parameter in rest.items() if n not in own}
        for name, parameter in rest.items():
            parameter.data = self.tensor(state, name, parameter.shape)
        return model

    def tensor(self, state, name, shape):
        """A tensor as float32, 0 where the state has none; ValueError if it is not finite."""
        if name not in state:
            return np.zeros(shape, np.float32)
        with np.errstate(over="ignore"):  # it is not finite then
            found = np.asarray(state[name], np.float32)
        if not np.isfinite(found).all():
            raise ValueError(f"{self.path}: not finite: {state.source(name)}")
        return found

    def bytes(self):
        """In float32, of the layers that do not stay and work for every token: the text's."""
        left, found = self.keep, 0
        for layer in self.layers:
            stays = layer.bytes <= left
            left -= layer.bytes * stays
            found += layer.bytes * (not stays) * layer.of_text
        return found

    def measure(self, rows):
        """Seconds a byte: reading one layer now, and multiplying `rows` tokens with its weights."""
        layer = max(self.layers, key=lambda layer: layer.bytes * layer.of_text)
        start = time.perf_counter()
        for weight in layer.read().values():
            if weight.ndim == 2:
                np.zeros((rows, weight.shape[1]), np.float32) @ weight.T
        return (time.perf_counter() - start) / layer.bytes


def _layers(module, prefix=""):
    """Yield (name, module) of every module that stands in a list, as layers do."""
    for key, value in vars(module).items():
        if isinstance(value, list) and value and all(isinstance(x, Module) for x in value):
            yield from ((f"{prefix}{key}.{i}", layer) for i, layer in enumerate(value))
        elif isinstance(value, Module):
            yield from _layers(value, f"{prefix}{key}.")


class _Layer:
    """One layer: its forward (and project_media) find the weights there."""

    def __init__(self, layers, name, module, parameters, state):
        self.layers, self.parameters, self.state = layers, parameters, state
        self.of_text = name.startswith(("blocks.", "lm.", "gated_xattn."))
        self.bytes = 4 * sum(parameter.size for parameter in parameters.values())
        self.kept, self.placeholders = False, {n: p.data for n, p in parameters.items()}
        for method in ("forward", "project_media"):
            if hasattr(module, method):
                setattr(module, method, self._with_weights(getattr(module, method)))

    def _with_weights(self, method):
        def call(*args, **kwargs):
            if not self.kept:
                self._fill()
            try:
                return method(*args, **kwargs)
            finally:
                self._forget()
                self.layers.progress()

        return call

    def read(self):
        """{name: array} of all weights, from the file."""
        tensor = self.layers.tensor
        return {n: tensor(self.state, n, p.shape) for n, p in self.parameters.items()}

    def _fill(self):
        start = time.perf_counter()
        for name, array in self.read().items():
            self.parameters[name].data = array
        self.layers.seconds += time.perf_counter() - start
        self.layers.read_bytes += self.bytes

    def _forget(self):
        if not self.kept and self.bytes <= self.layers.keep:
            self.kept, self.layers.keep = True, self.layers.keep - self.bytes
        for name, parameter in self.parameters.items() if not self.kept else ():
            parameter.data = self.placeholders[name]
