"""Scaled dot-product attention and its gradient; then what every room builds from it.

    attention(Q, K, V) = softmax(Q K^T / sqrt(K)) V        (Vaswani et al., 2017, equation 1)

Letters: B batch, L or Lq queries, Lk keys, H heads, K head width, D model width.
"""

import numpy as np

from miniflamingo.autograd import differentiable
from miniflamingo.functional import (
    ACTIVATIONS,
    LayerNorm,
    Linear,
    RMSNorm,
    concat,
    row_dot,
    row_max,
    row_sum,
)
from miniflamingo.module import Module
from miniflamingo.rotary import frequencies, rotate


def visible_pairs(mask, bias):  # -> bool [.., Lq, Lk], or None where all may see all
    """Which keys a query may attend to: those that neither mask nor a bias of -inf hides."""
    if bias is None:
        return mask
    return bias != -np.inf if mask is None else mask & (bias != -np.inf)


def attention_weights(q, k, mask=None, bias=None):  # [.., Lq, K], [.., Lk, K] -> [.., Lq, Lk]
    """softmax(q k^T / sqrt(K) + bias), over the keys that `mask` allows.

    mask is boolean (True: may be attended to), bias is added to the scores; both broadcast to
    [.., Lq, Lk]. A query that may attend to nothing gets weights of exactly 0: the softmax of a row
    that holds only -inf would be NaN, and that of equal large negatives a uniform average.
    """
    scores = q @ k.swapaxes(-1, -2)
    scores *= q.shape[-1] ** -0.5
    if bias is not None:
        scores += bias
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    top = row_max(scores)
    if (
        bias is not None and np.isnan(top).any()
    ):  # NaN - inf is NaN: choose, where a sum will not do
        scores = np.where(visible_pairs(mask, bias), scores, -np.inf)
        top = row_max(scores)
    scores -= np.where(np.isfinite(top), top, 0)
    weights = np.exp(scores, out=scores)  # in place: a large array costs more to get than to fill
    total = row_sum(weights)
    weights /= np.where(total > 0, total, 1)
    return weights


def weigh(weights, x, visible):  # [.., I, J], [.., J, K], bool [.., I, J] or None -> [.., I, K]
    """weights @ x, in which a hidden pair's weight of 0 hides NaN and infinity, too."""
    if visible is None or np.isfinite(x).all():
        return weights @ x
    visible, wrong = np.broadcast_to(visible, weights.shape), ~np.isfinite(x)
    return np.where(visible @ wrong, weights @ x, weights @ np.where(wrong, 0, x))


@differentiable
def attention(q, k, v, mask=None, bias=None):
    """[.., Lq, K], [.., Lk, K], [.., Lk, K] -> [.., Lq, K]; see attention_weights for the mask.

    What a query may not attend to does not reach it, in output or gradient, NaN or not.
    """
    return weigh(attention_weights(q, k, mask, bias), v, visible_pairs(mask, bias))


@attention.gradient
def attention_backward(dout, q, k, v, mask=None, bias=None):
    p, visible, seen_by = attention_weights(q, k, mask, bias), visible_pairs(mask, bias), None
    if visible is not None:
        seen_by = np.broadcast_to(visible, p.shape).swapaxes(-1, -2)
    # out = p @ v
    dv = weigh(p.swapaxes(-1, -2), dout, seen_by)
    dscores = dout @ v.swapaxes(-1, -2)  # so far dp
    if visible is not None and not np.isfinite(dscores).all():
        dscores = np.where(visible, dscores, 0)
    # p = softmax(scores): a row of zeros stays a row of zeros
    dscores -= row_dot(p, dscores)
    dscores *= p
    # scores = q @ k^T / sqrt(K) + bias
    dscores *= q.shape[-1] ** -0.5
    return weigh(dscores, k, visible), weigh(dscores.swapaxes(-1, -2), q, seen_by), dv


class KeyValueCache:
    """The keys and values of the tokens seen so far, for one self-attention layer.

    Row b's token at position p lies at [b, p], so rows of different lengths share one cache with no
    padding between their tokens: what lies behind a row's last position is masked, and overwritten
    later.
    """

    def __init__(self, batch, length, heads, head_dim, dtype):
        self.k = np.zeros((batch, length, heads, head_dim), dtype)
        self.v = np.zeros_like(self.k)

    def update(self, k, v, positions):
        """Store k, v [B, L, H, K] at positions [B, L] (or [1, L]); return, as views, those up to
        the furthest of these positions, [B, Lk, H, K]: Lk = furthest + 1."""
        rows, end = np.arange(len(k))[:, None], positions.max() + 1
        self.k[rows, positions], self.v[rows, positions] = k, v
        return self.k[:, :end], self.v[:, :end]

    def select(self, rows):
        """Keep (or repeat) the given batch rows, for beams."""
        self.k, self.v = self.k[rows], self.v[rows]


def swap_heads(x):  # [B, L, H, K] <-> [B, H, L, K]
    """Exchange the token and the head axis."""
    return x.transpose(0, 2, 1, 3)


def group_heads(x, groups):  # [B, L, H, K] -> [B, L groups, H / groups, K]
    """Lay the heads that share a key and a value behind one another, as if each were a token."""
    if groups == 1:
        return x
    B, L, H, K = x.shape
    x = x.reshape(B, L, H // groups, groups, K).transpose(0, 1, 3, 2, 4)
    return x.reshape(B, L * groups, H // groups, K)


def ungroup_heads(x, groups):  # [B, L groups, H / groups, K] -> [B, L, H, K]
    """Undo group_heads."""
    if groups == 1:
        return x
    B, M, H, K = x.shape
    x = x.reshape(B, M // groups, groups, H, K).transpose(0, 1, 3, 2, 4)
    return x.reshape(B, M // groups, H * groups, K)


def group_rows(mask, groups, L):  # what broadcasts to [B, H, L, Lk] -> the same of grouped heads
    """A mask or a bias for the queries of group_heads."""
    if mask is None or groups == 1:
        return mask
    mask = mask[(None,) * (4 - mask.ndim)]
    B, H, rows, Lk = mask.shape
    if H == 1:
        return mask if rows == 1 else np.repeat(mask, groups, axis=2)
    mask = np.broadcast_to(mask, (B, H, L, Lk)).reshape(B, H // groups, groups, L, Lk)
    return mask.swapaxes(2, 3).reshape(B, H // groups, L * groups, Lk)


MOST_SCORES = 1 << 26  # numbers in memory at a time: 0.3 GB in float32


def attention_in_parts(q, k, v, mask=None, bias=None):
    """attention, of some queries after others where all scores would be too many to keep: what a
    query gets depends on no other one."""
    each = max(1, MOST_SCORES * q.shape[-2] * q.shape[-1] // max(1, q.size * k.shape[-2]))
    if each >= q.shape[-2]:
        return attention(q, k, v, mask=mask, bias=bias)

    def rows(x, i):  # of a mask or a bias, which may have one for all queries
        return x if x is None or x.ndim < 2 or x.shape[-2] == 1 else x[..., i, :]

    parts = [slice(i, i + each) for i in range(0, q.shape[-2], each)]
    outs = (attention(q[..., i, :], k, v, mask=rows(mask, i), bias=rows(bias, i)) for i in parts)
    return concat(*outs, axis=-2)


def shared_key_attention(q, k, v, mask=None, bias=None):
    """[B, L, H, K], [B, Lk, H / groups, K] twice -> [B, L, H, K]; mask and bias as in attention.

    Without sharing (groups = 1) this is attention with the heads' axis in its place.
    """
    groups, L = q.shape[2] // k.shape[2], q.shape[1]
    mask, bias = group_rows(mask, groups, L), group_rows(bias, groups, L)
    q, k, v = swap_heads(group_heads(q, groups)), swap_heads(k), swap_heads(v)
    return ungroup_heads(swap_heads(attention_in_parts(q, k, v, mask, bias)), groups)


class MultiHeadAttention(Module):
    """H attentions side by side, of width K each; self-attention unless a context is given.

    The paper's has none of the options: kv_heads keys and values that H / kv_heads heads share each
    (Ainslie et al., 2023), biases, a norm of each query and key (qk_norm makes it), by head or,
    with whole_norm, of all heads together, and a RotaryConfig. ValueError when heads is no multiple
    of kv_heads.
    """

    def __init__(
        self, dim, heads, head_dim, context_dim=None, out_scale=1.0,
        kv_heads=None, bias=False, qk_norm=None, rotary=None, whole_norm=False, *, rng,
    ):  # fmt: skip
        context_dim, kv_heads = context_dim or dim, kv_heads or heads
        if heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
        self.heads, self.head_dim, self.groups = heads, head_dim, heads // kv_heads
        self.rotary, self.whole_norm = rotary, whole_norm
        self.q_proj = Linear(dim, heads * head_dim, bias, rng=rng)
        self.k_proj = Linear(context_dim, kv_heads * head_dim, bias, rng=rng)
        self.v_proj = Linear(context_dim, kv_heads * head_dim, bias, rng=rng)
        self.out_proj = Linear(heads * head_dim, dim, bias, scale=out_scale, rng=rng)
        widths = (n * head_dim if whole_norm else head_dim for n in (heads, kv_heads))
        self.q_norm, self.k_norm = (qk_norm and qk_norm(width) for width in widths)

    def project(self, projection, x):  # [B, L, D] -> [B, L, H, K]
        """Apply one of the three projections and split the heads."""
        x = projection(x)
        return x.reshape(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim)

    def queries(self, x, positions=None):  # [B, L, D], int [B, L] -> [B, L, H, K]
        """The queries of x, normalised and turned where this attention does so."""
        return self._place(self.project(self.q_proj, x), self.q_norm, positions)

    def keys(self, x, positions=None):  # [..., D] -> [..., H / groups, K]
        """The keys of x, likewise."""
        return self._place(self.project(self.k_proj, x), self.k_norm, positions)

    def _place(self, x, norm, positions):
        if norm is not None:
            x = norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape) if self.whole_norm else norm(x)
        if self.rotary is None:
            return x
        positions = np.arange(x.shape[1])[None] if positions is None else positions
        turns = frequencies(self.rotary, self.head_dim)
        return rotate(x, positions, frequencies=turns, scale=self.rotary.scale)

    def weights(self, x, context=None, mask=None, bias=None):
        """How much each query looks at each key, [B, H, Lq, Lk]; arguments as in forward."""
        q, k = self.queries(x), self.keys(x if context is None else context)
        k = np.repeat(k, self.groups, axis=2)
        return attention_weights(swap_heads(q), swap_heads(k), mask, bias)

    def forward(self, x, context=None, mask=None, bias=None, cache=None, positions=None):
        """x [B, Lq, D], context [B, Lk, C] -> [B, Lq, D]; mask, bias broadcast to [B, H, Lq, Lk].

        With a KeyValueCache, keys and values of x go to `positions` [B, Lq], and Lk is one more
        than the furthest of them.
        """
        context = x if context is None else context
        q = self.queries(x, positions)
        k, v = self.keys(context, positions), self.project(self.v_proj, context)
        if cache is not None:
            k, v = cache.update(k, v, positions)
        out = shared_key_attention(q, k, v, mask, bias)
        return self.out_proj(out.reshape(*x.shape[:-1], self.heads * self.head_dim))


class FeedForward(Module):
    """x -> down(activation(up(norm(x)))): the dense half of a layer, D -> hidden -> D.

    gated (Shazeer, 2020; SwiGLU with silu): x -> down(activation(gate(norm(x))) * up(norm(x))).
    """

    def __init__(
        self, dim, hidden, activation="squared_relu", norm=LayerNorm, out_scale=1.0,
        gated=False, bias=False, *, rng,
    ):  # fmt: skip
        self.activation = ACTIVATIONS[activation]
        self.norm = norm(dim)
        self.gate = Linear(dim, hidden, bias, rng=rng) if gated else None
        self.up = Linear(dim, hidden, bias, rng=rng)
        self.down = Linear(hidden, dim, bias, scale=out_scale, rng=rng)

    def forward(self, x):  # [..., D] -> [..., D]
        x = self.norm(x)
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class TransformerBlock(Module):
    """Self-attention and feed-forward, each with a norm before it and the residual around it.

    head_dim is dim / heads unless given; bias is that of both parts unless ffw_bias is given;
    qk_norm gives the queries and the keys, of all heads together, a norm of the same kind; the
    other options as in the two parts. ValueError when dim is no multiple of heads.
    """

    def __init__(
        self, dim, heads, hidden, activation="gelu", norm=RMSNorm, out_scale=1.0,
        gated=False, bias=False, head_dim=None, kv_heads=None, rotary=None, ffw_bias=None,
        qk_norm=False, *, rng,
    ):  # fmt: skip
        ffw_bias = bias if ffw_bias is None else ffw_bias
        if head_dim is None and dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got {dim} and {heads}")
        self.norm = norm(dim)
        self.attention = MultiHeadAttention(
            dim, heads, head_dim or dim // heads, None, out_scale, kv_heads, bias,
            norm if qk_norm else None, rotary, whole_norm=True, rng=rng,
        )  # fmt: skip
        self.ffw = FeedForward(dim, hidden, activation, norm, out_scale, gated, ffw_bias, rng=rng)

    def forward(self, x, mask=None, bias=None, cache=None, positions=None):
        """x [B, L, D] -> [B, L, D]; the other arguments as in MultiHeadAttention."""
        x = x + self.attention(self.norm(x), None, mask, bias, cache, positions)
        return x + self.ffw(x)
