"""The squared ReLU, fused into the product before it: h = relu(x @ weight^T)^2.

NumPy twin: `miniflamingo.functional.squared_relu` of `functional.linear`, and their gradients. It
is the first half of the gated feed-forward branch. Letters: M rows (B*L text tokens), D inputs, F
outputs (4D in the paper).

    x, dx [..., D]    weight, dweight [F, D]    h, dout [..., F]

Forward: a tiled product whose epilogue takes the squared ReLU of the sums. The other branch is
cuBLAS's product and one pass over it in place; `choose` takes one by size.

Backward: relu's derivative needs r = relu(x @ weight^T), and r = sqrt(h). So h alone is kept, which
the next product keeps for its own gradient anyway: this function's gradient keeps nothing more.
The root halves a relative error, so r has half of what h was rounded by, and less than an r kept in
the same dtype. (In float16 an h below 6e-5 has few bits; r inherits half of h's own error there.)
dpre = 2 r dout is one pass, then dx = dpre @ weight and dweight = dpre^T x are cuBLAS's.

What it saves, counted in elements of [M, F]: moved in the forward besides the written h, kept for
the backward, and moved to make dpre from dout.

                                               forward   kept      dpre
    torch, operation by operation                 4      2, r h    8 or more: a pass for each factor
    fused, keeping x @ weight^T and h             1      2         3
    fused, keeping r, and h made from it again    -      1, r      3, and 2 for h
    fused, keeping neither                        -      0         3, and a product of 2MDF flops
    cuBLAS and a pass, r = sqrt(h)                2      1, h      3
    fused, r = sqrt(h)                            0      1, h      3

For M = 16384 in bfloat16, one MF is 268 MB at D = 2048, F = 4D; 537 at 4096, 1074 at 8192. What
the epilogue costs is the part of cuBLAS's rate that a plain Triton product does not reach: saving 4
bytes an output of 2D flops (see gated_linear.py) pays while that part stays below 18 % for
D = 2048, 9 % for 4096, 4.5 % for 8192.

Counted, not built: 2 r dout as the epilogue of the product that makes dout (h read, 2 MF not moved)
pays below the same losses, but joins this function to the one after it; dpre as a prologue of its
two products reads 2 MF in place of 1 in each, several times over, and saves 2.

Tested (interpreter), compiled: as `gated_linear.py`. Not tested: any GPU.
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
    name_of,
    operator,
    rows_contiguous,
    tl,
    torch,
    triton,
)

# The largest D for which the fused product is taken. It is 0, so always cuBLAS and a pass, until a
# file in kernels/results has measured it (`miniflamingo bench --case squared_relu_linear`).
FUSED_UP_TO = 0


def choose(D):
    """Whether the fused product is taken for D inputs: where it was measured to be faster."""
    return D <= FUSED_UP_TO


@triton.jit
def squared_relu(x):
    """relu(x)^2, where NaN stays NaN."""
    r = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return r * r


# --- forward ------------------------------------------------------------------------------------


@triton.jit
def _squared_relu_linear(
    x_ptr, w_ptr, h_ptr, M, F, D, x_m, w_f, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    m, f = locate_tile(M, F, BLOCK_M, BLOCK_N)
    pre = multiply(x_ptr, w_ptr, m, f, M, F, D, x_m, 1, w_f, 1, ACC, BLOCK_M, BLOCK_N, BLOCK_I)
    offsets, inside = place_tile(m, f, M, F, F)
    tl.store(h_ptr + offsets, cast(squared_relu(pre), h_ptr.dtype.element_ty), inside)


@triton.jit
def _squared_relu(x_ptr, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """x = relu(x)^2, in place."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < size, other=0.0).to(ACC)
    tl.store(x_ptr + i, cast(squared_relu(x), x_ptr.dtype.element_ty), i < size)


# --- backward -----------------------------------------------------------------------------------


@triton.jit
def _squared_relu_backward(dout_ptr, h_ptr, dpre_ptr, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """dpre = 2 r dout with r = sqrt(h); all contiguous."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dout = tl.load(dout_ptr + i, i < size, other=0.0).to(ACC)
    r = tl.sqrt(tl.load(h_ptr + i, i < size, other=0.0).to(ACC))
    tl.store(dpre_ptr + i, cast(2 * r * dout, dpre_ptr.dtype.element_ty), i < size)


# --- launching: all matrices [rows, columns] with contiguous rows -------------------------------

BLOCK = 2048  # elements of a pass's program


def _acc(dtype):
    return tl.float64 if accumulator(dtype) == torch.float64 else tl.float32


def _launch_forward(x, weight):
    (M, D), F, options = x.shape, len(weight), options_for(x.dtype)
    h = allocate((M, F), x.dtype, x.device)
    launch(
        _squared_relu_linear, tiles(M, F, options), x, weight, h, M, F, D,
        x.stride(0), weight.stride(0), ACC=_acc(x.dtype), **options,
    )  # fmt: skip
    return h


def _launch_pass(x):
    """x = relu(x)^2, in place -> x."""
    options = dict(ACC=_acc(x.dtype), BLOCK=BLOCK, num_warps=4)
    launch(_squared_relu, triton.cdiv(x.numel(), BLOCK), x, x.numel(), **options)
    return x


def _launch_backward(dout, h):
    dpre, size = allocate(h.shape, h.dtype, h.device), h.numel()
    options = dict(ACC=_acc(h.dtype), BLOCK=BLOCK, num_warps=4)
    launch(_squared_relu_backward, triton.cdiv(size, BLOCK), dout, h, dpre, size, **options)
    return dpre


def launch_examples(K, dtype, R):
    """Launch every kernel once, at a usual size: what `compile.py` records; for one K and R."""
    if (K, R) != (128, 64):  # the kernels depend on neither
        return
    x, weight = (torch.empty((n, 2048), dtype=dtype, device="meta") for n in (16384, 8192))
    h = _launch_pass(_launch_forward(x, weight))
    _launch_backward(h, h)


# --- the torch op -------------------------------------------------------------------------------


@operator("squared_relu_linear")
def _op(x: torch.Tensor, weight: torch.Tensor, fused: bool) -> torch.Tensor:
    rows, weight = as_rows(x), rows_contiguous(weight)
    h = _launch_forward(rows, weight) if fused else _launch_pass(packed(rows) @ packed(weight).mT)
    return h.view(*x.shape[:-1], len(weight))


@operator("squared_relu_linear_backward")
def _backward_op(
    dout: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dpre = _launch_backward(as_rows(dout).contiguous(), as_rows(h).contiguous())
    return (dpre @ packed(weight)).view(x.shape), dpre.mT @ packed(as_rows(x))


@_op.register_fake
def _(x, weight, fused):
    return torch.empty((*x.shape[:-1], len(weight)), dtype=x.dtype, device=x.device)


@_backward_op.register_fake
def _(dout, x, weight, h):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, weight))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output)


def _run_backward(ctx, dout):
    return *_backward_op(dout, *ctx.saved_tensors), None


_op.register_autograd(_run_backward, setup_context=_save)

# --- the functions to call ----------------------------------------------------------------------


def squared_relu_linear(x, weight, fused=None):
    """relu(x @ weight^T)^2: x [..., D], weight [F, D] -> [..., F], with gradients for both.

    fused: the kernel (True), cuBLAS and a pass (False), or what `choose` says (None). ValueError
    for arguments that do not fit.
    """
    _check(x, weight)
    return _op(x, weight, choose(x.shape[-1]) if fused is None else fused)


def squared_relu_linear_backward(dout, x, weight, h=None, fused=None):
    """The gradients dx, dweight from dout [..., F] and the forward's inputs.

    h is the forward's output, where the caller has kept it; otherwise it is made again.
    """
    _check(x, weight)
    h = squared_relu_linear(x, weight, fused) if h is None else h
    expected = [*x.shape[:-1], len(weight)]
    for name, tensor in (("dout", dout), ("h", h)):
        if list(tensor.shape) != expected or tensor.dtype != x.dtype or tensor.device != x.device:
            wanted = f"{name_of(x.dtype)} {expected} on {x.device}"
            raise ValueError(f"{name} must be {wanted}, got {describe(tensor)}")
    return _backward_op(dout, x, weight, h)


def _check(x, weight):
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be [..., D] and weight [F, D], got {list(x.shape)} and {list(weight.shape)}"
        )
    check_alike(x=x, weight=weight)
