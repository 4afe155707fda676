"""Right and wrong answers to the exercises of module 14, for test_checks.py."""

from itertools import pairwise

import numpy as np

from miniflamingo.course.checks.module_14 import gated_bytes, summary, timed

# --- 14.1: bytes and flops ------------------------------------------------------------------------


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


# --- 14.2: the floor ------------------------------------------------------------------------------


def floor(moved, flops, bandwidth, peak):
    return np.maximum(moved / bandwidth, flops / peak)


def floor_by_ridge(moved, flops, bandwidth, peak):
    return [m / bandwidth if f / m < peak / bandwidth else f / peak for m, f in zip(moved, flops)]


# --- 14.3: the gate's three ways ------------------------------------------------------------------


def gate(L, D, I, size, plain=5, addmm=(3, 2), fused=1, common=(1, 1, 1)):
    a, w, y = L * I, D * I, L * D
    every = common[0] * a + common[1] * w + common[2] * y
    return size * np.array(
        [every + plain * y, every + addmm[0] * y + addmm[1] * w, every + fused * y]
    )


def gate_by_steps(L, D, I, size):
    a, w, y = size * L * I, size * D * I, size * L * D
    plain = [a, w, y, y, y, y, y, y]  # a, w -> branch -> gate * branch; + x -> y
    addmm = [w, w, y, y, a, w, y, y]  # the folded weight; x copied; read with a, w; y
    return [sum(plain), sum(addmm), a + w + y + y]


# --- 14.4: occupancy ------------------------------------------------------------------------------


def warps(r, num_warps, step=8, most=64, schedulers=4, whole=True):
    """Equation (6) as students write it, with a place for each mistake."""
    rounded = -(-r // step) * step
    held = np.minimum(schedulers * (512 // rounded), most)
    return held // num_warps * num_warps if whole else held


def occupied(registers, num_warps, spare=None, own=None, **mistake):
    """An answer that takes away one register after the other."""
    rows = []
    for r in map(int, registers):
        now, fewer = warps(r, num_warps, **mistake), 0
        while warps(r - fewer, num_warps) == warps(r, num_warps) < 64 // num_warps * num_warps:
            fewer += 1
        rows.append([own(now) if own else now, spare(r, fewer) if spare else fewer])
    return np.array(rows)


def occupied_by_inverting(registers, num_warps):
    """Without a search: the most registers with which p + 1 programs fit; in floats."""
    held = np.minimum(64, 4 * np.floor(512 / (np.ceil(registers / 8) * 8)))
    programs = np.floor(held / num_warps)
    each = np.ceil((programs + 1) * num_warps / 4)  # warps that a scheduler must hold then
    most = np.floor(512 / each / 8) * 8
    can = (programs + 1) * num_warps <= 64
    return np.stack([programs * num_warps, np.where(can, registers - most, 0)], axis=1)


def spared(spare):
    return lambda *a: occupied(*a, spare=spare)


def until_all_fit(registers, num_warps):
    fewer = [max(r - 32, 0) for r in registers]
    return np.stack([occupied(registers, num_warps)[:, 0], fewer], axis=1)


def next_step(registers, num_warps):
    return np.stack([occupied(registers, num_warps)[:, 0], (registers - 1) % 8 + 1], axis=1)


def room_for_a_warp(registers, num_warps):
    out = occupied(registers, num_warps)
    return np.stack([out[:, 0], occupied(registers, 1)[:, 1]], axis=1)


def pooled(registers, num_warps):
    held = np.minimum(2048 // (-(-registers // 8) * 8), 64) // num_warps * num_warps
    return np.stack([held, occupied(registers, num_warps)[:, 1]], axis=1)


def occupied_in_place(registers, num_warps):
    out = occupied(registers, num_warps)
    registers -= out[:, 1]
    return out


# --- 14.5: timing ---------------------------------------------------------------------------------


def measured(devices, warm_up, repeats, **lie):
    return summary(timed(devices, warm_up, repeats, **lie))


def by_differences(devices, warm_up, repeats):
    """Another right way: read the clock after each call that was waited for; lists."""
    for device in devices:
        for _ in range(warm_up):
            device.launch()
            device.wait()
    marks = [[device.clock()] for device in devices]
    for _ in range(repeats):
        for device, own in zip(devices, marks):
            device.launch()
            device.wait()
            own.append(device.clock())
    taken = [sorted(b - a for a, b in pairwise(own)) for own in marks]
    middles = [(t[(len(t) - 1) // 2] + t[len(t) // 2]) / 2 for t in taken]
    return [[m, (t[-1] - t[0]) / m] for m, t in zip(middles, taken)]


def with_means(times):
    return np.stack([times.mean(axis=1), summary(times)[:, 1]], axis=1)


def all_at_once(devices, warm_up, repeats):
    out = []
    for device in devices:
        for _ in range(warm_up):
            device.launch()
        device.wait()
        start = device.clock()
        for _ in range(repeats):
            device.launch()
        device.wait()
        out.append([(device.clock() - start) / repeats, 0.0])
    return out


RIGHT = [
    ("14.1", work),
    ("14.1", work_by_arrays),
    ("14.2", floor),
    ("14.2", floor_by_ridge),
    ("14.3", gate),
    ("14.3", gate_by_steps),
    ("14.4", occupied),
    ("14.4", occupied_by_inverting),
    ("14.5", measured),
    ("14.5", by_differences),
    ("14.1", lambda *a: np.array(work(*a), float)),
    ("14.3", lambda *a: gate(*a) / 1),
]

WRONG = [
    ("14.1", lambda *a: work(*a[:-1], 1), "numbers, not bytes"),
    ("14.1", lambda *a: work(*a, writes=0), "the output is written, too"),
    ("14.1", lambda *a: work(*a, media=1), "keys AND values are read"),
    ("14.1", lambda *a: work(*a, media=0), "keys and values are missing"),
    ("14.1", lambda *a: work(*a, seen=1), "keys and values of ALL N images"),
    ("14.1", lambda *a: work(*a, seen=a[1]), "once, not once a token"),
    ("14.1", lambda *a: work(*a, flops=2), "a multiplication AND an addition"),
    ("14.1", lambda *a: work(*a, flops=4 * a[2]), "this is the dense mask"),
    ("14.1", lambda *a: work(*a)[::-1], "the order is: bytes, flops"),
    ("14.1", lambda *a: work(*a)[1] / work(*a)[0], "this is their quotient"),
    ("14.2", lambda m, f, b, p: m / b + f / p, "the longer of them, not their sum"),
    ("14.2", lambda m, f, b, p: np.minimum(m / b, f / p), "the LONGER of the two"),
    ("14.2", lambda m, f, b, p: m / b, "the memory's time alone"),
    ("14.2", lambda m, f, b, p: f / p, "the arithmetic's time alone"),
    ("14.2", lambda m, f, b, p: np.minimum(b * f / m, p), "this is a rate"),
    ("14.2", lambda m, f, b, p: np.maximum(m / p, f / b), "mixed up"),
    ("14.2", lambda m, f, b, p: f / m, "this is the intensity"),
    ("14.2", lambda *a: floor(*a).max(), "one floor for each pair"),
    ("14.3", lambda *a: gate(*a[:-1], 1), "numbers, not bytes"),
    ("14.3", lambda *a: gate(*a, plain=3), "writes AND reads the branch"),
    ("14.3", lambda *a: gate(*a, plain=4), "reads what it wrote"),
    ("14.3", lambda *a: gate(*a, addmm=(3, 0)), "a COPY of the weight: read and written"),
    ("14.3", lambda *a: gate(*a, addmm=(1, 2)), "addmm copies x first"),
    ("14.3", lambda *a: gate(*a, fused=0), "the residual must still be read"),
    ("14.3", lambda *a: gate(*a, fused=3), "never leaves the chip"),
    ("14.3", lambda *a: gate(*a, common=(1, 1, 0)), "the output is written in every way"),
    ("14.3", lambda *a: gate(*a, common=(0, 0, 1)), "the product's inputs are read in every way"),
    ("14.3", lambda *a: gated_bytes(*a)[0] - gated_bytes(*a), "not what is saved"),
    ("14.4", lambda *a: occupied(*a, step=1), "rounded UP"),
    ("14.4", lambda *a: occupied(*a, most=10**6), "at most 64 warps"),
    ("14.4", lambda *a: occupied(*a, whole=False), "only whole programs fit"),
    ("14.4", lambda *a: occupied(*a, own=lambda w: w // a[1]), "programs are counted here"),
    ("14.4", lambda *a: occupied(*a, schedulers=1), "an SM has four schedulers"),
    ("14.4", lambda *a: occupied(*a, own=lambda w: w / 64), "a share of 64"),
    ("14.4", lambda *a: occupied(*a, own=lambda w: 32 * w), "these are threads"),
    ("14.4", pooled, "then times 4"),
    ("14.4", spared(lambda r, fewer: r - fewer), "how many registers are LEFT"),
    ("14.4", spared(lambda r, fewer: max(fewer, 1)), "0 only where no program more"),
    ("14.4", spared(lambda r, fewer: fewer + 1), "one too many: stop at the FIRST"),
    ("14.4", spared(lambda r, fewer: max(fewer - 1, 0)), "one too few"),
    ("14.4", spared(lambda r, fewer: -fewer), "minus sign"),
    ("14.4", until_all_fit, "not until all do"),
    ("14.4", next_step, "the next step of 8 registers is not always enough"),
    ("14.4", room_for_a_warp, "one PROGRAM more is wanted, not for one warp"),
    ("14.4", lambda *a: occupied(*a)[:, 0], "the second column is missing"),
    ("14.4", lambda *a: occupied(*a)[:, ::-1], "the columns are exchanged"),
    ("14.4", lambda *a: occupied(*a).T, "this is turned"),
    ("14.4", occupied_in_place, "changes its argument number 1 in place"),
    ("14.5", lambda devices, w, r: measured(devices, 0, r), "no warm-up"),
    ("14.5", lambda *a: measured(*a, after=False), "you timed the LAUNCH"),
    ("14.5", lambda *a: measured(*a, before=False, after=False), "you timed the LAUNCH"),
    ("14.5", lambda *a: measured(*a, before=False), "still in the queue when the clock starts"),
    ("14.5", lambda *a: measured(*a, turns=False), "Let them take turns"),
    ("14.5", lambda *a: timed(*a), "not all times"),
    ("14.5", lambda *a: measured(*a)[:, 0], "the spread is missing"),
    ("14.5", lambda *a: measured(*a)[:, ::-1], "the columns are exchanged"),
    ("14.5", lambda *a: measured(*a).T, "this is turned"),
    ("14.5", lambda *a: summary(timed(*a).T), "the wrong axis"),
    ("14.5", lambda *a: with_means(timed(*a)), "one slow call moves a mean"),
    ("14.5", lambda devices, w, r: measured(devices, 0, w + r), "warm-up's calls are timed too"),
    ("14.5", lambda *a: measured(*a) / [1000, 1], "in microseconds"),
    ("14.5", all_at_once, "wrong value"),
    ("14.1", lambda *a: [8 * n for n in work(*a)], "every number is 8 times the right one"),
    ("14.2", lambda m, f, b, p: np.maximum(m * b, f * p), "not times"),
]
