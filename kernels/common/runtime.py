"""What every kernel stands on: the interpreter flag, launching, allocating, and a few tile helpers.

Kernel files take torch, triton and tl from here, so that it is this file that finds one missing.

`launch` and `allocate` are the only ways in which a kernel file starts a kernel and gets memory.
Both can be replaced for a while: `poisoned()` fills every fresh buffer with NaN, so that a value
that a kernel forgot to store is seen; `compile.py` records launches instead of making them.
"""

import contextlib
import functools

from .. import unavailable

if unavailable():
    raise ImportError(unavailable())

import torch
import triton
import triton.language as tl
from torch.autograd import forward_ad

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E): GPUs have exp2 in hardware
MAX_K, MAX_R = 128, 256  # the widest head, and the most visual tokens of an image
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
if INTERPRET.value:
    DTYPES += (torch.float64,)  # for checking gradients

if INTERPRET.value and isinstance(tl.sum, triton.runtime.JITFunction):
    raise ImportError("Triton came before `miniflamingo.kernels`: import that first, or set "
                      "TRITON_INTERPRET=1, where there is no GPU")  # fmt: skip

# --- launching and allocating -------------------------------------------------------------------

# A launch option for CUDA: up to all 255 registers a thread. Left alone, ptxas may spill some bytes
# of a float32 kernel so that one more warp fits; which shapes it hits has no pattern
ALL_REGISTERS = {"maxnreg": 255}

_replaced = {}  # "launch" or "allocate" -> what stands in for it


def launch(kernel, programs, *args, **options):
    """Start `programs` programs of a kernel, on the device of its first argument."""
    if "launch" in _replaced:
        return _replaced["launch"](kernel, programs, *args, **options)
    if programs:
        device = args[0].device
        on_gpu = device.type == "cuda"
        options = options_of(options, _target(device) if on_gpu else None)
        with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
            kernel[(programs,)](*args, **options)


@functools.cache
def _target(device):
    if torch.version.hip:
        return "gfx"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def options_of(options, target):
    """Launch options as a target, "sm_90" or "gfx", takes them: with its own, options[target].

    AMD's compiler has no maxnreg, and its matrix instructions are told to have 16 rows: of those
    with 32, which it would choose, four warps fill 128, and a tile of 64 would be computed twice.
    """
    own = options.get(target, {})
    options = {k: v for k, v in options.items() if not isinstance(v, dict)} | own
    if target == "gfx":
        options.pop("maxnreg", None)
        options["matrix_instr_nonkdim"] = 16
    return options


def allocate(shape, dtype, device):
    """A buffer for a kernel to fill: uninitialised, or NaN under `poisoned()`."""
    return _replaced.get("allocate", torch.empty)(shape, dtype=dtype, device=device)


@contextlib.contextmanager
def replaced(**functions):
    """Let other functions stand in for launch= or allocate= inside a `with` block."""
    before = dict(_replaced)
    _replaced.update(functions)
    try:
        yield
    finally:
        _replaced.clear()
        _replaced.update(before)


def poisoned():
    """Inside this `with` block every buffer that a kernel is to fill holds NaN at first."""
    return replaced(allocate=lambda shape, **options: torch.full(shape, float("nan"), **options))


def rows_contiguous(x):
    """x with its last axis contiguous: x itself, whatever its other strides, or else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def side(size):
    """The side of a tile that holds `size`: a power of two, 16 or more, as tl.dot needs it."""
    return max(16, triton.next_power_of_2(size))


# --- torch operators ----------------------------------------------------------------------------


def operator(name):
    """A decorator: torch.library.custom_op "miniflamingo::name", without forward-mode derivative.

    torch would let the operator drop a tangent, so that the derivative is a silent 0. Its call is a
    RuntimeError instead, wherever a tangent may be on the way: for dual tensors, and for whatever
    torch.func.jvp, jacfwd and hessian have wrapped.
    """

    def decorate(function):
        op = torch.library.custom_op(f"miniflamingo::{name}", function, mutates_args=())

        @functools.wraps(function)
        def call(*args):
            if forward_ad._current_level >= 0 and any(map(_may_have_tangent, args)):
                raise RuntimeError(
                    f"{name} has no forward-mode derivative (torch.func.jvp, dual tensors); "
                    "expected backward(), got a tensor with a tangent"
                )
            return op(*args)

        call.register_fake, call.register_autograd = op.register_fake, op.register_autograd
        return call

    return decorate


def _may_have_tangent(x):
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)  # vmap's
    return forward_ad.unpack_dual(x).tangent is not None


# --- checks -------------------------------------------------------------------------------------


def check_alike(**tensors):
    """ValueError unless all tensors have one dtype and one device that kernels can use here."""
    names, xs = ", ".join(tensors), tensors.values()
    if len({x.dtype for x in xs}) > 1 or next(iter(xs)).dtype not in DTYPES:
        raise ValueError(
            f"{names} must have one dtype of {', '.join(map(name_of, DTYPES))}, "
            f"got {', '.join(name_of(x.dtype) for x in xs)}"
        )
    expected = "cpu (interpreter)" if INTERPRET.value else "cuda"
    if len({x.device for x in xs}) > 1 or not (INTERPRET.value or next(iter(xs)).is_cuda):
        raise ValueError(
            f"{names} must be on one device, {expected}, got {', '.join(str(x.device) for x in xs)}"
        )


def check_limits(K, R):
    """ValueError unless the head width K and the R visual tokens of an image are within limits."""
    if not 1 <= K <= MAX_K:
        raise ValueError(f"the head width K must be 1 to {MAX_K}, got {K}")
    if not 1 <= R <= MAX_R:
        raise ValueError(f"the visual tokens of an image R must be 1 to {MAX_R}, got {R}")


def name_of(dtype):
    """A dtype as one writes it: "float32"."""
    return str(dtype).removeprefix("torch.")


def describe(x):
    """A tensor's dtype, shape and device, for an error message."""
    return f"{name_of(x.dtype)} {list(x.shape)} on {x.device}"


# --- tiles --------------------------------------------------------------------------------------


@triton.jit
def load_rows(ptr, rows, stride, valid, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows `rows` [M] of K elements each, as a tile [M, BLOCK_K]; zeros where not valid [M]."""
    columns = tl.arange(0, BLOCK_K)
    mask = valid[:, None] & (columns < K)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask, other=0.0)


@triton.jit
def store_rows(ptr, rows, stride, valid, tile, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Store the valid rows of a tile [M, BLOCK_K], rounded to the memory's dtype."""
    columns = tl.arange(0, BLOCK_K)
    mask = valid[:, None] & (columns < K)[None, :]
    pointers = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(pointers, cast(tile, ptr.dtype.element_ty), mask)


@triton.jit
def dot(a, b):
    """a @ b, accumulated in float32 (float64 for float64)."""
    if INTERPRET and a.dtype == tl.bfloat16:
        # the interpreter keeps bfloat16 as uint16 and would multiply the bit patterns
        result = tl.dot(_widen(a), _widen(b))
    else:
        # "ieee": no tf32, so that float32 means float32
        result = tl.dot(a, b, input_precision="ieee")
    return result


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in another float dtype, rounded to nearest, ties to even."""
    if INTERPRET and x.dtype == tl.float32 and dtype == tl.bfloat16:
        # the interpreter would truncate. bfloat16 is the upper half of a float32: add just under
        # half of the last bit that stays (all of a half where that bit is 1), then cut
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def _widen(x):  # bfloat16 -> float32, exactly, by its bits
    bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    return bits.to(tl.float32, bitcast=True)
