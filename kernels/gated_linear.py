"""The tanh gate, fused into the product before it: y = x + tanh(alpha) * (a @ weight^T).

NumPy twin: `miniflamingo.xattn.tanh_gate` of `miniflamingo.functional.linear`, and their gradients.
In GATED XATTN-DENSE it ends both branches: a is the attention's output before out_proj, or the
feed-forward's hidden layer. Letters: M rows (B*L text tokens), I inputs, D outputs.

    x, y, dout [..., D]    a, da [..., I]    alpha, dalpha of one element    weight, dweight [D, I]

Forward: a tiled product whose epilogue scales the sums by the gate and adds the residual. The other
branch is torch.addmm(x, a, (tanh(alpha) * weight)^T), by cuBLAS; `choose` takes one by size.

Backward, from the forward's inputs a, alpha and weight alone. With dW' = dout^T a,

    dx = dout    da = dout @ (tanh(alpha) weight)
    dweight = tanh(alpha) dW'    dalpha = (1 - tanh(alpha)^2) <weight, dW'>

for <dout, a @ weight^T> = <weight, dout^T a>: the branch's output, of which the formula speaks, is
neither kept nor made again. The fused branch makes dweight and each tile's share of <weight, dW'>
in the epilogue of dout^T a; the other one in a pass over cuBLAS's dW'. The shares are float32, one
a program, added up by torch: no atomics, two runs agree bit for bit. da is cuBLAS's in both.

What it saves, counted: elements moved besides what every way moves (forward: a and weight read, y
written; backward: dout, a and weight read for two products, da and dweight written).

    forward, as the paper writes it   5 MD          the branch written and read, gate * branch
                                                    written and read, x read
    forward, addmm                    3 MD + 2 DI   torch copies x into y (2), cuBLAS reads it (1);
                                                    the gate folded into a copy of weight
    forward, fused                    1 MD          x read
    backward, as the paper writes it  6 MD          gate * dout (2), dout * branch and its sum (4)
    backward, addmm                   7 DI          a float32 dW' written and read (4), weight read
                                                    for the shares (1), folded for da (2)
    backward, fused                   3 DI          weight read for the shares (1), folded (2)

The paper's way also keeps the branch, MD, from forward to backward; the other two keep inputs only.

What it costs: the part of cuBLAS's rate that a plain Triton product does not reach. Saving b bytes
an output of 2I flops pays while that part stays below b * (flops a byte of the machine) / 2I.
Against addmm b = 4 in bfloat16; with 184 flops a byte (an H200's) that is 18 % for I = 2048, 9 %
for 4096, 4.5 % for 8192, 1.1 % for 32768. So I decides, and the feed-forward's I = 4D pays least.

Tested (interpreter): M, D and I no multiples of a tile, from 0; float32, float16, bfloat16,
float64; strided x, a, dout, weight. No register spills for sm_80, sm_90 and gfx942
(results/compiled.json). Not tested: any GPU; torch.mm's out_dtype (GPU only), which the addmm
branch uses for dW'. Not handled: autocast (one dtype for x, a and weight; alpha may have another).
"""

from .common.operands import packed
from .common.products import (
    accumulator,
    as_rows,
    locate_tile,
    multiply,
    options_for,
    place_tile,
    tiles,
)
from .common.runtime import (
    allocate,
    cast,
    check_alike,
    describe,
    launch,
    operator,
    rows_contiguous,
    tl,
    torch,
    triton,
)

# The largest I for which the fused product is taken. It is 0, so always addmm, until a file in
# kernels/results has measured it (`python -m miniflamingo bench --case gated_linear`).
FUSED_UP_TO = 0


def choose(I):
    """Whether the fused product is taken for I inputs: where it was measured to be faster."""
    return I <= FUSED_UP_TO


# --- forward ------------------------------------------------------------------------------------


@triton.jit
def _gated_linear(
    a_ptr, w_ptr, x_ptr, gate_ptr, out_ptr, M, D, I, a_m, w_d, x_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    m, d = locate_tile(M, D, BLOCK_M, BLOCK_N)
    gate = tl.load(gate_ptr)
    branch = multiply(
        a_ptr, w_ptr, m, d, M, D, I, a_m, 1, w_d, 1, gate.dtype, BLOCK_M, BLOCK_N, BLOCK_I
    )
    offsets, inside = place_tile(m, d, M, D, x_m)
    x = tl.load(x_ptr + offsets, inside, other=0.0).to(gate.dtype)
    offsets, inside = place_tile(m, d, M, D, D)
    tl.store(out_ptr + offsets, cast(x + gate * branch, out_ptr.dtype.element_ty), inside)


# --- backward -----------------------------------------------------------------------------------


@triton.jit
def _gated_linear_dweight(
    dout_ptr, a_ptr, w_ptr, gate_ptr, dw_ptr, share_ptr, M, D, I, do_m, a_m, w_d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    d, i = locate_tile(D, I, BLOCK_M, BLOCK_N)
    gate = tl.load(gate_ptr)
    dw = multiply(  # dW' = dout^T a
        dout_ptr, a_ptr, d, i, D, I, M, 1, do_m, 1, a_m, gate.dtype, BLOCK_M, BLOCK_N, BLOCK_I
    )
    offsets, inside = place_tile(d, i, D, I, w_d)
    w = tl.load(w_ptr + offsets, inside, other=0.0).to(gate.dtype)
    tl.store(share_ptr + tl.program_id(0), tl.sum(tl.sum(w * dw, 1), 0))
    offsets, inside = place_tile(d, i, D, I, I)
    tl.store(dw_ptr + offsets, cast(gate * dw, dw_ptr.dtype.element_ty), inside)


@triton.jit
def _gate_dweight(dw_ptr, w_ptr, gate_ptr, out_ptr, share_ptr, size, BLOCK: tl.constexpr):
    """The same from a dW' that is there already; all matrices contiguous."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr)
    dw = tl.load(dw_ptr + i, i < size, other=0.0).to(gate.dtype)
    w = tl.load(w_ptr + i, i < size, other=0.0).to(gate.dtype)
    tl.store(share_ptr + tl.program_id(0), tl.sum(w * dw, 0))
    tl.store(out_ptr + i, cast(gate * dw, out_ptr.dtype.element_ty), i < size)


# --- launching: all matrices [rows, columns] with contiguous rows -------------------------------


def _launch_forward(x, a, gate, weight):
    (M, D), I, options = x.shape, a.shape[1], options_for(x.dtype)
    out = allocate((M, D), x.dtype, x.device)
    launch(
        _gated_linear, tiles(M, D, options), a, weight, x, gate, out, M, D, I,
        a.stride(0), weight.stride(0), x.stride(0), **options,
    )  # fmt: skip
    return out


def _launch_dweight(dout, a, gate, weight):
    """-> dweight, <weight, dW'>."""
    (M, D), I, options = dout.shape, a.shape[1], options_for(a.dtype)
    dweight = allocate((D, I), a.dtype, a.device)
    shares = allocate((tiles(D, I, options),), gate.dtype, a.device)
    launch(
        _gated_linear_dweight, len(shares), dout, a, weight, gate, dweight, shares, M, D, I,
        dout.stride(0), a.stride(0), weight.stride(0), **options,
    )  # fmt: skip
    return dweight, shares.sum()


def _launch_gate_dweight(dw, gate, weight, BLOCK=2048):
    """-> dweight, <weight, dW'> from dW' and a contiguous weight."""
    dweight = allocate(weight.shape, weight.dtype, weight.device)
    shares = allocate((triton.cdiv(weight.numel(), BLOCK),), gate.dtype, weight.device)
    arguments = dw, weight, gate, dweight, shares, weight.numel()
    launch(_gate_dweight, len(shares), *arguments, BLOCK=BLOCK, num_warps=4)
    return dweight, shares.sum()


def launch_examples(K, dtype, R):
    """Launch every kernel once, at a usual size: what `compile.py` records; for one K and R."""
    if (K, R) != (128, 64):  # the kernels depend on neither
        return
    x, weight = (torch.empty((n, 2048), dtype=dtype, device="meta") for n in (16384, 2048))
    gate = torch.empty((1,), dtype=torch.float32, device="meta")
    _launch_forward(x, x, gate, weight)
    _launch_dweight(x, x, gate, weight)
    _launch_gate_dweight(weight.float(), gate, weight)


# --- the torch op -------------------------------------------------------------------------------


def _gate(alpha, dtype):
    return alpha.to(accumulator(dtype)).tanh().reshape(1)


def _fold(gate, weight):
    """gate * weight, rounded once: a scalar would be rounded to weight's dtype first."""
    weight = packed(weight)
    return torch.mul(weight, gate, out=torch.empty_like(weight))


def _exact_product(a, b):
    """a @ b without rounding its float32 sums."""
    if a.is_cuda and a.dtype.itemsize < 4:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.to(accumulator(a.dtype)) @ b.to(accumulator(b.dtype))


@operator("gated_linear")
def _op(
    x: torch.Tensor, a: torch.Tensor, alpha: torch.Tensor, weight: torch.Tensor, fused: bool
) -> torch.Tensor:
    gate = _gate(alpha, x.dtype)
    if fused:
        out = _launch_forward(as_rows(x), as_rows(a), gate, rows_contiguous(weight))
    else:
        out = torch.addmm(packed(as_rows(x)), packed(as_rows(a)), _fold(gate, weight).mT)
    return out.view(x.shape)


@operator("gated_linear_backward")
def _backward_op(
    dout: torch.Tensor, a: torch.Tensor, alpha: torch.Tensor, weight: torch.Tensor, fused: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate, rows, a_rows = _gate(alpha, a.dtype), as_rows(dout), as_rows(a)
    da = (packed(rows) @ _fold(gate, weight)).view(a.shape)
    if fused:
        dweight, inner = _launch_dweight(rows, a_rows, gate, rows_contiguous(weight))
    else:
        dw = _exact_product(rows.mT, a_rows)
        dweight, inner = _launch_gate_dweight(dw.contiguous(), gate, weight.contiguous())
    dalpha = (1 - gate.square()) * inner
    return da, dalpha.to(alpha.dtype).reshape(alpha.shape), dweight


@_op.register_fake
def _(x, a, alpha, weight, fused):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_backward_op.register_fake
def _(dout, a, alpha, weight, fused):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a, alpha, weight))


def _save_inputs(ctx, inputs, output):
    _, *tensors, ctx.fused = inputs
    ctx.save_for_backward(*tensors)


def _run_backward(ctx, dout):
    return dout, *_backward_op(dout, *ctx.saved_tensors, ctx.fused), None


_op.register_autograd(_run_backward, setup_context=_save_inputs)

# --- the functions to call ----------------------------------------------------------------------


def gated_linear(x, a, alpha, weight, fused=None):
    """x + tanh(alpha) * (a @ weight^T): x [..., D], a [..., I], alpha one float, weight [D, I].

    -> [..., D], with gradients for all four. At alpha = 0 it is x, bit for bit, where a and weight
    are finite (0 * inf is NaN); only -0 may become 0. x, a and weight have one dtype, alpha any.
    fused: the kernel (True), addmm (False), or what `choose` says (None). ValueError for arguments
    that do not fit.
    """
    _check(x, a, alpha, weight)
    return _op(x, a, alpha, weight, choose(a.shape[-1]) if fused is None else fused)


def gated_linear_backward(dout, x, a, alpha, weight, fused=None):
    """The gradients dx, da, dalpha, dweight from dout [..., D] and the forward's inputs."""
    _check(x, a, alpha, weight)
    if dout.shape != x.shape or dout.dtype != x.dtype or dout.device != x.device:
        raise ValueError(f"dout must be like x, {describe(x)}, got {describe(dout)}")
    fused = choose(a.shape[-1]) if fused is None else fused
    return dout, *_backward_op(dout, a, alpha, weight, fused)


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
