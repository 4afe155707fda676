"""Rotary positions (Su et al., 2021): queries and keys turn by angles that grow with position.

A pair (x_i, x_{i + K/2}) of a head is one point of a plane; at position p it is turned by p f_i
with f_i = base^(-2 i / K). A query's product with a key then depends on their distance alone.
Models that read further than they were trained to lower the frequencies: see RotaryConfig.

Letters: B batch, L tokens, H heads, K head width.
"""

import functools
from dataclasses import dataclass

import numpy as np

from miniflamingo.autograd import differentiable
from miniflamingo.checks import check_above_zero, check_at_least, check_types
from miniflamingo.functional import remembered


def _turn(x, positions, frequencies, scale, sign):
    frequencies = np.ascontiguousarray(frequencies, float).tobytes()
    cos, sin = _cos_sin(np.asarray(positions), frequencies, scale, x.dtype)
    half = x.shape[-1] // 2
    a, b, sin = x[..., :half], x[..., half:], sin if sign > 0 else -sin
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@remembered
def _cos_sin(positions, frequencies, scale, dtype):  # int [B, L], bytes -> [B, L, 1, K/2] each
    angle = positions[..., None, None] * np.frombuffer(frequencies)
    return (scale * np.cos(angle)).astype(dtype), (scale * np.sin(angle)).astype(dtype)


@differentiable
def rotate(x, positions, frequencies, scale=1.0):
    """[B, L, H, K], int [B, L] or [1, L], frequencies [K/2] -> [B, L, H, K]; scale: YaRN's."""
    return _turn(x, positions, frequencies, scale, 1)


@rotate.gradient
def rotate_backward(dout, x, positions, frequencies, scale=1.0):
    # a rotation's transpose turns back
    return _turn(dout, positions, frequencies, scale, -1)


SCALINGS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RotaryConfig:
    """The frequencies of rotary positions, named as in transformers' `rope_parameters`.

    scaling "linear" divides all by `factor` (Chen et al., 2023); "llama3" those whose wave is
    longer than original_length / low, and none shorter than original_length / high (Llama 3.1);
    "yarn" those that turn less than beta_slow times in original_length and none that turn beta_fast
    times, and scales queries and keys (Peng et al., 2023). ValueError for a value that cannot work.
    """

    base: float = 10_000.0
    scaling: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self):
        check_types(self)
        check_above_zero(self, "base", "low", "beta_fast", "beta_slow", "attention_factor")
        check_at_least(self, 1, "factor", "original_length")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {self.scaling!r}")
        if self.scaling == "llama3" and not self.high > self.low:
            raise ValueError(f"high must be above low = {self.low}, got {self.high}")
        if not self.base > 1:
            raise ValueError(f"base must be above 1, got {self.base}")

    @property
    def scale(self):
        """What the turned vectors are multiplied by."""
        if self.scaling != "yarn":
            return 1.0
        return self.attention_factor or 0.1 * float(np.log(self.factor)) + 1.0


@functools.lru_cache(maxsize=64)
def frequencies(config, head_dim):  # -> [K/2], read-only
    """Radians a position, for a RotaryConfig and an even head width K."""
    c = config
    f = c.base ** (-np.arange(0, head_dim, 2) / head_dim)
    if c.scaling != "default":
        f = f / c.factor + (f - f / c.factor) * _share_kept(c, f, head_dim)
    f.flags.writeable = False
    return f


def _share_kept(c, f, head_dim):  # -> [K/2] in 0..1: 1 keeps a frequency, 0 divides it
    if c.scaling == "linear":
        return np.zeros_like(f)
    if c.scaling == "llama3":
        turns = c.original_length * f / (2 * np.pi)
        return np.clip((turns - c.low) / (c.high - c.low), 0, 1)
    # YaRN: a ramp over the indices, between those that turn beta_fast and beta_slow times
    turns = np.array([c.beta_fast, c.beta_slow]) * 2 * np.pi
    ends = head_dim * np.log(c.original_length / turns) / (2 * np.log(c.base))
    low, high = max(np.floor(ends[0]), 0), min(np.ceil(ends[1]), head_dim - 1)
    high = high + 0.001 if high == low else high
    return 1 - np.clip((np.arange(len(f)) - low) / (high - low), 0, 1)
