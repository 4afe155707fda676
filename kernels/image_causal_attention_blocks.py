"""Image-causal cross-attention for images whose keys do not fit in one tile: R up to 256.

The kernels of `image_causal_attention.py` hold all keys and values of an image in a tile each;
those of this file loop over blocks of 32 or 64 keys. Read that file first: the letters, the work
list and the checks are the same.

Algorithm. Forward: online softmax, as in FlashAttention: with each block of keys the running
maximum m grows, and what was summed so far shrinks by 2^(old m - new m). Backward, two kernels:

    _backward_dq       item and head               the row statistics m, sum and delta, then dq
    _backward_dkdv     item, head, block of keys   dk and dv of the block, from the statistics

The statistics are scratch of the backward pass [B, H, L], float32; the forward pass saves nothing.
They are m and 1 / sum, not the log-sum-exp m + log2(sum): with that, p would inherit the absolute
rounding error of a number of the size of m.

Tested and untested: as in `image_causal_attention.py`.
"""

from .common.runtime import (
    ALL_REGISTERS,
    LOG2E,
    allocate,
    cast,
    dot,
    launch,
    load_rows,
    side,
    store_rows,
    tl,
    torch,
    triton,
)
from .common.work_list import load_item, store_zeros, sum_partials

# --- forward ------------------------------------------------------------------------------------


@triton.jit
def _forward_blocks(
    q_ptr, k_ptr, v_ptr, out_ptr, order_ptr, items_ptr,
    q_b, q_l, q_h, k_b, k_n, k_r, k_h, v_b, v_n, v_r, v_h, L, H,
    R: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    item, h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    b, image, begin, end = load_item(items_ptr, item)
    out_ptr += b * L * H * K + h * K
    if image == 0:
        store_zeros(out_ptr, order_ptr + b * L, begin, end, H * K, K, BLOCK_M, BLOCK_K)
    else:
        k_ptr += b * k_b + (image - 1) * k_n + h * k_h
        v_ptr += b * v_b + (image - 1) * v_n + h * v_h
        for start in range(begin, end, BLOCK_M):
            place = start + tl.arange(0, BLOCK_M)
            token = tl.load(order_ptr + b * L + place, place < end, other=0)
            q = load_rows(q_ptr + b * q_b + h * q_h, token, q_l, place < end, K, BLOCK_K)
            ACC: tl.constexpr = tl.float64 if q.dtype == tl.float64 else tl.float32
            m = tl.full([BLOCK_M], float("-inf"), ACC)
            total = tl.zeros([BLOCK_M], ACC)
            out = tl.zeros([BLOCK_M, BLOCK_K], ACC)
            for first in range(0, R, BLOCK_R):
                r = first + tl.arange(0, BLOCK_R)
                k = load_rows(k_ptr, r, k_r, r < R, K, BLOCK_K)
                v = load_rows(v_ptr, r, v_r, r < R, K, BLOCK_K)
                scores = dot(q, tl.trans(k)) * (SCALE * LOG2E)
                scores = tl.where((r < R)[None, :], scores, float("-inf"))
                new_m = tl.maximum(m, tl.max(scores, 1))
                shrink = tl.exp2(m - new_m)
                p = tl.exp2(scores - new_m[:, None])
                total = total * shrink + tl.sum(p, 1)
                out = out * shrink[:, None] + dot(cast(p, v.dtype), v)
                m = new_m
            store_rows(out_ptr, token, H * K, place < end, out / total[:, None], K, BLOCK_K)


# --- backward -----------------------------------------------------------------------------------


@triton.jit
def _backward_dq(
    dout_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, m_ptr, inverse_ptr, delta_ptr, order_ptr, items_ptr,
    do_b, do_l, do_h, q_b, q_l, q_h, k_b, k_n, k_r, k_h, v_b, v_n, v_r, v_h, L, H,
    R: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    item, h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    b, image, begin, end = load_item(items_ptr, item)
    dq_ptr += b * L * H * K + h * K
    if image == 0:
        store_zeros(dq_ptr, order_ptr + b * L, begin, end, H * K, K, BLOCK_M, BLOCK_K)
    else:
        k_ptr += b * k_b + (image - 1) * k_n + h * k_h
        v_ptr += b * v_b + (image - 1) * v_n + h * v_h
        for start in range(begin, end, BLOCK_M):
            place = start + tl.arange(0, BLOCK_M)
            token = tl.load(order_ptr + b * L + place, place < end, other=0)
            q = load_rows(q_ptr + b * q_b + h * q_h, token, q_l, place < end, K, BLOCK_K)
            dout = load_rows(dout_ptr + b * do_b + h * do_h, token, do_l, place < end, K, BLOCK_K)
            ACC: tl.constexpr = m_ptr.dtype.element_ty
            m = tl.full([BLOCK_M], float("-inf"), ACC)
            total = tl.zeros([BLOCK_M], ACC)
            delta = tl.zeros([BLOCK_M], ACC)  # sum(p * dp) of a row
            for first in range(0, R, BLOCK_R):
                r = first + tl.arange(0, BLOCK_R)
                k = load_rows(k_ptr, r, k_r, r < R, K, BLOCK_K)
                v = load_rows(v_ptr, r, v_r, r < R, K, BLOCK_K)
                scores = dot(q, tl.trans(k)) * (SCALE * LOG2E)
                scores = tl.where((r < R)[None, :], scores, float("-inf"))
                new_m = tl.maximum(m, tl.max(scores, 1))
                shrink = tl.exp2(m - new_m)
                p = tl.exp2(scores - new_m[:, None])
                total = total * shrink + tl.sum(p, 1)
                delta = delta * shrink + tl.sum(p * dot(dout, tl.trans(v)), 1)
                m = new_m
            inverse = 1 / total
            delta *= inverse
            dq = tl.zeros([BLOCK_M, BLOCK_K], ACC)
            for first in range(0, R, BLOCK_R):
                r = first + tl.arange(0, BLOCK_R)
                k = load_rows(k_ptr, r, k_r, r < R, K, BLOCK_K)
                v = load_rows(v_ptr, r, v_r, r < R, K, BLOCK_K)
                scores = dot(q, tl.trans(k)) * (SCALE * LOG2E)
                scores = tl.where((r < R)[None, :], scores, float("-inf"))
                p = tl.exp2(scores - m[:, None]) * inverse[:, None]
                dscores = p * (dot(dout, tl.trans(v)) - delta[:, None])
                dq += dot(cast(dscores, k.dtype), k)
            store_rows(dq_ptr, token, H * K, place < end, dq * SCALE, K, BLOCK_K)
            row = (b * H + h) * L + token  # of the statistics [B, H, L]
            tl.store(m_ptr + row, m, place < end)
            tl.store(inverse_ptr + row, inverse, place < end)
            tl.store(delta_ptr + row, delta, place < end)


@triton.jit
def _backward_dkdv(
    dout_ptr, q_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr, dk_part_ptr, dv_part_ptr,
    m_ptr, inverse_ptr, delta_ptr, order_ptr, items_ptr,
    do_b, do_l, do_h, q_b, q_l, q_h, k_b, k_n, k_r, k_h, v_b, v_n, v_r, v_h, L, N, H,
    R: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    block, item_head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    item, h = item_head // H, (item_head % H).to(tl.int64)
    b, image, begin, end = load_item(items_ptr, item)
    if image > 0:
        n, r = image - 1, block * BLOCK_R + tl.arange(0, BLOCK_R)
        k = load_rows(k_ptr + b * k_b + n * k_n + h * k_h, r, k_r, r < R, K, BLOCK_K)
        v = load_rows(v_ptr + b * v_b + n * v_n + h * v_h, r, v_r, r < R, K, BLOCK_K)
        dk = tl.zeros([BLOCK_R, BLOCK_K], m_ptr.dtype.element_ty)
        dv = tl.zeros([BLOCK_R, BLOCK_K], m_ptr.dtype.element_ty)
        for start in range(begin, end, BLOCK_M):
            place = start + tl.arange(0, BLOCK_M)
            token = tl.load(order_ptr + b * L + place, place < end, other=0)
            q = load_rows(q_ptr + b * q_b + h * q_h, token, q_l, place < end, K, BLOCK_K)
            dout = load_rows(dout_ptr + b * do_b + h * do_h, token, do_l, place < end, K, BLOCK_K)
            row = (b * H + h) * L + token
            m = tl.load(m_ptr + row, place < end, other=0.0)
            inverse = tl.load(inverse_ptr + row, place < end, other=0.0)
            delta = tl.load(delta_ptr + row, place < end, other=0.0)
            # transposed as in _backward: [R, M]. Past the end q, dout and inverse are 0
            scores = dot(k, tl.trans(q)) * (SCALE * LOG2E)
            scores = tl.where((r < R)[:, None], scores, float("-inf"))
            p = tl.exp2(scores - m[None, :]) * inverse[None, :]
            dv += dot(cast(p, dout.dtype), dout)
            dscores = p * (dot(v, tl.trans(dout)) - delta[None, :])
            dk += dot(cast(dscores, q.dtype), q)
        slot = tl.load(items_ptr + item * 5 + 4).to(tl.int64)
        if slot < 0:
            first = ((b * N + n) * R * H + h) * K
            store_rows(dk_ptr + first, r, H * K, r < R, dk * SCALE, K, BLOCK_K)
            store_rows(dv_ptr + first, r, H * K, r < R, dv, K, BLOCK_K)
        else:
            first = (slot * R * H + h) * K
            store_rows(dk_part_ptr + first, r, H * K, r < R, dk * SCALE, K, BLOCK_K)
            store_rows(dv_part_ptr + first, r, H * K, r < R, dv, K, BLOCK_K)


# --- launching ----------------------------------------------------------------------------------

# as in `image_causal_attention.py`, and the keys of a block
OPTIONS = {
    ("_forward_blocks", False, False): (64, 4, 32),
    ("_forward_blocks", True, False): (64, 4, 64),
    ("_forward_blocks", False, True): (32, 4, 32),
    ("_forward_blocks", True, True): (32, 8, 32),
    ("_backward_dq", False, False): (64, 8, 32),
    ("_backward_dq", True, False): (64, 8, 32),
    ("_backward_dq", False, True): (32, 4, 32),
    ("_backward_dq", True, True): (16, 8, 32),
    ("_backward_dkdv", False, False): (32, 4, 64),
    ("_backward_dkdv", True, False): (16, 8, 64),
    ("_backward_dkdv", False, True): (16, 4, 32),
    ("_backward_dkdv", True, True): (16, 8, 64),
}


def options_for(kernel, K, dtype, R):
    """The constants and launch options of a kernel of this file."""
    BLOCK_M, num_warps, BLOCK_R = OPTIONS[kernel.__name__, K > 64, dtype.itemsize >= 4]
    blocks = dict(BLOCK_M=BLOCK_M, BLOCK_R=min(BLOCK_R, side(R)), BLOCK_K=side(K))
    options = dict(num_warps=num_warps, num_stages=1)
    if kernel is _forward_blocks and dtype.itemsize >= 4:
        options |= ALL_REGISTERS
    return dict(R=R, K=K, SCALE=K**-0.5, **blocks, **options)


def launch_forward(q, k, v, work):
    """The forward pass -> out, for arguments that `image_causal_attention` has checked."""
    (_, L, H, K), R = q.shape, k.shape[2]
    out = allocate(q.shape, q.dtype, q.device)
    launch(
        _forward_blocks, len(work.items) * H, q, k, v, out, work.order, work.items,
        *q.stride()[:3], *k.stride()[:4], *v.stride()[:4], L, H,
        **options_for(_forward_blocks, K, q.dtype, R),
    )  # fmt: skip
    return out


def launch_backward(dout, q, k, v, work):
    """The backward pass -> dq, dk, dv."""
    (B, L, H, K), (N, R) = q.shape, k.shape[1:3]
    precise = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (allocate(x.shape, x.dtype, x.device) for x in (q, k, v))
    parts = [allocate((work.num_slots, R, H, K), precise, q.device) for _ in "kv"]
    statistics = [allocate((B, H, L), precise, q.device) for _ in range(3)]
    strides = *dout.stride()[:3], *q.stride()[:3], *k.stride()[:4], *v.stride()[:4]
    items = work.backward_items
    programs = len(items) * H
    launch(
        _backward_dq, programs, dout, q, k, v, dq, *statistics, work.order, items,
        *strides, L, H, **options_for(_backward_dq, K, q.dtype, R),
    )  # fmt: skip
    options = options_for(_backward_dkdv, K, q.dtype, R)
    launch(
        _backward_dkdv, programs * triton.cdiv(R, options["BLOCK_R"]), dout, q, k, v, dk, dv,
        *parts, *statistics, work.order, items, *strides, L, N, H, **options,
    )  # fmt: skip
    sum_partials(parts, (dk, dv), work.splits)
    return dq, dk, dv
