"""The Perceiver Resampler's attention, fused: latents attend to [features, latents], not joined.

NumPy twin: `miniflamingo.attention.attention` on the concatenation, image by image (it is written
out in `twins.py`). Letters: B images or clips, R latents, H heads, K head width, M features of an
image (its own number, 0 allowed), `total` features of all images.

    q, k_l, v_l, dout, out, dq, dk_l, dv_l [B, R, H, K]    k_x, v_x, dk_x, dv_x [total, H, K]

Algorithm. Online softmax, as in FlashAttention, over two segments one after the other: the features
of an image, then the latents. Each segment is its own call of one helper: a pointer chosen between
the two, inside one loop, would keep the compiler from loading ahead. R queries alone give few
programs, so where B*H is small the features are split: `build_feature_list` cuts every image's into
items of at most `chunk`, the first of which also takes the latents. One program handles one item,
head and block of queries. An item that has its image to itself stores the result; the others store
partial ones in float32, which are merged in the order of the features:

    forward     _resample         online softmax                     [_resample_merge]
    backward    _resample_dq      delta = sum(out * dout), then dq   [sum_partials]
                _resample_dkdv    dk, dv of an item's keys, over all queries: plain stores

The forward pass leaves to the backward pass two numbers a row in float32: the log-sum-exp, in two
parts, the maximum m and 1 / sum, for m + log2(sum) would give p the absolute rounding error of a
number of the size of m. With them and out, which is saved with the inputs, the backward pass
recomputes p and dp in each of its kernels; sum(p * dp) is sum(out * dout), for out = p @ v. No
atomics: two runs agree bit for bit. The host waits for nothing once the list is built, and the
number of programs follows from the shapes alone.

Memory traffic, counted, not measured, in numbers of the inputs' dtype, for whole images and R up to
one block of queries. Forward: H*K * (2*total + 4*B*R); every slot of a split image adds 2 * H*R *
(K + 2) in float32. Backward: H*K * (6*total + 12*B*R), two passes over all inputs, with q and dout
counted once in each, out, and the gradients. The statistics and delta, B*R*H * 8 numbers in
float32 over both passes, are not counted. Concatenating [x_f, latents] of width D before the
projections, as the paper's pseudo-code does in every layer, reads and writes 2*D * (total + B*R)
numbers more, and needs padding where M differs: for an image of the paper's (M = 100, R = 64,
D = 1536, 16 heads of 128) 0.5 million beside the 0.9 that this forward pass moves, for a clip of 8
frames (M = 800) 2.7 beside 3.8 million.

Tested (interpreter): K 1 to 128, R 1 to 256, float32, float16, bfloat16, float64, B, M and total
from 0, ragged and padded batches, split and whole images, strided inputs. No spills and no repeated
tiles on sm_80, sm_90 and gfx942 at the K and R of results/compiled.json, with strides that are
multiples of 16, as projections make them; with other strides a few bytes may spill (bfloat16,
K = 80, R = 70: up to 80 on sm_80 and sm_90). Not tested: any GPU; tensors of more than 2^31
elements (offsets are 64 bits wide). The launch options and the split were not chosen by measured
time. float64, for checking gradients, exists in the interpreter alone.
"""

from .common.feature_list import (
    FeatureList,
    build_feature_list,
    build_padded_list,
    choose_chunk,
    launch_list,
    load_features,
)
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
from .common.work_list import sum_partials

# --- forward ------------------------------------------------------------------------------------


@triton.jit
def locate(H, R: tl.constexpr, BLOCK_M: tl.constexpr):
    """This program's item, head and latents; blocks of latents that share keys are neighbours."""
    blocks: tl.constexpr = (R + BLOCK_M - 1) // BLOCK_M
    block, item_head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    return item_head // H, (item_head % H).to(tl.int64), r


@triton.jit
def attend(
    q, k_ptr, v_ptr, k_n, v_n, begin, end, m, total, out,
    K: tl.constexpr, SCALE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Attend to keys begin..end of one segment, on top of what m, total and out hold."""
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, n, k_n, n < end, K, BLOCK_K)
        v = load_rows(v_ptr, n, v_n, n < end, K, BLOCK_K)
        scores = dot(q, tl.trans(k)) * (SCALE * LOG2E)  # [M, N]
        scores = tl.where((n < end)[None, :], scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1))
        shrink = tl.exp2(m - new_m)
        p = tl.exp2(scores - new_m[:, None])
        total = total * shrink + tl.sum(p, 1)
        out = out * shrink[:, None] + dot(cast(p, v.dtype), v)
        m = new_m
    return m, total, out


@triton.jit
def _resample(
    q_ptr, kx_ptr, vx_ptr, kl_ptr, vl_ptr, out_ptr, statistics_ptr,
    m_part_ptr, total_part_ptr, out_part_ptr, items_ptr,
    q_b, q_r, q_h, kx_n, kx_h, vx_n, vx_h, kl_b, kl_r, kl_h, vl_b, vl_r, vl_h, H,
    R: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    item, h, r = locate(H, R, BLOCK_M)
    b, begin, end, _, slot, latents = load_features(items_ptr, item)
    if b >= 0:
        q = load_rows(q_ptr + b * q_b + h * q_h, r, q_r, r < R, K, BLOCK_K)
        ACC: tl.constexpr = m_part_ptr.dtype.element_ty
        m = tl.full([BLOCK_M], float("-inf"), ACC)
        total = tl.zeros([BLOCK_M], ACC)
        out = tl.zeros([BLOCK_M, BLOCK_K], ACC)
        m, total, out = attend(
            q, kx_ptr + h * kx_h, vx_ptr + h * vx_h, kx_n, vx_n, begin, end, m, total, out,
            K, SCALE, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        m, total, out = attend(
            q, kl_ptr + b * kl_b + h * kl_h, vl_ptr + b * vl_b + h * vl_h, kl_r, vl_r,
            0, latents * R, m, total, out, K, SCALE, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if slot < 0:  # the image's only item
            row = (b * R + r) * H + h  # of out [B, R, H, K] and the statistics [B, R, H, 2]
            inverse = 1 / total
            store_rows(out_ptr, row, K, r < R, out * inverse[:, None], K, BLOCK_K)
            tl.store(statistics_ptr + row * 2, m, r < R)
            tl.store(statistics_ptr + row * 2 + 1, inverse, r < R)
        else:
            row = (slot * R + r) * H + h  # of the partial results [slots, R, H, ..]
            store_rows(out_part_ptr, row, K, r < R, out, K, BLOCK_K)
            tl.store(m_part_ptr + row, m, r < R)
            tl.store(total_part_ptr + row, total, r < R)


@triton.jit
def _resample_merge(
    m_part_ptr, total_part_ptr, out_part_ptr, out_ptr, statistics_ptr, splits_ptr, H,
    R: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = sum(2^m_i out_i) / sum(2^m_i total_i) over the parts i of an image that has several."""
    split, h, r = locate(H, R, BLOCK_M)
    splits_ptr += split * 3
    b, slot = tl.load(splits_ptr).to(tl.int64), tl.load(splits_ptr + 1).to(tl.int64)
    slots = tl.load(splits_ptr + 2)
    if slots > 0:
        ACC: tl.constexpr = m_part_ptr.dtype.element_ty
        m = tl.full([BLOCK_M], float("-inf"), ACC)
        total = tl.zeros([BLOCK_M], ACC)
        out = tl.zeros([BLOCK_M, BLOCK_K], ACC)
        for i in range(slots):
            row = ((slot + i) * R + r) * H + h
            # the first part has the latents, so m is finite from there on. One that is all padding
            # has total = 0 and m = -inf, and adds nothing
            m_i = tl.load(m_part_ptr + row, r < R, other=0.0)
            new_m = tl.maximum(m, m_i)
            shrink, weight = tl.exp2(m - new_m), tl.exp2(m_i - new_m)
            total = total * shrink + tl.load(total_part_ptr + row, r < R, other=1.0) * weight
            out_i = load_rows(out_part_ptr, row, K, r < R, K, BLOCK_K)
            out = out * shrink[:, None] + out_i * weight[:, None]
            m = new_m
        row = (b * R + r) * H + h
        inverse = 1 / total
        store_rows(out_ptr, row, K, r < R, out * inverse[:, None], K, BLOCK_K)
        tl.store(statistics_ptr + row * 2, m, r < R)
        tl.store(statistics_ptr + row * 2 + 1, inverse, r < R)


# --- backward -----------------------------------------------------------------------------------


@triton.jit
def add_dq(
    dq, q, dout, m, inverse, delta, k_ptr, v_ptr, k_n, v_n, begin, end,
    K: tl.constexpr, SCALE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add what keys begin..end of one segment give to dq (the scale comes at the end)."""
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, n, k_n, n < end, K, BLOCK_K)
        v = load_rows(v_ptr, n, v_n, n < end, K, BLOCK_K)
        scores = dot(q, tl.trans(k)) * (SCALE * LOG2E)
        scores = tl.where((n < end)[None, :], scores, float("-inf"))
        p = tl.exp2(scores - m[:, None]) * inverse[:, None]
        # p = softmax(scores), scores = q @ k^T / sqrt(K)
        dscores = p * (dot(dout, tl.trans(v)) - delta[:, None])
        dq += dot(cast(dscores, k.dtype), k)
    return dq


@triton.jit
def _resample_dq(
    dout_ptr, q_ptr, kx_ptr, vx_ptr, kl_ptr, vl_ptr, out_ptr, statistics_ptr, delta_ptr,
    dq_ptr, dq_part_ptr, items_ptr, do_b, do_r, do_h,
    q_b, q_r, q_h, kx_n, kx_h, vx_n, vx_h, kl_b, kl_r, kl_h, vl_b, vl_r, vl_h, H,
    R: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    item, h, r = locate(H, R, BLOCK_M)
    b, begin, end, _, slot, latents = load_features(items_ptr, item)
    if b >= 0:
        q = load_rows(q_ptr + b * q_b + h * q_h, r, q_r, r < R, K, BLOCK_K)
        dout = load_rows(dout_ptr + b * do_b + h * do_h, r, do_r, r < R, K, BLOCK_K)
        row = (b * R + r) * H + h
        out = load_rows(out_ptr, row, K, r < R, K, BLOCK_K)
        m = tl.load(statistics_ptr + row * 2, r < R, other=0.0)
        inverse = tl.load(statistics_ptr + row * 2 + 1, r < R, other=0.0)
        delta = tl.sum(out.to(m.dtype) * dout.to(m.dtype), 1)  # sum(p * dp), for out = p @ v
        if latents:  # of an image's items one is enough
            tl.store(delta_ptr + row, delta, r < R)
        dq = tl.zeros([BLOCK_M, BLOCK_K], m.dtype)
        dq = add_dq(
            dq, q, dout, m, inverse, delta, kx_ptr + h * kx_h, vx_ptr + h * vx_h, kx_n, vx_n,
            begin, end, K, SCALE, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        dq = add_dq(
            dq, q, dout, m, inverse, delta, kl_ptr + b * kl_b + h * kl_h,
            vl_ptr + b * vl_b + h * vl_h, kl_r, vl_r, 0, latents * R, K, SCALE, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if slot < 0:
            store_rows(dq_ptr, row, K, r < R, dq * SCALE, K, BLOCK_K)
        else:
            row = (slot * R + r) * H + h
            store_rows(dq_part_ptr, row, K, r < R, dq * SCALE, K, BLOCK_K)


@triton.jit
def store_dkdv(
    k_ptr, v_ptr, dk_ptr, dv_ptr, k_n, v_n, begin, end,
    dout_ptr, q_ptr, statistics_ptr, delta_ptr, do_r, q_r, H,
    R: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dk and dv of keys begin..end of one segment, from all R queries."""
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, n, k_n, n < end, K, BLOCK_K)
        v = load_rows(v_ptr, n, v_n, n < end, K, BLOCK_K)
        dk = tl.zeros([BLOCK_N, BLOCK_K], delta_ptr.dtype.element_ty)
        dv = tl.zeros([BLOCK_N, BLOCK_K], delta_ptr.dtype.element_ty)
        for start in range(0, R, BLOCK_M):
            r = start + tl.arange(0, BLOCK_M)
            q = load_rows(q_ptr, r, q_r, r < R, K, BLOCK_K)
            dout = load_rows(dout_ptr, r, do_r, r < R, K, BLOCK_K)
            m = tl.load(statistics_ptr + r * H * 2, r < R, other=0.0)
            inverse = tl.load(statistics_ptr + r * H * 2 + 1, r < R, other=0.0)
            delta = tl.load(delta_ptr + r * H, r < R, other=0.0)
            # transposed, [N, M]: all products then have the rows of a block of keys
            scores = dot(k, tl.trans(q)) * (SCALE * LOG2E)
            scores = tl.where((n < end)[:, None], scores, float("-inf"))
            p = tl.exp2(scores - m[None, :]) * inverse[None, :]
            # out = p @ v. Past R dout, q and p are 0, and add nothing
            dv += dot(cast(p, dout.dtype), dout)
            dscores = p * (dot(v, tl.trans(dout)) - delta[None, :])
            # scores = q @ k^T / sqrt(K)
            dk += dot(cast(dscores, q.dtype), q)
        store_rows(dk_ptr, n, H * K, n < end, dk * SCALE, K, BLOCK_K)
        store_rows(dv_ptr, n, H * K, n < end, dv, K, BLOCK_K)


@triton.jit
def _resample_dkdv(
    dout_ptr, q_ptr, kx_ptr, vx_ptr, kl_ptr, vl_ptr, statistics_ptr, delta_ptr,
    dkx_ptr, dvx_ptr, dkl_ptr, dvl_ptr, items_ptr, do_b, do_r, do_h,
    q_b, q_r, q_h, kx_n, kx_h, vx_n, vx_h, kl_b, kl_r, kl_h, vl_b, vl_r, vl_h, H,
    R: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    item, h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    b, begin, end, stop, _, latents = load_features(items_ptr, item)
    dkx_ptr += h * K
    dvx_ptr += h * K
    if b >= 0:
        dout_ptr += b * do_b + h * do_h
        q_ptr += b * q_b + h * q_h
        row = b * R * H + h  # of the statistics [B, R, H, 2], delta, and dk_l, dv_l [B, R, H, K]
        store_dkdv(
            kx_ptr + h * kx_h, vx_ptr + h * vx_h, dkx_ptr, dvx_ptr, kx_n, vx_n, begin, end,
            dout_ptr, q_ptr, statistics_ptr + row * 2, delta_ptr + row, do_r, q_r, H,
            R, K, SCALE, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        store_dkdv(
            kl_ptr + b * kl_b + h * kl_h, vl_ptr + b * vl_b + h * vl_h,
            dkl_ptr + row * K, dvl_ptr + row * K, kl_r, vl_r, 0, latents * R,
            dout_ptr, q_ptr, statistics_ptr + row * 2, delta_ptr + row, do_r, q_r, H,
            R, K, SCALE, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    for first in range(end, stop, BLOCK_N):  # the padding behind the features
        n = first + tl.arange(0, BLOCK_N)
        zeros = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        store_rows(dkx_ptr, n, H * K, n < stop, zeros, K, BLOCK_K)
        store_rows(dvx_ptr, n, H * K, n < stop, zeros, K, BLOCK_K)


# --- launching ----------------------------------------------------------------------------------

# (kernel, K > 64, float32) -> latents of a tile, warps of a program, keys of a block, stages (with
# 2, a block is loaded while the one before it is worked on): wide ones, chosen so as neither to
# spill nor to compute a tile twice (`compile.py` looks); not yet chosen by time
OPTIONS = {
    ("_resample", False, False): (64, 4, 64, 2),
    ("_resample", True, False): (64, 4, 32, 1),
    ("_resample", False, True): (32, 8, 32, 1),
    ("_resample", True, True): (16, 4, 16, 1),
    ("_resample_dq", False, False): (64, 4, 64, 2),
    ("_resample_dq", True, False): (64, 4, 32, 2),
    ("_resample_dq", False, True): (16, 4, 16, 1),
    ("_resample_dq", True, True): (16, 8, 16, 1),
    ("_resample_dkdv", False, False): (32, 4, 64, 1),
    ("_resample_dkdv", True, False): (32, 4, 32, 2),
    ("_resample_dkdv", False, True): (16, 4, 32, 1),
    ("_resample_dkdv", True, True): (16, 8, 32, 1),
}
# ... and where gfx942's differ: its matrix instructions take float32, and want 16 rows for a warp
OWN = {
    ("_resample_dkdv", True, False): dict(BLOCK_N=64, num_stages=1),
    ("_resample_dkdv", False, True): dict(BLOCK_N=64),
    ("_resample_dkdv", True, True): dict(BLOCK_N=64, num_warps=4),
}


def options_for(kernel, K, dtype, R):
    """The constants and launch options of a kernel of this file, _resample_merge excepted.

    A matrix instruction has 16 rows. Of a tile of latents, which few latents make small, each warp
    gets that many, so that none computes what another has. Its blocks of keys shrink with the
    warps, so that a thread holds no more of them than in a full tile. The smallest tile is that of
    two warps, 32 latents: one warp's share of a wide head spills. Float32 has such instructions on
    gfx942 alone. _resample_dkdv has rows of keys, and the latents beside them fill its tile, with
    zeros where they are few.
    """
    key = kernel.__name__, K > 64, dtype.itemsize >= 4
    BLOCK_M, num_warps, BLOCK_N, num_stages = OPTIONS[key]
    own = OWN.get(key, {})
    if kernel is not _resample_dkdv:
        BLOCK_M = min(BLOCK_M, max(32, side(R)))
        fewer = min(num_warps, BLOCK_M // 16)
        own = dict(num_warps=fewer)
        if dtype.itemsize < 4:
            num_warps, BLOCK_N = fewer, BLOCK_N * fewer // num_warps
    blocks = dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=side(K))
    options = dict(num_warps=num_warps, num_stages=num_stages, gfx=own)
    if dtype.itemsize >= 4 or R % 64:  # few latents: a loop of one turn, unrolled; or a part tile
        options |= ALL_REGISTERS
    return dict(R=R, K=K, SCALE=K**-0.5, **blocks, **options)


def _launch(kernel, programs, tensors, strided, options):
    """Launch with the strides of the tensors whose names begin the kernel's arguments."""
    strides = (s for x in strided for s in x.stride()[:-1])
    H = strided[0].shape[2]
    launch(kernel, programs * H, *tensors, *strides, H, **options)


def _query_blocks(options):
    return triton.cdiv(options["R"], options["BLOCK_M"])


def _launch_forward(q, k_x, v_x, k_l, v_l, features):
    """-> out, and m and 1 / sum of every row [B, R, H, 2]."""
    (B, R, H, K), slots = q.shape, features.num_slots
    precise = torch.promote_types(q.dtype, torch.float32)
    out = allocate(q.shape, q.dtype, q.device)
    statistics = allocate((B, R, H, 2), precise, q.device)
    # of split images: m and sum [slots, R, H], and sum * out
    parts = [allocate((slots, R, H, *last), precise, q.device) for last in ((), (), (K,))]
    options = options_for(_resample, K, q.dtype, R)
    inputs = q, k_x, v_x, k_l, v_l
    programs = len(features.items) * _query_blocks(options)
    _launch(
        _resample, programs, (*inputs, out, statistics, *parts, features.items), inputs, options
    )
    if slots:
        launch(
            _resample_merge, len(features.splits) * H * triton.cdiv(R, 8), *parts, out, statistics,
            features.splits, H, R=R, K=K, BLOCK_M=8, BLOCK_K=triton.next_power_of_2(K),
        )  # fmt: skip
    return out, statistics


def _launch_backward(dout, q, k_x, v_x, k_l, v_l, out, statistics, features):
    (_, R, H, K), inputs = q.shape, (dout, q, k_x, v_x, k_l, v_l)
    grads = [allocate(x.shape, x.dtype, x.device) for x in inputs[1:]]
    delta = allocate(statistics.shape[:3], statistics.dtype, q.device)
    dq_part = allocate((features.num_slots, R, H, K), statistics.dtype, q.device)

    def start(kernel, blocks, options, *tensors):
        programs, tensors = len(features.items) * blocks, (*inputs, *tensors, features.items)
        _launch(kernel, programs, tensors, inputs, options)

    options = options_for(_resample_dq, K, q.dtype, R)
    blocks = _query_blocks(options)
    start(_resample_dq, blocks, options, out, statistics, delta, grads[0], dq_part)
    sum_partials([dq_part], grads[:1], features.splits)
    options = options_for(_resample_dkdv, K, q.dtype, R)
    start(_resample_dkdv, 1, options, statistics, delta, *grads[1:])
    return tuple(grads)


def launch_examples(K, dtype, R):
    """Launch every kernel once for R latents, at a usual size: what `compile.py` records."""
    B, total, H = 1, 1800, 16  # few programs: the features are split
    q = torch.empty((B, R, H, K), dtype=dtype, device="meta")
    x = torch.empty((total, H, K), dtype=dtype, device="meta")
    offsets = torch.empty(B + 1, dtype=torch.int32, device="meta")
    chunk = choose_chunk(B, total, H)
    launch_list(offsets, 8 * 225, 225, chunk)  # padded, as lengths; of packed features, as offsets:
    features = FeatureList(*launch_list(offsets, total, -1, chunk), (B, total), chunk)
    out, statistics = _launch_forward(q, x, x, q, q, features)
    _launch_backward(q, q, x, x, q, q, out, statistics, features)


# --- the torch op -------------------------------------------------------------------------------


@operator("resampler_attention")
def _attention(
    q: torch.Tensor, k_x: torch.Tensor, v_x: torch.Tensor, k_l: torch.Tensor, v_l: torch.Tensor,
    items: torch.Tensor, splits: torch.Tensor, chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    features = FeatureList(items, splits, (len(q), len(k_x)), chunk)
    return _launch_forward(*map(rows_contiguous, (q, k_x, v_x, k_l, v_l)), features)


@operator("resampler_attention_backward")
def _attention_backward(
    dout: torch.Tensor, q: torch.Tensor, k_x: torch.Tensor, v_x: torch.Tensor, k_l: torch.Tensor,
    v_l: torch.Tensor, out: torch.Tensor, statistics: torch.Tensor,
    items: torch.Tensor, splits: torch.Tensor, chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    features = FeatureList(items, splits, (len(q), len(k_x)), chunk)
    inputs = map(rows_contiguous, (dout, q, k_x, v_x, k_l, v_l))
    return _launch_backward(*inputs, out.contiguous(), statistics.contiguous(), features)


@_attention.register_fake
def _(q, k_x, v_x, k_l, v_l, items, splits, chunk):
    precise = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((*q.shape[:3], 2), dtype=precise)


@_attention_backward.register_fake
def _(dout, q, k_x, v_x, k_l, v_l, out, statistics, items, splits, chunk):
    return tuple(x.new_empty(x.shape) for x in (q, k_x, v_x, k_l, v_l))


def _save(ctx, inputs, output):
    *inputs, items, splits, ctx.chunk = inputs
    ctx.save_for_backward(*inputs, *output, items, splits)


def _run_backward(ctx, dout, _):
    return *_attention_backward(dout, *ctx.saved_tensors, ctx.chunk), None, None, None


_attention.register_autograd(_run_backward, setup_context=_save)

# --- the functions to call ----------------------------------------------------------------------


def resampler_attention(q, k_x, v_x, k_l, v_l, offsets, work=None, check=True):
    """Latents attend to their image's features and to all of its latents, in one softmax.

    q, k_l, v_l [B, R, H, K]; k_x, v_x [total, H, K], of which image b owns rows offsets[b] to
    offsets[b + 1], possibly none; offsets int[B + 1] -> [B, R, H, K], with gradients for the first
    five. K <= 128, R <= 256; one dtype and one device. work is `build_feature_list` of the offsets,
    where the caller has it (all layers can share one); that of others is refused. check=True reads
    the offsets, and compares them where they are another tensor, for which the host waits for the
    device; unchecked, as under torch.compile or in a CUDA graph, wrong ones are clamped into order
    and range, and work needs the very tensor that it was built from. ValueError otherwise.
    """
    work = _prepare(q, k_x, v_x, k_l, v_l, offsets, work, check)
    return _attention(q, k_x, v_x, k_l, v_l, work.items, work.splits, work.chunk)[0]


def resampler_attention_backward(dout, q, k_x, v_x, k_l, v_l, offsets, work=None, check=True):
    """The gradients dq, dk_x, dv_x, dk_l, dv_l from dout [B, R, H, K] and the forward's inputs.

    The forward pass is run again for what autograd keeps of it: its output and its statistics.
    """
    work = _prepare(q, k_x, v_x, k_l, v_l, offsets, work, check)
    if dout.shape != q.shape or dout.dtype != q.dtype or dout.device != q.device:
        raise ValueError(f"dout must be like q, {describe(q)}, got {describe(dout)}")
    inputs, lists = (q, k_x, v_x, k_l, v_l), (work.items, work.splits, work.chunk)
    return _attention_backward(dout, *inputs, *_attention(*inputs, *lists), *lists)


def padded_resampler_attention(q, k_x, v_x, k_l, v_l, lengths=None, work=None, check=True):
    """The same for padded features k_x, v_x [B, M, H, K]: image b has lengths[b] of its M rows.

    lengths int[B] in 0..M; by default those of work, or all M of every image. What lies behind them
    is not read, and its gradient is 0. work is `build_padded_list` of the lengths. No copy is made
    where k_x and v_x [B, M] can be seen as one axis. Otherwise as resampler_attention.
    """
    if k_x.ndim != 4 or k_x.shape != v_x.shape or len(k_x) != len(q):
        raise ValueError(
            f"k_x and v_x must be [B, M, H, K] with B = {len(q)}, "
            f"got {list(k_x.shape)} and {list(v_x.shape)}"
        )
    B, M = k_x.shape[:2]
    if lengths is None and work is None:
        lengths = torch.full((B,), M, device=q.device)
    if lengths is not None and (lengths.shape != (B,) or lengths.device != q.device):
        raise ValueError(f"lengths must be int [B] = [{B}] on {q.device}, got {describe(lengths)}")
    if work is None:
        work = build_padded_list(lengths, M, q.shape[2], check)
    k_x, v_x = k_x.flatten(0, 1), v_x.flatten(0, 1)
    _check(q, k_x, v_x, k_l, v_l, work, "lengths", lengths, check)
    return _attention(q, k_x, v_x, k_l, v_l, work.items, work.splits, work.chunk)[0]


def _prepare(q, k_x, v_x, k_l, v_l, offsets, work, check):
    """Check the arguments (ValueError), and build the list of features unless it is given."""
    if offsets.shape != (len(q) + 1,) or offsets.device != q.device:
        raise ValueError(
            f"offsets must be int [B + 1] = [{len(q) + 1}] on {q.device}, got {describe(offsets)}"
        )
    _check(q, k_x, v_x, k_l, v_l, work, "offsets", offsets, check)
    return build_feature_list(offsets, len(k_x), q.shape[2], check) if work is None else work


def _check(q, k_x, v_x, k_l, v_l, work, name, counts, check):
    """ValueError unless the kernels can take these arguments; counts are the offsets or lengths."""
    if q.ndim != 4 or k_l.shape != q.shape or v_l.shape != q.shape:
        raise ValueError(
            "q, k_l and v_l must be [B, R, H, K], all three, "
            f"got {list(q.shape)}, {list(k_l.shape)} and {list(v_l.shape)}"
        )
    if k_x.ndim != 3 or k_x.shape[1:] != q.shape[2:] or v_x.shape != k_x.shape:
        raise ValueError(
            f"k_x and v_x must be [total, H, K] with (H, K) = {tuple(q.shape[2:])}, "
            f"got {list(k_x.shape)} and {list(v_x.shape)}"
        )
    check_limits(q.shape[3], q.shape[1])
    check_alike(q=q, k_x=k_x, v_x=v_x, k_l=k_l, v_l=v_l)
    if work is not None:
        _check_work(work, (len(q), len(k_x)), q.device, name, counts, check)


def _check_work(work, shape, device, name, counts, check):
    if work.shape != shape or work.items.device != device:
        raise ValueError(
            f"work must be for (B, total) = {shape} on {device}, "
            f"got {work.shape} on {work.items.device}"
        )
    (B, total), source = shape, work.source
    if source is None or len(work.items) != B + 1 + total // work.chunk:
        raise ValueError("work must be as build_feature_list returns it, got one that was changed")
    if source.name != name:
        raise ValueError(f"work must be built from {name}, got one built from {source.name}")
    source.check(source.tensor if counts is None else counts, check)
