"""The tanh gate and the product before it, y = x + tanh(alpha) * (a @ weight^T); and the gate's
gradient for nearly nothing.

NumPy twin: `miniflamingo.xattn.tanh_gate` of `miniflamingo.functional.linear`, and their gradients.
In GATED XATTN-DENSE it ends both branches: a is the attention's output before out_proj, or the
feed-forward's hidden layer. Letters: M rows (B*L text tokens), I inputs, D outputs.

    x, y, dout [..., D]    a, da [..., I]    alpha, dalpha of one element    weight, dweight [D, I]

Forward: torch.addmm(x, a, (tanh(alpha) * weight)^T), one product by cuBLAS, which adds x.

Backward, from the forward's inputs a, alpha and weight alone. With dW' = dout^T a,

    dx = dout    da = dout @ (tanh(alpha) weight)
    dweight = tanh(alpha) dW'    dalpha = (1 - tanh(alpha)^2) <weight, dW'>

for <dout, a @ weight^T> = <weight, dout^T a>: the branch's output, of which the formula speaks, is
neither kept nor made again. cuBLAS makes dW'; the kernel makes dweight and <weight, dW'> from it in
one pass over D * I numbers. A program writes its share of that sum, and torch adds up the shares:
no atomics, two runs agree bit for bit.

Why there is no kernel for the products themselves. Counted for a whole block, forward and backward
(M = 16384, H*K = D, bfloat16, 790 TFLOP/s and 4.3 TB/s, as measured on an H200; predicted, not
measured), an epilogue or a pass of our own would save, of what cuBLAS with the folded gate, and
torch.compile's passes, take:

                                                        D = 2048    4096    8192
    gate and residual in the product's epilogue             1.3      0.9     0.6 %
    dweight and the shares in that of dout^T a              0.6      0.7     0.7 %
    the squared ReLU in the epilogue                        2.0      1.1     0.6 %
    layer norm's backward in one pass                       1.0      0.5     0.3 %

and a Triton product that reaches 92 % of cuBLAS's rate loses 1.0 to 1.4 % in each. The attention
is another matter: see image_causal_attention.py.

Tested (interpreter): M, D and I no multiples of a tile, from 0; float32, float16, bfloat16,
float64; strided x, a, dout, weight. No register spills for sm_80, sm_90 and gfx942
(results/compiled.json). Not tested: any GPU; torch.mm's out_dtype (GPU only), which gives dW' its
float32 sums. Not handled: autocast (one dtype for x, a and weight; alpha may have another).
"""

import math

from .common.operands import packed
from .common.runtime import (
    allocate,
    cast,
    check_alike,
    describe,
    launch,
    operator,
    tl,
    torch,
    triton,
)

# --- the kernel ---------------------------------------------------------------------------------


@triton.jit
def _gate_dweight(dw_ptr, w_ptr, gate_ptr, out_ptr, share_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr)
    dw = tl.load(dw_ptr + i, i < size, other=0.0).to(gate.dtype)  # dW'
    w = tl.load(w_ptr + i, i < size, other=0.0).to(gate.dtype)
    tl.store(share_ptr + tl.program_id(0), tl.sum(w * dw, 0))
    tl.store(out_ptr + i, cast(gate * dw, out_ptr.dtype.element_ty), i < size)


def gate_dweight(dw, gate, weight, BLOCK=2048):
    """dW' and weight [D, I], contiguous, and tanh(alpha) [1] -> dweight [D, I], <weight, dW'>."""
    dweight = allocate(weight.shape, weight.dtype, weight.device)
    shares = allocate((triton.cdiv(weight.numel(), BLOCK),), gate.dtype, weight.device)
    arguments = dw, weight, gate, dweight, shares, weight.numel()
    launch(_gate_dweight, len(shares), *arguments, BLOCK=BLOCK, num_warps=4)
    return dweight, shares.sum()


def launch_examples(K, dtype, R):
    """Launch every kernel once, at a usual size: what `compile.py` records; for one K and R."""
    if (K, R) != (128, 64):  # the kernel depends on neither
        return
    weight = torch.empty((2048, 2048), dtype=dtype, device="meta")
    gate_dweight(weight.float(), torch.empty((1,), dtype=torch.float32, device="meta"), weight)


# --- the torch op -------------------------------------------------------------------------------


def _accumulator(dtype):
    """The dtype in which products of this dtype are summed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _as_rows(x):
    """[..., n] -> [rows, n], a view where that is possible."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _gate(alpha, dtype):
    return alpha.to(_accumulator(dtype)).tanh().reshape(1)


def _fold(gate, weight):
    """gate * weight, rounded once: a scalar would be rounded to weight's dtype first."""
    weight = packed(weight)
    return torch.mul(weight, gate, out=torch.empty_like(weight))


def _exact_product(a, b):
    """a @ b without rounding its float32 sums."""
    if a.is_cuda and a.dtype.itemsize < 4:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.to(_accumulator(a.dtype)) @ b.to(_accumulator(b.dtype))


@operator("gated_linear")
def _op(
    x: torch.Tensor, a: torch.Tensor, alpha: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    folded = _fold(_gate(alpha, x.dtype), weight).mT
    return torch.addmm(packed(_as_rows(x)), packed(_as_rows(a)), folded).view(x.shape)


@operator("gated_linear_backward")
def _backward_op(
    dout: torch.Tensor, a: torch.Tensor, alpha: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate, rows = _gate(alpha, a.dtype), _as_rows(dout)
    da = (packed(rows) @ _fold(gate, weight)).view(a.shape)
    dw = _exact_product(rows.mT, _as_rows(a))
    dweight, inner = gate_dweight(dw.contiguous(), gate, weight.contiguous())
    dalpha = (1 - gate.square()) * inner
    return da, dalpha.to(alpha.dtype).reshape(alpha.shape), dweight


@_op.register_fake
def _(x, a, alpha, weight):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_backward_op.register_fake
def _(dout, a, alpha, weight):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a, alpha, weight))


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _run_backward(ctx, dout):
    return dout, *_backward_op(dout, *ctx.saved_tensors)


_op.register_autograd(_run_backward, setup_context=_save_inputs)

# --- the functions to call ----------------------------------------------------------------------


def gated_linear(x, a, alpha, weight):
    """x + tanh(alpha) * (a @ weight^T): x [..., D], a [..., I], alpha one float, weight [D, I].

    -> [..., D], with gradients for all four. At alpha = 0 it is x, bit for bit, where a and weight
    are finite (0 * inf is NaN); only -0 may become 0. x, a and weight have one dtype, alpha any.
    ValueError for arguments that do not fit.
    """
    _check(x, a, alpha, weight)
    return _op(x, a, alpha, weight)


def gated_linear_backward(dout, x, a, alpha, weight):
    """The gradients dx, da, dalpha, dweight from dout [..., D] and the forward's inputs."""
    _check(x, a, alpha, weight)
    if dout.shape != x.shape or dout.dtype != x.dtype or dout.device != x.device:
        raise ValueError(f"dout must be like x, {describe(x)}, got {describe(dout)}")
    return dout, *_backward_op(dout, a, alpha, weight)


def _check(x, a, alpha, weight):
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"x must be [..., D] and weight [D, I], got {list(x.shape)} and {list(weight.shape)}"
        )
    expected = [*x.shape[:-1], weight.shape[1]]
    if list(a.shape) != expected:
        raise ValueError(f"a must be [..., I] = {expected}, got {list(a.shape)}")
    if alpha.numel() != 1 or not alpha.is_floating_point():
        raise ValueError(f"alpha must be one float, got {describe(alpha)}")
    check_alike(x=x, a=a, weight=weight)
    if alpha.device != x.device:
        raise ValueError(f"alpha must be on {x.device}, got {alpha.device}")
