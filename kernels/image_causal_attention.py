"""Image-causal cross-attention, fused: each token attends to the R visual tokens of one image.

NumPy twin: `miniflamingo.xattn.image_causal_attention` and its gradient, line for line. Letters: B
batch, L text tokens, N images, R visual tokens of an image, H heads, K head width.

    q, dout, out, dq [B, L, H, K]    k, v, dk, dv [B, N, R, H, K]    phi int[B, L] in 0..N

Algorithm. `build_work_list` sorts each row's tokens by the image they attend to (a stable sort, so
any phi will do) and cuts every image's run of tokens into items of at most `chunk` tokens. One
program handles one item and one head. It loads the image's keys and values once; a token's whole
softmax, over R <= 64 scores, fits in its tile. So there is no online rescaling, and nothing is
saved for the backward pass, which recomputes the weights p from q and k, and delta = sum(p * dp) in
place. No dense mask exists; memory traffic is that of the arguments plus the work list.

Every token belongs to one item, so out and dq are plain stores. An image with one item has dk and
dv stored by that item's program; one with several (a long run, as with N = 1) gets one float32
partial from each, and `_sum_partials` adds them up in the order of the tokens. No atomics: two
runs agree bit for bit. Tokens with phi = 0 are items of "image 0", which store zeros; an image that
nobody attends to owns one empty item, which stores dk = dv = 0.

Larger images (R > 64, or K > 64 in float32) go to `image_causal_attention_blocks.py`, which loops
over blocks of keys.

Tested (interpreter): K 1 to 128, R 1 to 256, float32, float16, bfloat16, float64, L and N from 0,
any order of phi, strided q, k, v, dout. No register spills for sm_80, sm_90 and gfx942 at any K
and R of results/compiled.json (K = 32, 64, 80, 96, 128; R = 1, 32, 64, 100, 256); at others a few
bytes may (float32 on sm_90, K = 24, R = 50: 8). Not tested: any GPU yet (tests/kernels runs there
as it is); tensors of more than 2^31 elements (offsets are 64 bits wide); several GPUs in one
process. The launch options were chosen for fitting in registers, not by measured time. float64, for
checking gradients, exists in the interpreter alone.
"""

from . import image_causal_attention_blocks as in_blocks
from .common.runtime import (
    LOG2E,
    allocate,
    cast,
    check_alike,
    check_limits,
    describe,
    dot,
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
from .common.work_list import (
    WorkList,
    build_work_list,
    choose_chunks,
    count_items,
    launch_list,
    load_item,
    store_zeros,
    sum_partials,
)

# --- forward ------------------------------------------------------------------------------------


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, order_ptr, items_ptr,
    q_b, q_l, q_h, k_b, k_n, k_r, k_h, v_b, v_n, v_r, v_h, L, H,
    R: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    item, h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    b, image, begin, end = load_item(items_ptr, item)
    out_ptr += b * L * H * K + h * K
    if image == 0:  # no image before these tokens: they attend to nothing
        store_zeros(out_ptr, order_ptr + b * L, begin, end, H * K, K, BLOCK_M, BLOCK_K)
    else:
        n, r = image - 1, tl.arange(0, BLOCK_R)
        k = load_rows(k_ptr + b * k_b + n * k_n + h * k_h, r, k_r, r < R, K, BLOCK_K)  # [R, K]
        v = load_rows(v_ptr + b * v_b + n * v_n + h * v_h, r, v_r, r < R, K, BLOCK_K)
        for start in range(begin, end, BLOCK_M):
            place = start + tl.arange(0, BLOCK_M)
            token = tl.load(order_ptr + b * L + place, place < end, other=0)
            q = load_rows(q_ptr + b * q_b + h * q_h, token, q_l, place < end, K, BLOCK_K)  # [M, K]
            # p = softmax(q @ k^T / sqrt(K)), in base 2
            scores = dot(q, tl.trans(k)) * (SCALE * LOG2E)  # [M, R]
            scores = tl.where((r < R)[None, :], scores, float("-inf"))
            p = tl.exp2(scores - tl.max(scores, 1)[:, None])
            # out = p @ v; dividing by the sum afterwards touches K numbers a row, p has R
            out = dot(cast(p, v.dtype), v) / tl.sum(p, 1)[:, None]
            store_rows(out_ptr, token, H * K, place < end, out, K, BLOCK_K)


# --- backward -----------------------------------------------------------------------------------


@triton.jit
def _backward(
    dout_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, dk_part_ptr, dv_part_ptr,
    order_ptr, items_ptr,
    do_b, do_l, do_h, q_b, q_l, q_h, k_b, k_n, k_r, k_h, v_b, v_n, v_r, v_h, L, N, H,
    R: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    item, h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    b, image, begin, end = load_item(items_ptr, item)
    dq_ptr += b * L * H * K + h * K
    if image == 0:
        store_zeros(dq_ptr, order_ptr + b * L, begin, end, H * K, K, BLOCK_M, BLOCK_K)
    else:
        n, r = image - 1, tl.arange(0, BLOCK_R)
        k = load_rows(k_ptr + b * k_b + n * k_n + h * k_h, r, k_r, r < R, K, BLOCK_K)  # [R, K]
        v = load_rows(v_ptr + b * v_b + n * v_n + h * v_h, r, v_r, r < R, K, BLOCK_K)
        dk = tl.zeros([BLOCK_R, BLOCK_K], dk_part_ptr.dtype.element_ty)
        dv = tl.zeros([BLOCK_R, BLOCK_K], dk_part_ptr.dtype.element_ty)
        for start in range(begin, end, BLOCK_M):
            place = start + tl.arange(0, BLOCK_M)
            token = tl.load(order_ptr + b * L + place, place < end, other=0)
            q = load_rows(q_ptr + b * q_b + h * q_h, token, q_l, place < end, K, BLOCK_K)  # [M, K]
            dout = load_rows(dout_ptr + b * do_b + h * do_h, token, do_l, place < end, K, BLOCK_K)
            # scores, p and their gradients are transposed, [R, M]: the products that make them and
            # dk, dv then have R rows and not M, so that a small tile of tokens, which leaves
            # registers to dk and dv, still fills the tensor cores
            scores = dot(k, tl.trans(q)) * (SCALE * LOG2E)
            scores = tl.where((r < R)[:, None], scores, float("-inf"))
            p = tl.exp2(scores - tl.max(scores, 0)[None, :])
            p = p / tl.sum(p, 0)[None, :]
            # out = p @ v. Past the end dout and q are 0, and add nothing
            dv += dot(cast(p, dout.dtype), dout)
            dp = dot(v, tl.trans(dout))
            # p = softmax(scores)
            dscores = cast(p * (dp - tl.sum(p * dp, 0)[None, :]), q.dtype)
            # scores = q @ k^T / sqrt(K)
            dk += dot(dscores, q)
            dq = dot(tl.trans(dscores), k) * SCALE  # [M, K]
            store_rows(dq_ptr, token, H * K, place < end, dq, K, BLOCK_K)
        slot = tl.load(items_ptr + item * 5 + 4).to(tl.int64)
        if slot < 0:  # the image's only item
            first = ((b * N + n) * R * H + h) * K  # of dk, dv [B, N, R, H, K]
            store_rows(dk_ptr + first, r, H * K, r < R, dk * SCALE, K, BLOCK_K)
            store_rows(dv_ptr + first, r, H * K, r < R, dv, K, BLOCK_K)
        else:
            first = (slot * R * H + h) * K  # of the partial sums [slots, R, H, K]
            store_rows(dk_part_ptr + first, r, H * K, r < R, dk * SCALE, K, BLOCK_K)
            store_rows(dv_part_ptr + first, r, H * K, r < R, dv, K, BLOCK_K)


# --- launching ----------------------------------------------------------------------------------


# (kernel, K > 64, float32) -> tokens of a tile, warps of a program: wide ones that compile without
# spilling for sm_80, sm_90 and gfx942 (`python -m miniflamingo compile`, Triton 3.7.1; 3.6.0 spills
# 8 bytes in _backward, float32, K > 64, R <= 16); not yet chosen by time
OPTIONS = {
    ("_forward", False, False): (64, 4),
    ("_forward", True, False): (64, 4),
    ("_forward", False, True): (32, 4),
    ("_forward", True, True): (32, 4),
    ("_backward", False, False): (32, 4),
    ("_backward", True, False): (32, 8),
    ("_backward", False, True): (16, 8),
    ("_backward", True, True): (16, 8),
}


def options_for(kernel, K, dtype, R):
    """The constants and launch options of a kernel of this file."""
    BLOCK_M, num_warps = OPTIONS[kernel.__name__, K > 64, dtype.itemsize >= 4]
    if kernel.__name__ == "_backward" and R <= 32:
        BLOCK_M = 16  # with 32, sm_90 spills 8 bytes at R = K = 32
    elif kernel.__name__ == "_backward" and dtype.itemsize >= 4 and side(K) <= 32:
        BLOCK_M = 32  # with 16, sm_80 spills 8 bytes at R = 64, K = 32
    blocks = dict(BLOCK_M=BLOCK_M, BLOCK_R=side(R), BLOCK_K=side(K))
    return dict(R=R, K=K, SCALE=K**-0.5, **blocks, num_warps=num_warps, num_stages=1)


def fits_one_tile(K, dtype, R):
    """Whether the kernels of this file handle an image: its keys fill at most 16 KiB of a tile."""
    return R <= 64 and side(R) * side(K) * dtype.itemsize <= 16 * 1024


def _launch_forward(q, k, v, work):
    (_, L, H, K), R = q.shape, k.shape[2]
    if not fits_one_tile(K, q.dtype, R):
        return in_blocks.launch_forward(q, k, v, work)
    out = allocate(q.shape, q.dtype, q.device)
    launch(
        _forward, len(work.items) * H, q, k, v, out, work.order, work.items,
        *q.stride()[:3], *k.stride()[:4], *v.stride()[:4], L, H,
        **options_for(_forward, K, q.dtype, R),
    )  # fmt: skip
    return out


def _launch_backward(dout, q, k, v, work):
    (_, L, H, K), (N, R) = q.shape, k.shape[1:3]
    if not fits_one_tile(K, q.dtype, R):
        return in_blocks.launch_backward(dout, q, k, v, work)
    dq, dk, dv = (allocate(x.shape, x.dtype, x.device) for x in (q, k, v))
    precise = torch.promote_types(q.dtype, torch.float32)
    parts = [allocate((work.num_slots, R, H, K), precise, q.device) for _ in "kv"]
    launch(
        _backward, len(work.backward_items) * H, dout, q, k, v, dq, dk, dv, *parts,
        work.order, work.backward_items,
        *dout.stride()[:3], *q.stride()[:3], *k.stride()[:4], *v.stride()[:4], L, N, H,
        **options_for(_backward, K, q.dtype, R),
    )  # fmt: skip
    sum_partials(parts, (dk, dv), work.splits)
    return dq, dk, dv


def launch_examples(K, dtype, R):
    """Launch every kernel once for R visual tokens, at a usual size: what `compile.py` records."""
    B, L, N, H = 8, 2048, 5, 16
    q = torch.empty((B, L, H, K), dtype=dtype, device="meta")
    k = torch.empty((B, N, R, H, K), dtype=dtype, device="meta")
    phi = torch.empty((B, L), dtype=torch.int32, device="meta")
    chunks = choose_chunks(B * L * H)
    work = WorkList(*launch_list(phi, N, *chunks), (B, L, N), chunks)
    _launch_forward(q, k, k, work)
    _launch_backward(q, q, k, k, work)


# --- the torch op -------------------------------------------------------------------------------


@operator("image_causal_attention")
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    order: torch.Tensor, items: torch.Tensor, backward_items: torch.Tensor, splits: torch.Tensor,
    chunk: int,
) -> torch.Tensor:  # fmt: skip
    shape = *q.shape[:2], k.shape[1]
    work = WorkList(order, items, backward_items, splits, shape, (None, chunk))
    return _launch_forward(*map(rows_contiguous, (q, k, v)), work)


@operator("image_causal_attention_backward")
def _attention_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    order: torch.Tensor, items: torch.Tensor, backward_items: torch.Tensor, splits: torch.Tensor,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    shape = *q.shape[:2], k.shape[1]
    work = WorkList(order, items, backward_items, splits, shape, (None, chunk))
    return _launch_backward(*map(rows_contiguous, (dout, q, k, v)), work)


@_attention.register_fake
def _(q, k, v, *work):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@_attention_backward.register_fake
def _(dout, q, k, v, *work):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _save_inputs(ctx, inputs, output):
    *tensors, ctx.chunk = inputs
    ctx.save_for_backward(*tensors)


def _run_backward(ctx, dout):
    return *_attention_backward(dout, *ctx.saved_tensors, ctx.chunk), *[None] * 5


_attention.register_autograd(_run_backward, setup_context=_save_inputs)

# --- the functions to call ----------------------------------------------------------------------


def image_causal_attention(q, k, v, phi, work=None, check=True):
    """Each token attends to the R visual tokens of image phi alone; where phi = 0, the output is 0.

    q [B, L, H, K]; k, v [B, N, R, H, K]; phi int[B, L] in 0..N, in any order -> [B, L, H, K], with
    gradients for q, k and v. K <= 128, R <= 256; one dtype and one device for q, k, v.
    work is this phi's `build_work_list`, where the caller has it (all layers can share one); that
    of another phi is refused, and so is phi's own, once phi was written to. check=True reads phi's
    range, and compares a phi that is another tensor, for which the host waits for the device; with
    check=False, as under torch.compile or in a CUDA graph, a phi outside 0..N counts as 0, and on a
    GPU a work list needs the very tensor that it was built from. ValueError otherwise.
    """
    work = _prepare(q, k, v, phi, work, check)
    return _attention(q, k, v, *work[:4], work.chunks[1])


def image_causal_attention_backward(dout, q, k, v, phi, work=None, check=True):
    """The gradients dq, dk, dv from dout [B, L, H, K] and the forward's inputs; see there."""
    work = _prepare(q, k, v, phi, work, check)
    if dout.shape != q.shape or dout.dtype != q.dtype or dout.device != q.device:
        raise ValueError(f"dout must be like q, {describe(q)}, got {describe(dout)}")
    return _attention_backward(dout, q, k, v, *work[:4], work.chunks[1])


def _prepare(q, k, v, phi, work, check):
    """Check the arguments (ValueError), and build the work list unless it is given."""
    check_tensors(q, k, v)
    (B, L, H, _), N = q.shape, k.shape[1]
    if phi.shape != (B, L) or phi.device != q.device:
        raise ValueError(f"phi must be int [B, L] = [{B}, {L}] on {q.device}, got {describe(phi)}")
    if work is None:
        return build_work_list(phi, N, heads=H, check=check)
    if work.shape != (B, L, N) or work.order.device != q.device:
        raise ValueError(
            f"work must be for (B, L, N) = {(B, L, N)} on {q.device}, "
            f"got {work.shape} on {work.order.device}"
        )
    found = len(work.items), len(work.backward_items)
    if work.source is None or found != count_items(work.shape, work.chunks):
        raise ValueError("work must be as build_work_list returns it, got one that was changed")
    work.source.check(phi, check)
    return work


def check_tensors(q, k, v):
    """ValueError unless q [B, L, H, K] and k, v [B, N, R, H, K] are what the kernels can take."""
    if q.ndim != 4 or k.ndim != 5 or (k.shape[0], *k.shape[3:]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(
            "q must be [B, L, H, K] and k [B, N, R, H, K] with the same B, H and K, "
            f"got q {list(q.shape)} and k {list(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must be shaped like k, {list(k.shape)}, got {list(v.shape)}")
    check_limits(k.shape[4], k.shape[2])
    check_alike(q=q, k=k, v=v)
