"""A tile of a matrix product: the main loop that the fused products end in their own way.

One program computes one tile of out = a @ b^T, [M, N], from a [M, I] and b [N, I] of any strides,
and hands the sums to its kernel's epilogue in float32 (float64 for float64). Neighbouring programs
share rows of a and of b, so that these come from the L2 cache. float16 and bfloat16 run on tensor
cores; float32 does not (no tf32: see `dot`).
"""

import math

from .runtime import dot, rows_contiguous, tl, torch, triton

# (float32 or wider) -> rows and columns of a tile, elements of a step, warps, stages of the
# pipeline: wide ones that compile without spilling for sm_80, sm_90 and gfx942; not chosen by time.
# Steps of 64 fit the first two as well (bfloat16; 174 registers, 98304 bytes of shared memory);
# 8 warps in float32 spill up to 16 bytes on sm_90
OPTIONS = {False: (128, 128, 32, 8, 3), True: (64, 64, 32, 4, 2)}


def options_for(dtype):
    """The constants and launch options of a fused product."""
    names = "BLOCK_M", "BLOCK_N", "BLOCK_I", "num_warps", "num_stages"
    return dict(zip(names, OPTIONS[dtype.itemsize >= 4]))


def tiles(M, N, options):
    """The number of programs for a product [M, N]."""
    return triton.cdiv(M, options["BLOCK_M"]) * triton.cdiv(N, options["BLOCK_N"])


def accumulator(dtype):
    """The dtype in which products of this dtype are summed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def as_rows(x):
    """[..., n] -> [rows, n] with contiguous rows, a view where that is possible."""
    return rows_contiguous(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


@triton.jit
def locate_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's rows [BLOCK_M] and columns [BLOCK_N] of [M, N], in bands of 8 tiles' rows."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band, place = tl.program_id(0) // (8 * columns), tl.program_id(0) % (8 * columns)
    height = tl.minimum(rows - 8 * band, 8)
    m = (8 * band + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (place // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    return m, n


@triton.jit
def multiply(
    a_ptr, b_ptr, m, n, M, N, I, a_m, a_i, b_n, b_i,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """sum over i of a[m, i] * b[n, i], as a tile [BLOCK_M, BLOCK_N]; what lies outside counts 0."""
    i = tl.arange(0, BLOCK_I)
    a_ptr += m.to(tl.int64)[:, None] * a_m + i.to(tl.int64)[None, :] * a_i
    b_ptr += n.to(tl.int64)[None, :] * b_n + i.to(tl.int64)[:, None] * b_i
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for first in range(0, I, BLOCK_I):
        inside = i < I - first
        a = tl.load(a_ptr, (m < M)[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_ptr, inside[:, None] & (n < N)[None, :], other=0.0)
        total += dot(a, b)
        a_ptr += BLOCK_I * a_i
        b_ptr += BLOCK_I * b_i
    return total


@triton.jit
def place_tile(m, n, M, N, stride):
    """The offsets [BLOCK_M, BLOCK_N] of a tile in a matrix [M, N], and which of them exist."""
    return m.to(tl.int64)[:, None] * stride + n[None, :], (m < M)[:, None] & (n < N)[None, :]
