"""Ours against another project's: outputs, gradients of the inputs, gradients of all weights.

A Peer is what another project computed: its config, its weights, inputs, outputs, and the gradients
of <dout, outputs>. It is made by the project's own code, live, or read from a fixture that
make_fixtures.py wrote; `compare` runs our module on the same numbers.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

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


def worst(pairs, relative=False):
    """The largest absolute difference of pairs (ours, theirs); relative: in units of the largest
    number of theirs, where that is above 1."""
    pairs = list(pairs)
    error = max((np.abs(a - b).max(initial=0) for a, b in pairs), default=0)
    return error / max([1, *(np.abs(b).max(initial=0) for _, b in pairs)]) if relative else error


def compare(peer, project, module, call, relative=False):
    """The worst difference of {"outputs", "inputs", "weights"}: see `worst`.

    call(module, **tensors) gives our outputs. Their gradients become ours by the same table as
    their weights.
    """
    module.unfreeze().zero_grad()
    inputs = {name: Tensor(x) for name, x in peer.inputs.items()}
    with Tape() as tape:
        out = call(module, **inputs)
    tape.backward(out, dout_like(array_of(out)))
    theirs = project.state_of(peer.gradients, module.config)
    own = dict(module.named_parameters())
    assert len(theirs) or not peer.gradients
    pairs = {
        "outputs": [(array_of(out), peer.outputs)],
        "inputs": [(inputs[name].grad, dx) for name, dx in peer.input_gradients.items()],
        "weights": [(own[name].grad, theirs[name]) for name in theirs],
    }
    return {what: worst(of, relative) for what, of in pairs.items()}


def check(errors, most):
    """All errors are at most `most`; they are printed, for `pytest -s`."""
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert all(error <= most for error in errors.values()), errors
