"""Checks of module 14: bytes and flops, floors, what fusing saves, occupancy, honest timing."""

import numpy as np

from .core import call, exercise, expect

# --- 14.1: bytes and flops of the forward pass ----------------------------------------------------

ATTENTIONS = ((2, 14, 3, 4, 2, 8, 2), (3, 7, 2, 5, 4, 6, 4))  # B, L, N, R, H, K, bytes a number


@exercise("14.1")
def forward_work(answer):
    """answer(B, L, N, R, H, K, size) -> int[2]: bytes, flops."""
    for case in ATTENTIONS:
        expect(call(answer, *case), attention_work(*case), _work_mistakes(*case), whole=True)


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


# --- 14.2: the floor ------------------------------------------------------------------------------


@exercise("14.2")
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
    yield "bytes / (bytes a second), not times", np.maximum(moved * bandwidth, flops * peak)
    yield "the mean of both is no bound", (memory + arithmetic) / 2
    yield (
        "one floor for each pair is wanted, not the largest of all",
        max(memory.max(), arithmetic.max()),
    )
    yield "seconds are wanted, not microseconds", 1e6 * np.maximum(memory, arithmetic)
    yield "this is the intensity, flops a byte", flops / moved


# --- 14.3: what a fused epilogue saves ------------------------------------------------------------


@exercise("14.3")
def gate_bytes(answer):
    """answer(L, D, I, size) -> int[3]: as the paper writes it, addmm, fused."""
    for case in ((7, 3, 5, 2), (4, 6, 9, 4)):
        expect(call(answer, *case), gated_bytes(*case), _gate_mistakes(*case), whole=True)


def gated_bytes(L, D, I, size):
    """Equation (5), with what every way moves."""
    common = L * I + D * I + L * D
    return size * np.array([common + 5 * L * D, common + 3 * L * D + 2 * D * I, common + L * D])


def _gate_mistakes(L, D, I, size):
    right = gated_bytes(L, D, I, size)
    y, weight = size * L * D, size * D * I
    yield "numbers, not bytes: `size` bytes each", right // size
    yield "the output is written in every way: L * D", right - y
    yield (
        "the product's inputs are read in every way: L * I and D * I",
        right - size * L * I - weight,
    )
    yield "the weight is read in every way: D * I", right - weight
    yield "the input a is read in every way: L * I", right - size * L * I
    yield "the residual x is read in every way: L * D", right - [y, 0, y]
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
    yield "fused, the residual must still be read: L * D", right - [0, 0, y]
    yield (
        "fused, the gate scales the sums, no copy of the weight",
        right + np.array([0, 0, 2 * weight]),
    )
    yield "the order is: the paper's, addmm, fused", right[::-1]
    yield "three totals are wanted, not what is saved", right[0] - right


# --- 14.4: occupancy ------------------------------------------------------------------------------


@exercise("14.4")
def occupancy(answer):
    """answer(registers int[n], num_warps) -> int[n, 2]: warps of an SM, registers too many."""
    registers = np.array([16, 33, 64, 80, 97, 104, 127, 128, 159, 255, 168])
    for num_warps in (4, 8, 2):
        right = warps_and_spare(registers, num_warps)
        mistakes = _warp_mistakes(registers, num_warps)
        expect(call(answer, registers, num_warps), right, mistakes, whole=True)


def warps_held(registers, num_warps, step=8, most=64):
    """Equation (6): 4 schedulers of 512 registers a lane; whole programs; at most 64 warps."""
    rounded = -(-registers // step) * step
    warps = np.minimum(4 * (512 // rounded), most)
    return warps // num_warps * num_warps


def warps_and_spare(registers, num_warps, held=warps_held):
    """[n, 2]: the warps, and how many registers fewer give room for one program more."""
    every = held(np.arange(1, 256), num_warps)
    warps = held(registers, num_warps)
    more = [np.flatnonzero(every[: r - 1] > w) for r, w in zip(registers, warps)]
    fewer = [r - 1 - places[-1] if len(places) else 0 for r, places in zip(registers, more)]
    return np.stack([warps, fewer], axis=1)


def _warp_mistakes(registers, num_warps):
    right = warps_and_spare(registers, num_warps)
    warps, spare = right.T
    for words, column in _spare_mistakes(registers, num_warps, warps, spare):
        yield f"column 1: {words}", np.stack([warps, column], axis=1)
    for words, held in (
        (
            "a warp gets a multiple of 8 registers a thread, rounded UP",
            lambda r, n: warps_held(r, n, 1),
        ),
        ("rounded up, not down", lambda r, n: warps_held(np.maximum(r // 8 * 8, 8), n)),
        ("an SM holds at most 64 warps", lambda r, n: warps_held(r, n, most=10**6)),
        ("only whole programs fit: a multiple of num_warps", lambda r, n: warps_held(r, 1)),
        (
            "only whole programs fit, and at most 64 warps",
            lambda r, n: warps_held(r, 1, most=10**6),
        ),
        ("an SM has four schedulers", lambda r, n: np.minimum(512 // _up(r), 64) // n * n),
        (
            "each scheduler has 512 registers a lane of its own: round down for one, then times 4",
            lambda r, n: np.minimum(2048 // _up(r), 64) // n * n,
        ),
        (
            "a warp has 32 threads, and each needs its registers",
            lambda r, n: np.minimum(65536 // _up(r), 64) // n * n,
        ),
        ("programs are counted here: warps are wanted", lambda r, n: warps_held(r, n) // n),
        ("these are threads: a warp has 32", lambda r, n: warps_held(r, n) * 32),
        ("a share of 64 is no number of warps", lambda r, n: warps_held(r, n) / 64),
    ):
        wrong = warps_and_spare(registers, num_warps, held)
        yield words, wrong
        yield words, np.stack([wrong[:, 0], spare], axis=1)
        yield f"column 1: {words}", np.stack([warps, wrong[:, 1]], axis=1)
    yield "the columns are exchanged: first the warps, then the registers", right[:, ::-1]
    yield "one row for each kernel, two columns; this is turned", right.T
    yield "the second column is missing: the registers that are too many", warps


def _spare_mistakes(registers, num_warps, warps, spare):
    fewer = registers - spare
    yield "this is how many registers are LEFT; how many fewer are they?", fewer
    yield "0 only where no program more can ever come", np.maximum(spare, 1)
    yield "one too few: with so many fewer there is no room yet", np.maximum(spare - 1, 0)
    yield "one too many: stop at the FIRST number of registers that makes room", spare + 1
    yield (
        "one too many: stop at the FIRST number of registers that makes room",
        np.where(spare > 0, spare + 1, 0),
    )
    single = warps_and_spare(registers, 1)[:, 1]
    yield "room for one PROGRAM more is wanted, not for one warp", single
    yield "minus sign: it is a number of registers", -spare
    step = registers - (_up(registers) - 8)
    yield "the next step of 8 registers is not always enough for one program more", step
    yield (
        "the next step of 8 registers is not always enough for one program more",
        np.where(spare > 0, step, 0),
    )
    most = warps_held(1, num_warps)
    full = [next(f for f in range(r) if warps_held(r - f, num_warps) == most) for r in registers]
    yield "until ONE program more fits, not until all do", np.array(full)
    yield "with more programs there are more warps: take registers away, do not add them", (
        np.array([next((f for f in range(512 - r) if warps_held(r + f, num_warps) < w), 0)
                  for r, w in zip(registers, warps)])
    )  # fmt: skip


def _up(registers):
    return -(-registers // 8) * 8


# --- 14.5: honest timing --------------------------------------------------------------------------

HOST = 5.0  # microseconds that a launch costs the host
HEAT = 0.02  # by how much every launch slows down all later ones on a machine


class Machine:
    """What devices share: it gets warmer with every launch, and slower."""

    launched = 0


class Device:
    """A GPU in miniature, with a clock of its own, in microseconds.

    launch() returns as soon as the work is in the queue; wait() returns when the queue is empty.
    The first two launches are slow (code is loaded, memory is fetched). With a machine, every call
    on any of its devices makes the later ones slower.
    """

    def __init__(self, cost=(90.0, 110.0, 100.0), first=(5000.0, 700.0), machine=None):
        self.now, self.busy_until, self.launched = 0.0, 0.0, 0
        self.cost, self.first, self.machine = cost, first, machine

    def clock(self):
        """The time now."""
        return self.now

    def launch(self):
        """Put one call into the queue."""
        n, self.launched = self.launched, self.launched + 1
        cost = self.first[n] if n < len(self.first) else self.cost[n % len(self.cost)]
        if self.machine:
            cost *= 1 + HEAT * self.machine.launched
            self.machine.launched += 1
        self.now += HOST
        self.busy_until = max(self.busy_until, self.now) + cost

    def wait(self):
        """Return when all work is done."""
        self.now = max(self.now, self.busy_until)


TIMINGS = (  # costs of the implementations, warm-up, repeats
    (((90.0, 110.0, 100.0), (100.0, 95.0)), 3, 5),
    (((50.0, 40.0), (70.0, 60.0, 65.0), (30.0,)), 4, 6),
)


def rivals(costs):
    """Devices on one machine, one an implementation."""
    machine = Machine()
    return [Device(cost, machine=machine) for cost in costs]


@exercise("14.5")
def measure(answer):
    """answer(devices, warm_up, repeats) -> float[n, 2]: median and spread of each device."""
    for costs, warm_up, repeats in TIMINGS:
        right = summary(timed(rivals(costs), warm_up, repeats))
        mistakes = _timing_mistakes(costs, warm_up, repeats)
        expect(call(answer, rivals(costs), warm_up, repeats), right, mistakes)


def timed(devices, warm_up, repeats, before=True, after=True, turns=True):
    """Microseconds [n, repeats]; without a wait, or not in turns, a lie."""
    for device in devices:
        for _ in range(warm_up):
            device.launch()
        if before:
            device.wait()
    times = np.empty((len(devices), repeats))
    order = [(i, r) for r in range(repeats) for i in range(len(devices))]
    for i, r in order if turns else sorted(order):
        device = devices[i]
        start = device.clock()
        device.launch()
        if after:
            device.wait()
        times[i, r] = device.clock() - start
    return times


def summary(times):
    """[median, (largest - smallest) / median] of each row."""
    median = np.median(times, axis=1)
    return np.stack([median, (times.max(axis=1) - times.min(axis=1)) / median], axis=1)


def _timing_mistakes(costs, warm_up, repeats):
    def with_(warm_up=warm_up, repeats=repeats, **lie):
        return timed(rivals(costs), warm_up, repeats, **lie)

    times = with_()
    right = summary(times)
    yield "no warm-up: the first calls are slow", summary(with_(warm_up=0))
    launch = "you timed the LAUNCH: wait before you look at the clock again"
    yield launch, summary(with_(after=False))
    yield launch, summary(with_(before=False, after=False))
    yield f"no warm-up, and {launch}", summary(with_(warm_up=0, after=False))
    yield (
        "the warm-up is still in the queue when the clock starts: wait first",
        summary(with_(before=False)),
    )
    yield (
        "one device after the other: the machine warms up, and whoever comes last looks slow. Let "
        "them take turns: the first call of each, the second of each, ...",
        summary(with_(turns=False)),
    )
    yield from _summary_mistakes(times, right)
    yield "the warm-up's calls are timed too", summary(with_(warm_up=0, repeats=warm_up + repeats))


def _summary_mistakes(times, right):
    (median, spread), wide = right.T, times.max(axis=1) - times.min(axis=1)
    yield "the MEDIAN: one slow call moves a mean", np.stack([times.mean(axis=1), spread], 1)
    yield (
        "this is the mean, and the spread over it",
        np.stack([times.mean(axis=1), wide / times.mean(axis=1)], 1),
    )
    yield "the smallest time is not the median", np.stack([times.min(axis=1), spread], 1)
    yield "the spread is a share: divide it by the median", np.stack([median, wide], 1)
    yield (
        "the spread is from the smallest to the largest time, not their standard deviation",
        (np.stack([median, times.std(axis=1) / median], 1)),
    )
    yield "the columns are exchanged: first the median, then the spread", right[:, ::-1]
    yield "one row for each device, two columns; this is turned", right.T
    yield "median and spread of each device are wanted, not all times", times
    yield "the medians alone: the spread is missing", median
    yield (
        "one median of all devices: axis=1 keeps them apart",
        np.array([np.median(times), np.ptp(times) / np.median(times)]),
    )
    per_repeat = summary(times.T)
    yield "the wrong axis: the median is over the repeats of one device", per_repeat
    yield "in microseconds, as the clock is", right / [1000, 1]
    yield "the host's time belongs to a call: end minus start", summary(times - HOST)
