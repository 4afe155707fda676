"""Parameters by name, freezing, and checkpoints; nothing more.

A module's parameters are found by walking its attributes, so a name is a path:
`lm.blocks.2.attention.q_proj.weight`. The torch twins in kernels/ use the same names, so one
safetensors file serves both sides.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save as to_bytes

from miniflamingo.autograd import Tensor


class Parameter(Tensor):
    """A Tensor that a Module owns: trained unless frozen (`requires_grad`)."""


class Module:
    """Something with parameters and a `forward`. Calling it calls `forward`."""

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def named_parameters(self, prefix=""):
        """Yield (name, Parameter), depth first, in the order the attributes were set."""
        for key, value in vars(self).items():
            yield from _walk(value, f"{prefix}{key}")

    def parameters(self):
        """The parameters as a list."""
        return [parameter for _, parameter in self.named_parameters()]

    def num_parameters(self, trainable_only=False):
        """How many numbers the parameters hold."""
        return sum(p.size for p in self.parameters() if p.requires_grad or not trainable_only)

    def freeze(self):
        """Exclude every parameter below this module from training; returns the module."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        return self

    def unfreeze(self):
        """Undo `freeze`; returns the module."""
        for parameter in self.parameters():
            parameter.requires_grad = True
        return self

    def zero_grad(self):
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    def astype(self, dtype):
        """Convert every parameter to `dtype` in place (float64 to check, float32 to train)."""
        for parameter in self.parameters():
            parameter.data = parameter.data.astype(dtype)
        return self

    def state_dict(self):
        """{name: array}. The arrays are the module's own, not copies."""
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def load_state_dict(self, state):
        """Copy `state` {name: array} into the parameters, each in the parameter's own dtype.

        Raises ValueError that lists every missing, unexpected and mis-shaped name and every array
        with a NaN or an infinity; nothing is loaded then.
        """
        own = dict(self.named_parameters())
        faults = [f"missing: {name} {list(own[name].shape)}" for name in own if name not in state]
        faults += [f"unexpected: {name}" for name in state if name not in own]
        for name in own.keys() & state.keys():
            if own[name].shape != state[name].shape:
                expected, got = list(own[name].shape), list(state[name].shape)
                faults.append(f"mis-shaped: {name} expected {expected}, got {got}")
            elif not np.isfinite(state[name]).all():
                faults.append(f"not finite: {name}")
        if faults:
            raise ValueError(
                f"checkpoint does not fit the model ({len(faults)} faults):\n  "
                + "\n  ".join(sorted(faults))
            )
        for name, parameter in own.items():
            parameter.data = np.array(state[name], dtype=parameter.dtype)
        return self

    def save(self, path, metadata=None):
        """Write the state_dict as safetensors, atomically; metadata is {str: str}."""
        save_tensors(path, self.state_dict(), metadata)

    def load(self, path):
        """Load a file that `save` wrote; ValueError when it is damaged or does not fit."""
        return self.load_state_dict(load_tensors(path)[0])


def _walk(value, name):
    if isinstance(value, Parameter):
        yield name, value
    elif isinstance(value, Module):
        yield from value.named_parameters(name + ".")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _walk(item, f"{name}.{i}")


def save_tensors(path, tensors, metadata=None):
    """Write {name: array} to a safetensors file, whole or not at all."""
    write_atomically(
        path, to_bytes({k: np.array(v, order="C") for k, v in tensors.items()}, metadata)
    )


def load_tensors(path):
    """Read a safetensors file -> ({name: array}, metadata). ValueError when it is damaged."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        size = Path(path).stat().st_size
        raise ValueError(f"{path} is no whole safetensors file ({size} bytes): {error}") from None


def write_atomically(path, data):
    """Write bytes to `path` through a neighbouring temporary file, so that no reader sees half."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
