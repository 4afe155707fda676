"""What makes Flamingo Flamingo: each token looks at one image, through a gate that starts shut.

The paper's section 3.1 in the order of this file:

    phi(l)                     the index of the last image before token l, 0 where there is none
    image-causal attention     token l attends only to the R visual tokens of image phi(l)
    tanh gate                  y + tanh(alpha) * branch, alpha = 0 at initialisation
    GATED XATTN-DENSE          y = y + tanh(alpha_xattn) * attention(q=y, kv=x)
                               y = y + tanh(alpha_dense) * ffw(y)

Earlier images reach a token through the language model's own self-attention. Letters: B batch,
L text tokens, N images in a sequence, R visual tokens of an image, H heads, K head width, D width.
"""

import numpy as np

from miniflamingo.attention import (
    FeedForward,
    MultiHeadAttention,
    attention,
    attention_backward,
    group_heads,
    swap_heads,
    ungroup_heads,
)
from miniflamingo.autograd import differentiable
from miniflamingo.dialects import DIALECTS
from miniflamingo.functional import column_dot, keep, norm_named, remembered
from miniflamingo.module import Module, Parameter

# --- phi ----------------------------------------------------------------------------------------


def compute_phi(tokens, image_token, use_next=False, num_images=None):
    """phi int[B, L]: which image, counted from 1, each token attends to (paper, section 3.1.3).

    tokens int[B, L]; `<image>` is image_token and already carries its own image's index.
    use_next, a bool or bool[B], gives every token of a row the NEXT image instead of the previous
    one (the training augmentation p_next); after the last image there is none, so phi is 0 there.
    num_images int[B], where given, is checked: ValueError when a row has more tags than images.
    """
    is_image = np.asarray(tokens) == image_token
    tags = is_image.sum(axis=1)
    if num_images is not None and (tags > num_images).any():
        b = int(np.argmax(tags > num_images))
        raise ValueError(f"row {b} has {tags[b]} <image> tags but {num_images[b]} images")
    previous = np.cumsum(is_image, axis=1)
    following = previous - is_image + 1  # tags strictly before the token, plus one
    following = np.where(following > tags[:, None], 0, following)
    use_next = np.broadcast_to(use_next, len(tags))[:, None]
    return np.where(use_next, following, previous).astype(np.int32)


def check_phi(phi, B, L, N):
    """Return phi as an array; ValueError unless it is int [B, L] with 0 <= phi <= N."""
    phi = np.asarray(phi)
    if phi.shape != (B, L) or phi.dtype.kind not in "iu":
        raise ValueError(f"phi must be int [B, L] = [{B}, {L}], got {phi.dtype} {list(phi.shape)}")
    if phi.size and (phi.min() < 0 or phi.max() > N):
        b, t = np.argwhere((phi < 0) | (phi > N))[0]
        raise ValueError(
            f"phi must lie in 0..{N} (N = {N} images), got phi[{b}, {t}] = {phi[b, t]}"
        )
    return phi.astype(np.int64, copy=False)  # unsigned phi - 1 would not be an index


def image_causal_mask(phi, N, R, only_last=True):
    """The mask that phi stands for, bool[B, L, N*R] (paper, figure 7): for teaching and reference.

    only_last=False lets a token attend to all images up to phi (the paper's ablation, row vii).
    """
    image = np.repeat(np.arange(1, N + 1), R)  # [N*R], which image a visual token belongs to
    phi = np.asarray(phi)[:, :, None]
    return image == phi if only_last else image <= phi


def keep_seen(x, phi, only_last=True):  # [B, N, ...], int [B, L] -> [B, N, ...]
    """x with zeros in the images that no token attends to, whatever these hold.

    The attention reads nothing of them; but what all images share, a projection say, adds up its
    gradient over all of them, and there a single NaN would count: 0 * NaN is NaN.
    """
    seen = image_causal_mask(phi, x.shape[1], 1, only_last).any(axis=1)  # [B, N]
    return keep(x, seen.reshape(seen.shape + (1,) * (x.ndim - 2)))


# --- image-causal attention ---------------------------------------------------------------------


@remembered
def work_list(phi, N, most=64):
    """Group the tokens by the image they attend to: the list of work of the fused kernel.

    Returns owner int[I], tokens int[I, M] with M <= most: item i's tokens all attend to image
    owner[i] of the batch's B*N images; they are flat indices into B*L, and B*L marks a free place.
    An image with more than `most` tokens owns several items, one without tokens owns none.
    """
    B, L = phi.shape
    image = np.where(phi > 0, np.arange(B)[:, None] * N + phi - 1, B * N).ravel()  # flat, [B*L]
    order = np.argsort(image, kind="stable")[: np.count_nonzero(phi)]  # tokens, image by image
    count = np.bincount(image, minlength=B * N + 1)[: B * N]
    M = max(1, min(most, count.max(initial=0)))
    items = -(-count // M)  # of each image
    rank = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)  # within its image
    tokens = np.full((items.sum(), M), B * L)
    tokens[np.repeat(np.cumsum(items) - items, count) + rank // M, rank % M] = order
    return np.repeat(np.arange(B * N), items), tokens


def _gather(x, tokens):  # [B, L, H, K], int [I, M] -> [I, H, M, K]; a free place gives zeros
    flat = np.concatenate([x.reshape(-1, *x.shape[2:]), np.zeros_like(x, shape=(1, *x.shape[2:]))])
    return swap_heads(flat[tokens])


def _scatter(items, tokens, shape):  # [I, H, M, K], int [I, M] -> [B, L, H, K]; others are zeros
    B, L, H, K = shape
    flat = np.zeros((B * L + 1, H, K), items.dtype)
    flat[tokens] = swap_heads(items)
    return flat[:-1].reshape(shape)


@differentiable
def image_causal_attention(q, k, v, phi):
    """Each token attends to the R visual tokens of image phi alone; where phi = 0, the output is 0.

    q [B, L, H, K]; k, v [B, N, R, H, K]; phi int[B, L] in 0..N, in any order -> [B, L, H, K].
    Equals attention under image_causal_mask, but builds no [L, N*R] array: its cost and its memory
    grow with L*R, whatever N is. phi is checked at the model's edge (check_phi), not here.
    """
    owner, tokens = work_list(phi, N=k.shape[1])
    k, v = (x.reshape(-1, *x.shape[2:])[owner] for x in (k, v))  # [I, R, H, K]
    out = attention(_gather(q, tokens), swap_heads(k), swap_heads(v))
    return _scatter(out, tokens, q.shape)


@image_causal_attention.gradient
def image_causal_attention_backward(dout, q, k, v, phi):
    owner, tokens = work_list(phi, N=k.shape[1])
    k_item, v_item = (swap_heads(x.reshape(-1, *x.shape[2:])[owner]) for x in (k, v))
    # out = attention(q, k, v) for every item; a free place has dout = 0 and adds nothing
    dq, dk, dv = attention_backward(_gather(dout, tokens), _gather(q, tokens), k_item, v_item)
    return _scatter(dq, tokens, q.shape), _sum_items(dk, owner, k), _sum_items(dv, owner, v)


def _sum_items(items, owner, like):  # [I, H, R, K] -> [B, N, R, H, K]: add up each image's items
    out = np.zeros_like(like, shape=(like.shape[0] * like.shape[1], *like.shape[2:]))
    first = np.flatnonzero(np.diff(owner, prepend=-1))  # an image's items follow one another
    if len(first):
        out[owner[first]] = np.add.reduceat(swap_heads(items), first, axis=0)
    return out.reshape(like.shape)


# --- the gate -----------------------------------------------------------------------------------


@differentiable
def tanh_gate(y, alpha, branch):  # [..., D], [] or [D], [..., D] -> [..., D]
    return y + np.tanh(alpha) * branch


@tanh_gate.gradient
def tanh_gate_backward(dout, y, alpha, branch):
    gate = np.tanh(alpha)
    # out = y + gate * branch, gate = tanh(alpha): at alpha = 0 only y and alpha receive a gradient
    dgate = column_dot(dout, branch) if np.size(alpha) > 1 else np.vdot(dout, branch)
    return dout, (1 - gate * gate) * dgate, gate * dout


# --- GATED XATTN-DENSE --------------------------------------------------------------------------


class ImageCausalCrossAttention(MultiHeadAttention):
    """Multi-head attention from the text to the visual tokens, under phi."""

    def __init__(self, dim, media_dim, heads, head_dim, only_last=True, *, rng, **options):
        super().__init__(dim, heads, head_dim, context_dim=media_dim, rng=rng, **options)
        self.only_last = only_last

    def project_media(self, media):
        """[B, N, R, D_media] -> keys and values [B, N, R, H, K]: what a decoder keeps per image."""
        return self.keys(media), self.project(self.v_proj, media)

    def forward(self, x, keys_values, phi):
        """x [B, L, D]; keys_values as from project_media; phi int[B, L] -> [B, L, D]."""
        q, (k, v) = group_heads(self.queries(x), self.groups), keys_values
        attend = image_causal_attention if self.only_last else _attend_to_all_previous
        out = ungroup_heads(attend(q, k, v, np.repeat(phi, self.groups, axis=1)), self.groups)
        return self.out_proj(out.reshape(*x.shape[:-1], self.heads * self.head_dim))


def _attend_to_all_previous(q, k, v, phi):
    """The ablation: attention to every image up to phi, by the dense mask; shapes as above."""
    B, N, R, H, K = k.shape
    mask = image_causal_mask(phi, N, R, only_last=False)[:, None]
    k, v = (swap_heads(x.reshape(B, N * R, H, K)) for x in (k, v))
    return swap_heads(attention(swap_heads(q), k, v, mask=mask))


class GatedCrossAttentionDense(Module):
    """One GATED XATTN-DENSE layer, put before a frozen language-model block (paper, figure 4).

    D text width, D_media width of the visual tokens. With both alphas at 0 it is the identity, bit
    for bit, where both branches are finite (0 * inf is NaN); only -0 may become 0.
    Layer norms as in the paper's first version: on the queries' input, on the keys' and values'
    input (shared by both), and on the feed-forward's input. skip_without_image, which the paper
    does not have, leaves tokens with phi = 0 to the language model alone, in both branches.
    dialect is how another system departs from it: see dialects.py.
    """

    def __init__(
        self, dim, media_dim, heads, head_dim, ffw_mult=4, only_last=True,
        skip_without_image=False, dialect=DIALECTS["paper"], *, rng,
    ):  # fmt: skip
        d, self.skip_without_image = dialect, skip_without_image
        norm, qk_norm = (norm_named(name, d.norm_eps) for name in (d.norm, d.qk_norm))
        self.norm, self.media_norm = norm(dim), norm(media_dim) if d.media_norm else None
        self.attention = ImageCausalCrossAttention(
            dim, media_dim, heads, head_dim, only_last,
            kv_heads=d.kv_heads, qk_norm=qk_norm, rng=rng,
        )  # fmt: skip
        alpha = np.zeros(dim if d.vector_alpha else (), np.float32)
        self.alpha_xattn = Parameter(alpha)
        self.ffw = FeedForward(
            dim, d.hidden or ffw_mult * dim, d.activation, norm, gated=d.gated, rng=rng
        )
        self.alpha_dense = Parameter(alpha.copy())

    def project_media(self, media):
        """[B, N, R, D_media] -> keys and values [B, N, R, H, K]."""
        media = media if self.media_norm is None else self.media_norm(media)
        return self.attention.project_media(media)

    def forward(self, y, media, phi, keys_values=None):
        """y [B, L, D]; media [B, N, R, D_media]; phi int[B, L] in 0..N -> [B, L, D].

        keys_values, where given, are the projected media (and media is not looked at). An image
        that no token attends to reaches no output and no gradient, NaN or not. ValueError when phi
        does not fit.
        """
        N = (media if keys_values is None else keys_values[0]).shape[1]
        phi = check_phi(phi, *y.shape[:2], N)
        if keys_values is None:
            keys_values = self.project_media(keep_seen(media, phi, self.attention.only_last))
        y = tanh_gate(y, self.alpha_xattn, self.attention(self.norm(y), keys_values, phi))
        if not self.skip_without_image:
            return tanh_gate(y, self.alpha_dense, self.ffw(y))
        has_image = (phi > 0)[..., None]
        dense = self.ffw(keep(y, has_image))  # what is skipped may overflow there
        return tanh_gate(y, self.alpha_dense, keep(dense, has_image))
