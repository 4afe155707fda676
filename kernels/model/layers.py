"""Torch twins of the NumPy modules, with the same parameter names, and a switch to the kernels.

A checkpoint of `miniflamingo.Flamingo` loads here unchanged, and back: `load_state_dict` of one
takes the `state_dict` of the other (see `from_numpy` and `to_numpy`). Each class stands for the
NumPy class of the same name; look there for the formulas and the paper's sections. Wherever text
looks at images, or latents at features, `backend` chooses "torch" (plain torch: a dense mask, a
concatenation), "fused" (the kernels) or "auto" (the kernels on a GPU, where they can take the
tensors; plain torch elsewhere).

`GatedCrossAttentionDense` stands alone: adapter.py puts it into other projects' decoders.

Letters: B batch, L text tokens, N images, T frames, S features of a frame, R visual tokens, H
heads, K head width, D width, D_m width of the visual tokens, V words.
"""

import functools
import warnings
from math import lcm
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from miniflamingo import efficientnet
from miniflamingo.dialects import DIALECTS
from miniflamingo.efficientnet import EfficientNetConfig
from miniflamingo.eyes import NoEyeConfig
from miniflamingo.flamingo import FlamingoConfig
from miniflamingo.language import alibi_slopes
from miniflamingo.perceiver import time_weights
from miniflamingo.rotary import frequencies
from miniflamingo.tiled_vit import MULTIPLE, TiledViTConfig
from miniflamingo.vision import ACTIVATION_GAIN, VisionConfig
from miniflamingo.vit import ViTConfig
from miniflamingo.xattn import compute_phi

from .. import unavailable
from ..common.operands import packed

BACKENDS = ("auto", "torch", "fused")
MISSING = unavailable()  # why there is no kernel here, None where there is
# the parameters of shape []
GATES = ("gate_attention", "gate_ffw", "gate_positions", "gate_pre", "gate_post")  # TiledViT's
SCALARS = ("alpha_xattn", "alpha_dense", "skip_gain", "log_inverse_temperature", *GATES)
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def choose_backend(backend, x, K, R, only_last=True):
    """The backend, "torch" or "fused", that a call gets; x is one of its tensors.

    "auto" takes the kernel on a GPU, for the head widths K, numbers R of visual tokens and dtypes
    that it has. "fused" without Triton falls back to plain torch, with one warning. ValueError for
    an unknown backend, and for "fused" in the ablation only_last=False, which has no kernel.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "fused" and not only_last:
        raise ValueError('backend="fused" has no kernel for only_last=False: "torch" or "auto" do')
    if backend == "fused" and MISSING:
        _warn_once(f"plain torch stands in for the fused kernel: {MISSING}")
    if backend == "torch" or MISSING or (backend == "auto" and not (x.is_cuda and only_last)):
        return "torch"
    from ..common.runtime import DTYPES, MAX_K, MAX_R  # needs Triton

    fits = x.dtype in DTYPES and K <= MAX_K and R <= MAX_R
    return "fused" if fits or backend == "fused" else "torch"


@functools.cache
def _warn_once(text):
    warnings.warn(text, stacklevel=2)


def squared_relu(x):  # [...] -> [...]
    return F.relu(x).square()


def gelu(x):  # [...] -> [...]
    return F.gelu(x, approximate="tanh")


def quick_gelu(x):  # [...] -> [...]
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "relu": F.relu,
    "squared_relu": squared_relu,
    "gelu": gelu,
    "gelu_exact": F.gelu,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
    "relu6": F.relu6,
}


class RMSNorm(nn.RMSNorm):
    def __init__(self, dim, eps=1e-6):
        super().__init__(dim, eps=eps)


NORMS = {"layer": nn.LayerNorm, "rms": RMSNorm}


def norm_named(name, eps=None):
    """As miniflamingo.functional.norm_named."""
    return functools.partial(NORMS[name], eps=eps) if name and eps else NORMS.get(name)


def turns(config, width, start, x):
    """cos, sin [L, 1, K/2] of heads of this width at the L positions of x from `start` on."""
    each = torch.from_numpy(frequencies(config, width).copy()).to(x.device)
    places = torch.arange(start, start + x.shape[1], device=x.device)
    angle = places[:, None, None] * each
    return (config.scale * angle.cos()).to(x), (config.scale * angle.sin()).to(x)


def rotate(x, cos, sin):
    """[B, L, H, K], turned as miniflamingo.rotary.rotate does it."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def group_heads(x, groups):  # [B, L, H, K] -> [B, L groups, H / groups, K]
    """As miniflamingo.attention.group_heads."""
    if groups == 1:
        return x
    return x.unflatten(2, (-1, groups)).transpose(2, 3).flatten(1, 2)


def ungroup_heads(x, groups):  # [B, L groups, H / groups, K] -> [B, L, H, K]
    """Undo group_heads."""
    if groups == 1:
        return x
    return x.unflatten(1, (-1, groups)).transpose(2, 3).flatten(2, 3)


def attend(q, k, v, mask=None, bias=None):
    """[B, L, H, K], [B, Lk, H, K] -> [B, L, H, K]; mask, bias broadcast to [B, H, L, Lk].

    What a query may not attend to (mask False, bias -inf) does not reach its output, NaN or not.
    A key or value with NaN or infinity in it makes NaN of every output that may attend to it, and
    has no gradient itself.
    """
    if bias is not None and mask is not None:
        bias = torch.where(mask, bias, -torch.inf)
    if bias is not None or mask is not None:
        k, v, reached = _hide(k, v, mask if bias is None else bias > -torch.inf)
    mask = mask if bias is None else bias
    q, k, v = (packed(x.transpose(1, 2)) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    return out if mask is None else torch.where(reached, torch.nan, out)


def _hide(k, v, visible):
    """k and v with zeros for what is not finite, and the queries bool[B, L, 1, 1] that see such.

    Multiplied by a weight of 0 it would be NaN, for every query.
    """
    visible = visible[(None,) * (4 - visible.ndim)]
    wrong = ~(k.isfinite().all(-1) & v.isfinite().all(-1))  # [B, Lk, H]
    reached = (visible.any(1) & wrong.any(-1)[:, None]).any(-1)  # [B, L], in any head
    return *(torch.where(wrong[..., None], 0, x) for x in (k, v)), reached[..., None, None]


def dense_image_causal_attention(q, k, v, phi, only_last=True):
    """Plain torch: q [B, L, H, K]; k, v [B, N, R, H, K]; phi int[B, L] -> [B, L, H, K].

    Under the dense mask [B, L, N*R]. A token that may look at nothing attends to everything and is
    then set to 0, so that no NaN arises, in value or gradient. NaN as in `attend`.
    """
    N, R = k.shape[1:3]
    if N == 0:  # zeros; DDP wants every parameter to take part
        return torch.where(q.new_zeros((), dtype=bool), q, 0) + (k.sum() + v.sum())
    if only_last and not torch.is_grad_enabled() and phi.shape[1] < N:
        return _attend_to_own(q, k, v, phi)
    image = torch.arange(1, N + 1, device=q.device).repeat_interleave(R)
    sees = (image == phi[:, :, None]) if only_last else (image <= phi[:, :, None])
    has_image = sees.any(dim=-1, keepdim=True)  # [B, L, 1]
    q = torch.where(has_image[..., None], q, 0)  # of a token that looks at nothing, NaN is unseen
    out = attend(q, k.flatten(1, 2), v.flatten(1, 2), (sees | ~has_image)[:, None])
    return torch.where(has_image[..., None], out, 0)


def _attend_to_own(q, k, v, phi):
    """The same of few tokens, as in decoding: each is given the keys of its own image alone.

    Under the mask a step would read all images' keys, and look for NaN in them, for every token.
    """
    B, N = len(phi), k.shape[1]
    has_image = ((phi > 0) & (phi <= N))[..., None, None]
    rows = torch.arange(B, device=q.device)[:, None]
    k, v = (x[rows, (phi - 1).clamp(0, N - 1)].flatten(0, 1) for x in (k, v))  # [B*L, R, H, K]
    out = attend(q.flatten(0, 1)[:, None], k, v).view(q.shape)
    return torch.where(has_image, out, 0)


def fused_image_causal_attention(q, k, v, phi, work=None):
    """The same by a kernel: that of one token a row, where there is one and no work list.

    That one has no gradient, and nothing in it waits for the device or depends on what phi holds,
    so that a CUDA graph can hold a step of decoding. phi's range is not checked.
    """
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.shape[1] == 1 and work is None and not wants_gradient:
        from ..decode_attention import decode_attention

        return decode_attention(q[:, 0], k, v, phi[:, 0])[:, None]
    from ..image_causal_attention import image_causal_attention

    return image_causal_attention(q, k, v, phi, work, check=False)


class MultiHeadAttention(nn.Module):
    def __init__(
        self, dim, heads, head_dim, context_dim=None, kv_heads=None, bias=False, qk_norm=None,
        rotary=None, whole_norm=False,
    ):  # fmt: skip
        super().__init__()
        context_dim, kv_heads = context_dim or dim, kv_heads or heads
        self.heads, self.head_dim, self.groups = heads, head_dim, heads // kv_heads
        self.rotary, self.whole_norm = rotary, whole_norm
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(context_dim, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(context_dim, kv_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(heads * head_dim, dim, bias=bias)
        widths = (n * head_dim if whole_norm else head_dim for n in (heads, kv_heads))
        self.q_norm, self.k_norm = (qk_norm and qk_norm(width) for width in widths)

    def project(self, projection, x):  # [..., D] -> [..., H, K]
        return projection(x).unflatten(-1, (-1, self.head_dim))

    def queries(self, x, turned=None):  # [..., D] -> [..., H, K]
        return self._place(self.project(self.q_proj, x), self.q_norm, turned)

    def keys(self, x, turned=None):  # [..., D] -> [..., H / groups, K]
        return self._place(self.project(self.k_proj, x), self.k_norm, turned)

    def _place(self, x, norm, turned):
        if norm is not None:
            x = norm(x.flatten(-2)).view_as(x) if self.whole_norm else norm(x)
        return x if turned is None else rotate(x, *turned)

    def forward(self, x, context=None, mask=None, bias=None, cache=None, turned=None):
        context = x if context is None else context
        if turned is None and self.rotary is not None:
            turned = turns(self.rotary, self.head_dim, cache.length if cache else 0, x)
        k, v = self.keys(context, turned), self.project(self.v_proj, context)
        k, v = (k, v) if cache is None else cache.update(k, v)
        k, v = (y.repeat_interleave(self.groups, dim=2) if self.groups > 1 else y for y in (k, v))
        return self.out_proj(attend(self.queries(x, turned), k, v, mask, bias).flatten(-2))


class FeedForward(nn.Module):
    def __init__(
        self, dim, hidden, activation="squared_relu", norm=nn.LayerNorm, gated=False, bias=False
    ):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.norm = norm(dim)
        self.gate = nn.Linear(dim, hidden, bias=bias) if gated else None
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def hidden(self, x):  # [..., D] -> [..., hidden], what `down` is to project
        x = self.norm(x)
        if self.gate is None:
            return self.activation(self.up(x))
        return self.activation(self.gate(x)) * self.up(x)

    def forward(self, x):
        return self.down(self.hidden(x))


class TransformerBlock(nn.Module):
    def __init__(
        self, dim, heads, hidden, activation="gelu", norm=RMSNorm, gated=False, bias=False,
        head_dim=None, kv_heads=None, rotary=None, ffw_bias=None, qk_norm=False,
    ):  # fmt: skip
        super().__init__()
        self.norm, head_dim = norm(dim), head_dim or dim // heads
        self.attention = MultiHeadAttention(
            dim, heads, head_dim, None, kv_heads, bias, norm if qk_norm else None, rotary,
            whole_norm=True,
        )  # fmt: skip
        ffw_bias = bias if ffw_bias is None else ffw_bias
        self.ffw = FeedForward(dim, hidden, activation, norm, gated, ffw_bias)

    def forward(self, x, mask=None, bias=None, cache=None, turned=None):
        x = x + self.attention(self.norm(x), None, mask, bias, cache, turned)
        return x + self.ffw(x)


# --- resamplers ---------------------------------------------------------------------------------


class PerceiverLayer(nn.Module):
    def __init__(self, dim, heads, head_dim, ffw_mult=4, activation="squared_relu", qk_norm=None):
        super().__init__()
        self.input_norm, self.latent_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = MultiHeadAttention(dim, heads, head_dim, qk_norm=qk_norm)
        self.ffw = FeedForward(dim, ffw_mult * dim, activation)

    def forward(self, latents, inputs, mask=None, backend="auto", work=None):
        """latents [B, R, D], inputs [B, M, D] -> [B, R, D].

        mask bool[B, 1, 1, M + R] is for "torch"; work, for "fused", is the features'
        `feature_list.build_padded_list`, by default of M for all. ValueError for another backend.
        """
        backend = choose_backend(backend, latents, self.attention.head_dim, latents.shape[1])
        x, inputs = self.latent_norm(latents), self.input_norm(inputs)
        if backend == "fused":
            attended = self._attend_fused(x, inputs, work)
        else:
            attended = self.attention(x, torch.cat([inputs, x], dim=1), mask=mask)
        latents = latents + attended
        return latents + self.ffw(latents)

    def _attend_fused(self, x, inputs, work):
        """The same attention without the concatenation: its two parts are projected apart."""
        from ..resampler_attention import padded_resampler_attention

        a = self.attention
        q, (k_x, k_l) = a.queries(x), (a.keys(y) for y in (inputs, x))
        v_x, v_l = (a.project(a.v_proj, y) for y in (inputs, x))
        out = padded_resampler_attention(q, k_x, v_x, k_l, v_l, work=work)
        return a.out_proj(out.flatten(-2))


class Resampler(nn.Module):
    def __init__(self, input_dim, dim, num_frames, num_features, dialect=DIALECTS["paper"]):
        super().__init__()
        self.input_proj = nn.Linear(input_dim, dim, bias=False) if input_dim != dim else None
        own = {"time_embeddings": num_frames if dialect.time_embeddings else None,
               "media_embeddings": dialect.media_embeddings}  # fmt: skip
        for name, rows in own.items():
            setattr(self, name, nn.Parameter(torch.randn(rows, dim)) if rows else None)
        self.spatial_embeddings = (
            nn.Parameter(torch.randn(num_features, dim)) if num_features else None
        )
        self.final_norm = nn.LayerNorm(dim)

    def embed(self, features, num_frames):
        B, N, T, S, _ = features.shape
        frames = np.full((B, N), T) if num_frames is None else np.asarray(num_frames)
        mask = None
        if (frames < T).any():  # else nothing is padded, and nothing to be paid for
            mask = np.repeat(np.arange(T) < frames[..., None], S, axis=-1).reshape(B * N, T * S)
            mask = torch.from_numpy(mask).to(features.device)
            real = mask.view(B, N, T, S, 1)
            features = torch.where(real, features, 0)  # NaN would count, in shared weights' grads
        x = features if self.input_proj is None else self.input_proj(packed(features))
        x = self._place(x, frames)
        return x.reshape(B * N, T * S, -1), mask

    def _place(self, x, frames):  # [B, N, T, S, D]
        if self.time_embeddings is not None:
            weights = time_weights(frames, x.shape[2], len(self.time_embeddings))
            x = x + (torch.from_numpy(weights).to(x) @ self.time_embeddings)[..., None, :]
        if self.spatial_embeddings is not None:
            x = x + self.spatial_embeddings
        if self.media_embeddings is not None:
            x = x + self.media_embeddings[: x.shape[1], None, None]
        return x

    def finish(self, x, B, N):
        return self.final_norm(x).unflatten(0, (B, N))


class PerceiverResampler(Resampler):
    def __init__(
        self, input_dim, dim, num_latents=64, depth=6, heads=16, head_dim=128, num_frames=8,
        num_features=None, dialect=DIALECTS["paper"], ffw_mult=4,
    ):  # fmt: skip
        super().__init__(input_dim, dim, num_frames, num_features, dialect)
        self.latents = nn.Parameter(torch.randn(num_latents, dim) * 0.3)
        self.heads = heads
        options = (ffw_mult, dialect.resampler_activation, norm_named(dialect.resampler_qk_norm))
        self.layers = nn.ModuleList(
            PerceiverLayer(dim, heads, head_dim, *options) for _ in range(depth)
        )

    def forward(self, features, num_frames=None, backend="auto"):
        """features [B, N, T, S, D_in], num_frames int[B, N] or None -> [B, N, R, D].

        ValueError for an unknown backend.
        """
        (B, N), R = features.shape[:2], len(self.latents)
        backend = choose_backend(backend, features, self.layers[0].attention.head_dim, R)
        x_f, mask = self.embed(features, num_frames)
        work = self._list_features(x_f, mask) if backend == "fused" else None
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(B * N, R)], dim=1)[:, None, None]
        x = self.latents.expand(B * N, -1, -1)
        for layer in self.layers:
            x = layer(x, x_f, mask, backend, work)
        return self.finish(x, B, N)

    def _list_features(self, x_f, mask):
        """What the fused layers share: which of the features [B*N, T*S, D] are real."""
        from ..common.feature_list import build_padded_list

        images, M = x_f.shape[:2]
        lengths = torch.full((images,), M, device=x_f.device) if mask is None else mask.sum(1)
        return build_padded_list(lengths, M, self.heads, check=False)


class NoResampler(nn.Module):
    def __init__(self, input_dim, dim):
        super().__init__()
        self.proj = nn.Linear(input_dim, dim) if input_dim != dim else None

    def forward(self, features, num_frames=None, backend="auto"):
        """features [B, N, T, S, D_in] -> [B, N, T*S, D]; backend is not looked at."""
        x = features if self.proj is None else self.proj(features)
        return x.flatten(2, 3)


# --- GATED XATTN-DENSE --------------------------------------------------------------------------


def share_work(phi, N, heads, backend, groups=1):
    """phi's work list for all layers of a model, or None where no layer will want one.

    One token a row, as in decoding, wants none where there are no gradients. groups heads share
    each key, and count as tokens.
    """
    phi, heads = spread_phi(phi, groups), heads // groups
    if phi.shape[1] == 1 and not torch.is_grad_enabled():
        return None
    if backend == "torch" or MISSING or (backend == "auto" and not phi.is_cuda):
        return None
    from ..image_causal_attention import build_work_list

    return build_work_list(phi, N, heads, check=False)


def spread_phi(phi, groups):  # int [B, L] -> int [B, L groups]
    """phi of the queries of group_heads."""
    return phi.repeat_interleave(groups, dim=1) if groups > 1 else phi


def check_phi(phi, B, L, N, device, check=True):
    """ValueError unless phi is int [B, L] on the device, and (with check) lies in 0..N.

    The range is on the device, and reading it waits for that: once a model, at its edge, is enough.
    Under torch.compile it is not read. Unread, a phi outside 0..N counts as 0.
    """
    if phi.shape != (B, L) or phi.dtype not in INTEGERS or phi.device != device:
        expected = f"int [B, L] = [{B}, {L}] on {device}"
        raise ValueError(f"phi must be {expected}, got {_describe(phi)}")
    if check and phi.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in phi.aminmax())
        if low < 0 or high > N:
            raise ValueError(f"phi must lie in 0..{N} (N = {N} images), got {low}..{high}")


def _describe(x):
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"


def keep_seen(x, phi, only_last=True):
    """x [B, N, ...] with zeros in the images that no token of phi int[B, L] attends to.

    Whatever these hold, NaN included: the attention does not look there, but the weights that all
    images share add up their gradient over all of them, and 0 * NaN is NaN.
    """
    image, phi = torch.arange(1, x.shape[1] + 1, device=x.device), phi[:, :, None]
    seen = (image == phi if only_last else image <= phi).any(1)  # [B, N]
    return torch.where(seen.view(*seen.shape, *[1] * (x.ndim - 2)), x, 0)


def gated_add(y, alpha, x, weight):
    """y + tanh(alpha) * (x @ weight^T): y [..., D], alpha [] or [D], x [..., I], weight [D, I].

    The gate is folded into the weight, so that the branch's output is not kept for the backward
    pass: with dW' = dout^T x, autograd gets d(alpha) = (1 - tanh(alpha)^2) <weight, dW'> and
    d(weight) = tanh(alpha) dW'. Without gradients the branch's output is scaled: for one token,
    writing a scaled weight would cost more than the product. At alpha = 0 the result is y, bit for
    bit, where x and weight are finite (0 * inf is NaN); only -0 may become 0.
    """
    if not torch.is_grad_enabled():
        return y + alpha.tanh() * F.linear(packed(x), weight)
    return y + F.linear(packed(x), alpha.tanh()[..., None] * weight)


class ImageCausalCrossAttention(MultiHeadAttention):
    def __init__(self, dim, media_dim, heads, head_dim, only_last=True, **options):
        super().__init__(dim, heads, head_dim, context_dim=media_dim, **options)
        self.only_last = only_last

    def heads_output(self, x, keys_values, phi, backend="auto", work=None):
        """x [B, L, D] -> [B, L, H*K], what out_proj is to project. phi's range is not checked."""
        q, phi = group_heads(self.queries(x), self.groups), spread_phi(phi, self.groups)
        k, v = (projected.to(q.dtype) for projected in keys_values)  # autocast may come in between
        if choose_backend(backend, q, q.shape[-1], k.shape[2], self.only_last) == "fused":
            out = fused_image_causal_attention(q, k, v, phi, work)
        else:
            out = dense_image_causal_attention(q, k, v, phi, self.only_last)
        return ungroup_heads(out, self.groups).flatten(-2)

    def forward(self, x, keys_values, phi, backend="auto", work=None):
        return self.out_proj(self.heads_output(x, keys_values, phi, backend, work))


class GatedCrossAttentionDense(nn.Module):
    """One GATED XATTN-DENSE layer, usable alone: y [B, L, D], media [B, N, R, D_m], phi int[B, L].

    With both alphas at 0, as at the start, it returns y, bit for bit, where both branches are
    finite; only -0 may become 0. An image that no token attends to reaches no output and no
    gradient, NaN or not. It runs under torch.compile (fullgraph), autocast, activation
    checkpointing, DDP and, after `without_scalars`, FSDP2. only_last, skip_without_image and
    dialect as in miniflamingo.xattn.
    """

    def __init__(
        self, dim, media_dim, heads, head_dim, ffw_mult=4, only_last=True, skip_without_image=False,
        dialect=DIALECTS["paper"],
    ):  # fmt: skip
        super().__init__()
        d, self.skip_without_image = dialect, skip_without_image
        norm, qk_norm = (norm_named(name, d.norm_eps) for name in (d.norm, d.qk_norm))
        self.norm, self.media_norm = norm(dim), norm(media_dim) if d.media_norm else None
        self.attention = ImageCausalCrossAttention(
            dim, media_dim, heads, head_dim, only_last, kv_heads=d.kv_heads, qk_norm=qk_norm
        )
        alpha = dim if d.vector_alpha else ()
        self.alpha_xattn = nn.Parameter(torch.zeros(alpha))
        self.ffw = FeedForward(dim, d.hidden or ffw_mult * dim, d.activation, norm, d.gated)
        self.alpha_dense = nn.Parameter(torch.zeros(alpha))

    def project_media(self, media):
        """[B, N, R, D_m] -> keys and values [B, N, R, H, K]: what a decoder keeps of the images."""
        media, a = media if self.media_norm is None else self.media_norm(media), self.attention
        return a.keys(media), a.project(a.v_proj, media)

    def forward(self, y, media, phi, backend="auto", work=None, keys_values=None, check=True):
        """-> [B, L, D].

        work, where given, is phi's `share_work`, which all layers can share. keys_values, where
        given, are the projected media (and media is not looked at). check as in `check_phi`.
        ValueError for shapes, dtypes, devices or a phi that do not fit, and as `choose_backend`.
        """
        self._check(y, media, phi, keys_values, check)
        if keys_values is None:
            keys_values = self.project_media(keep_seen(media, phi, self.attention.only_last))
        a = self.attention.heads_output(self.norm(y), keys_values, phi, backend, work)
        y = gated_add(y, self.alpha_xattn, a, self.attention.out_proj.weight)
        if not self.skip_without_image:
            return gated_add(y, self.alpha_dense, self.ffw.hidden(y), self.ffw.down.weight)
        has_image = ((phi > 0) & (phi <= keys_values[0].shape[1]))[..., None]
        h = self.ffw.hidden(torch.where(has_image, y, 0))  # what is skipped may overflow there
        h = torch.where(has_image, h, 0)
        return gated_add(y, self.alpha_dense, h, self.ffw.down.weight)

    def _check(self, y, media, phi, keys_values, check):
        a, (D,), x = self.attention, self.norm.normalized_shape, media
        name, width = "media", (a.k_proj.in_features,)
        if keys_values is not None:
            name, x, width = "keys_values", keys_values[0], (a.heads // a.groups, a.head_dim)
        if y.ndim != 3 or y.shape[-1] != D:
            raise ValueError(f"y must be [B, L, {D}], got {_describe(y)}")
        if x.ndim != 3 + len(width) or x.shape[0] != len(y) or x.shape[3:] != width:
            expected = ", ".join(map(str, width))
            raise ValueError(f"{name} must be [{len(y)}, N, R, {expected}], got {_describe(x)}")
        _check_alike(f"y, {name} and the layer", y, x, a.q_proj.weight)
        check_phi(phi, *y.shape[:2], x.shape[1], y.device, check)


def _check_alike(names, *tensors):
    devices, dtypes = [x.device for x in tensors], [x.dtype for x in tensors]
    if len(set(devices)) > 1:
        raise ValueError(f"{names} must be on one device, got {', '.join(map(str, devices))}")
    if len(set(dtypes)) > 1 and not torch.is_autocast_enabled(devices[0].type):
        got = ", ".join(map(str, dtypes))
        raise ValueError(f"{names} must have one dtype outside torch.autocast, got {got}")


def without_scalars(module):
    """Turn every parameter of shape [], a gate, into [1], in place: fully_shard takes no scalars.

    `Flamingo.to_numpy` turns them back. -> the module.
    """
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.ndim == 0:
                vector = nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad)
                setattr(owner, name, vector)
    return module


# --- the frozen parts ---------------------------------------------------------------------------


class Conv2d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel, stride=1, groups=1):
        super().__init__()
        self.stride, self.padding, self.groups = stride, kernel // 2, groups
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels // groups, kernel, kernel))
        self.gain = nn.Parameter(torch.ones(out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x):  # [B, C, height, width], as torch has it
        w = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        w = w * (w.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-4).rsqrt()
        w = w * self.gain[:, None, None, None]
        return F.conv2d(x, w, self.bias, self.stride, self.padding, 1, self.groups)


class SqueezeExcite(nn.Module):
    def __init__(self, channels, ratio):
        super().__init__()
        self.down = nn.Linear(channels, int(channels * ratio))
        self.up = nn.Linear(int(channels * ratio), channels)

    def forward(self, x):
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean(dim=(2, 3))))))
        return x * gate[:, :, None, None] * 2


class NFBlock(nn.Module):
    def __init__(self, in_width, width, stride, expected_std, config):
        super().__init__()
        self.stride, self.beta = stride, 1 / expected_std
        self.act = scaled(config.activation)
        inner = width if config.bottleneck is None else int(width * config.bottleneck)
        groups = inner // config.group_size if config.group_size else 1
        shapes = [(in_width, inner, 3, stride, groups), (inner, width, 3, 1, groups)]
        if config.bottleneck is not None:
            shapes = [(in_width, inner, 1), (inner, inner, 3, stride, groups)]
            shapes += [(inner, inner, 3, 1, groups), (inner, width, 1)]
        self.convs = nn.ModuleList(Conv2d(*shape) for shape in shapes)
        transition = stride > 1 or in_width != width
        self.shortcut = Conv2d(in_width, width, 1) if transition else None
        ratio = config.squeeze_excite
        self.squeeze_excite = SqueezeExcite(width, ratio) if ratio else None
        self.skip_gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        out = self.act(x) * self.beta
        if self.shortcut is not None:
            x = self.shortcut(F.avg_pool2d(out, self.stride) if self.stride > 1 else out)
        out = self.convs[0](out)
        for conv in self.convs[1:]:
            out = conv(self.act(out))
        if self.squeeze_excite is not None:
            out = self.squeeze_excite(out)
        return x + out * self.skip_gain * 0.2


def scaled(activation):
    return lambda x: ACTIVATIONS[activation](x) * ACTIVATION_GAIN[activation]


class NormalizerFreeResNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.act = config, scaled(config.activation)
        channels = (3, *config.stem)
        self.stem = nn.ModuleList(
            Conv2d(channels[i], channels[i + 1], 3, s) for i, s in enumerate(config.stem_strides)
        )
        blocks, width, variance = [], channels[-1], 1.0
        for depth, out, stride in zip(config.depths, config.widths, config.strides):
            for i in range(depth):
                blocks.append(NFBlock(width, out, 1 if i else stride, variance**0.5, config))
                variance = (1.0 if blocks[-1].shortcut is not None else variance) + 0.04
                width = out
        self.blocks = nn.ModuleList(blocks)
        self.final_conv = Conv2d(width, config.final_width, 1) if config.final_width else None

    def forward(self, pixels):  # [B, height, width, 3] in [0, 1] -> [B, S, D_v]
        x = self.stem[0](pixels.permute(0, 3, 1, 2) * 2 - 1)
        for conv in self.stem[1:]:
            x = conv(self.act(x))
        for block in self.blocks:
            x = block(x)
        x = self.act(x if self.final_conv is None else self.final_conv(x))
        return x.flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, norm = config, norm_named("layer", config.norm_eps)
        self.config = config
        self.patch = nn.Parameter(torch.randn(c.dim, 3, c.patch_size, c.patch_size) * 0.02)
        self.class_token = nn.Parameter(torch.randn(c.dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(c.num_tokens, c.dim) * 0.02)
        self.pre_norm = norm(c.dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(c.dim, c.heads, c.hidden, c.activation, norm, bias=True)
            for _ in range(c.depth)
        )
        self.final_norm = norm(c.dim) if c.final_norm else None

    def forward(self, pixels):  # [B, height, width, 3] in [0, 1] -> [B, S, D_v]
        mean, std = (pixels.new_tensor(x) for x in (self.config.mean, self.config.std))
        x = ((pixels - mean) * (1 / std)).permute(0, 3, 1, 2)
        x = F.conv2d(x, self.patch, stride=self.config.patch_size).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1) + self.positions
        x = self.pre_norm(x)
        for block in self.blocks:
            x = block(x)
        x = x if self.config.class_feature else x[:, 1:]
        return x if self.final_norm is None else self.final_norm(x)


class Convolution(nn.Module):
    def __init__(self, in_channels, out_channels, k, stride=1, depthwise=False):
        super().__init__()
        self.k, self.stride, self.groups = k, stride, out_channels if depthwise else 1
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels // self.groups, k, k))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x):  # [B, C, height, width], padded as TensorFlow does
        pads = [max((-(-n // self.stride) - 1) * self.stride + self.k - n, 0) for n in x.shape[2:]]
        height, width = ((pad // 2, pad - pad // 2) for pad in pads)
        x = F.pad(x, (*width, *height))
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


class InvertedResidual(nn.Module):
    def __init__(self, in_width, width, k, stride, widening):
        super().__init__()
        inner = in_width * widening
        self.expand = Convolution(in_width, inner, 1) if widening > 1 else None
        self.depthwise = Convolution(inner, inner, k, stride, True)
        self.project = Convolution(inner, width, 1)
        self.adds = stride == 1 and in_width == width

    def forward(self, x):
        out = x if self.expand is None else F.relu6(self.expand(x))
        out = self.project(F.relu6(self.depthwise(out)))
        return x + out if self.adds else out


class EfficientNetLite(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, before, blocks = config, efficientnet.STEM, []
        self.stem = Convolution(3, before, 3, 2)
        for repeats, k, stride, widening, width in efficientnet.STAGES:
            for i in range(repeats):
                blocks.append(InvertedResidual(before, width, k, 1 if i else stride, widening))
                before = width
        self.blocks, self.head = nn.ModuleList(blocks), Convolution(before, efficientnet.HEAD, 1)

    def widen(self, grid):  # [B, S, 320] -> [B, S, D_v]
        return F.relu6(F.linear(grid, self.head.weight.flatten(1), self.head.bias))

    def grid(self, pixels):  # [B, height, width, 3] in [0, 1] -> [B, 320, h, w]
        mean, std = (pixels.new_tensor(x) for x in (self.config.mean, self.config.std))
        x = F.relu6(self.stem(((pixels - mean) * (1 / std)).permute(0, 3, 1, 2)))
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, pixels):  # [B, height, width, 3] in [0, 1] -> [B, S, D_v]
        return self.widen(self.grid(pixels).flatten(2).transpose(1, 2))


class GatedBlock(TransformerBlock):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gate_attention, self.gate_ffw = (
            nn.Parameter(torch.tensor(np.pi / 4, dtype=torch.float32)) for _ in range(2)
        )

    def forward(self, x, mask=None):
        x = x + self.gate_attention.tanh() * self.attention(self.norm(x), mask=mask)
        return x + self.gate_ffw.tanh() * self.ffw(x)


class TiledViT(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        rows, T, S, D = 1 + len(c.grids), c.max_tiles, c.num_tokens, c.dim
        shapes = {"patch": (D, 3, c.patch_size, c.patch_size), "class_token": (D,),
                  "positions": (S, D), "tile_positions": (rows, T * S * D),
                  "pre_tiles": (rows, T * D), "post_tiles": (rows, T * D)}  # fmt: skip
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) * 0.02))
        for name in ("gate_positions", "gate_pre", "gate_post"):
            setattr(self, name, nn.Parameter(torch.zeros(())))
        self.pre_norm, self.post_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        sizes = (D, c.heads, c.hidden, c.activation, norm_named("layer", c.norm_eps))
        self.blocks, self.gated_blocks = (
            nn.ModuleList(kind(*sizes, ffw_bias=True) for _ in range(depth))
            for kind, depth in ((TransformerBlock, c.depth), (GatedBlock, c.gated_depth))
        )

    def forward(self, pixels):  # [B, rows * size, columns * size, 3] in [0, 1] -> [B, t S, D_v]
        c = self.config
        grid = tuple(n // c.image_size for n in pixels.shape[1:3])
        row, t, levels = 1 + c.grids.index(grid), grid[0] * grid[1], []
        x = self.embed(self.patches(pixels, *grid), row)
        real = torch.arange(x.shape[2], device=x.device) < c.num_tokens
        real = real & (torch.arange(c.max_tiles, device=x.device) < t)[:, None]
        mask, tiles = real.view(-1, 1) | real.view(-1), x.shape[1:3]
        x = x.flatten(1, 2)
        for block in self.blocks:
            x = block(x, mask)
            levels.append(x)
        x = self.post_norm(x).unflatten(1, tiles)
        x = self.in_tiles(x, self.gate_post, self.post_tiles[row]).flatten(1, 2)
        for block in self.gated_blocks:
            x = block(x, mask)
        found = [torch.stack([levels[i] for i in c.levels], dim=-1).flatten(2)] if c.levels else []
        x = torch.cat([x, *found], dim=-1).unflatten(1, tiles)
        return x[:, :t, : c.num_tokens].flatten(1, 2)

    def patches(self, pixels, rows, columns):  # -> [B, T, P, D]
        c, B = self.config, len(pixels)
        mean, std = (pixels.new_tensor(x) for x in (c.mean, c.std))
        x = ((pixels - mean) * (1 / std)).unflatten(2, (columns, -1)).unflatten(1, (rows, -1))
        x = x.permute(0, 1, 3, 5, 2, 4).flatten(0, 2)  # [B * t, 3, size, size]
        x = F.conv2d(x, self.patch, stride=c.patch_size).flatten(2).transpose(1, 2)
        return F.pad(x.unflatten(0, (B, -1)), (0, 0, 0, 0, 0, c.max_tiles - rows * columns))

    def embed(self, x, row):  # [B, T, P, D] -> [B, T, S and empty ones, D]
        x = self.in_tiles(x, self.gate_pre, self.pre_tiles[row])
        x = torch.cat([self.class_token.expand(*x.shape[:2], 1, -1), x], dim=2)
        of_tiles = self.tile_positions[row].view(x.shape[1:]) - self.positions
        x = self.pre_norm(x + self.positions + self.gate_positions.tanh() * of_tiles)
        return F.pad(x, (0, 0, 0, -x.shape[2] % MULTIPLE))

    def in_tiles(self, x, gate, which):  # [B, T, S, D], [], [T D] -> [B, T, S, D]
        return x + gate.tanh() * which.view(x.shape[1], 1, -1)


def beside(*media):
    """As miniflamingo.tiled_vit.beside."""
    R = lcm(*(x.shape[2] for x in media))
    return torch.cat([x.repeat(1, 1, R // x.shape[2], 1) for x in media], dim=1)


class NoEye(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, pixels):
        return self.config.image_size  # ValueError


EYES = {
    VisionConfig: NormalizerFreeResNet,
    ViTConfig: VisionTransformer,
    EfficientNetConfig: EfficientNetLite,
    TiledViTConfig: TiledViT,
    NoEyeConfig: NoEye,
}


class LanguageModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        norm = norm_named(*c.block_norm)
        self.embedding = nn.Embedding(c.vocab_size, c.dim)
        learned = c.positions == "learned"
        self.positions = nn.Parameter(torch.randn(c.max_positions, c.dim)) if learned else None
        self.blocks = nn.ModuleList(
            TransformerBlock(c.dim, c.heads, norm=norm, **c.block_options()) for _ in range(c.depth)
        )
        self.norm = norm(c.dim)
        tied, words = c.tie_embeddings, c.num_logits or c.vocab_size
        self.head = None if tied else nn.Linear(c.dim, words, bias=False)

    def causality(self, L, start=0):  # -> bias [1, H, L, start + L]; None: nothing is hidden
        if L == 1 and self.config.positions != "alibi":
            return None
        distance = torch.arange(start, start + L)[:, None] - torch.arange(start + L)
        slopes = self.config.alibi_slopes or alibi_slopes(self.config.heads)
        slopes = slopes if self.config.positions == "alibi" else (0.0,)
        slopes = torch.as_tensor(slopes)[:, None, None].to(self.embedding.weight)
        distance = distance.to(slopes.device)
        return torch.where(distance >= 0, -slopes * distance, -torch.inf)[None]

    def turned(self, x, start=0):
        """What all blocks share where positions are rotary: `turns`; else None."""
        rotary, K = self.blocks[0].attention.rotary, self.blocks[0].attention.head_dim
        return None if rotary is None else turns(rotary, K, start, x)

    def embed(self, tokens, table, start=0):
        x = F.embedding(tokens, table)
        return x if self.positions is None else x + self.positions[start:][: tokens.shape[1]]

    def forward(self, tokens, cache=None, last=False, noise=None):  # int [B, L] -> [B, L, V]
        """Logits. cache: a KeyValueCache for each block, whose tokens came before; last: [B, 1, V];
        noise [B, L, D] is added to the embedded tokens."""
        cache = cache or [None] * len(self.blocks)
        start = cache[0].length if cache[0] else 0
        x = self.embed(tokens, self.embedding.weight, start)
        x = x if noise is None else x + noise
        bias, turned = self.causality(tokens.shape[1], start), self.turned(x, start)
        for block, kept in zip(self.blocks, cache):
            x = block(x, None, bias, kept, turned)
        return F.linear(self.norm(x[:, -1:] if last else x), (self.head or self.embedding).weight)


class KeyValueCache:
    """The keys and values of one self-attention's tokens so far, in rows of one length; no
    gradient goes through it."""

    def __init__(self, batch, length, heads, head_dim, like):
        self.k, self.length = like.new_zeros(batch, length, heads, head_dim), 0
        self.v = torch.zeros_like(self.k)

    def update(self, k, v):  # [B, L, H, K] -> views of all so far
        start, self.length = self.length, self.length + k.shape[1]
        self.k[:, start : self.length], self.v[:, start : self.length] = k, v
        return self.k[:, : self.length], self.v[:, : self.length]

    @classmethod
    def of(cls, lm, batch, length):
        """One for each block of a LanguageModel, with room for `length` tokens."""
        shape = (batch, length, *lm.config.kv_shape, lm.embedding.weight)
        return [cls(*shape) for _ in lm.blocks]


# --- the contrastive objective --------------------------------------------------------------------


class TextEncoder(nn.Module):
    def __init__(self, vocab_size, dim, depth=1, heads=4, max_positions=32, pad_token=0):
        super().__init__()
        self.pad_token = pad_token
        self.embedding = nn.Embedding(vocab_size, dim)
        self.positions = nn.Parameter(torch.randn(max_positions, dim) * 0.1)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, heads, 4 * dim, norm=nn.LayerNorm) for _ in range(depth)
        )

    def forward(self, tokens):  # int [B, L], padded -> [B, D]
        present = tokens != self.pad_token
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        x = torch.where(present[..., None], x, 0)
        for block in self.blocks:
            x = block(x, mask=present[:, None, None])
        share = present / present.sum(dim=1, keepdim=True).clamp(min=1)
        return (x * share[..., None].to(x.dtype)).sum(dim=1)


class ContrastiveModel(nn.Module):
    def __init__(self, vision_encoder, text_encoder, text_dim, joint_dim):
        super().__init__()
        self.vision_encoder, self.text_encoder = vision_encoder, text_encoder
        self.image_proj = nn.Linear(vision_encoder.config.out_dim, joint_dim, bias=False)
        self.text_proj = nn.Linear(text_dim, joint_dim, bias=False)
        self.log_inverse_temperature = nn.Parameter(torch.tensor(np.log(10)))

    @classmethod
    def from_numpy(cls, model):
        """The twin of a miniflamingo.vision.ContrastiveModel: its sizes, weights and dtype."""
        state = {name: torch.from_numpy(np.array(x)) for name, x in model.state_dict().items()}
        text, blocks = model.text_encoder, model.text_encoder.blocks
        joint, dim = state["text_proj.weight"].shape
        twin = cls(
            NormalizerFreeResNet(model.vision_encoder.config),
            TextEncoder(len(state["text_encoder.embedding.weight"]), dim, len(blocks),
                        blocks[0].attention.heads, len(text.positions), text.pad_token),
            dim, joint,
        )  # fmt: skip
        twin.to(next(iter(state.values())).dtype).load_state_dict(state)
        return twin

    def embed_images(self, pixels):  # [B, height, width, 3] -> [B, D], unit length
        return F.normalize(self.image_proj(self.vision_encoder(pixels).mean(dim=1)), dim=-1)

    def embed_texts(self, tokens):  # int [B, L] -> [B, D], unit length
        return F.normalize(self.text_proj(self.text_encoder(tokens)), dim=-1)

    def forward(self, pixels, others):  # -> images, others [B, D] of unit length, temperature []
        embed = self.embed_images if others.ndim == 4 else self.embed_texts
        temperature = self.log_inverse_temperature.exp()
        return self.embed_images(pixels), embed(others), temperature.squeeze()


# --- Flamingo -----------------------------------------------------------------------------------


def numpy_state(state):
    """{name: tensor} -> {name: array}, with scalars that `without_scalars` changed as scalars."""
    arrays = {name: x.detach().cpu().numpy() for name, x in state.items()}
    alone = {n for n, x in arrays.items() if n.endswith(SCALARS) and x.size == 1}
    return {n: x.reshape(()) if n in alone else x for n, x in arrays.items()}


def build_resampler(config):
    """The resampler that a FlamingoConfig names; ValueError for those of the ablations."""
    c = config
    if c.resampler == "none":
        return NoResampler(c.vision.out_dim, c.media_dim)
    if c.resampler != "perceiver":
        raise ValueError(f"the torch twin has the perceiver resampler, got {c.resampler!r}")
    return PerceiverResampler(
        c.vision.out_dim, c.media_dim, c.num_latents, c.resampler_depth, c.resampler_heads,
        c.resampler_head_dim, c.num_frames,
        c.vision.num_features if c.spatial_embeddings else None, c.dialect,
    )  # fmt: skip


class Cache(NamedTuple):
    """What decoding keeps: a KeyValueCache for each LM block, and each gated layer's projected
    media, keys and values [B, N, R, H, K]."""

    tokens: list
    media: list

    @classmethod
    def of(cls, model, media, length):
        """Of a Flamingo, with room for `length` tokens; media [B, N, R, D_m] is projected once."""
        projected = [layer.project_media(media) for layer in model.gated_xattn]
        return cls(KeyValueCache.of(model.lm, len(media), length), projected)


class Flamingo(nn.Module):
    """The whole model, for training and scoring; ValueError for a resampler of the ablations, and
    for an eye that has no twin."""

    def __init__(self, config: FlamingoConfig):
        super().__init__()
        c = self.config = config
        if type(c.vision) not in EYES:
            raise ValueError(f"the torch twin has no {type(c.vision).__name__}")
        self.vision_encoder = EYES[type(c.vision)](c.vision).requires_grad_(False)
        self.resampler = build_resampler(c)
        sizes = (c.lm.dim, c.media_dim, c.xattn_heads, c.xattn_head_dim)
        choices = dict(only_last=c.only_last, skip_without_image=c.skip_without_image)
        self.gated_xattn = nn.ModuleList(
            GatedCrossAttentionDense(*sizes, **choices, dialect=c.dialect) for _ in c.layers()
        )
        self.lm = LanguageModel(c.lm).requires_grad_(False)
        own = c.train_eoc
        self.eoc_embedding = nn.Parameter(torch.zeros(c.lm.dim)) if own else None
        own = own and not c.lm.tie_embeddings
        self.eoc_head = nn.Parameter(torch.zeros(c.lm.dim)) if own else None

    @classmethod
    def from_numpy(cls, model):
        """The twin of a miniflamingo.Flamingo: the same config, weights and dtype."""
        twin = cls(model.config)
        state = {name: torch.from_numpy(np.array(x)) for name, x in model.state_dict().items()}
        twin.to(next(iter(state.values())).dtype).load_state_dict(state)
        return twin

    def to_numpy(self):
        """{name: array}, what miniflamingo.Flamingo.load_state_dict takes."""
        return numpy_state(self.state_dict())

    def encode(self, pixels, num_frames=None):  # [B, N, T, height, width, 3] -> [B, N, T, S, D_v]
        if num_frames is not None:
            real = np.arange(pixels.shape[2]) < np.asarray(num_frames)[..., None]  # [B, N, T]
            real = torch.from_numpy(real).to(pixels.device)
            pixels = torch.where(real[..., None, None, None], pixels, 0)
        return self.vision_encoder(pixels.flatten(0, 2)).unflatten(0, pixels.shape[:3])

    def forward(
        self, tokens, pixels, *, phi=None, num_images=None, num_frames=None, backend="auto"
    ):
        """As miniflamingo.Flamingo.forward, with tensors: logits [B, L, V]."""
        N = pixels.shape[1]
        if phi is None:
            ids = tokens.cpu().numpy()
            num_images = np.full(len(ids), N) if num_images is None else num_images
            phi = torch.from_numpy(compute_phi(ids, self.config.image_token, False, num_images))
            phi = phi.to(tokens.device)
        check_phi(phi, *tokens.shape, N, tokens.device)
        pixels = keep_seen(pixels, phi, self.config.only_last)
        media = self.resampler(self.encode(pixels, num_frames), num_frames, backend)
        return self.read(tokens, media, phi, backend, check=False)

    def read(
        self, tokens, media, phi, backend="auto", check=True, cache=None, last=False, keep=None
    ):
        """The text half: tokens int[B, L], media [B, N, R, D_m], phi int[B, L] -> [B, L, V].

        check=True reads phi's range, once for all layers (see check_phi). cache, where given, is a
        Cache: the tokens come behind those that it holds, and media only says how many images there
        are. last=True gives the last token's logits alone, [B, 1, V], keep bool[B, L] those of its
        tokens, [C, V].
        """
        kept = cache or Cache([None] * len(self.lm.blocks), [None] * len(self.gated_xattn))
        start = kept.tokens[0].length if cache else 0
        table, head = self.lm.embedding.weight, (self.lm.head or self.lm.embedding).weight
        if self.eoc_embedding is not None:
            table = self._with_eoc(table, self.eoc_embedding)
            head = table if self.lm.head is None else self._with_eoc(head, self.eoc_head)
        check_phi(phi, *tokens.shape, media.shape[1], tokens.device, check)
        x = self.lm.embed(tokens, table, start)
        bias, turned = self.lm.causality(tokens.shape[1], start), self.lm.turned(x, start)
        groups = self.gated_xattn[0].attention.groups if len(self.gated_xattn) else 1
        work = share_work(phi, media.shape[1], self.config.xattn_heads, backend, groups)
        for i, block in enumerate(self.lm.blocks):
            j, between = divmod(i - self.config.dialect.offset, self.config.xattn_every)
            if not between:
                x = self.gated_xattn[j](x, media, phi, backend, work, kept.media[j], check=False)
            x = block(x, None, bias, kept.tokens[i], turned)
        x = x[:, -1:] if last else x if keep is None else x[keep]
        return F.linear(self.lm.norm(x), head)

    def _with_eoc(self, table, row):
        rows = torch.arange(len(table), device=table.device)[:, None]
        return torch.where(rows == self.config.eoc_token, row, table)
