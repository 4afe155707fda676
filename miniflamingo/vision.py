"""The frozen eye: a Normalizer-Free ResNet, and the contrastive objective that trains it.

The paper's encoder is NFNet-F6 (Brock et al., 2021): residual blocks without batch norm, kept at
unit variance by weight-standardised convolutions, scaled activations and a bookkeeping of the
variance (beta). It is trained beside a text encoder so that an image and its caption agree (paper,
section 3.1.1 and appendix B.1.3), and then frozen. Its last grid, flattened, feeds the resampler.

Images are [B, height, width, channels], values in [0, 1]. C and O count channels in and out.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from miniflamingo.attention import TransformerBlock
from miniflamingo.autograd import array_of, differentiable
from miniflamingo.checks import check_at_least, check_lengths, check_range, check_types
from miniflamingo.functional import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    Linear,
    cross_entropy,
    cross_entropy_backward,
    exp,
    keep,
    sigmoid,
)
from miniflamingo.module import Module, Parameter

# --- convolution --------------------------------------------------------------------------------


def _patches(x, kh, kw, stride, padding, groups):
    """[B, height, width, C] -> [groups, B, h, w, kh * kw * C/groups], one row for each output."""
    C = x.shape[-1]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    x = x.reshape(*x.shape[:3], groups, C // groups)
    windows = np.lib.stride_tricks.sliding_window_view(x, (kh, kw), axis=(1, 2))
    windows = windows[:, ::stride, ::stride].transpose(3, 0, 1, 2, 5, 6, 4)
    return windows.reshape(*windows.shape[:4], kh * kw * C // groups)


def _matrices(weight, groups):  # [O, C/groups, kh, kw] -> [groups, kh * kw * C/groups, O/groups]
    O = len(weight)
    return weight.reshape(groups, O // groups, *weight.shape[1:]).transpose(0, 3, 4, 2, 1).reshape(
        groups, -1, O // groups
    )  # fmt: skip


@differentiable
def conv2d(x, weight, bias=None, stride=1, padding=0, groups=1):
    """[B, height, width, C], [O, C/groups, kh, kw], [O] -> [B, h, w, O], zero padding."""
    patches = _patches(x, *weight.shape[2:], stride, padding, groups)
    out = _rows(patches) @ _matrices(weight, groups)  # one large product for each group
    out = np.moveaxis(out, 0, 1).reshape(*patches.shape[1:4], len(weight))
    return out if bias is None else out + bias


def _rows(x):  # [groups, B, h, w, I] -> [groups, B*h*w, I]
    return x.reshape(len(x), -1, x.shape[-1])


@conv2d.gradient
def conv2d_backward(
    dout, x, weight, bias=None, stride=1, padding=0, groups=1, needs=(True, True, True)
):
    O, I, kh, kw = weight.shape
    B, h, w, _ = dout.shape
    dgroup = np.moveaxis(dout.reshape(B, h, w, groups, O // groups), 3, 0)
    dx = dweight = None
    # out = patches @ matrix, for every group
    if needs[0]:
        dpatches = _rows(dgroup) @ _matrices(weight, groups).swapaxes(-1, -2)
        dx = _add_patches(dpatches.reshape(groups, B, h, w, kh, kw, I), x.shape, stride, padding)
    if needs[1]:
        rows = _rows(_patches(x, kh, kw, stride, padding, groups))
        dmatrix = rows.swapaxes(-1, -2) @ _rows(dgroup)
        dweight = dmatrix.reshape(groups, kh, kw, I, O // groups).transpose(0, 4, 3, 1, 2)
        dweight = dweight.reshape(weight.shape)
    return dx, dweight, None if bias is None else dout.sum(axis=(0, 1, 2))


def _add_patches(dpatches, shape, stride, padding):
    """Undo _patches: every window adds its gradient to the pixels it was cut from."""
    groups, B, h, w, kh, kw, I = dpatches.shape
    _, height, width, C = shape
    dx = np.zeros((B, height + 2 * padding, width + 2 * padding, groups, I), dpatches.dtype)
    for i in range(kh):
        for j in range(kw):
            rows, columns = slice(i, i + stride * h, stride), slice(j, j + stride * w, stride)
            dx[:, rows, columns] += np.moveaxis(dpatches[:, :, :, :, i, j], 0, 3)
    return dx[:, padding : padding + height, padding : padding + width].reshape(B, height, width, C)


@differentiable
def standardise_weight(weight, gain, eps=1e-4):  # [O, I, kh, kw], [O] -> [O, I, kh, kw]
    """Scaled weight standardisation: each filter gets mean 0 and norm `gain` (Brock et al., 2021).

    With unit-variance inputs of mean 0 the output then has variance gain^2.
    """
    return _standard_filters(weight, eps)[0] * gain[:, None, None, None]


def _standard_filters(weight, eps):
    centred = weight - weight.mean(axis=(1, 2, 3), keepdims=True)
    inv_norm = 1 / np.sqrt(np.square(centred).sum(axis=(1, 2, 3), keepdims=True) + eps)
    return centred * inv_norm, inv_norm


@standardise_weight.gradient
def standardise_weight_backward(dout, weight, gain, eps=1e-4):
    w_hat, inv_norm = _standard_filters(weight, eps)
    # out = w_hat * gain
    dgain = (dout * w_hat).sum(axis=(1, 2, 3))
    dw_hat = dout * gain[:, None, None, None]
    # w_hat = centred * inv_norm, inv_norm = (sum centred^2 + eps)^-1/2
    dcentred = dw_hat - w_hat * (dw_hat * w_hat).sum(axis=(1, 2, 3), keepdims=True)
    dcentred *= inv_norm
    # centred = weight - mean(weight)
    return dcentred - dcentred.mean(axis=(1, 2, 3), keepdims=True), dgain


@differentiable
def average_pool(x, size):  # [B, height, width, C] -> [B, height/size, width/size, C]
    B, height, width, C = x.shape
    return x.reshape(B, height // size, size, width // size, size, C).mean(axis=(2, 4))


@average_pool.gradient
def average_pool_backward(dout, x, size):
    return dout.repeat(size, axis=1).repeat(size, axis=2) / size**2


# --- the Normalizer-Free ResNet -----------------------------------------------------------------

# what brings the variance of activation(x), x ~ N(0, 1), back to 1
ACTIVATION_GAIN = {"relu": 1.7139588594446636, "gelu": 1.7015043497085571}


@dataclass(frozen=True)
class VisionConfig:
    """A Normalizer-Free ResNet. The defaults are the mini model's; `NFNET_F6` is the paper's.

    bottleneck None makes a block of two 3x3 convolutions; a ratio makes one of 1x1, two grouped
    3x3 and 1x1, the inner width being ratio * width. ValueError when a value cannot work, as when
    the strides do not divide image_size.
    """

    image_size: int = 24
    stem: tuple[int, ...] = (24,)
    stem_strides: tuple[int, ...] = (2,)
    widths: tuple[int, ...] = (48, 64)
    depths: tuple[int, ...] = (1, 1)
    strides: tuple[int, ...] = (2, 1)
    bottleneck: float | None = None
    group_size: int | None = None
    squeeze_excite: float | None = None
    final_width: int | None = None
    activation: str = "relu"

    def __post_init__(self):
        check_types(self)
        sizes = ("stem", "stem_strides", "widths", "depths", "strides")
        check_range(self, 1, 4096, "image_size")
        check_at_least(self, 1, "group_size", "final_width", *sizes)
        check_lengths(self, max(1, len(self.stem)), "stem", "stem_strides")
        check_lengths(self, max(1, len(self.widths)), "widths", "depths", "strides")
        self._check_widths()
        if self.activation not in ACTIVATION_GAIN:
            known = " or ".join(ACTIVATION_GAIN)
            raise ValueError(f"activation must be {known}, got {self.activation!r}")
        stride = prod(self.stem_strides) * prod(self.strides)
        if self.image_size % stride:
            raise ValueError(f"image_size must be a multiple of {stride}, got {self.image_size}")

    def _check_widths(self):
        """ValueError unless the inner widths are above 0 and made of whole groups."""
        check_range(self, 1 / min(self.widths), 16, "bottleneck", "squeeze_excite")
        ratio, size, before = self.bottleneck or 1, self.group_size, self.stem[-1]
        for width in self.widths if size else ():
            inner = int(width * ratio)
            # without a bottleneck a block's first convolution is grouped too, and reads `before`
            if inner % size or (self.bottleneck is None and before % (inner // size)):
                raise ValueError(f"group_size must divide the inner width {inner}, got {size}")
            before = width

    @property
    def out_dim(self):
        """D_v, the width of a visual feature."""
        return self.final_width or self.widths[-1]

    @property
    def num_features(self):
        """S, the number of features of one frame: the last grid, flattened."""
        return (self.image_size // (prod(self.stem_strides) * prod(self.strides))) ** 2


NFNET_F6 = VisionConfig(
    image_size=320, stem=(16, 32, 64, 128), stem_strides=(2, 1, 1, 2),
    widths=(256, 512, 1536, 1536), depths=(7, 14, 42, 21), strides=(1, 2, 2, 2),
    bottleneck=0.5, group_size=128, squeeze_excite=0.5, final_width=3072, activation="gelu",
)  # fmt: skip


class Conv2d(Module):
    """A convolution with scaled weight standardisation; `same` padding for odd kernels."""

    def __init__(self, in_channels, out_channels, kernel, stride=1, groups=1, *, rng):
        shape = (out_channels, in_channels // groups, kernel, kernel)
        self.stride, self.padding, self.groups = stride, kernel // 2, groups
        weight = rng.normal(0, prod(shape[1:]) ** -0.5, shape)
        self.weight = Parameter(weight.astype(np.float32, copy=False))
        self.gain = Parameter(np.ones(out_channels, np.float32))
        self.bias = Parameter(np.zeros(out_channels, np.float32))

    def forward(self, x):  # [B, height, width, C] -> [B, h, w, O]
        weight = standardise_weight(self.weight, self.gain)
        return conv2d(
            x, weight, self.bias, stride=self.stride, padding=self.padding, groups=self.groups
        )


class SqueezeExcite(Module):
    """Scale every channel by a gate in (0, 2), from the channels' means (Hu et al., 2018)."""

    def __init__(self, channels, ratio, *, rng):
        hidden = int(channels * ratio)
        self.down = Linear(channels, hidden, bias=True, rng=rng)
        self.up = Linear(hidden, channels, bias=True, rng=rng)

    def forward(self, x):  # [B, height, width, C] -> the same
        gate = sigmoid(self.up(ACTIVATIONS["relu"](self.down(x.mean(axis=(1, 2))))))
        return x * (gate.reshape(len(x), 1, 1, x.shape[-1]) * 2)


class NFBlock(Module):
    """x -> shortcut(x) + 0.2 * skip_gain * residual(x), without any normalisation.

    The input is divided by its expected deviation (beta). skip_gain starts at 1, not at NFNet's 0:
    a choice for networks of a few blocks.
    """

    def __init__(self, in_width, width, stride, expected_std, config, *, rng):
        self.stride, self.beta, self.act = stride, 1 / expected_std, _scaled(config.activation)
        inner = width if config.bottleneck is None else int(width * config.bottleneck)
        groups = inner // config.group_size if config.group_size else 1
        shapes = [(in_width, inner, 3, stride, groups), (inner, width, 3, 1, groups)]
        if config.bottleneck is not None:
            shapes = [(in_width, inner, 1), (inner, inner, 3, stride, groups)]
            shapes += [(inner, inner, 3, 1, groups), (inner, width, 1)]
        self.convs = [Conv2d(*shape, rng=rng) for shape in shapes]
        transition = stride > 1 or in_width != width
        self.shortcut = Conv2d(in_width, width, 1, rng=rng) if transition else None
        ratio = config.squeeze_excite
        self.squeeze_excite = SqueezeExcite(width, ratio, rng=rng) if ratio else None
        self.skip_gain = Parameter(np.ones((), np.float32))

    def forward(self, x):  # [B, height, width, C] -> [B, height/stride, width/stride, O]
        out = self.act(x) * self.beta
        if self.shortcut is not None:
            x = self.shortcut(average_pool(out, self.stride) if self.stride > 1 else out)
        out = self.convs[0](out)
        for conv in self.convs[1:]:
            out = conv(self.act(out))
        if self.squeeze_excite is not None:
            out = self.squeeze_excite(out)
        return x + out * self.skip_gain * 0.2


def _scaled(activation):
    return lambda x: ACTIVATIONS[activation](x) * ACTIVATION_GAIN[activation]


class NormalizerFreeResNet(Module):
    """Images -> a grid of features (Brock et al., 2021), flattened as the paper does."""

    def __init__(self, config, *, rng):
        self.config, self.act = config, _scaled(config.activation)
        channels = (3, *config.stem)
        self.stem = [
            Conv2d(channels[i], channels[i + 1], 3, stride, rng=rng)
            for i, stride in enumerate(config.stem_strides)
        ]
        self.blocks, width, variance = [], channels[-1], 1.0
        for stage, depth in enumerate(config.depths):
            for i in range(depth):
                stride = config.strides[stage] if i == 0 else 1
                block = NFBlock(width, config.widths[stage], stride, variance**0.5, config, rng=rng)
                self.blocks.append(block)
                # a transition's shortcut starts again from variance 1; the residual adds 0.2^2
                variance = (1.0 if block.shortcut is not None else variance) + 0.04
                width = config.widths[stage]
        final = config.final_width
        self.final_conv = Conv2d(width, final, 1, rng=rng) if final else None

    def forward(self, pixels):
        """[B, height, width, 3] in [0, 1] -> features [B, S, D_v]."""
        x = self.stem[0](pixels * 2 - 1)
        for conv in self.stem[1:]:
            x = conv(self.act(x))
        for block in self.blocks:
            x = block(x)
        x = self.act(x if self.final_conv is None else self.final_conv(x))
        return x.reshape(len(pixels), self.config.num_features, self.config.out_dim)


def check_pixels(pixels, image_size, grids=((1, 1),)):
    """Return pixels [..., H, W, 3] as an array; ValueError unless real numbers within [0, 1], and
    H, W rows and columns of image_size, of one of these grids (rows, columns)."""
    pixels = np.asarray(pixels)
    if pixels.shape[-3:] not in [(r * image_size, c * image_size, 3) for r, c in grids]:
        tiles = f", or up to {max(r * c for r, c in grids)} such tiles" * (len(grids) > 1)
        want = f"[..., {image_size}, {image_size}, 3]{tiles}"
        raise ValueError(f"images must be {want}, got {pixels.shape}")
    if pixels.dtype.kind != "f":
        raise ValueError(f"images must be floating point in [0, 1], got {pixels.dtype}")
    if not np.isfinite(pixels).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(pixels))[0])
        raise ValueError(f"images must be finite, got {pixels[index]} at {list(index)}")
    if pixels.size and (pixels.min() < 0 or pixels.max() > 1):
        raise ValueError(f"images must lie in [0, 1], got {pixels.min()}..{pixels.max()}")
    return pixels


# --- the contrastive objective ------------------------------------------------------------------


@differentiable
def l2_normalise(x, eps=1e-12):  # [..., D] -> [..., D] of length 1
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), eps)


@l2_normalise.gradient
def l2_normalise_backward(dout, x, eps=1e-12):
    norm = np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), eps)
    unit = x / norm
    # only what is orthogonal to x turns it; its length does not matter
    return (dout - unit * (dout * unit).sum(axis=-1, keepdims=True)) / norm


@differentiable
def contrastive_loss(images, texts, inverse_temperature, label_smoothing=0.0):
    """Cross-entropy of finding each image's text plus that of finding each text's image.

    images, texts [B, D] of unit length, row i belonging to row i; inverse_temperature [] -> []
    (paper, appendix B.1.3: the two-term multi-class N-pair loss).
    """
    logits, own = inverse_temperature * (images @ texts.T), np.arange(len(images))
    image_to_text = cross_entropy(logits, own, label_smoothing=label_smoothing)
    return image_to_text + cross_entropy(logits.T, own, label_smoothing=label_smoothing)


@contrastive_loss.gradient
def contrastive_loss_backward(dout, images, texts, inverse_temperature, label_smoothing=0.0):
    similarity, own = images @ texts.T, np.arange(len(images))
    logits, smooth = inverse_temperature * similarity, {"label_smoothing": label_smoothing}
    # loss = cross_entropy(logits) + cross_entropy(logits^T)
    dlogits = cross_entropy_backward(dout, logits, own, **smooth)[0]
    dlogits = dlogits + cross_entropy_backward(dout, logits.T, own, **smooth)[0].T
    # logits = inverse_temperature * images @ texts^T
    dsimilarity = inverse_temperature * dlogits
    return dsimilarity @ texts, dsimilarity.T @ images, (dlogits * similarity).sum()


class TextEncoder(Module):
    """A small bidirectional transformer in the place of the paper's BERT; mean over the words."""

    def __init__(self, vocab_size, dim, depth=1, heads=4, max_positions=32, pad_token=0, *, rng):
        self.pad_token = pad_token
        self.embedding = Embedding(vocab_size, dim, rng=rng)
        self.positions = Parameter(
            rng.normal(0, 0.1, (max_positions, dim)).astype(np.float32, copy=False)
        )
        self.blocks = [
            TransformerBlock(dim, heads, 4 * dim, norm=LayerNorm, rng=rng) for _ in range(depth)
        ]

    def forward(self, tokens):  # int [B, L], padded -> [B, D]
        """ValueError when the tokens are longer than max_positions."""
        L, most = tokens.shape[1], len(self.positions)
        if L > most:
            raise ValueError(f"the text encoder takes at most {most} tokens, got {L}")
        present = tokens != self.pad_token
        x = keep(self.embedding(tokens) + self.positions[:L], present[..., None])
        for block in self.blocks:
            x = block(x, mask=present[:, None, None])
        share = present / np.maximum(present.sum(axis=1, keepdims=True), 1)
        return (x * share[..., None].astype(array_of(x).dtype)).sum(axis=1)


class ContrastiveModel(Module):
    """The vision and the text encoder with their projections into one space of unit vectors."""

    def __init__(self, vision_encoder, text_encoder, text_dim, joint_dim, *, rng):
        self.vision_encoder, self.text_encoder = vision_encoder, text_encoder
        self.image_proj = Linear(vision_encoder.config.out_dim, joint_dim, rng=rng)
        self.text_proj = Linear(text_dim, joint_dim, rng=rng)
        self.log_inverse_temperature = Parameter(np.array(np.log(10), np.float32))

    def embed_images(self, pixels):  # [B, height, width, 3] -> [B, D], unit length
        """The mean of the features, projected."""
        return l2_normalise(self.image_proj(self.vision_encoder(pixels).mean(axis=1)))

    def embed_texts(self, tokens):  # int [B, L] -> [B, D], unit length
        """The mean of the words, projected."""
        return l2_normalise(self.text_proj(self.text_encoder(tokens)))

    def forward(self, pixels, others, label_smoothing=0.0):  # -> the loss, []
        """pixels [B, height, width, 3], others: tokens int[B, L], or other pictures of the same
        things, [B, height, width, 3]; row i of one belongs to row i of both."""
        inverse_temperature = exp(self.log_inverse_temperature)
        images, embed = self.embed_images(pixels), self.embed_texts
        if np.ndim(others) == 4:
            embed = self.embed_images
        smoothing = dict(label_smoothing=label_smoothing)
        return contrastive_loss(images, embed(others), inverse_temperature, **smoothing)
