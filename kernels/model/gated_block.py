"""GATED XATTN-DENSE as functions, from the fused pieces: what `miniflamingo.xattn` computes.

    y = y + tanh(alpha_xattn) * out_proj(attention(q_proj(norm(y)), keys_values, phi))
    y = y + tanh(alpha_dense) * down(relu(up(ffw.norm(y)))^2)

Letters: B batch, L text tokens, N images, R visual tokens of an image, H heads, K head width, D and
D_m the widths of text and visual tokens. weights is {name: tensor} with the parameters' names of
`miniflamingo.xattn.GatedCrossAttentionDense` and of its twin in layers.py.

The pieces, and what decides between their branches:

    norm, ffw.norm, media_norm    layer_norm.py              always: 3/5 of torch's backward bytes
    q_proj, k_proj, v_proj        cuBLAS                     nothing to fuse
    attention                     image_causal_attention.py  always
    out_proj and its gate         gated_linear.py            `choose`, by H*K
    up and the squared ReLU       squared_relu_linear.py     `choose`, by D
    down and its gate             gated_linear.py            `choose`, by 4D

Kept for the backward pass, in elements (the norms' inputs y are the residual stream itself): both
norms' outputs 2 BLD, q and the attention's output 2 BLHK, the hidden layer 4 BLD, and the stream
between the branches BLD; operation by operation torch also keeps r, 4 BLD, and each branch's output
for its gate, 2 BLD.

Tested (interpreter) against the NumPy module and plain torch, forward and backward. Not tested: any
GPU.
"""

from ..common.operands import packed
from ..common.runtime import describe, torch
from ..gated_linear import gated_linear
from ..image_causal_attention import image_causal_attention
from ..layer_norm import layer_norm
from ..squared_relu_linear import squared_relu_linear
from .layers import keep_seen

MEDIA_WEIGHTS = (
    *("media_norm.weight", "media_norm.bias"),
    *("attention.k_proj.weight", "attention.v_proj.weight"),
)
TEXT_WEIGHTS = (
    *("norm.weight", "norm.bias", "attention.q_proj.weight", "attention.out_proj.weight"),
    *("alpha_xattn", "ffw.norm.weight", "ffw.norm.bias", "ffw.up.weight", "ffw.down.weight"),
    "alpha_dense",
)


def project_media(media, weights, heads, phi=None):
    """media [B, N, R, D_m], heads (H, K) -> keys and values [B, N, R, H, K]: once per image.

    phi int[B, L], where given, keeps images that no token attends to, which may hold NaN, out of
    the weights' gradients. ValueError for weights that are missing or do not fit.
    """
    norm_weight, norm_bias, *projections = _named(weights, MEDIA_WEIGHTS)
    rows = heads[0] * heads[1]
    for x in projections:
        if list(x.shape) != [rows, media.shape[-1]]:
            raise ValueError(
                f"k_proj and v_proj must be [H*K, D_m] = [{rows}, {media.shape[-1]}], "
                f"got {list(x.shape)}"
            )
    media = media if phi is None else keep_seen(media, phi)
    media = layer_norm(media, norm_weight, norm_bias)
    return tuple(_linear(media, w).unflatten(-1, heads) for w in projections)


def _linear(x, weight):
    return torch.nn.functional.linear(packed(x), packed(weight))


def gated_xattn_dense(
    y, keys_values, phi, weights, work=None, *, fused=None, skip_without_image=False, check=True
):
    """y [B, L, D], keys_values as from project_media, phi int[B, L] in 0..N -> [B, L, D].

    work is phi's `build_work_list`, which all layers can share; check as in image_causal_attention.
    fused: every product by its kernel (True), by cuBLAS (False), or as each file's `choose` says
    (None). skip_without_image leaves tokens with phi = 0 as they are, in both branches. With both
    alphas at 0 the result is y, bit for bit, where both branches are finite; only -0 may become 0.
    ValueError for arguments that do not fit.
    """
    (norm_weight, norm_bias, q_proj, out_proj, alpha_xattn,
     ffw_weight, ffw_bias, up, down, alpha_dense) = _named(weights, TEXT_WEIGHTS)  # fmt: skip
    (k, v), D = keys_values, q_proj.shape[-1]
    if y.ndim != 3 or y.shape[-1] != D:
        raise ValueError(f"y must be [B, L, {D}], got {describe(y)}")
    if k.ndim != 5 or k.shape[3] * k.shape[4] != len(q_proj):
        raise ValueError(f"keys must be [B, N, R, H, K], H*K = {len(q_proj)}, got {describe(k)}")
    q = _linear(layer_norm(y, norm_weight, norm_bias), q_proj)
    attended = image_causal_attention(q.unflatten(-1, k.shape[3:]), k, v, phi, work, check)
    y = gated_linear(y, attended.flatten(-2), alpha_xattn, out_proj, fused)
    seen = ((phi > 0) & (phi <= k.shape[1]))[..., None]
    read = torch.where(seen, y, 0) if skip_without_image else y  # what is skipped may overflow
    hidden = squared_relu_linear(layer_norm(read, ffw_weight, ffw_bias), up, fused)
    out = gated_linear(y, hidden, alpha_dense, down, fused)
    # a choice of y, D wide, moves less than one of hidden, 4D wide
    return torch.where(seen, out, y) if skip_without_image else out


def _named(weights, names):
    missing = [name for name in names if name not in weights]
    if missing:
        raise ValueError(f"weights must have {', '.join(names)}; missing: {', '.join(missing)}")
    return [weights[name] for name in names]
