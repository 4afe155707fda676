"""The formulas that every room uses, each with its hand-derived gradient right below it.

Shapes stand in the signatures; `...` is any number of leading axes. A backward takes `dout`, the
gradient of the loss with respect to the output, and the forward's inputs. The gradient of `x` is
always called `dx`. No dtype is fixed: float32 in, float32 out; float64 in, float64 out.
"""

import functools

import numpy as np

from miniflamingo.autograd import Tensor, differentiable
from miniflamingo.module import Module, Parameter


def remembered(build):
    """A decorator for what depends on whole numbers alone, such as phi: build(x, ...) -> arrays.

    They are kept, read-only, for the last few x int[...]: all layers of a model ask the same.
    """

    @functools.lru_cache(maxsize=8)
    def kept(x, shape, *args, **kwargs):
        arrays = build(np.frombuffer(x, np.int64).reshape(shape), *args, **kwargs)
        for array in arrays:
            array.flags.writeable = False
        return arrays

    @functools.wraps(build)
    def call(x, *args, **kwargs):
        return kept(np.ascontiguousarray(x, np.int64).tobytes(), x.shape, *args, **kwargs)

    return call


# --- arithmetic and shapes: what lets `x + y`, `x.reshape(...)` and `x[i]` be recorded ------------


def _unbroadcast(dx, shape):
    """Sum dx over the axes along which an input of `shape` was broadcast."""
    if dx.shape == shape:
        return dx
    dx = dx.sum(axis=tuple(range(dx.ndim - len(shape))))
    repeated = tuple(i for i, n in enumerate(shape) if n == 1 and dx.shape[i] != 1)
    return dx.sum(axis=repeated, keepdims=True) if repeated else dx


@differentiable
def add(x, y):  # [...], [...] -> [...], broadcast
    return x + y


@add.gradient
def add_backward(dout, x, y, needs=(True, True)):
    dx, dy = (_unbroadcast(dout, np.shape(a)) if need else None for a, need in zip((x, y), needs))
    return dx, dy


@differentiable
def multiply(x, y):  # [...], [...] -> [...], broadcast
    return x * y


@multiply.gradient
def multiply_backward(dout, x, y, needs=(True, True)):
    dx = _unbroadcast(dout * y, np.shape(x)) if needs[0] else None
    return dx, _unbroadcast(dout * x, np.shape(y)) if needs[1] else None


@differentiable
def matmul(x, y):  # [..., I, J], [..., J, K] -> [..., I, K]
    return x @ y


@matmul.gradient
def matmul_backward(dout, x, y):
    dx = dout @ y.swapaxes(-1, -2)
    dy = x.swapaxes(-1, -2) @ dout
    return _unbroadcast(dx, x.shape), _unbroadcast(dy, y.shape)


@differentiable
def reshape(x, *shape):  # [...] -> shape
    return x.reshape(*shape)


@reshape.gradient
def reshape_backward(dout, x, *shape):
    return dout.reshape(x.shape)


@differentiable
def transpose(x, *axes):  # [...] -> the axes in the given order
    return x.transpose(*axes)


@transpose.gradient
def transpose_backward(dout, x, *axes):
    return dout.transpose(*np.argsort(axes))


@differentiable
def getitem(x, index):  # [...] -> x[index]
    return x[index]


@getitem.gradient
def getitem_backward(dout, x, index):
    dx = np.zeros_like(x)
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, (list, np.ndarray)) for i in parts):
        np.add.at(dx, index, dout)  # an index array may name one element twice
    else:
        dx[index] = dout
    return dx


@differentiable
def concat(*xs, axis):  # n arrays -> one
    return np.concatenate(xs, axis=axis)


@concat.gradient
def concat_backward(dout, *xs, axis):
    ends = np.cumsum([x.shape[axis] for x in xs])
    return tuple(np.split(dout, ends[:-1], axis=axis))


@differentiable
def broadcast_to(x, *shape):  # [...] -> shape
    return np.broadcast_to(x, shape)


@broadcast_to.gradient
def broadcast_to_backward(dout, x, *shape):
    return _unbroadcast(dout, x.shape)


@differentiable
def keep(x, mask):  # [...], bool, broadcast to [...] -> [...]
    """x where the mask is True; 0 elsewhere, whatever x holds there (0 * NaN would be NaN)."""
    return np.where(mask, x, 0)


@keep.gradient
def keep_backward(dout, x, mask):
    return np.where(mask, dout, 0)


@differentiable
def total(x, axis=None):  # [...] -> the sum over `axis` (all axes by default)
    return x.sum(axis=axis)


@total.gradient
def total_backward(dout, x, axis=None):
    dout = dout if axis is None else np.expand_dims(dout, axis)
    return np.broadcast_to(dout, x.shape)


@differentiable
def mean(x, axis=None):  # [...] -> the mean over `axis` (all axes by default)
    return x.mean(axis=axis)


@mean.gradient
def mean_backward(dout, x, axis=None):
    return total_backward(dout, x, axis) * (np.size(dout) / x.size)


@differentiable
def exp(x):  # [...] -> [...]
    return np.exp(x)


@exp.gradient
def exp_backward(dout, x):
    return dout * np.exp(x)


Tensor.__add__ = Tensor.__radd__ = add
Tensor.__mul__ = Tensor.__rmul__ = multiply
Tensor.__matmul__, Tensor.__getitem__ = matmul, getitem
Tensor.__rmatmul__ = lambda self, other: matmul(other, self)
Tensor.__neg__ = lambda self: multiply(self, -1)
Tensor.__sub__ = lambda self, other: add(self, -other)
Tensor.__rsub__ = lambda self, other: add(other, -self)
Tensor.reshape, Tensor.transpose = reshape, transpose
Tensor.sum, Tensor.mean = total, mean


# --- reductions that NumPy does slowly when the last axis is short --------------------------------


def row_sum(x):  # [..., D] -> [..., 1]
    """x.sum(axis=-1, keepdims=True), several times faster."""
    return np.einsum("...d->...", x)[..., None]


def row_dot(x, y):  # [..., D], [..., D] -> [..., 1]
    """(x * y).sum(axis=-1, keepdims=True), without the array x * y."""
    return np.einsum("...d,...d->...", x, y)[..., None]


def column_dot(x, y):  # [..., D], [..., D] -> [D]
    """(x * y) summed over all axes but the last, without the array x * y."""
    return np.einsum("nd,nd->d", x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))


def row_max(x):  # [..., D] -> [..., 1], -inf for D = 0
    """x.max(axis=-1, keepdims=True)."""
    if not 0 < x.shape[-1] <= 64 or x.size < 64 * x.shape[-1]:
        return x.max(axis=-1, keepdims=True, initial=-np.inf)
    return functools.reduce(np.maximum, np.moveaxis(x, -1, 0))[..., None]


# --- linear -------------------------------------------------------------------------------------


@differentiable
def linear(x, weight, bias=None):  # [..., I], [O, I], [O] -> [..., O]
    # one product of two matrices is much faster than one for each leading index
    out = x.reshape(-1, x.shape[-1]) @ weight.T
    if bias is not None:
        out += bias
    return out.reshape(*x.shape[:-1], len(weight))


@linear.gradient
def linear_backward(dout, x, weight, bias=None, needs=(True, True, True)):
    rows = dout.reshape(-1, dout.shape[-1])
    # out = x @ weight.T + bias
    dx = (rows @ weight).reshape(x.shape) if needs[0] else None
    dweight = rows.T @ x.reshape(-1, x.shape[-1]) if needs[1] else None
    dbias = None if bias is None else rows.sum(axis=0)
    return dx, dweight, dbias


class Linear(Module):
    """x -> x weight^T + bias, weight [O, I] drawn with standard deviation (3 I)^-1/2 * scale.

    A choice that matters: with I^-1/2 the small language model never learned to bind names.
    """

    def __init__(self, in_features, out_features, bias=False, scale=1.0, *, rng):
        weight = rng.normal(0, scale * (3 * in_features) ** -0.5, (out_features, in_features))
        self.weight = Parameter(weight.astype(np.float32, copy=False))
        self.bias = Parameter(np.zeros(out_features, np.float32)) if bias else None

    def forward(self, x):  # [..., I] -> [..., O]
        return linear(x, self.weight, self.bias)


# --- normalisation ------------------------------------------------------------------------------


@differentiable
def layer_norm(x, weight, bias, eps=1e-5):  # [..., D], [D], [D] -> [..., D]
    out = _standardise(x, eps)[0]
    out *= weight
    out += bias
    return out


def _standardise(x, eps):
    x_hat = x - row_sum(x) / x.shape[-1]
    inv_std = 1 / np.sqrt(row_dot(x_hat, x_hat) / x.shape[-1] + eps)
    x_hat *= inv_std
    return x_hat, inv_std


@layer_norm.gradient
def layer_norm_backward(dout, x, weight, bias, eps=1e-5):
    x_hat, inv_std = _standardise(x, eps)
    # out = x_hat * weight + bias
    dweight, dbias = column_dot(dout, x_hat), dout.reshape(-1, x.shape[-1]).sum(axis=0)
    # x_hat = (x - mean(x)) * inv_std: x moves its own x_hat, the mean and the deviation
    dx = dout * weight  # so far dx_hat
    x_hat *= row_dot(dx, x_hat) / x.shape[-1]
    dx -= row_sum(dx) / x.shape[-1]
    dx -= x_hat
    dx *= inv_std
    return dx, dweight, dbias


class LayerNorm(Module):
    """Layer normalisation over the last axis (Ba et al., 2016) with weight and bias [D]."""

    def __init__(self, dim, eps=1e-5):
        self.eps = eps
        self.weight = Parameter(np.ones(dim, np.float32))
        self.bias = Parameter(np.zeros(dim, np.float32))

    def forward(self, x):  # [..., D] -> [..., D]
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


@differentiable
def rms_norm(x, weight, eps=1e-6):  # [..., D], [D] -> [..., D]
    return x / np.sqrt(row_dot(x, x) / x.shape[-1] + eps) * weight


@rms_norm.gradient
def rms_norm_backward(dout, x, weight, eps=1e-6):
    inv_rms = 1 / np.sqrt(row_dot(x, x) / x.shape[-1] + eps)
    x_hat = x * inv_rms
    # out = x_hat * weight
    dweight = column_dot(dout, x_hat)
    # x_hat = x * inv_rms
    dx = dout * weight  # so far dx_hat
    x_hat *= row_dot(dx, x_hat) / x.shape[-1]
    dx -= x_hat
    dx *= inv_rms
    return dx, dweight


class RMSNorm(Module):
    """Division by the root mean square of the last axis (Zhang and Sennrich, 2019), weight [D]."""

    def __init__(self, dim, eps=1e-6):
        self.eps = eps
        self.weight = Parameter(np.ones(dim, np.float32))

    def forward(self, x):  # [..., D] -> [..., D]
        return rms_norm(x, self.weight, eps=self.eps)


NORMS = {"layer": LayerNorm, "rms": RMSNorm}


def norm_named(name, eps=None):
    """dim -> a norm of NORMS, with another eps where one is given; None for None."""
    return functools.partial(NORMS[name], eps=eps) if name and eps else NORMS.get(name)


# --- activations --------------------------------------------------------------------------------


@differentiable
def relu(x):  # [...] -> [...]
    return np.maximum(x, 0)


@relu.gradient
def relu_backward(dout, x):
    return dout * (x > 0)


@differentiable
def squared_relu(x):  # [...] -> [...], Flamingo's activation (So et al., 2021)
    return np.square(np.maximum(x, 0))


@squared_relu.gradient
def squared_relu_backward(dout, x):
    dx = np.maximum(x, 0)
    dx *= 2
    dx *= dout
    return dx


GELU_SCALE, GELU_CUBE = float(np.sqrt(8 / np.pi)), 0.044715


def _gelu_gate(x):  # (1 + tanh(u / 2)) / 2 = sigmoid(u), u = sqrt(8 / pi) (x + 0.044715 x^3)
    gate = x * x
    gate *= -GELU_SCALE * GELU_CUBE
    gate -= GELU_SCALE
    gate *= x  # -u
    np.exp(np.minimum(gate, 80, out=gate), out=gate)
    gate += 1
    return np.reciprocal(gate, out=gate)


@differentiable
def gelu(x):  # [...] -> [...], the tanh form (Hendrycks and Gimpel, 2016)
    return x * _gelu_gate(x)


@gelu.gradient
def gelu_backward(dout, x):
    gate = _gelu_gate(x)
    # out = x * gate, gate = sigmoid(u): out' = gate + x gate (1 - gate) u'
    du = x * x
    du *= 3 * GELU_CUBE * GELU_SCALE
    du += GELU_SCALE
    du *= x
    du *= 1 - gate
    du += 1
    du *= gate
    du *= dout
    return du


@differentiable
def sigmoid(x):  # [...] -> [...]
    return 0.5 * (1 + np.tanh(0.5 * x))  # never overflows


@sigmoid.gradient
def sigmoid_backward(dout, x):
    s = sigmoid(x)
    return dout * s * (1 - s)


@differentiable
def silu(x):  # [...] -> [...], LLaMA's activation (Elfwing et al., 2018)
    return x * sigmoid(x)


@silu.gradient
def silu_backward(dout, x):
    s = sigmoid(x)
    # out = x * s, s' = s (1 - s)
    return dout * s * (1 + x * (1 - s))


@differentiable
def quick_gelu(x):  # [...] -> [...], CLIP's activation
    return x * sigmoid(1.702 * x)


@quick_gelu.gradient
def quick_gelu_backward(dout, x):
    s = sigmoid(1.702 * x)
    # out = x * s, s' = 1.702 s (1 - s)
    return dout * s * (1 + 1.702 * x * (1 - s))


@differentiable
def relu6(x):  # [...] -> [...], MobileNet's and EfficientNet-Lite's activation
    return np.clip(x, 0, 6)


@relu6.gradient
def relu6_backward(dout, x):
    return dout * ((x > 0) & (x < 6))


# erfc(z) = t exp(P(2 t - 1) - z^2), t = 2 / (2 + z), z >= 0 (Press et al., 2007, section 6.2.2). P
# is a Chebyshev series, good to 2e-17; float32 needs its first twelve terms, to 1e-7.
ERFC = (
    -0.65132685989085472, 0.64196979235649026, 0.019476473204185836, -0.0095615147868086316,
    -0.00094659534448203687, 0.00036683949785276145, 4.2523324806907772e-5, -2.0278578112534243e-5,
    -1.6242900046470255e-6, 1.3036558355805232e-6, 1.5626441722066143e-8, -8.5238095914926543e-8,
    6.5290544390988515e-9, 5.0593434955514689e-9, -9.9136415649303309e-10, -2.2736512229318358e-10,
    9.6467911020155265e-11, 2.3940380830391176e-12, -6.8860275264975556e-12, 8.9448792730907414e-13,
    3.1309213993429491e-13, -1.127082236136723e-13, 3.8109052551937414e-16, 7.106097613608112e-15,
    -1.5230282014553114e-15, -9.4574945715363442e-17, 1.2102371892552393e-16,
    -2.8166630881195955e-17,
)  # fmt: skip
ERFC_POWERS = {n: np.polynomial.chebyshev.cheb2poly(ERFC[:n])[::-1] for n in (12, len(ERFC))}


BLOCK = 1 << 14  # numbers: what a loop over many terms keeps in the processor's cache


def normal_tail(x):  # [...] -> [...], erfc(|x| / sqrt(2)) / 2
    """How likely a standard normal number lies above |x|; NumPy has no erf."""
    flat = np.ravel(x)
    out = np.empty_like(flat)
    for i in range(0, len(flat), BLOCK):
        _tail_block(flat[i : i + BLOCK], out[i : i + BLOCK])
    return out.reshape(np.shape(x))


def _tail_block(x, out):
    z = np.abs(x)
    np.minimum(z, 40, out=z)  # beyond it is 0, and a square might overflow
    z *= 0.5**0.5
    t = 2 / (2 + z)
    u, powers = 2 * t - 1, ERFC_POWERS[len(ERFC) if x.dtype.itemsize > 4 else 12]
    out[:] = powers[0]
    for power in powers[1:].tolist():
        out *= u
        out += power
    z *= z
    out -= z
    np.exp(out, out=out)
    t *= 0.5
    out *= t


@differentiable
def gelu_exact(x):  # [...] -> [...], x Phi(x) (Hendrycks and Gimpel, 2016): torch's own GELU
    out = normal_tail(x)
    out *= np.abs(x)
    return np.maximum(x, 0) - out  # Phi(x) is the tail below 0, and 1 - the tail above


@gelu_exact.gradient
def gelu_exact_backward(dout, x):
    density = np.exp(-0.5 * np.square(np.minimum(np.abs(x), 40))) * (2 * np.pi) ** -0.5
    tail = normal_tail(x)
    # out = x * Phi(x), Phi' = density
    return dout * (np.where(x < 0, tail, 1 - tail) + x * density)


ACTIVATIONS = {
    "relu": relu,
    "squared_relu": squared_relu,
    "gelu": gelu,
    "gelu_exact": gelu_exact,
    "quick_gelu": quick_gelu,
    "silu": silu,
    "relu6": relu6,
}


@differentiable
def softmax(x):  # [..., V] -> [..., V], over the last axis
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@softmax.gradient
def softmax_backward(dout, x):
    p = softmax(x)
    return p * (dout - (dout * p).sum(axis=-1, keepdims=True))


# --- embedding ----------------------------------------------------------------------------------


@differentiable
def embedding(ids, weight):  # int [...], [V, D] -> [..., D]
    return weight[ids]


@embedding.gradient
def embedding_backward(dout, ids, weight):
    dweight = np.zeros_like(weight)
    np.add.at(dweight, ids, dout)
    return None, dweight


class Embedding(Module):
    """A table [V, D] with one row for each token, drawn with standard deviation D^-1/2."""

    def __init__(self, num_embeddings, dim, *, rng):
        weight = rng.normal(0, dim**-0.5, (num_embeddings, dim))
        self.weight = Parameter(weight.astype(np.float32, copy=False))

    def forward(self, ids):  # int [...] -> [..., D]
        return embedding(ids, self.weight)


@differentiable
def replace_row(table, row, index):  # [V, D], [D], int -> [V, D], a copy with table[index] = row
    out = table.copy()
    out[index] = row
    return out


@replace_row.gradient
def replace_row_backward(dout, table, row, index):
    dtable = dout.copy()
    dtable[index] = 0
    return dtable, dout[index]


# --- cross-entropy ------------------------------------------------------------------------------


def log_softmax(x):  # [..., V] -> [..., V], for scoring; cross_entropy has its own gradient
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@differentiable
def cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.0):
    """Mean over the counted targets of -sum_v t_v log softmax(logits)_v  ([..., V], [...] -> []).

    t is one-hot, mixed with the uniform distribution by label_smoothing. Targets equal to
    ignore_index count for nothing. ValueError if none is left or one lies outside 0..V-1.
    """
    logp, _, ids = _counted(logits, targets, ignore_index)
    hit = logp[np.arange(len(ids)), ids]
    return -((1 - label_smoothing) * hit + label_smoothing * logp.mean(axis=-1)).mean()


def _counted(logits, targets, ignore_index):
    """The rows that count: log-probabilities [C, V], their indices [C], their targets [C]."""
    V = logits.shape[-1]
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets must be {list(logits.shape[:-1])}, got {list(targets.shape)}")
    rows = np.flatnonzero(targets.ravel() != ignore_index)
    ids = targets.ravel()[rows]
    if not len(ids):
        raise ValueError(f"every target is ignore_index ({ignore_index}): there is no loss")
    if ids.min() < 0 or ids.max() >= V:
        raise ValueError(f"targets must lie in 0..{V - 1}, got {ids.min()}..{ids.max()}")
    return log_softmax(logits.reshape(-1, V)[rows]), rows, ids


@cross_entropy.gradient
def cross_entropy_backward(dout, logits, targets, ignore_index=-100, label_smoothing=0.0):
    logp, rows, ids = _counted(logits, targets, ignore_index)
    # d(-sum_v t_v log p_v) / d logits = p - t
    drows = np.exp(logp) - label_smoothing / logits.shape[-1]
    drows[np.arange(len(ids)), ids] -= 1 - label_smoothing
    dlogits = np.zeros((targets.size, logits.shape[-1]), logits.dtype)
    dlogits[rows] = drows * (dout / len(ids))
    return dlogits.reshape(logits.shape), None
