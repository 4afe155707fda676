"""Layer norm, whose backward pass reads its inputs once. The forward pass is torch's own.

NumPy twin: `miniflamingo.functional.layer_norm` and its gradient. Letters: M rows, D columns.

    x, out, dout, dx [..., D]    weight, bias, dweight, dbias [D]

What there is to save, counted in elements of [M, D] moved:

                                         torch   here
    forward: x in, out out                 2       2     nothing to save: torch's own is taken
    backward: dx                           3       3     dout and x in, dx out
    backward: dweight, dbias               2       0     torch reads dout and x again
    backward: partial sums                 -   2 P / M   of elements of 4 bytes, twice (P programs)

With P = 512, M = 16384, bfloat16: 2 MD = 134 MB saved at D = 2048, 268 at 4096, 537 at 8192, for
17, 34 and 67 MB of partial sums. A program holds a row whole and makes its mean and deviation
again, which costs no bytes, so the forward pass keeps x and weight alone. dweight and dbias are
summed over the program's rows in float32, stored as partial sums [P, D], and added up by torch: no
atomics, two runs agree bit for bit.

Counted, not built: fusing the norm into the product after it would save its output, 2 MD of the
forward pass; but that product's weight gradient needs the output, which would be made again (2 MD),
and the product would no longer be cuBLAS's: 18 % of its rate would be the most it could lose at
D = 2048 for a product of D outputs, 4.5 % for one of 4D. And the sum of dx and the residual's
gradient (3 MD, 1 if added here) belongs to autograd, which sees two functions.

Tested (interpreter): D from 1 to 300; M from 0, also above P; float32, float16, bfloat16, float64;
strided x and dout. No register spills for sm_80, sm_90 and gfx942 at D = 2048 and 8192
(results/compiled.json). Not tested: any GPU. Wider than MAX_D, torch's own backward is taken.
"""

from .common.products import accumulator, as_rows
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

MAX_D = 8192  # a row's columns that fit in registers with the partial sums
PROGRAMS = 512  # about four for each processor of a large GPU

# --- backward -----------------------------------------------------------------------------------


@triton.jit
def _layer_norm_backward(
    dout_ptr, x_ptr, w_ptr, dx_ptr, dw_part_ptr, db_part_ptr, M, do_m, x_m, eps, programs,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d, program = tl.arange(0, BLOCK_D), tl.program_id(0)
    inside = d < D
    ACC: tl.constexpr = dw_part_ptr.dtype.element_ty
    w = tl.load(w_ptr + d, inside, other=0.0).to(ACC)
    dw, db = tl.zeros([BLOCK_D], ACC), tl.zeros([BLOCK_D], ACC)
    for row in range(program, M, programs):
        row = tl.cast(row, tl.int64)
        x = tl.load(x_ptr + row * x_m + d, inside, other=0.0).to(ACC)
        dout = tl.load(dout_ptr + row * do_m + d, inside, other=0.0).to(ACC)
        x_hat = tl.where(inside, x - tl.sum(x, 0) / D, 0.0)
        inv_std = 1 / tl.sqrt(tl.sum(x_hat * x_hat, 0) / D + eps)
        x_hat *= inv_std
        # out = x_hat * weight + bias
        dw += dout * x_hat
        db += dout
        # x_hat = (x - mean(x)) * inv_std: x moves its own x_hat, the mean and the deviation
        dx_hat = dout * w
        dx = dx_hat - tl.sum(dx_hat, 0) / D - x_hat * (tl.sum(dx_hat * x_hat, 0) / D)
        tl.store(dx_ptr + row * D + d, cast(dx * inv_std, dx_ptr.dtype.element_ty), inside)
    first = program.to(tl.int64) * D
    tl.store(dw_part_ptr + first + d, dw, inside)
    tl.store(db_part_ptr + first + d, db, inside)


def _launch_backward(dout, x, weight, eps):
    """dout, x [M, D] with contiguous rows, weight [D] -> dx, dweight, dbias."""
    (M, D), programs = x.shape, min(len(x), PROGRAMS)
    dx = allocate((M, D), x.dtype, x.device)
    parts = [allocate((programs, D), accumulator(x.dtype), x.device) for _ in "wb"]
    block = triton.next_power_of_2(D)
    launch(
        _layer_norm_backward, programs, dout, x, weight, dx, *parts, M,
        dout.stride(0), x.stride(0), eps, programs, D=D, BLOCK_D=block,
        num_warps=min(16, max(4, block // 512)),
    )  # fmt: skip
    return dx, *(part.sum(0).to(weight.dtype) for part in parts)


def launch_examples(K, dtype, R):
    """Launch the kernel at a narrow and a wide size: what `compile.py` records."""
    if (K, R) in ((128, 64), (128, 256)):  # the kernel depends on neither
        D = 2048 if R == 64 else MAX_D
        x = torch.empty((16384, D), dtype=dtype, device="meta")
        _launch_backward(x, x, x[0], 1e-5)


# --- the torch op -------------------------------------------------------------------------------


@operator("layer_norm")
def _op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps).contiguous()


@operator("layer_norm_backward")
def _backward_op(
    dout: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, *rest = _launch_backward(as_rows(dout), as_rows(x), weight.contiguous(), eps)
    return dx.view(x.shape), *rest


@_op.register_fake
def _(x, weight, bias, eps):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_backward_op.register_fake
def _(dout, x, weight, eps):
    shapes = x.shape, weight.shape, weight.shape
    return tuple(torch.empty(shape, dtype=x.dtype, device=x.device) for shape in shapes)


def _save_inputs(ctx, inputs, output):
    x, weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _run_backward(ctx, dout):
    return *_backward_op(dout, *ctx.saved_tensors, ctx.eps), None


_op.register_autograd(_run_backward, setup_context=_save_inputs)

# --- the functions to call ----------------------------------------------------------------------


def layer_norm(x, weight, bias, eps=1e-5):
    """x [..., D], weight and bias [D] -> [..., D], with gradients for all three.

    Above D = MAX_D it is torch's own. ValueError for arguments that do not fit.
    """
    _check(x, weight, bias)
    if x.shape[-1] > MAX_D:
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)
    return _op(x, weight, bias, eps)


def layer_norm_backward(dout, x, weight, bias, eps=1e-5):
    """The gradients dx, dweight, dbias from dout [..., D] and the forward's inputs; D <= MAX_D."""
    _check(x, weight, bias)
    if x.shape[-1] > MAX_D:
        raise ValueError(f"the width D must be 1 to {MAX_D}, got {x.shape[-1]}")
    if dout.shape != x.shape or dout.dtype != x.dtype or dout.device != x.device:
        raise ValueError(f"dout must be like x, {describe(x)}, got {describe(dout)}")
    return _backward_op(dout, x, weight, eps)


def _check(x, weight, bias):
    D = x.shape[-1] if x.ndim else 0
    if D < 1 or list(weight.shape) != [D] or list(bias.shape) != [D]:
        raise ValueError(
            "x must be [..., D] and weight and bias [D], "
            f"got {list(x.shape)}, {list(weight.shape)} and {list(bias.shape)}"
        )
    check_alike(x=x, weight=weight, bias=bias)
