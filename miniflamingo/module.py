"""Parameters by name, freezing, and checkpoints; nothing more.

A module's parameters are found by walking its attributes, so a name is a path:
`lm.blocks.2.attention.q_proj.weight`. The torch twins in kernels/ use the same names, so one
safetensors file serves both sides.
"""

import contextlib
import os
import secrets
from pathlib import Path

import numpy as np
from safetensors.numpy import save as to_bytes

from miniflamingo.autograd import Tensor
from miniflamingo.command import some
from miniflamingo.tensorfile import TensorFile, misfits


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

    def load_state_dict(self, state, what="checkpoint"):
        """Copy `state` {name: array} into the parameters, each in the parameter's own dtype; errors
        call it `what`, such as its file.

        Raises ValueError that lists missing, unexpected and mis-shaped names, arrays that are not
        floating point, and those with a NaN or an infinity (also one that only the parameter's
        dtype makes); nothing is loaded then.
        """
        own = dict(self.named_parameters())
        shapes = ({n: np.shape(x) for n, x in values.items()} for values in (own, state))
        faults, loaded = misfits(*shapes), {}
        for name in own.keys() & state.keys():
            array = np.asarray(state[name])
            if array.dtype.kind != "f":
                faults.append(f"not floating point: {name} is {array.dtype}")
                continue
            with np.errstate(over="ignore"):
                loaded[name] = np.array(array, dtype=own[name].dtype)
            if not np.isfinite(loaded[name]).all():
                faults.append(f"not finite: {name}")
        _refuse(faults, what)
        for name, parameter in own.items():
            parameter.data = loaded[name]
        return self

    def check_header(self, file):
        """ValueError unless a TensorFile's names and shapes are this module's; reads no numbers."""
        own = {name: parameter.shape for name, parameter in self.named_parameters()}
        _refuse(misfits(own, file.shapes), file.path)

    def save(self, path, metadata=None):
        """Write the state_dict as safetensors, atomically; metadata is {str: str}."""
        save_tensors(path, self.state_dict(), metadata)

    def load(self, path):
        """Load a file that `save` wrote; ValueError when it is damaged or does not fit."""
        file = TensorFile(path)
        self.check_header(file)
        return self.load_state_dict(file.arrays(), file.path)


def _refuse(faults, what):
    if faults:
        faults = f"({len(faults)} faults):\n  " + some(sorted(faults), "\n  ")
        raise ValueError(f"{what} does not fit the model {faults}")


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
    """Read a safetensors file -> ({name: array}, metadata); ValueError as TensorFile's."""
    file = TensorFile(path)
    return file.arrays(), file.metadata


def write_atomically(path, data):
    """Write bytes to `path` through a temporary file beside it, so that no reader sees half.

    A link stays one: its target is written. A file that was there keeps its permissions, a new one
    gets the usual ones. What is no file (/dev/stdout) is written to as it is.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        return path.write_bytes(data)
    path = Path(os.path.realpath(path))
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(temporary, path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None  # not the temporary one
        raise
    _sync_folder(path.parent)


def _sync_folder(folder):
    """Make a new name last through a power failure, on systems where a folder can be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
