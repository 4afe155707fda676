"""What the kernels cost on this machine, beside their peers: `python -m miniflamingo bench`.

First the machine's own limits are measured: the bandwidth of a large copy, and the rate of a large
matrix product. Then every implementation of every entry (bench_entries.py), forward and forward +
backward. Its output and gradients are checked against the reference in float64 before it is timed;
one that cannot run, or is wrong, is listed with the reason. A row's figures:

    us          median of the timed calls, microseconds
    spread      between the medians of the first and the second half of the calls, over the median
    of floor    the floor's share of the time. The floor is counted by hand (`work` of
                an entry): every input read once and every output written once at the measured
                bandwidth, or the products at the measured rate, whichever takes longer
    ratio       to the kernel's time
    MB          the most memory that a call held beyond its arguments, with what was prepared
    error       the worst row's, relative to its norm or a typical row's (see worst_row)

The file has more: both halves' medians, bytes and flops, and prepare_microseconds, how long the
host waits for what is made of phi once a forward pass (a mask, a work list): "us" leaves it out.

On a GPU the inputs are bfloat16 and rotate through copies that together exceed four times the L2
cache (or 60 MB, if that is more), so that a call finds it cold; CUDA events time it, behind a pause
on the device that is longer than the host needs to enqueue the call. On a CPU small shapes in
float32 are timed for plain torch and NumPy alone: the interpreter's time says nothing of a kernel.

To add a kernel or a peer, add an Implementation to a list in peers.py; to add an entry, an Entry.
"""

import contextlib
import datetime
import importlib.metadata
import json as jsonlib
import math
import os
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from miniflamingo import outputs
from miniflamingo.command import some

from .bench_entries import DIRECTIONS, ENTRIES

COMMAND = "python -m miniflamingo bench"
FIGURES = ("cost_forward.png", "cost_forward_backward.png", "roofline.png")
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
# of the worst row: above what rounding does to it, below what one key too many among 64 would do
TOLERANCE = {"cuda": 0.06, "cpu": 1e-5}
LEAST_CACHE = 60 * 2**20

# --- checking -------------------------------------------------------------------------------------


class Draw:
    """Normal numbers as tensors of the dtype and on the device of a run."""

    def __init__(self, device, seed=0):
        self.device, self.dtype = device, DTYPES[device]
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *size, scale=1.0):
        like = dict(device=self.device, dtype=self.dtype, generator=self.generator)
        return torch.randn(size, **like) * scale

    def place(self, x):
        return x.to(self.device)


def floats(args):
    """The arguments that have gradients."""
    return [x for x in args if x.is_floating_point()]


def call(implementation, state, args, dout=None):
    """Run it once -> [output] or, with dout, [output, *gradients]."""
    if dout is None:
        with torch.no_grad():
            return [implementation.run(state, *args)]
    if implementation.gradients:
        return [implementation.run(state, *args), *implementation.gradients(dout, *args)]
    out = implementation.run(state, *args)
    return [out, *torch.autograd.grad(out, floats(args), dout)]


def expect(entry, shape, args, dout):
    """[output, *gradients] of the reference, in float64 on the same rounded arguments."""
    args = [x.detach().double() if x.is_floating_point() else x for x in args]
    for x in floats(args):
        x.requires_grad_()
    out = entry.reference(shape)(*args)
    return [out.detach(), *torch.autograd.grad(out, floats(args), dout.double())]


def worst_row(x, reference):
    """The largest error of a row (the last axis), over its norm or a typical one, if that is more.

    A norm over the whole tensor would hide a few wrong tokens among many. NaN becomes infinite.
    """
    norms = reference.norm(dim=-1)
    typical = norms.square().mean().sqrt()
    errors = (x.double() - reference).norm(dim=-1) / norms.clamp(min=typical if typical else 1)
    worst = float(errors.max())
    return math.inf if math.isnan(worst) else worst


def error_of(results, expected):
    """The worst row of all results. Gates' gradients, a number each, are left out: their relative
    error is that of a sum whose terms cancel."""
    pairs = zip(results, expected)  # forward alone: the output alone
    return max(worst_row(x.detach(), reference) for x, reference in pairs if reference.ndim)


# --- timing ---------------------------------------------------------------------------------------


def rotation(args, device):
    """Copies of the arguments that together exceed what the cache holds; phi is shared."""
    if device == "cpu":
        return [args]
    cache = max(LEAST_CACHE, torch.cuda.get_device_properties(device).L2_cache_size)
    size = sum(x.nbytes for x in floats(args))
    copies = max(1, math.ceil(4 * cache / size))
    fresh = [tuple(x.detach().clone() if x.is_floating_point() else x for x in args)
             for _ in range(copies)]  # fmt: skip
    for x in (x for copy in fresh for x in floats(copy)):
        x.requires_grad_()
    return [args, *fresh]


def time_calls(step, copies, repeats, device):
    """Microseconds of each of `repeats` calls step(i), i running round the copies."""
    for i in range(max(3, copies)):
        step(i % copies)
    return (_time_cuda if device == "cuda" else _time_cpu)(step, copies, repeats)


def _time_cpu(step, copies, repeats):
    taken = []
    for i in range(repeats):
        start = time.perf_counter()
        step(i % copies)
        taken.append((time.perf_counter() - start) * 1e6)
    return taken


def _time_cuda(step, copies, repeats):
    torch.cuda.synchronize()
    start = time.perf_counter()
    step(0)
    pause = int((time.perf_counter() - start) * 4e9) + 100_000  # cycles: twice what the host needs
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(repeats)]
    for i, (begin, end) in enumerate(events):
        torch.cuda._sleep(pause)
        begin.record()
        step(i % copies)
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e3 for begin, end in events]


def summary(taken):
    """{"microseconds", "halves", "spread"} of a list of times."""
    middle = statistics.median(taken)
    half = len(taken) // 2
    halves = [statistics.median(taken[:half]), statistics.median(taken[half:])]
    return dict(microseconds=middle, halves=halves, spread=abs(halves[0] - halves[1]) / middle)


def measure_limits(device, repeats):
    """The machine's bandwidth, bytes a second, and matrix rate, flops a second, both measured."""
    draw = Draw(device)
    size, side = (2**29, 8192) if device == "cuda" else (2**23, 512)
    source, target = draw(size), torch.empty(size, dtype=draw.dtype, device=device)
    a, b = draw(side, side), draw(side, side)
    copy = summary(time_calls(lambda i: target.copy_(source), 1, repeats, device))
    product = summary(time_calls(lambda i: a @ b, 1, repeats, device))
    return {
        "copy_bytes": 2 * source.nbytes,
        "copy_bytes_per_second": 2 * source.nbytes / copy["microseconds"] * 1e6,
        "copy_spread": copy["spread"],
        "product_side": side,
        "flops_per_second": 2 * side**3 / product["microseconds"] * 1e6,
        "product_spread": product["spread"],
    }


# --- one case -------------------------------------------------------------------------------------


@dataclass
class Record:
    """One row: an implementation of an entry, for a shape and a direction."""

    entry: str
    shape: dict
    dtype: str
    direction: str
    backend: str
    implementation: str
    is_kernel: bool
    bytes: int
    flops: int
    floor_microseconds: float
    floor_by: str
    microseconds: float | None = None
    halves: list | None = None
    spread: float | None = None
    percent_of_floor: float | None = None
    ratio: float | None = None
    prepare_microseconds: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    reason: str | None = None  # why there is no time


class GpuLost(RuntimeError):
    """After an illegal access nothing runs any more in this process."""


def one_line(error):
    """An exception's first line; two where the first one only announces the next."""
    lines = str(error).strip().splitlines() or [""]
    text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {text}"[:300].removesuffix(": ")


@dataclass
class Trial:
    """A record in the making, and what its implementation prepared."""

    record: Record
    implementation: object
    state: object = None
    state_bytes: int = 0


def attempt(trial, step, *args):
    """step(trial, *args), unless the trial failed before; an exception becomes its reason."""
    record, on_gpu = trial.record, trial.record.backend == "cuda"
    if record.reason:
        return
    try:
        step(trial, *args)
    except Exception as error:
        if record.is_kernel and isinstance(error, torch.OutOfMemoryError):
            raise  # then the case is tried with a smaller batch
        record.reason = one_line(error)
    if record.reason and on_gpu:
        try:
            torch.cuda.synchronize()
        except Exception:
            name = f"{record.entry}, {record.implementation}"
            raise GpuLost(f"the GPU is lost after {name}: {record.reason}") from None


def new_record(entry, shape, args, direction, implementation, device, limits):
    """A Record with the counted work and the floor, before anything ran."""
    moved, flops = entry.work(shape, args, direction != "forward")
    moved *= DTYPES[device].itemsize
    floors = {
        "bytes": moved / limits["copy_bytes_per_second"] * 1e6,
        "flops": flops / limits["flops_per_second"] * 1e6,
    }
    by = max(floors, key=floors.get)
    reason = None
    if implementation.needs == "cuda" and device == "cpu":
        reason = "needs a GPU" + ": the interpreter is not timed" * implementation.is_kernel
    dtype = str(DTYPES[device]).removeprefix("torch.")
    return Record(
        entry.name, shape, dtype, direction, device, implementation.name, implementation.is_kernel,
        moved, flops, floors[by], by, reason=reason,
    )  # fmt: skip


def measure_case(entry, shape, device, limits, repeats):
    """All implementations in all directions -> [Record]: first checked, then timed."""
    args = entry.make(shape, Draw(device))
    for x in floats(args):
        x.requires_grad_()
    dout = Draw(device, seed=1)(*entry.out_shape(shape, args))
    trials = [
        Trial(new_record(entry, shape, args, direction, choice, device, limits), choice)
        for choice in entry.implementations(shape)
        for direction in entry.directions
        if (choice.needs, device) != ("cpu", "cuda")
    ]
    expected = expect(entry, shape, args, dout)
    for trial in trials:
        attempt(trial, prepare, args)
        attempt(trial, check, args, dout, expected)
    del expected
    copies = rotation(args, device)
    for trial in trials:
        attempt(trial, clock, copies, dout, repeats)
    records = [trial.record for trial in trials]
    add_ratios(records)
    return records


def prepare(trial, args):
    """Fill in the state, its memory, and how long the host waits for it: the second time."""
    trial.implementation.prepare(*args)
    held = synchronised_bytes(trial)
    start = time.perf_counter()
    trial.state = trial.implementation.prepare(*args)
    trial.state_bytes = synchronised_bytes(trial) - held
    trial.record.prepare_microseconds = (time.perf_counter() - start) * 1e6


def synchronised_bytes(trial):
    """The memory in use on the GPU, once it has finished; 0 on a CPU."""
    if trial.record.backend == "cpu":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def call_trial(trial, args, dout):
    """Run it once in its direction; see `call`."""
    dout = None if trial.record.direction == "forward" else dout
    return call(trial.implementation, trial.state, args, dout)


def check(trial, args, dout, expected):
    """Fill in the error, and the reason if it is too large."""
    record = trial.record
    record.error = error_of(call_trial(trial, args, dout), expected)
    allowed = TOLERANCE[record.backend]
    if not record.error <= allowed:
        record.reason = f"wrong: the worst row is off by {record.error:.2g}, above {allowed:.2g}"


def clock(trial, copies, dout, repeats):
    """Fill in the times and the memory."""
    record, device = trial.record, trial.record.backend
    if device == "cuda":
        held = synchronised_bytes(trial)
        torch.cuda.reset_peak_memory_stats()
        call_trial(trial, copies[0], dout)
        record.peak_bytes = torch.cuda.max_memory_allocated() - held + trial.state_bytes
    times = summary(
        time_calls(lambda i: call_trial(trial, copies[i], dout), len(copies), repeats, device)
    )
    record.microseconds, record.halves, record.spread = times.values()
    record.percent_of_floor = 100 * record.floor_microseconds / record.microseconds


def add_ratios(records):
    """Each time over the kernel's in the same direction, where there is one."""
    for record in records:
        kernel = [r for r in records if r.is_kernel and r.direction == record.direction]
        if record.microseconds and kernel and kernel[0].microseconds:
            record.ratio = record.microseconds / kernel[0].microseconds


def measure_fitting(entry, shape, device, *options):
    """measure_case, with half the batch (B or I) as long as memory does not allow it."""
    letter = "B" if "B" in shape else "I"
    while True:
        with contextlib.suppress(torch.OutOfMemoryError):
            return measure_case(entry, shape, device, *options)
        if shape[letter] == 1:
            raise ValueError(f"{entry.name} does not fit in this GPU's memory: {shape}")
        shape = {**shape, letter: shape[letter] // 2}
        torch.cuda.empty_cache()


# --- the command ----------------------------------------------------------------------------------


def choose_device(device):
    """ "cuda" or "cpu"; ValueError where a GPU is asked for that kernels cannot run on."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a GPU that torch can use, got none")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("0", ""):
        raise ValueError("a GPU is timed without TRITON_INTERPRET in the environment, got it set")
    return "cuda"


def meta(device, quick, repeats):
    """Where, when and with what the figures were made."""
    gpu = torch.cuda.get_device_properties(device) if device == "cuda" else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "backend": device,
        "kernels_timed": device == "cuda",
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": gpu and gpu.name,
        "gpu_memory_bytes": gpu and gpu.total_memory,
        "gpu_cache_bytes": gpu and gpu.L2_cache_size,
        "processors": gpu and gpu.multi_processor_count,
        "driver": driver() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "triton": version("triton"),
        "quick": quick,
        "repeats": repeats,
    }


def cpu_name():
    """The processor's name, where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def driver():
    """The NVIDIA driver's version, where nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        return done.stdout.split()[0]


def version(package):
    """The installed version, or None."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def chosen(device, quick, case):
    """The (entry, shape) to measure whose label contains `case`; ValueError if none does."""
    every = [
        (entry, shape)
        for entry in ENTRIES
        for shape in entry.shapes[device][: 3 if quick else None]
    ]
    found = [(entry, shape) for entry, shape in every if case in label(entry.name, shape)]
    if not found:
        names = some((label(entry.name, shape) for entry, shape in every), "; ")
        raise ValueError(f"--case: expected part of one of: {names}; got {case!r}")
    return found


def label(name, shape):
    """As printed: the entry's name and its sizes."""
    return " ".join([name, *(f"{letter}={size}" for letter, size in shape.items())])


def write_json(path, document):
    """Write the document; NaN and infinities become null."""

    def finite(x):
        if isinstance(x, dict):
            return {k: finite(v) for k, v in x.items()}
        return None if isinstance(x, float) and not math.isfinite(x) else x

    rows = [finite(row) for row in document["records"]]
    document = {"made_by": COMMAND, **document, "records": rows}
    data = jsonlib.dumps(document, indent=1, allow_nan=False).encode()
    outputs.write_file(path, data, COMMAND)


def print_limits(document):
    """What was found out about the machine."""
    m, limits = document["meta"], document["limits"]
    if not m["kernels_timed"]:
        print("no GPU: this times plain torch and NumPy on the CPU, at small shapes, and no kernel")
    print(f"{m['gpu'] or m['cpu']}, torch {m['torch']}, Triton {m['triton']}, {m['date']}")
    print(
        f"copy {limits['copy_bytes_per_second'] / 1e9:.0f} GB/s, product of side "
        f"{limits['product_side']} {limits['flops_per_second'] / 1e12:.3g} TFLOP/s"
    )


def print_case(records):
    """The table of a case: one part for each direction."""
    for direction in dict.fromkeys(r.direction for r in records):
        rows = [r for r in records if r.direction == direction]
        r = rows[0]
        print(
            f"\n{label(r.entry, r.shape)}, {r.dtype}, {direction}: {r.bytes / 1e6:.3g} MB, "
            f"{r.flops / 1e9:.3g} GFLOP, floor {r.floor_microseconds:.3g} us ({r.floor_by})"
        )
        print(f"  {'':<30}{'us':>10}{'spread':>8}{'of floor':>10}{'ratio':>8}{'MB':>8}{'error':>9}")
        for r in rows:
            print(f"  {r.implementation:<30}" + (row(r) if r.reason is None else f"  - {r.reason}"))


def row(record):
    """A record's figures."""
    ratio = f"{record.ratio:.2f}" if record.ratio else ""
    memory = f"{record.peak_bytes / 1e6:.0f}" if record.peak_bytes is not None else ""
    return (
        f"{record.microseconds:>10.1f}{record.spread:>8.1%}{record.percent_of_floor:>9.1f}%"
        f"{ratio:>8}{memory:>8}{record.error:>9.1e}"
    )


def run(device="auto", json=None, quick=False, case="", plots=None):
    """The command: print the tables, write the file `json` and the figures; returns the exit code.

    The file is written anew after each case, so that a run that is cut short leaves what it has.
    Exit code 1 where a kernel is wrong or did not run on a GPU.
    """
    device = choose_device(device)
    cases = chosen(device, quick, case)
    outputs.check_file(json, COMMAND)
    if plots and not Path(plots).is_dir():
        raise ValueError(f"--plots: expected an existing folder, got {plots}")
    repeats = 10 if quick else 50
    drawn = (
        outputs.staged(plots, "bench", FIGURES, "--plots") if plots else contextlib.nullcontext()
    )
    with drawn as folder:
        document = {"meta": meta(device, quick, repeats), "limits": measure_limits(device, repeats)}
        document["records"] = []
        print_limits(document)
        failed = measure_all(document, cases, device, repeats, json)
        if folder:
            draw_figures(document, folder)
    return 1 if failed else 0


def measure_all(document, cases, device, repeats, json):
    """Measure the cases into the document; True where a kernel failed on a GPU, or it was lost."""
    failed = False
    if device == "cuda":
        # all implementations compile the same functions; past a limit torch runs them uncompiled
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    for entry, shape in cases:
        try:
            records = measure_fitting(entry, shape, device, document["limits"], repeats)
        except GpuLost as error:
            print(f"\n{error}")
            return True
        failed |= device == "cuda" and any(r.is_kernel and r.reason for r in records)
        document["records"] += map(asdict, records)
        print_case(records)
        if json:
            write_json(json, document)
        if device == "cuda":
            torch.compiler.reset()  # or the next shapes would count as recompilations
    return failed


def draw_figures(document, folder):
    """The figures of miniflamingo.plots, as PNG."""
    from miniflamingo import plots

    entry = "image_causal_attention"  # the one that has a cost for each number of images
    if any(r["entry"] == entry and r["microseconds"] for r in document["records"]):
        for direction, name in zip(DIRECTIONS, FIGURES):
            plots.plot_cost(document, entry, direction).savefig(folder / name)
    plots.plot_roofline(document).savefig(folder / FIGURES[-1])
