"""Ours against another project's: outputs, gradients of the inputs, gradients of all weights.

A Peer is what another project computed: its config, its weights, inputs, outputs, and the gradients
of <dout, outputs>. It is made by the project's own code, live, or read from a fixture that
make_fixtures.py wrote; `compare` runs our module on the same numbers.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from miniflamingo.autograd import Tape, Tensor, array_of
from miniflamingo.module import load_tensors, save_tensors
from tests.gradients import dout_like

FIXTURES = Path(__file__).with_name("fixtures")


@dataclass
class Peer:
    """config a dict; weights, gradients {their name: array}; inputs, input_gradients {name: array};
    whole {name: integers}, such as phi; outputs an array; extra {name: array}, such as a leak."""

    config: dict
    weights: dict
    inputs: dict
    outputs: np.ndarray
    gradients: dict
    input_gradients: dict
    whole: dict = field(default_factory=dict)
    extra: dict = field(default_factory=dict)

    def save(self, name):
        """Write FIXTURES/name.safetensors."""
        named = ("weights", "inputs", "gradients", "input_gradients", "extra")
        groups = {name: getattr(self, name) for name in named}
        whole = {name: np.asarray(x).tolist() for name, x in self.whole.items()}
        tensors = {f"{group}/{n}": x for group, arrays in groups.items() for n, x in arrays.items()}
        save_tensors(
            FIXTURES / f"{name}.safetensors", tensors | {"outputs": self.outputs},
            {"config": json.dumps(self.config), "whole": json.dumps(whole)},
        )  # fmt: skip

    @classmethod
    def load(cls, name):
        """Read what `save` wrote."""
        tensors, metadata = load_tensors(FIXTURES / f"{name}.safetensors")
        outputs, groups = tensors.pop("outputs"), {}
        for key, array in tensors.items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = array
        whole = {n: np.array(x) for n, x in json.loads(metadata["whole"]).items()}
        return cls(json.loads(metadata["config"]), outputs=outputs, whole=whole, **groups)


def move(module, seed=0):
    """Every parameter of a torch module away from its start: gates open, norms that matter."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
        start = parameter.data if parameter.ndim <= 1 else 0
        parameter.data = (start + scale * noise).to(parameter.dtype)
    return module


def arrays(module):
    """{name: array} of a torch module's state."""
    return {name: x.detach().numpy().copy() for name, x in module.state_dict().items()}


def run_theirs(module, call, inputs, config, whole=None, extra=None, prefix=""):
    """The Peer of a torch module: call(**tensors) -> outputs, for inputs {name: float64 array};
    prefix is what the module's names start with in a checkpoint."""
    import torch

    tensors = {n: torch.from_numpy(x.copy()).requires_grad_() for n, x in inputs.items()}
    module.zero_grad()
    out = call(**tensors)
    out.backward(torch.from_numpy(dout_like(out.detach().numpy())).to(out.dtype))
    named = dict(module.named_parameters(remove_duplicate=False))
    gradients = {prefix + n: p.grad.numpy() for n, p in named.items() if p.grad is not None}
    weights = {prefix + n: x for n, x in arrays(module).items()}
    return Peer(
        config, weights, inputs, out.detach().numpy(), gradients,
        {n: t.grad.numpy() for n, t in tensors.items()}, whole or {}, extra or {},
    )  # fmt: skip


class Route:
    """What our numbers go through: the NumPy module ("numpy"), its torch twin ("torch"), or the
    twin with its kernels ("fused"). A call takes it to make arrays of the route's kind, and for
    the options of a forward."""

    def __init__(self, name="numpy"):
        self.name, self.options = name, {} if name == "numpy" else {"backend": name}

    def of(self, x):
        """An array as the route takes it."""
        return x if self.name == "numpy" else _tensor(x)

    def run(self, module, call, inputs):
        """-> outputs, {input: gradient}, {parameter: gradient} of <dout, outputs>; a gradient that
        did not come is None."""
        run = _run_numpy if self.name == "numpy" else _run_torch
        return run(module, lambda m, **x: call(m, self, **x), inputs)


ROUTES = ("numpy", "torch", "fused")
each_route = pytest.mark.parametrize("route", ROUTES)


def _tensor(x):
    import torch

    return torch.from_numpy(np.array(x))


def _run_numpy(module, call, inputs):
    module.unfreeze().zero_grad()
    tensors = {name: Tensor(x) for name, x in inputs.items()}
    with Tape() as tape:
        out = call(module, **tensors)
    tape.backward(out, dout_like(array_of(out)))
    own = dict(module.named_parameters())
    return array_of(out), *({n: x.grad for n, x in of.items()} for of in (tensors, own))


def _run_torch(module, call, inputs):
    twin = twin_of(module).requires_grad_(True)
    tensors = {name: _tensor(x).requires_grad_() for name, x in inputs.items()}
    out = call(twin, **tensors)
    out.backward(_tensor(dout_like(out.detach().numpy())))
    groups = (tensors, dict(twin.named_parameters()))
    grads = ({n: None if x.grad is None else x.grad.numpy() for n, x in of.items()}
             for of in groups)  # fmt: skip
    return out.detach().numpy(), *grads


def twin_of(module):
    """The torch twin of a LanguageModel, a Flamingo or a Bridge, with its weights in float64."""
    from miniflamingo.kernels.model import layers

    c = module.config
    if hasattr(layers, kind := type(module).__name__):
        twin = getattr(layers, kind)(c)
    else:
        twin = _bridge(layers, module)
    twin.double().load_state_dict({n: _tensor(x) for n, x in module.state_dict().items()})
    return twin


def _bridge(layers, module):
    import torch

    c, twin = module.config, torch.nn.Module()
    twin.resampler = None
    if c.num_latents:
        twin.resampler = layers.PerceiverResampler(
            c.media_dim, c.media_dim, c.num_latents, c.resampler_depth, c.heads, c.head_dim,
            c.num_frames, dialect=c.dialect,
        )  # fmt: skip
    sizes = (c.dim, c.media_dim, c.heads, c.head_dim)
    gated = (layers.GatedCrossAttentionDense(*sizes, dialect=c.dialect) for _ in module.gated_xattn)
    twin.gated_xattn = torch.nn.ModuleList(gated)
    return twin


def worst(pairs, relative=False):
    """The largest absolute difference of pairs (ours, theirs); relative: in units of the largest
    number of theirs, where that is above 1. None of ours is 0."""
    pairs = [(0 if ours is None else ours, theirs) for ours, theirs in pairs]
    error = max((np.abs(a - b).max(initial=0) for a, b in pairs), default=0)
    return error / max([1, *(np.abs(b).max(initial=0) for _, b in pairs)]) if relative else error


def compare(peer, project, module, call, relative=False, route="numpy"):
    """The worst difference of {"outputs", "inputs", "weights"}, as far as there are: see `worst`.

    call(module, route, **arrays) gives our outputs, where module is ours or its twin, and arrays
    are what the Route takes. The peer's gradients become ours by the same table as its weights.
    """
    out, inputs, own = Route(route).run(module, call, peer.inputs)
    theirs = project.state_of(peer.gradients, module.config)
    assert len(theirs) or not peer.gradients
    pairs = {
        "outputs": [(out, peer.outputs)],
        "inputs": [(inputs[name], dx) for name, dx in peer.input_gradients.items()],
        "weights": [(own[name], theirs[name]) for name in theirs],
    }
    return {what: float(worst(of, relative)) for what, of in pairs.items() if of}


@dataclass(frozen=True)
class Case:
    """A row of the agreement table, which a test measures, too.

    part is what is compared, `most` the tolerance, errors(route) is what `compare` returns,
    same_tokens() whether greedy tokens are equal; the peer is a package that is installed, or, with
    from_file, what its code once computed.
    """

    package: str
    part: str
    name: str
    most: float
    errors: object
    same_tokens: object = None
    from_file: bool = False
    routes: tuple = ROUTES


@dataclass(frozen=True)
class Fault:
    """What a package does and this project does not: measure() -> {name: number} of theirs, and
    ours, for which 0 is right unless `right` says otherwise."""

    package: str
    name: str
    measure: object
    right: float = 0.0


def check(errors, most):
    """All errors are at most `most`; they are printed, for `pytest -s`."""
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert all(error <= most for error in errors.values()), errors
