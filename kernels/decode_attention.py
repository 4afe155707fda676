"""Image-causal cross-attention of one new token in each row, as a decoder needs it.

NumPy twin: `miniflamingo.xattn.image_causal_attention` with L = 1. Letters: B batch, N images, R
visual tokens of an image, H heads, K head width.

    q, out [B, H, K]    k, v [B, N, R, H, K], projected once and kept    phi int[B] in 0..N

The layers of layers.py take it for one token a row that wants no gradient, and so does any decoder
with those layers in it (adapter.py) that generates with a cache.

Algorithm. One program for each row and head reads phi, then the R keys and values of that one
image, in blocks, with an online softmax. A row with phi = 0 stores zeros, exactly. A single query
would leave the tensor cores almost empty, so scores and sums are plain products in float32.

Forward only: it has no gradient, and asking for one is an error. It is made for CUDA graphs: phi is
read on the device, the number of programs is B*H, and nothing is checked that only the device
knows: a phi outside 0..N counts as 0.

Memory traffic, counted, not measured: H*K * (2*R + 2) numbers a row, whatever N is; attention under
a dense mask over all images reads 2*N*R*H*K of them.

Tested (interpreter): K 1 to 128, R 1 to 256, float32, float16, bfloat16, float64, B and N from 0,
strided inputs. No register spills for sm_80, sm_90 and gfx942 at any K and R of
results/compiled.json (K = 32, 64, 80, 96, 128; R = 1, 32, 64, 100, 256). Not tested: any GPU yet,
CUDA graphs with it; the launch options were not chosen by measured time.
"""

from .common.runtime import (
    LOG2E,
    allocate,
    check_alike,
    check_limits,
    describe,
    launch,
    load_rows,
    operator,
    rows_contiguous,
    side,
    store_rows,
    tl,
    torch,
    triton,
)
from .common.work_list import INTEGERS


@triton.jit
def _decode(
    q_ptr, k_ptr, v_ptr, out_ptr, phi_ptr,
    q_b, q_h, k_b, k_n, k_r, k_h, v_b, v_n, v_r, v_h, phi_b, N, H,
    R: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    one = tl.arange(0, 1)
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    image = tl.load(phi_ptr + b * phi_b).to(tl.int64)
    out = tl.zeros([1, BLOCK_K], ACC)
    if (image > 0) & (image <= N):
        k_ptr += b * k_b + (image - 1) * k_n + h * k_h
        v_ptr += b * v_b + (image - 1) * v_n + h * v_h
        q = load_rows(q_ptr + b * q_b + h * q_h, one, 0, one == 0, K, BLOCK_K).to(ACC)  # [1, K]
        m = tl.full([1], float("-inf"), ACC)
        total = tl.zeros([1], ACC)
        for first in range(0, R, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            k = load_rows(k_ptr, r, k_r, r < R, K, BLOCK_K).to(ACC)  # [R, K]
            v = load_rows(v_ptr, r, v_r, r < R, K, BLOCK_K).to(ACC)
            scores = tl.sum(q * k, 1)[:, None] * (SCALE * LOG2E)  # [R, 1]
            scores = tl.where((r < R)[:, None], scores, float("-inf"))
            new_m = tl.maximum(m, tl.max(scores, 0))
            shrink = tl.exp2(m - new_m)
            p = tl.exp2(scores - new_m[None, :])
            total = total * shrink + tl.sum(p, 0)
            out = out * shrink[:, None] + tl.sum(p * v, 0)[None, :]
            m = new_m
        out = out * (1 / total)[:, None]
    store_rows(out_ptr + (b * H + h) * K, one, 0, one == 0, out, K, BLOCK_K)


# --- launching ----------------------------------------------------------------------------------


def options_for(K, R, dtype):
    """The constants and launch options: blocks of keys that compile without spilling."""
    BLOCK_R, num_warps = (32, 8) if dtype.itemsize >= 4 else (64, 4)
    blocks = dict(BLOCK_R=min(BLOCK_R, side(R)), BLOCK_K=side(K))
    return dict(R=R, K=K, SCALE=K**-0.5, **blocks, num_warps=num_warps)


def _launch_decode(q, k, v, phi):
    (B, H, K), (N, R) = q.shape, k.shape[1:3]
    out = allocate(q.shape, q.dtype, q.device)
    launch(
        _decode, B * H, q, k, v, out, phi, *q.stride()[:2], *k.stride()[:4], *v.stride()[:4],
        phi.stride(0), N, H, **options_for(K, R, q.dtype),
    )  # fmt: skip
    return out


def launch_examples(K, dtype, R):
    """Launch the kernel once for R visual tokens, at a usual size: what `compile.py` records."""
    B, N, H = 8, 32, 16
    q = torch.empty((B, H, K), dtype=dtype, device="meta")
    k = torch.empty((B, N, R, H, K), dtype=dtype, device="meta")
    _launch_decode(q, k, k, torch.empty(B, dtype=torch.int32, device="meta"))


# --- the torch op, and the function to call -----------------------------------------------------


@operator("decode_attention")
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, phi: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    return _launch_decode(*map(rows_contiguous, (q, k, v)), phi)


@_attention.register_fake
def _(q, k, v, phi):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def decode_attention(q, k, v, phi):
    """One token in each row attends to the R visual tokens of image phi alone; phi = 0 gives 0.

    q [B, H, K]; k, v [B, N, R, H, K]; phi int[B] -> [B, H, K]. K <= 128, R <= 256; one dtype and
    one device for q, k, v. Without a gradient: backward() through it raises. A phi outside 0..N
    counts as 0, for nothing here waits for the device. ValueError otherwise.
    """
    if q.ndim != 3 or k.ndim != 5 or (k.shape[0], *k.shape[3:]) != tuple(q.shape):
        raise ValueError(
            "q must be [B, H, K] and k [B, N, R, H, K] with the same B, H and K, "
            f"got q {list(q.shape)} and k {list(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must be shaped like k, {list(k.shape)}, got {list(v.shape)}")
    if phi.shape != q.shape[:1] or phi.dtype not in INTEGERS or phi.device != q.device:
        raise ValueError(f"phi must be int [B] = [{len(q)}] on {q.device}, got {describe(phi)}")
    check_limits(k.shape[4], k.shape[2])
    check_alike(q=q, k=k, v=v)
    return _attention(q, k, v, phi)
