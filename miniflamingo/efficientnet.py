"""EfficientNet-Lite0 (Tan and Le, 2019; the Lite variant without squeeze-excite, with ReLU6).

A trained ImageNet eye of 3.4M parameters that runs in NumPy. A block widens its input sixfold with
a 1x1 convolution, looks around with one small filter for each channel (a depthwise convolution),
and narrows again; the residual lies between the narrow ends (Sandler et al., 2018). Batch norms are
folded into the convolutions before them when the weights are loaded: interop/efficientnet.py.

Images are [B, height, width, channels]; C counts channels, k the width of a square kernel.
"""

from dataclasses import dataclass

import numpy as np

from miniflamingo.autograd import array_of, differentiable
from miniflamingo.checks import check_lengths, check_range, check_types
from miniflamingo.functional import relu6
from miniflamingo.module import Module, Parameter
from miniflamingo.vision import conv2d

# repeats, kernel, stride, widening, width of each stage, and the convolutions around them
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip
STEM, HEAD, STRIDE = 32, 1280, 32


@dataclass(frozen=True)
class EfficientNetConfig:
    """EfficientNet-Lite0: only the images' size and normalisation are free."""

    image_size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    out_dim = HEAD

    def __post_init__(self):
        check_types(self)
        check_range(self, STRIDE, 4096, "image_size")
        check_lengths(self, 3, "mean", "std")
        check_range(self, 1e-6, 1e6, "std")
        if self.image_size % STRIDE:
            raise ValueError(f"image_size must be a multiple of {STRIDE}, got {self.image_size}")

    @property
    def num_features(self):
        """S, the number of features of one frame: the last grid, flattened."""
        return (self.image_size // STRIDE) ** 2


def pad_at_end(x, k, stride):
    """[B, height, width, C] -> padded for an output of ceil(size / stride), as TensorFlow does.

    More zeros at the end than at the start, where their number is odd.
    """
    height, width = x.shape[1:3]
    pads = [max((-(-n // stride) - 1) * stride + k - n, 0) for n in (height, width)]
    return np.pad(x, ((0, 0), *((pad // 2, pad - pad // 2) for pad in pads), (0, 0)))


def _shifts(k, stride, height, width):
    """Every place (i, j) of a filter, and the pixels that lie under it, one for each output."""
    h, w = (height - k) // stride + 1, (width - k) // stride + 1
    for i in range(k):
        for j in range(k):
            yield i, j, np.s_[:, i : i + stride * h : stride, j : j + stride * w : stride]


@differentiable
def pad_same(x, k, stride=1):  # [B, height, width, C] -> [B, height + k - stride, ..., C]
    return pad_at_end(x, k, stride)


@pad_same.gradient
def pad_same_backward(dout, x, k, stride=1):
    top, left = ((after - before) // 2 for after, before in zip(dout.shape[1:3], x.shape[1:3]))
    return dout[:, top : top + x.shape[1], left : left + x.shape[2]]


@differentiable
def depthwise_conv2d(x, weight, bias, stride=1):
    """[B, height, width, C], [C, 1, k, k], [C] -> [B, h, w, C]: a filter for each channel.

    The sum of k * k shifted images: no patches are copied, as conv2d's groups would.
    """
    out = bias
    for i, j, under in _shifts(weight.shape[-1], stride, *x.shape[1:3]):
        out = out + x[under] * weight[:, 0, i, j]
    return out


@depthwise_conv2d.gradient
def depthwise_conv2d_backward(dout, x, weight, bias, stride=1):
    dx, dweight = np.zeros_like(x), np.zeros_like(weight)
    for i, j, under in _shifts(weight.shape[-1], stride, *x.shape[1:3]):
        # out += x[under] * weight[:, 0, i, j]
        dx[under] += dout * weight[:, 0, i, j]
        dweight[:, 0, i, j] = np.einsum("bhwc,bhwc->c", dout, x[under])
    return dx, dweight, dout.sum(axis=(0, 1, 2))


class Convolution(Module):
    """A convolution with TensorFlow's padding; depthwise where it keeps the channels."""

    def __init__(self, in_channels, out_channels, k, stride=1, depthwise=False, *, rng):
        self.k, self.stride, self.depthwise = k, stride, depthwise
        shape = (out_channels, 1 if depthwise else in_channels, k, k)
        weight = rng.normal(0, np.prod(shape[1:]) ** -0.5, shape)
        self.weight = Parameter(weight.astype(np.float32, copy=False))
        self.bias = Parameter(np.zeros(out_channels, np.float32))

    def forward(self, x):  # [B, height, width, C] -> [B, h, w, O]
        x = pad_same(x, k=self.k, stride=self.stride) if self.k > 1 else x
        convolve = depthwise_conv2d if self.depthwise else conv2d
        return convolve(x, self.weight, self.bias, stride=self.stride)


class InvertedResidual(Module):
    """expand 1x1 -> depthwise k x k -> project 1x1, around which the input is added if it fits."""

    def __init__(self, in_width, width, k, stride, widening, *, rng):
        inner = in_width * widening
        self.expand = Convolution(in_width, inner, 1, rng=rng) if widening > 1 else None
        self.depthwise = Convolution(inner, inner, k, stride, True, rng=rng)
        self.project = Convolution(inner, width, 1, rng=rng)
        self.adds = stride == 1 and in_width == width

    def forward(self, x):  # [B, height, width, C] -> [B, height/stride, width/stride, O]
        out = x if self.expand is None else relu6(self.expand(x))
        out = self.project(relu6(self.depthwise(out)))
        return x + out if self.adds else out


class EfficientNetLite(Module):
    """Images -> a grid of features [B, S, 1280], flattened."""

    def __init__(self, config, *, rng):
        self.config = config
        self.stem = Convolution(3, STEM, 3, 2, rng=rng)
        self.blocks, before = [], STEM
        for repeats, k, stride, widening, width in STAGES:
            for i in range(repeats):
                shape = (before, width, k, 1 if i else stride, widening)
                self.blocks.append(InvertedResidual(*shape, rng=rng))
                before = width
        self.head = Convolution(before, HEAD, 1, rng=rng)

    def grid(self, pixels):
        """[B, height, width, 3] in [0, 1] -> [B, h, w, 320]: all but the last, widening, layer."""
        dtype = array_of(pixels).dtype
        mean, std = (np.array(x, dtype) for x in (self.config.mean, self.config.std))
        x = relu6(self.stem((pixels - mean) * (1 / std)))
        for block in self.blocks:
            x = block(x)
        return x

    def widen(self, grid):
        """What `grid` gave, or [B, S, 320] as a grid of one row -> features [B, S, D_v]."""
        return relu6(self.head(grid)).reshape(len(grid), -1, HEAD)

    def forward(self, pixels):
        """[B, height, width, 3] in [0, 1] -> features [B, S, D_v]."""
        return self.widen(self.grid(pixels))
