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

A larger image (R > 64, or K > 64 in float32) has several blocks of keys. `_forward` then loops over
those after the first, with an online softmax as in FlashAttention: the running maximum m grows, and
what was summed so far shrinks by 2^(old m - new m). It leaves m and 1 / sum of every row to the
backward pass, in float32: not the log-sum-exp m + log2(sum), which would give p the absolute
rounding error of a number of the size of m. `_backward_dq` takes delta = sum(out * dout), the same
number for out = p @ v, and makes dq; `_backward`, one program for each block, makes dk and dv. With
one block the loop has no turn and costs nothing: the code is that without it.

Every token belongs to one item, so out and dq are plain stores. An image with one item has dk and
dv stored by that item's program; one with several (a long run, as with N = 1) gets one float32
partial from each, and `_sum_partials` adds them up in the order of the tokens. No atomics: two
runs agree bit for bit. Tokens with phi = 0 are items of "image 0", which store zeros; an image that
nobody attends to owns one empty item, which stores dk = dv = 0.

Tested (interpreter): K 1 to 128, R 1 to 256, float32, float16, bfloat16, float64, L and N from 0,
any order of phi, strided q, k, v, dout. No spills and no repeated tiles on sm_80, sm_90 and gfx942
at the K and R of results/compiled.json, with strides that are multiples of 16, as projections make
them. With other strides a few bytes may spill: `_backward`, bfloat16, K = 80, R = 70, 32 to 40 on
sm_80 and sm_90. Not tested: any GPU yet (tests/kernels runs there as it is); tensors of more than
2^31 elements (offsets are 64 bits wide); several GPUs in one process. The launch options were
chosen for fitting in registers, not by measured time. float64, for checking gradients, exists in
the interpreter alone.
"""

from .common.runtime import (
    ALL_REGISTERS,
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
    q_ptr, k_ptr, v_ptr, out_ptr, statistics_ptr, order_ptr, items_ptr,
    q_b, q_l, q_h, k_b, k_n, k_r, k_h, v_b, v_n, v_r, v_h, L, H,
    R: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    item, h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    b, image, begin, end = load_item(items_ptr, item)
    out_ptr += b * L * H * K + h * K
    statistics_ptr += (b * L * H + h) * 2
    if image == 0:  # no image before these tokens: they attend to nothing
        store_zeros(out_ptr, order_ptr + b * L, begin, end, H * K, K, BLOCK_M, BLOCK_K)
        if R > BLOCK_R:
            store_zeros(statistics_ptr, order_ptr + b * L, begin, end, H * 2, 2, BLOCK_M, 2)
    else:
        k_ptr += b * k_b + (image - 1) * k_n + h * k_h
        v_ptr += b * v_b + (image - 1) * v_n + h * v_h
        r = tl.arange(0, BLOCK_R)
        k = load_rows(k_ptr, r, k_r, r < R, K, BLOCK_K)  # [R, K], or its first block
        v = load_rows(v_ptr, r, v_r, r < R, K, BLOCK_K)
        for start in range(begin, end, BLOCK_M):
            place = start + tl.arange(0, BLOCK_M)
            token = tl.load(order_ptr + b * L + place, place < end, other=0)
            q = load_rows(q_ptr + b * q_b + h * q_h, token, q_l, place < end, K, BLOCK_K)  # [M, K]
            # p = softmax(q @ k^T / sqrt(K)), out = p @ v, both not yet divided by the row's sum
            scores = dot(q, tl.trans(k)) * (SCALE * LOG2E)  # [M, R], for powers of 2
            scores = tl.where((r < R)[None, :], scores, float("-inf"))
            m = tl.max(scores, 1)
            p = tl.exp2(scores - m[:, None])
            total, out = tl.sum(p, 1), dot(cast(p, v.dtype), v)
            for first in range(BLOCK_R, R, BLOCK_R):  # the other blocks of a large image
                n = first + r
                k_block = load_rows(k_ptr, n, k_r, n < R, K, BLOCK_K)
                v_block = load_rows(v_ptr, n, v_r, n < R, K, BLOCK_K)
                scores = dot(q, tl.trans(k_block)) * (SCALE * LOG2E)
                scores = tl.where((n < R)[None, :], scores, float("-inf"))
                new_m = tl.maximum(m, tl.max(scores, 1))
                shrink = tl.exp2(m - new_m)
                p = tl.exp2(scores - new_m[:, None])
                total = total * shrink + tl.sum(p, 1)
                out = out * shrink[:, None] + dot(cast(p, v.dtype), v_block)
                m = new_m
            inverse = 1 / total  # one division a row, not K of them
            store_rows(out_ptr, token, H * K, place < end, out * inverse[:, None], K, BLOCK_K)
            if R > BLOCK_R:
                tl.store(statistics_ptr + token.to(tl.int64) * H * 2, m, place < end)
                tl.store(statistics_ptr + token.to(tl.int64) * H * 2 + 1, inverse, place < end)


# --- backward -----------------------------------------------------------------------------------


@triton.jit
def _backward_dq(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, dq_ptr, statistics_ptr, delta_ptr,
    order_ptr, items_ptr,
    do_b, do_l, do_h, q_b, q_l, q_h, k_b, k_n, k_r, k_h, v_b, v_n, v_r, v_h, L, H,
    R: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    item, h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    b, image, begin, end = load_item(items_ptr, item)
    row = b * L * H + h  # of out, dq [B, L, H, K], the statistics [B, L, H, 2] and delta [B, L, H]
    if image == 0:
        store_zeros(dq_ptr + row * K, order_ptr + b * L, begin, end, H * K, K, BLOCK_M, BLOCK_K)
    else:
        k_ptr += b * k_b + (image - 1) * k_n + h * k_h
        v_ptr += b * v_b + (image - 1) * v_n + h * v_h
        for start in range(begin, end, BLOCK_M):
            place = start + tl.arange(0, BLOCK_M)
            token = tl.load(order_ptr + b * L + place, place < end, other=0)
            q = load_rows(q_ptr + b * q_b + h * q_h, token, q_l, place < end, K, BLOCK_K)
            dout = load_rows(dout_ptr + b * do_b + h * do_h, token, do_l, place < end, K, BLOCK_K)
            out = load_rows(out_ptr + row * K, token, H * K, place < end, K, BLOCK_K)
            own = row + token.to(tl.int64) * H
            m = tl.load(statistics_ptr + own * 2, place < end, other=0.0)
            inverse = tl.load(statistics_ptr + own * 2 + 1, place < end, other=0.0)
            delta = tl.sum(out.to(m.dtype) * dout.to(m.dtype), 1)  # sum(p * dp), as out = p @ v
            tl.store(delta_ptr + own, delta, place < end)
            dq = tl.zeros([BLOCK_M, BLOCK_K], m.dtype)
            for first in range(0, R, BLOCK_R):
                r = first + tl.arange(0, BLOCK_R)
                k = load_rows(k_ptr, r, k_r, r < R, K, BLOCK_K)
                v = load_rows(v_ptr, r, v_r, r < R, K, BLOCK_K)
                scores = dot(q, tl.trans(k)) * (SCALE * LOG2E)
                scores = tl.where((r < R)[None, :], scores, float("-inf"))
                p = tl.exp2(scores - m[:, None]) * inverse[:, None]
                dscores = p * (dot(dout, tl.trans(v)) - delta[:, None])
                dq += dot(cast(dscores, k.dtype), k)
            store_rows(dq_ptr + row * K, token, H * K, place < end, dq * SCALE, K, BLOCK_K)


@triton.jit
def _backward(
    dout_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, dk_part_ptr, dv_part_ptr,
    statistics_ptr, delta_ptr, order_ptr, items_ptr,
    do_b, do_l, do_h, q_b, q_l, q_h, k_b, k_n, k_r, k_h, v_b, v_n, v_r, v_h, L, N, H,
    R: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    block, item_head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    item, h = item_head // H, (item_head % H).to(tl.int64)
    b, image, begin, end = load_item(items_ptr, item)
    dq_ptr += b * L * H * K + h * K
    if image == 0:
        if blocks == 1:
            store_zeros(dq_ptr, order_ptr + b * L, begin, end, H * K, K, BLOCK_M, BLOCK_K)
    else:
        n, r = image - 1, block * BLOCK_R + tl.arange(0, BLOCK_R)
        k = load_rows(k_ptr + b * k_b + n * k_n + h * k_h, r, k_r, r < R, K, BLOCK_K)  # [R, K]
        v = load_rows(v_ptr + b * v_b + n * v_n + h * v_h, r, v_r, r < R, K, BLOCK_K)
        dk = tl.zeros([BLOCK_R, BLOCK_K], dk_part_ptr.dtype.element_ty)
        dv = tl.zeros([BLOCK_R, BLOCK_K], dk_part_ptr.dtype.element_ty)
        for start in range(begin, end, BLOCK_M):
            place = start + tl.arange(0, BLOCK_M)
            token = tl.load(order_ptr + b * L + place, place < end, other=0)
            q = load_rows(q_ptr + b * q_b + h * q_h, token, q_l, place < end, K, BLOCK_K)  # [M, K]
            dout = load_rows(dout_ptr + b * do_b + h * do_h, token, do_l, place < end, K, BLOCK_K)
            scores = dot(q, tl.trans(k)) * (SCALE * LOG2E)  # [M, R]
            scores = tl.where((r < R)[None, :], scores, float("-inf"))
            if blocks == 1:
                p = tl.exp2(scores - tl.max(scores, 1)[:, None])
                p *= (1 / tl.sum(p, 1))[:, None]
            else:  # past the end, inverse is 0
                row = (b * L + token) * H + h
                m = tl.load(statistics_ptr + row * 2, place < end, other=0.0)
                inverse = tl.load(statistics_ptr + row * 2 + 1, place < end, other=0.0)
                p = tl.exp2(scores - m[:, None]) * inverse[:, None]
            # out = p @ v. Past the end dout and q are 0, and add nothing
            dv += dot(tl.trans(cast(p, dout.dtype)), dout)
            dp = dot(dout, tl.trans(v))
            # p = softmax(scores)
            if blocks == 1:
                delta = tl.sum(p * dp, 1)
            else:
                delta = tl.load(delta_ptr + row, place < end, other=0.0)
            dscores = cast(p * (dp - delta[:, None]), q.dtype)
            # scores = q @ k^T / sqrt(K)
            dk += dot(tl.trans(dscores), q)
            if blocks == 1:
                dq = dot(dscores, k) * SCALE  # [M, K]
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


# (kernel, several blocks, K > 64, float32) -> tokens of a tile, warps of a program, keys of a
# block, stages (with 2, a tile is loaded while the one before it is worked on): wide ones that
# compile without spilling and without computing a tile twice (`compile.py`); not yet chosen by time
OPTIONS = {
    ("_forward", False, False, False): (64, 4, 64, 1),
    ("_forward", False, True, False): (64, 4, 64, 1),
    ("_forward", False, False, True): (32, 4, 64, 1),
    ("_forward", False, True, True): (32, 4, 64, 1),
    ("_forward", True, False, False): (64, 4, 64, 1),
    ("_forward", True, True, False): (64, 4, 32, 1),
    ("_forward", True, False, True): (16, 4, 32, 1),
    ("_forward", True, True, True): (16, 8, 16, 1),
    ("_backward", False, False, False): (64, 4, 64, 1),
    ("_backward", False, True, False): (64, 8, 64, 1),
    ("_backward", False, False, True): (16, 8, 64, 1),
    ("_backward", False, True, True): (16, 8, 32, 1),
    ("_backward_dq", True, False, False): (64, 4, 32, 1),
    ("_backward_dq", True, True, False): (64, 4, 32, 1),
    ("_backward_dq", True, False, True): (16, 4, 32, 1),
    ("_backward_dq", True, True, True): (16, 8, 16, 1),
    ("_backward", True, False, False): (64, 4, 64, 1),
    ("_backward", True, True, False): (32, 4, 64, 1),
    ("_backward", True, False, True): (16, 4, 32, 1),
    ("_backward", True, True, True): (16, 8, 32, 1),
}
# ... and where a target's differ. Keys of a block cannot: the number of programs hangs on them.
# gfx942's matrix instructions take float32, and want 16 tokens for every warp
OWN = {
    ("_backward", False, False, False): {"sm_90": dict(num_stages=2)},
    ("_backward", False, True, False): {
        "sm_90": dict(BLOCK_M=128),
        "gfx": dict(num_warps=4),
    },
    ("_backward", True, True, False): {
        "sm_90": dict(BLOCK_M=64),
        "gfx": dict(BLOCK_M=64),
    },
}
OWN |= {key: {"gfx": dict(BLOCK_M=64, num_warps=4)} for key in OPTIONS if key[3]}


def in_one_block(K, dtype, R):
    """Whether all keys of an image are one block: at most 64, which fill 16 KiB of a tile."""
    return R <= 64 and side(R) * side(K) * dtype.itemsize <= 16 * 1024


def options_for(kernel, K, dtype, R):
    """The constants and launch options of a kernel of this file."""
    key = kernel.__name__, not in_one_block(K, dtype, R), K > 64, dtype.itemsize >= 4
    BLOCK_M, num_warps, BLOCK_R, num_stages = OPTIONS[key]
    if kernel.__name__ != "_backward":  # whose tiles of dk and dv its warps would fill twice
        # where K > 64, sm_80's warps lie side by side in `out`, 8 columns each: in the scores, too
        BLOCK_R = min(BLOCK_R, max(side(R), 32 if K > 64 else 16))
    blocks = dict(BLOCK_M=BLOCK_M, BLOCK_R=BLOCK_R, BLOCK_K=side(K))
    options = dict(num_warps=num_warps, num_stages=num_stages, **OWN.get(key, {}))
    if dtype.itemsize >= 4:
        options |= ALL_REGISTERS
    return dict(R=R, K=K, SCALE=K**-0.5, **blocks, **options)


def _launch_forward(q, k, v, work):
    """-> out, and for an image of several blocks m and 1 / sum of every row [B, L, H, 2]."""
    (_, L, H, K), R = q.shape, k.shape[2]
    out = allocate(q.shape, q.dtype, q.device)
    precise = torch.promote_types(q.dtype, torch.float32)
    statistics = allocate(statistics_shape(q, k), precise, q.device)
    launch(
        _forward, len(work.items) * H, q, k, v, out, statistics, work.order, work.items,
        *q.stride()[:3], *k.stride()[:4], *v.stride()[:4], L, H,
        **options_for(_forward, K, q.dtype, R),
    )  # fmt: skip
    return out, statistics


def statistics_shape(q, k):
    """[B, L, H, 2] where the backward pass takes statistics from the forward pass, or else [0]."""
    (*rows, K), R = q.shape, k.shape[2]
    return (0,) if in_one_block(K, q.dtype, R) else (*rows, 2)


def _launch_backward(dout, q, k, v, out, statistics, work):
    (_, L, H, K), (N, R) = q.shape, k.shape[1:3]
    precise = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (allocate(x.shape, x.dtype, x.device) for x in (q, k, v))
    parts = [allocate((work.num_slots, R, H, K), precise, q.device) for _ in "kv"]
    delta = allocate(statistics.shape[:3], precise, q.device)
    strides = *dout.stride()[:3], *q.stride()[:3], *k.stride()[:4], *v.stride()[:4]
    programs = len(work.backward_items) * H
    if len(statistics):
        launch(
            _backward_dq, programs, dout, q, k, v, out, dq, statistics, delta,
            work.order, work.backward_items, *strides, L, H,
            **options_for(_backward_dq, K, q.dtype, R),
        )  # fmt: skip
    options = options_for(_backward, K, q.dtype, R)
    launch(
        _backward, programs * triton.cdiv(R, options["BLOCK_R"]), dout, q, k, v, dq, dk, dv,
        *parts, statistics, delta, work.order, work.backward_items, *strides, L, N, H, **options,
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
    out, statistics = _launch_forward(q, k, k, work)
    _launch_backward(q, q, k, k, out, statistics, work)


# --- the torch op -------------------------------------------------------------------------------


@operator("image_causal_attention")
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    order: torch.Tensor, items: torch.Tensor, backward_items: torch.Tensor, splits: torch.Tensor,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    shape = *q.shape[:2], k.shape[1]
    work = WorkList(order, items, backward_items, splits, shape, (None, chunk))
    return _launch_forward(*map(rows_contiguous, (q, k, v)), work)


@operator("image_causal_attention_backward")
def _attention_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, statistics: torch.Tensor,
    order: torch.Tensor, items: torch.Tensor, backward_items: torch.Tensor, splits: torch.Tensor,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    shape = *q.shape[:2], k.shape[1]
    work = WorkList(order, items, backward_items, splits, shape, (None, chunk))
    inputs = map(rows_contiguous, (dout, q, k, v))
    return _launch_backward(*inputs, out.contiguous(), statistics.contiguous(), work)


@_attention.register_fake
def _(q, k, v, *work):
    precise = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(statistics_shape(q, k), dtype=precise)


@_attention_backward.register_fake
def _(dout, q, k, v, *others):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, *lists, ctx.chunk = inputs
    out, statistics = output
    out = out if len(statistics) else statistics  # with one block of keys neither is read
    ctx.save_for_backward(q, k, v, out, statistics, *lists)


def _run_backward(ctx, dout, _):
    return *_attention_backward(dout, *ctx.saved_tensors, ctx.chunk), *[None] * 5


_attention.register_autograd(_run_backward, setup_context=_save)

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
    return _attention(q, k, v, *work[:4], work.chunks[1])[0]


def image_causal_attention_backward(dout, q, k, v, phi, work=None, check=True):
    """The gradients dq, dk, dv from dout [B, L, H, K] and the forward's inputs; see there.

    For an image of several blocks of keys, the forward pass is run again for what autograd keeps
    of it.
    """
    work = _prepare(q, k, v, phi, work, check)
    if dout.shape != q.shape or dout.dtype != q.dtype or dout.device != q.device:
        raise ValueError(f"dout must be like q, {describe(q)}, got {describe(dout)}")
    lists = *work[:4], work.chunks[1]
    if in_one_block(q.shape[3], q.dtype, k.shape[2]):
        none = q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
        return _attention_backward(dout, q, k, v, none, none, *lists)
    return _attention_backward(dout, q, k, v, *_attention(q, k, v, *lists), *lists)


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
