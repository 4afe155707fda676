"""What the kernels are timed against: the same results from plain torch and from NumPy.

An Implementation computes an entry's output from its arguments. What depends on phi and the sizes
alone, and can therefore serve all layers of a forward pass (a mask, a work list, a compiled
function), it prepares beforehand. Letters: B batch, L text tokens, N images, R visual tokens of an
image, H heads, K head width, D and D_m the widths of text and visual tokens, I images of a batch,
M features of an image or a clip.

    attention   q [B, L, H, K]; k, v [B, N, R, H, K]; phi int[B, L]
    decoding    the same with L = 1
    resampler   q [I, R, H, K]; of the features k, v [I, M, H, K]; of the latents k, v [I, R, H, K]
    block       y [B, L, D]; media [B, N, R, D_m]; phi int[B, L]; the weights, in BLOCK_NAMES' order

Needs torch alone; kernels are imported when they are used.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from miniflamingo import xattn
from miniflamingo.attention import attention, attention_backward, swap_heads

from ..model.layers import GatedCrossAttentionDense


def nothing(*args):
    """What an implementation prepares that has nothing to prepare."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an output: run(state, *args), where state = prepare(*args).

    needs is "cuda" or "cpu" for what runs only there. gradients(dout, *args) is for NumPy, which
    autograd does not reach; there is one for each floating-point argument. is_kernel marks this
    project's own, against whose time the others' are held.
    """

    name: str
    run: Callable
    prepare: Callable = nothing
    needs: str = ""
    gradients: Callable | None = None
    is_kernel: bool = False
    slow: bool = False  # to prepare: timed last
    lists: bool = False  # prepare costs every forward pass: timed with it, too


def compiled(function, **options):
    """torch.compile, for these shapes alone."""
    return torch.compile(function, dynamic=False, **options)


def heads_first(*tensors):
    """[B, L, H, K] or [B, N, R, H, K] -> [B, H, ..., K], as views."""
    return [x.flatten(1, -3).transpose(1, 2) for x in tensors]


# --- the reference --------------------------------------------------------------------------------


def reference_attention(q, k, v, phi):
    """Image by image, without a mask; differentiable, in any dtype (the benchmark's is float64)."""
    out = []
    for b, row in enumerate(phi):
        order = row.argsort(stable=True)  # the tokens, image by image
        counts = row.long().bincount(minlength=k.shape[1] + 1).tolist()
        parts = list(q[b, order].split(counts))  # [tokens of an image, H, K]
        parts[0] = torch.zeros_like(parts[0])
        for j in range(1, len(parts)):
            scores = torch.einsum("lhk,rhk->hlr", parts[j], k[b, j - 1]) * q.shape[-1] ** -0.5
            parts[j] = torch.einsum("hlr,rhk->lhk", scores.softmax(-1), v[b, j - 1])
        out.append(torch.cat(parts)[order.argsort()])
    return torch.stack(out)


# --- image-causal attention -----------------------------------------------------------------------


def sees(phi, N, R):
    """The dense mask bool[B, 1, L, N*R]: which visual tokens a text token may look at."""
    image = torch.arange(1, N + 1, device=phi.device).repeat_interleave(R)
    return (phi[:, :, None] == image)[:, None]


def prepare_eager(q, k, v, phi):
    """What OpenFlamingo computes in every layer: the masked places, and the rows without images."""
    mask = sees(phi, *k.shape[1:3])
    return ~mask, ~mask.any(-1, keepdim=True)


def eager_attention(state, q, k, v, phi):
    """Masked attention as OpenFlamingo writes it, operation by operation."""
    masked, empty = state
    q, k, v = heads_first(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    scores = scores.masked_fill(masked, -torch.finfo(scores.dtype).max)
    scores = scores - scores.amax(-1, keepdim=True).detach()
    return (scores.softmax(-1).masked_fill(empty, 0.0) @ v).transpose(1, 2)


def prepare_sdpa(q, k, v, phi):
    """The mask as a bias, 0 or -inf: from a boolean one torch would make it in every call. A token
    without an image sees everything: it is set to 0 afterwards."""
    mask = sees(phi, *k.shape[1:3])
    empty = ~mask.any(-1, keepdim=True)
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=phi.device)
    return bias.masked_fill_(~(mask | empty), -torch.inf), empty.transpose(1, 2)


def sdpa_attention(state, q, k, v, phi):
    """torch's own attention under a dense mask."""
    bias, empty = state
    out = F.scaled_dot_product_attention(*heads_first(q, k, v), attn_mask=bias)
    return out.transpose(1, 2).masked_fill(empty, 0.0)


def attention_by_image(backend, state, q, k, v, phi):
    """torch's own attention without a mask, for N equal runs of tokens: rows of one image each."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    N = k.shape[1]
    q, k, v = q.unflatten(1, (N, -1)).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2).unflatten(0, (-1, N)).flatten(1, 2)


class Flex(NamedTuple):
    """What FlexAttention prepares."""

    function: Callable
    block_mask: object
    options: dict | None


def prepare_flex(q, k, v, phi, kv_block=128):
    """Compile flex_attention, and find the blocks of its mask.

    torch's backward for Hopper has one configuration, which a KV block of 64 does not divide: only
    autotuning tries others.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    (B, L), (N, R) = phi.shape, k.shape[1:3]

    def mask(b, h, token, visual):
        return phi[b, token] == visual // R + 1

    blocks = create_block_mask(mask, B, None, L, N * R, phi.device, BLOCK_SIZE=(128, kv_block))
    if kv_block == 128:
        return Flex(compiled(flex_attention), blocks, None)
    tuned = compiled(flex_attention, mode="max-autotune-no-cudagraphs")
    return Flex(tuned, blocks, {"fwd_BLOCK_N": kv_block})


def flex_attention(state, q, k, v, phi):
    """FlexAttention: the same mask, of which only the blocks that hold something are computed."""
    out = state.function(
        *heads_first(q, k, v), block_mask=state.block_mask, kernel_options=state.options
    )
    return out.transpose(1, 2)


class Varlen(NamedTuple):
    """What varlen_attn prepares: where the segments of queries and keys begin, and the longest."""

    function: Callable
    begin_q: torch.Tensor
    begin_k: torch.Tensor
    longest: int


def prepare_varlen(q, k, v, phi, longest=None):
    """One segment for each row and image, and one without keys for the tokens before the first.

    longest is the host integer that sizes the launch: the true maximum, or the one given. The runs
    must be contiguous: ValueError when phi decreases.
    """
    from torch.nn.attention.varlen import varlen_attn

    if (phi.diff(dim=1) < 0).any():
        raise ValueError("varlen_attn needs every image's tokens side by side; phi decreases")
    B, N, R = k.shape[:3]
    counts = F.one_hot(phi.long(), N + 1).sum(1).flatten()  # [B * (N + 1)]
    keys = torch.tensor([0] + [R] * N, device=phi.device).repeat(B)
    begins = [F.pad(x.cumsum(0), (1, 0)).int() for x in (counts, keys)]
    return Varlen(varlen_attn, *begins, longest or int(counts.max()))


def varlen_attention(state, q, k, v, phi):
    """Flash attention over segments of different lengths: no mask and no copy."""
    flat = q.flatten(0, 1), k.flatten(0, 2), v.flatten(0, 2)
    out = state.function(*flat, state.begin_q, state.begin_k, state.longest, k.shape[2])
    return out.view_as(q)


def prepare_fused(q, k, v, phi):
    """The kernel, and phi's work list."""
    kernel = import_module("miniflamingo.kernels.image_causal_attention")
    work = kernel.build_work_list(phi, k.shape[1], heads=q.shape[2], check=False)
    return kernel.image_causal_attention, work


def fused_attention(state, q, k, v, phi):
    """This project's kernel, as a torch operator."""
    kernel, work = state
    return kernel(q, k, v, phi, work, check=False)


def numpy_run(function):
    """A NumPy function as run(state, *tensors) -> tensor; it reads the tensors' own memory."""
    return lambda state, *args: torch.from_numpy(function(*(x.detach().numpy() for x in args)))


def numpy_gradients(function):
    """A NumPy backward as gradients(dout, *tensors) -> tensors."""
    return lambda *args: [
        torch.from_numpy(g) for g in function(*(x.detach().numpy() for x in args))
    ]


FROM_PHI = partial(Implementation, lists=True)
NUMPY = Implementation(
    "NumPy",
    numpy_run(xattn.image_causal_attention),
    needs="cpu",
    gradients=numpy_gradients(xattn.image_causal_attention_backward),
)
FUSED = FROM_PHI("fused", fused_attention, prepare_fused, "cuda", is_kernel=True)
EAGER = FROM_PHI("eager", eager_attention, prepare_eager)
SDPA = FROM_PHI("SDPA, dense mask", sdpa_attention, prepare_sdpa)
VARLEN = FROM_PHI("varlen_attn", varlen_attention, prepare_varlen, "cuda")


def attention_implementations(shape):
    """Image-causal attention: the kernel, then its peers."""
    upper = partial(prepare_varlen, longest=shape["L"])
    longest = FROM_PHI("varlen_attn, max_q = L", varlen_attention, upper, "cuda")
    flexes = [
        Implementation(
            f"FlexAttention, KV {block}",
            flex_attention,
            partial(prepare_flex, kv_block=block),
            "cuda",
            slow=block == 64,
        )
        for block in (128, 64)
    ]
    by_image = [
        Implementation(f"SDPA by image, {name}", partial(attention_by_image, backend), needs="cuda")
        for name, backend in (("flash", "FLASH_ATTENTION"), ("cuDNN", "CUDNN_ATTENTION"))
        if shape["phi"] == "even" and shape["L"] % shape["N"] == 0
    ]
    return [FUSED, NUMPY, EAGER, SDPA, *by_image, longest, VARLEN, *flexes]


# --- decoding -------------------------------------------------------------------------------------


def gathered_attention(state, q, k, v, phi):
    """Copy out the image that each row looks at, then torch's own attention without a mask."""
    rows, image = torch.arange(len(q), device=q.device), (phi[:, 0].long() - 1).clamp(min=0)
    out = F.scaled_dot_product_attention(*heads_first(q, k[rows, image], v[rows, image]))
    return out.transpose(1, 2).masked_fill((phi == 0)[:, :, None, None], 0.0)


def prepare_decode(*args):
    """The kernel; nothing depends on phi."""
    return import_module("miniflamingo.kernels.decode_attention").decode_attention


def decode_attention(kernel, q, k, v, phi):
    """This project's kernel for one token, which has no axis for it."""
    return kernel(q[:, 0], k, v, phi[:, 0])[:, None]


def decoding_implementations(shape):
    """Attention of one token a row, over keys and values that were projected before."""
    own = Implementation("fused", decode_attention, prepare_decode, "cuda", is_kernel=True)
    general = replace(FUSED, name="image_causal_attention", is_kernel=False)
    gathered = Implementation("gather, SDPA", gathered_attention)
    return [own, general, NUMPY, EAGER, SDPA, gathered]


# --- the resampler's attention --------------------------------------------------------------------


def reference_resampler(q, k_x, v_x, k_latents, v_latents):
    """softmax(q @ concat([k_x, k_latents])^T / sqrt(K)) @ concat([v_x, v_latents])."""
    q, k, v = heads_first(q, torch.cat([k_x, k_latents], 1), torch.cat([v_x, v_latents], 1))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def concat_sdpa(state, q, k_x, v_x, k_latents, v_latents):
    """The copy that the pseudo-code asks for, then torch's own attention."""
    k, v = torch.cat([k_x, k_latents], 1), torch.cat([v_x, v_latents], 1)
    return F.scaled_dot_product_attention(*heads_first(q, k, v)).transpose(1, 2)


def _joined(k_x, v_x, k_latents, v_latents):
    k, v = np.concatenate([k_x, k_latents], 1), np.concatenate([v_x, v_latents], 1)
    return swap_heads(k), swap_heads(v)


def numpy_resampler(q, k_x, v_x, k_latents, v_latents):
    """The same in NumPy, arrays of the shapes above."""
    return swap_heads(attention(swap_heads(q), *_joined(k_x, v_x, k_latents, v_latents)))


def numpy_resampler_backward(dout, q, k_x, v_x, k_latents, v_latents):
    """Its gradients, in the arguments' order."""
    keys_values = _joined(k_x, v_x, k_latents, v_latents)
    grads = attention_backward(swap_heads(dout), swap_heads(q), *keys_values)
    (dq, dk, dv), M = map(swap_heads, grads), k_x.shape[1]
    return dq, dk[:, :M], dv[:, :M], dk[:, M:], dv[:, M:]


def prepare_resampler(q, k_x, v_x, k_latents, v_latents):
    """The kernel, and the list of features: every image has all M."""
    kernel = import_module("miniflamingo.kernels.resampler_attention").padded_resampler_attention
    build = import_module("miniflamingo.kernels.common.feature_list").build_padded_list
    (images, M), heads = k_x.shape[:2], q.shape[2]
    lengths = torch.full((images,), M, device=q.device)
    return kernel, lengths, build(lengths, M, heads, check=False)


def fused_resampler(state, *args):
    """This project's kernel: nothing is concatenated."""
    kernel, lengths, work = state
    return kernel(*args, lengths, work, check=False)


def resampler_implementations(shape):
    """The resampler's attention: the kernel, then its peers."""
    own = FROM_PHI("fused", fused_resampler, prepare_resampler, "cuda", is_kernel=True)
    return [
        own,
        Implementation(
            "NumPy",
            numpy_run(numpy_resampler),
            needs="cpu",
            gradients=numpy_gradients(numpy_resampler_backward),
        ),
        Implementation("eager", lambda state, *args: reference_resampler(*args)),
        Implementation("concat, SDPA", concat_sdpa),
        Implementation(
            "torch.compile of concat, SDPA",
            lambda step, *args: step(None, *args),
            lambda *args: compiled(concat_sdpa),
            "cuda",
        ),
    ]


# --- GATED XATTN-DENSE ----------------------------------------------------------------------------


def block_module(shape):
    """The module of layers.py with the sizes of `shape`, without memory for its weights."""
    with torch.device("meta"):
        return GatedCrossAttentionDense(shape["D"], shape["D_m"], shape["H"], shape["K"])


BLOCK_NAMES = [n for n, _ in block_module(dict(D=1, D_m=1, H=1, K=1)).named_parameters()]


def gate(y, x, alpha, weight):
    """y + tanh(alpha) * x W^T, as the paper writes it."""
    return y + alpha.tanh() * F.linear(x, weight)


def folded_gate(y, x, alpha, weight):
    """The same with tanh(alpha) in the weight: the product's own epilogue adds y."""
    out = torch.addmm(y.flatten(0, 1), x.flatten(0, 1), (alpha.tanh() * weight).mT)
    return out.view_as(y)


def block(attend, heads, gate, y, media, phi, *weights):
    """The whole block in plain torch; attend(q, k, v, phi) is its attention, heads = (H, K)."""
    w = dict(zip(BLOCK_NAMES, weights))

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def project(name, x):
        return F.linear(x, w[f"attention.{name}_proj.weight"]).unflatten(-1, heads)

    media = norm("media_norm", media)
    q, k, v = project("q", norm("norm", y)), project("k", media), project("v", media)
    attended = attend(q, k, v, phi).flatten(-2)
    y = gate(y, attended, w["alpha_xattn"], w["attention.out_proj.weight"])
    hidden = F.relu(F.linear(norm("ffw.norm", y), w["ffw.up.weight"])).square()
    return gate(y, hidden, w["alpha_dense"], w["ffw.down.weight"])


def reference_block(shape):
    """The block as the paper writes it, around the reference's attention."""
    return partial(block, reference_attention, (shape["H"], shape["K"]), gate)


def compiled_block(name, inner, shape, needs="cuda"):
    """torch.compile of the block with the folded gate, around an Implementation of attention."""
    H, K = shape["H"], shape["K"]

    def prepare(y, media, phi, *weights):
        q = torch.empty(*phi.shape, H, K, dtype=y.dtype, device="meta")
        k = torch.empty(*media.shape[:3], H, K, dtype=y.dtype, device="meta")
        attend = partial(inner.run, inner.prepare(q, k, k, phi))
        return compiled(partial(block, attend, (H, K), folded_gate))

    return Implementation(
        name, lambda step, *args: step(*args), prepare, needs, is_kernel=inner.is_kernel
    )


def layer(name, backend, shape, needs=""):
    """The module of layers.py, not compiled."""

    def prepare(y, media, phi, *weights):
        work = None
        if backend == "fused":
            kernel = import_module("miniflamingo.kernels.image_causal_attention")
            work = kernel.build_work_list(phi, media.shape[1], shape["H"], check=False)
        return block_module(shape), work

    def run(state, y, media, phi, *weights):
        module, work = state
        parameters = dict(zip(BLOCK_NAMES, weights))
        return torch.func.functional_call(module, parameters, (y, media, phi, backend, work))

    return Implementation(name, run, prepare, needs)


def block_implementations(shape):
    """The whole block: compiled around the kernel, then its peers."""
    return [
        compiled_block("fused, torch.compile", FUSED, shape),
        layer("fused, layers.py", "fused", shape, "cuda"),
        layer("eager, layers.py", "torch", shape),
        compiled_block("torch.compile, dense mask", SDPA, shape),
        compiled_block("torch.compile, varlen_attn", VARLEN, shape),
    ]
