"""Checks of module 13: bytes and flops, floors, what fusing saves, occupancy, honest timing."""

import numpy as np

from .core import call, exercise, expect

# --- 13.1: bytes and flops of the forward pass ----------------------------------------------------

ATTENTIONS = ((2, 14, 3, 4, 2, 8, 2), (3, 7, 2, 5, 4, 6, 4))  # B, L, N, R, H, K, bytes a number


@exercise("13.1")
def forward_work(answer):
    """answer(B, L, N, R, H, K, size) -> int[2]: bytes, flops."""
    for case in ATTENTIONS:
        expect(call(answer, *case), attention_work(*case), _work_mistakes(*case))


def attention_work(B, L, N, R, H, K, size):
    """Equation (3) for every token with an image: [bytes, flops]."""
    tokens, media = B * L * H * K, B * N * R * H * K
    return np.array([size * (2 * tokens + 2 * media), 4 * R * tokens])


def _work_mistakes(B, L, N, R, H, K, size):
    moved, flops = attention_work(B, L, N, R, H, K, size)
    tokens, media = B * L * H * K, B * N * R * H * K
    byte = [
        ("numbers, not bytes: `size` bytes each", 2 * tokens + 2 * media),
        ("the output is written, too: 2 arrays of the tokens' size", size * (tokens + 2 * media)),
        ("keys AND values are read: 2 arrays of the images' size", size * (2 * tokens + media)),
        ("keys and values are missing", size * 2 * tokens),
        ("queries and outputs are missing", size * 2 * media),
        ("each image is read once, not once a token", size * (2 * tokens + 2 * R * tokens)),
        ("keys and values of ALL N images are read, not of one", size * 2 * (tokens + media // N)),
        ("the scores stay on the chip: they are no traffic", moved + size * B * H * L * R),
    ]
    yield from ((f"bytes: {message}", [wrong, flops]) for message, wrong in byte)
    flop = [
        ("two products, and in each a multiplication AND an addition", 2 * R * tokens),
        ("this is the dense mask: a token attends to R keys, not to N*R", N * flops),
        ("all heads count", flops // H),
        ("one product and one flop a number: 4 times too few", R * tokens),
        ("the number of keys R is missing", 4 * tokens),
        ("the batch is missing", flops // B),
    ]
    yield from ((f"flops: {message}", [moved, wrong]) for message, wrong in flop)
    yield "the order is: bytes, flops", [flops, moved]
    yield "two numbers are wanted, this is their quotient", flops / moved


# --- 13.2: the floor ------------------------------------------------------------------------------


@exercise("13.2")
def floor(answer):
    """answer(bytes [n], flops [n], bandwidth, peak) -> float[n], seconds."""
    for moved, flops, bandwidth, peak in (
        (np.array([8.0, 100.0, 3.0]), np.array([90.0, 20.0, 600.0]), 2.0, 30.0),
        (np.array([5.0, 1.0]), np.array([7.0, 400.0]), 0.5, 10.0),
    ):
        case = moved, flops, bandwidth, peak
        right = np.maximum(moved / bandwidth, flops / peak)
        expect(call(answer, *case), right, _floor_mistakes(*case))


def _floor_mistakes(moved, flops, bandwidth, peak):
    memory, arithmetic = moved / bandwidth, flops / peak
    yield "the two overlap on a GPU: the longer of them, not their sum", memory + arithmetic
    yield "the LONGER of the two is the floor", np.minimum(memory, arithmetic)
    yield "this is the memory's time alone", memory
    yield "this is the arithmetic's time alone", arithmetic
    yield (
        "upside down: bytes / (bytes a second) are seconds",
        np.maximum(bandwidth / moved, peak / flops),
    )
    yield "upside down: this is a rate, flops a second", np.minimum(bandwidth * flops / moved, peak)
    yield (
        "mixed up: bytes over bandwidth, flops over peak",
        np.maximum(moved / peak, flops / bandwidth),
    )
    yield "the mean of both is no bound", (memory + arithmetic) / 2
    yield (
        "one floor for each pair is wanted, not the largest of all",
        max(memory.max(), arithmetic.max()),
    )
    yield "seconds are wanted, not microseconds", 1e6 * np.maximum(memory, arithmetic)
    yield "this is the intensity, flops a byte", flops / moved


# --- 13.3: what a fused epilogue saves ------------------------------------------------------------


@exercise("13.3")
def gate_bytes(answer):
    """answer(M, D, I, size) -> int[3]: as the paper writes it, addmm, fused."""
    for case in ((7, 3, 5, 2), (4, 6, 9, 4)):
        expect(call(answer, *case), gated_bytes(*case), _gate_mistakes(*case))


def gated_bytes(M, D, I, size):
    """Equation (5), with what every way moves."""
    common = M * I + D * I + M * D
    return size * np.array([common + 5 * M * D, common + 3 * M * D + 2 * D * I, common + M * D])


def _gate_mistakes(M, D, I, size):
    right = gated_bytes(M, D, I, size)
    y, weight = size * M * D, size * D * I
    yield "numbers, not bytes: `size` bytes each", right // size
    yield "the output is written in every way: M * D", right - y
    yield (
        "the product's inputs are read in every way: M * I and D * I",
        right - size * M * I - weight,
    )
    yield "the weight is read in every way: D * I", right - weight
    yield "the input a is read in every way: M * I", right - size * M * I
    yield "the residual x is read in every way: M * D", right - [y, 0, y]
    yield (
        "the paper's way writes AND reads the branch, and gate * branch too",
        right - [2 * y, 0, 0],
    )
    yield "the paper's way reads what it wrote: the branch, and gate * branch", right - [y, 0, 0]
    yield (
        "addmm folds the gate into a COPY of the weight: read and written",
        (right - [0, 2 * weight, 0]),
    )
    yield "addmm folds the gate into a COPY of the weight: read AND written", right - [0, weight, 0]
    yield "addmm copies x first: read, written, and read again", right - [0, 2 * y, 0]
    yield "fused, the branch never leaves the chip", right + np.array([0, 0, 2 * y])
    yield "fused, the residual must still be read: M * D", right - [0, 0, y]
    yield (
        "fused, the gate scales the sums, no copy of the weight",
        right + np.array([0, 0, 2 * weight]),
    )
    yield "the order is: the paper's, addmm, fused", right[::-1]
    yield "three totals are wanted, not what is saved", right[0] - right


# --- 13.4: occupancy ------------------------------------------------------------------------------


@exercise("13.4")
def resident_warps(answer):
    """answer(registers int[n], num_warps) -> int[n]: warps that an SM holds."""
    registers = np.array([16, 33, 64, 80, 97, 104, 127, 128, 159, 255])
    for num_warps in (4, 8, 2):
        right = warps_held(registers, num_warps)
        mistakes = _warp_mistakes(registers, num_warps)
        expect(call(answer, registers, num_warps), right, mistakes)


def warps_held(registers, num_warps, step=8, most=64):
    """Equation (6): 4 schedulers of 512 registers a lane; whole programs; at most 64 warps."""
    rounded = -(-registers // step) * step
    warps = np.minimum(4 * (512 // rounded), most)
    return warps // num_warps * num_warps


def _warp_mistakes(registers, num_warps):
    rounded = -(-registers // 8) * 8
    yield (
        "a warp gets a multiple of 8 registers a thread, rounded UP",
        warps_held(registers, num_warps, 1),
    )
    yield "rounded up, not down", warps_held(np.maximum(registers // 8 * 8, 8), num_warps)
    yield "an SM holds at most 64 warps", warps_held(registers, num_warps, most=10**6)
    yield "only whole programs fit: a multiple of num_warps", np.minimum(4 * (512 // rounded), 64)
    yield "only whole programs fit, and at most 64 warps", 4 * (512 // rounded)
    yield (
        "programs are counted here: warps are wanted",
        warps_held(registers, num_warps) // num_warps,
    )
    yield "an SM has four schedulers", np.minimum(512 // rounded, 64) // num_warps * num_warps
    pooled = np.minimum(2048 // rounded, 64) // num_warps * num_warps
    yield (
        "each scheduler has 512 registers a lane of its own: round down for one, then times 4",
        pooled,
    )
    yield "a share of 64 is no number of warps", warps_held(registers, num_warps) / 64
    yield "these are threads: a warp has 32", warps_held(registers, num_warps) * 32
    spent = np.minimum(65536 // rounded, 64) // num_warps * num_warps
    yield "a warp has 32 threads, and each needs its registers", spent


# --- 13.5: honest timing --------------------------------------------------------------------------

HOST = 5.0  # microseconds that a launch costs the host


class Device:
    """A GPU in miniature, with a clock of its own, in microseconds.

    launch() returns as soon as the work is in the queue; wait() returns when the queue is empty.
    The first two launches are slow (code is loaded, memory is fetched).
    """

    def __init__(self, cost=(90.0, 110.0, 100.0), first=(5000.0, 700.0)):
        self.now, self.busy_until, self.launched = 0.0, 0.0, 0
        self.cost, self.first = cost, first

    def clock(self):
        """The time now."""
        return self.now

    def launch(self):
        """Put one call into the queue."""
        n, self.launched = self.launched, self.launched + 1
        cost = self.first[n] if n < len(self.first) else self.cost[n % len(self.cost)]
        self.now += HOST
        self.busy_until = max(self.busy_until, self.now) + cost

    def wait(self):
        """Return when all work is done."""
        self.now = max(self.now, self.busy_until)


@exercise("13.5")
def measure(answer):
    """answer(device, warm_up, repeats) -> float[repeats], microseconds of each call."""
    for costs, warm_up, repeats in (((90.0, 110.0, 100.0), 3, 6), ((50.0, 40.0), 5, 4)):
        right = measured(Device(costs), warm_up, repeats)
        mistakes = _timing_mistakes(costs, warm_up, repeats)
        expect(call(answer, Device(costs), warm_up, repeats), right, mistakes)


def measured(device, warm_up, repeats, before=True, after=True):
    """The microseconds of each call; without a wait before or after it, a lie."""
    for _ in range(warm_up):
        device.launch()
    taken = []
    for _ in range(repeats):
        if before:
            device.wait()
        start = device.clock()
        device.launch()
        if after:
            device.wait()
        taken.append(device.clock() - start)
    return np.array(taken)


def _timing_mistakes(costs, warm_up, repeats):
    case, right = (warm_up, repeats), measured(Device(costs), warm_up, repeats)
    yield "no warm-up: the first calls are slow", measured(Device(costs), 0, repeats)
    yield (
        "you timed the LAUNCH: wait before you look at the clock again",
        measured(Device(costs), *case, after=False),
    )
    yield (
        "you timed the LAUNCH: wait before you look at the clock again",
        measured(Device(costs), *case, before=False, after=False),
    )
    yield (
        "the warm-up is still in the queue when the clock starts: wait first",
        measured(Device(costs), *case, before=False),
    )
    yield (
        "no warm-up, and you timed the LAUNCH: wait before you look at the clock again",
        measured(Device(costs), 0, repeats, before=False, after=False),
    )
    yield "one time for each call is wanted, not their mean", right.mean()
    yield "one time for each call is wanted, not their median", np.median(right)
    yield "one time for each call is wanted, not their sum", right.sum()
    yield "these are points in time: end minus start of each call", np.cumsum(right)
    yield "the warm-up's calls are timed too", measured(Device(costs), 0, warm_up + repeats)
