"""Right and wrong answers to the exercises of module 13, for test_checks.py."""

import numpy as np

from miniflamingo.course.checks.module_13 import gated_bytes, measured, warps_held

# --- 13.1: bytes and flops ------------------------------------------------------------------------


def work(B, L, N, R, H, K, size, reads=1, writes=1, media=2, seen=None, flops=4):
    images = N if seen is None else seen
    tokens = B * L * H * K
    moved = size * ((reads + writes) * tokens + media * B * images * R * H * K)
    return [moved, flops * R * tokens]


def work_by_arrays(B, L, N, R, H, K, size):
    """The arrays themselves, and a loop over what is computed."""
    like = {2: np.float16, 4: np.float32}[size]
    q, k = np.empty((B, L, H, K), like), np.empty((B, N, R, H, K), like)
    flops = sum(2 * R * K + 2 * R * K for _ in np.ndindex(B, L, H))
    return np.array([2 * q.nbytes + 2 * k.nbytes, flops])


# --- 13.2: the floor ------------------------------------------------------------------------------


def floor(moved, flops, bandwidth, peak):
    return np.maximum(moved / bandwidth, flops / peak)


def floor_by_ridge(moved, flops, bandwidth, peak):
    return [m / bandwidth if f / m < peak / bandwidth else f / peak for m, f in zip(moved, flops)]


# --- 13.3: the gate's three ways ------------------------------------------------------------------


def gate(M, D, I, size, plain=5, addmm=(3, 2), fused=1, common=(1, 1, 1)):
    a, w, y = M * I, D * I, M * D
    every = common[0] * a + common[1] * w + common[2] * y
    return size * np.array(
        [every + plain * y, every + addmm[0] * y + addmm[1] * w, every + fused * y]
    )


def gate_by_steps(M, D, I, size):
    a, w, y = size * M * I, size * D * I, size * M * D
    plain = [a, w, y, y, y, y, y, y]  # a, w -> branch -> gate * branch; + x -> y
    addmm = [w, w, y, y, a, w, y, y]  # the folded weight; x copied; read with a, w; y
    return [sum(plain), sum(addmm), a + w + y + y]


# --- 13.4: occupancy ------------------------------------------------------------------------------


def warps(registers, num_warps, step=8, schedulers=4, most=64, whole=True):
    rounded = -(-registers // step) * step
    held = np.minimum(schedulers * (512 // rounded), most)
    return held // num_warps * num_warps if whole else held


def warps_by_loop(registers, num_warps):
    out = []
    for r in registers:
        while r % 8:
            r += 1
        programs = min(4 * (512 // int(r)) // num_warps, 64 // num_warps)
        out.append(programs * num_warps)
    return out


# --- 13.5: timing ---------------------------------------------------------------------------------


def by_differences(device, warm_up, repeats):
    """Another right way: wait once, then read the clock after each call that was waited for."""
    for _ in range(warm_up):
        device.launch()
        device.wait()
    marks = [device.clock()]
    for _ in range(repeats):
        device.launch()
        device.wait()
        marks.append(device.clock())
    return np.diff(marks)


RIGHT = [
    ("13.1", work),
    ("13.1", work_by_arrays),
    ("13.2", floor),
    ("13.2", floor_by_ridge),
    ("13.3", gate),
    ("13.3", gate_by_steps),
    ("13.4", warps),
    ("13.4", warps_by_loop),
    ("13.5", measured),
    ("13.5", by_differences),
]

WRONG = [
    ("13.1", lambda *a: work(*a[:-1], 1), "numbers, not bytes"),
    ("13.1", lambda *a: work(*a, writes=0), "the output is written, too"),
    ("13.1", lambda *a: work(*a, media=1), "keys AND values are read"),
    ("13.1", lambda *a: work(*a, media=0), "keys and values are missing"),
    ("13.1", lambda *a: work(*a, seen=1), "keys and values of ALL N images"),
    ("13.1", lambda *a: work(*a, seen=a[1]), "once, not once a token"),
    ("13.1", lambda *a: work(*a, flops=2), "a multiplication AND an addition"),
    ("13.1", lambda *a: work(*a, flops=4 * a[2]), "this is the dense mask"),
    ("13.1", lambda *a: work(*a)[::-1], "the order is: bytes, flops"),
    ("13.1", lambda *a: work(*a)[1] / work(*a)[0], "this is their quotient"),
    ("13.2", lambda m, f, b, p: m / b + f / p, "the longer of them, not their sum"),
    ("13.2", lambda m, f, b, p: np.minimum(m / b, f / p), "the LONGER of the two"),
    ("13.2", lambda m, f, b, p: m / b, "the memory's time alone"),
    ("13.2", lambda m, f, b, p: f / p, "the arithmetic's time alone"),
    ("13.2", lambda m, f, b, p: np.minimum(b * f / m, p), "this is a rate"),
    ("13.2", lambda m, f, b, p: np.maximum(m / p, f / b), "mixed up"),
    ("13.2", lambda m, f, b, p: f / m, "this is the intensity"),
    ("13.2", lambda *a: floor(*a).max(), "one floor for each pair"),
    ("13.3", lambda *a: gate(*a[:-1], 1), "numbers, not bytes"),
    ("13.3", lambda *a: gate(*a, plain=3), "writes AND reads the branch"),
    ("13.3", lambda *a: gate(*a, plain=4), "reads what it wrote"),
    ("13.3", lambda *a: gate(*a, addmm=(3, 0)), "a COPY of the weight: read and written"),
    ("13.3", lambda *a: gate(*a, addmm=(1, 2)), "addmm copies x first"),
    ("13.3", lambda *a: gate(*a, fused=0), "the residual must still be read"),
    ("13.3", lambda *a: gate(*a, fused=3), "never leaves the chip"),
    ("13.3", lambda *a: gate(*a, common=(1, 1, 0)), "the output is written in every way"),
    ("13.3", lambda *a: gate(*a, common=(0, 0, 1)), "the product's inputs are read in every way"),
    ("13.3", lambda *a: gated_bytes(*a)[0] - gated_bytes(*a), "not what is saved"),
    ("13.4", lambda *a: warps(*a, step=1), "rounded UP"),
    ("13.4", lambda *a: warps(*a, most=10**6), "at most 64 warps"),
    ("13.4", lambda *a: warps(*a, whole=False), "only whole programs fit"),
    ("13.4", lambda *a: warps(*a) // a[1], "programs are counted here"),
    ("13.4", lambda *a: warps(*a, schedulers=1), "an SM has four schedulers"),
    ("13.4", lambda r, n: np.minimum(2048 // (-(-r // 8) * 8), 64) // n * n, "then times 4"),
    ("13.4", lambda *a: warps_held(*a) / 64, "a share of 64"),
    ("13.5", lambda device, warm_up, repeats: measured(device, 0, repeats), "no warm-up"),
    ("13.5", lambda *a: measured(*a, after=False), "you timed the LAUNCH"),
    ("13.5", lambda *a: measured(*a, before=False, after=False), "you timed the LAUNCH"),
    ("13.5", lambda *a: measured(*a, before=False), "still in the queue when the clock starts"),
    ("13.5", lambda *a: measured(*a).mean(), "not their mean"),
    ("13.5", lambda *a: np.cumsum(measured(*a)), "these are points in time"),
    ("13.5", lambda device, w, r: measured(device, 0, w + r), "warm-up's calls are timed too"),
]
