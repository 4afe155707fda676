"""What the kernels cost on this machine, beside their peers: `python -m miniflamingo bench`.

First the machine's own limits are measured: the bandwidth of a large copy, and the rate of a large
matrix product. Then every implementation of every entry (bench_entries.py), forward and forward +
backward. Its output and gradients are checked against the reference in float64 before it is timed;
one that cannot run, or is wrong, is listed with the reason. A row's figures:

    us          median of the timed calls, microseconds on the device
    host        the host's microseconds a call: where they are more, they decide
    prepared    us, with what is made of phi once a forward pass (a mask, a work list) in every call
    spread      between the medians of the first and the second half of the calls, over the median
    of floor    the floor's share of the time. The floor is counted by hand (`work` of
                an entry): every input read once and every output written once at the measured
                bandwidth, or the products at the measured rate, whichever takes longer
    ratio       to the kernel's time
    MB          the most memory that a call held beyond its arguments, with what was prepared
    error       the worst row's, relative to its norm or a typical row's (see worst_row)
    predicted   of a kernel on a GPU that predict.py knows, and by how much us is above it

The file has more: both halves' medians, bytes and flops, and prepare_microseconds, how long the
host waits for what is prepared.

The file is written anew after each row, so that a run that is cut short leaves what it has;
`--append` goes on with one: what it has, of the same GPU, versions and kernels, is kept.

On a GPU the inputs are bfloat16 and rotate through copies of which the calls touch more than four
times the L2 cache (or 60 MB, if that is more), so that they find it cold; CUDA events time them,
behind a pause on the device that is longer than the host needs to enqueue the call. On a CPU small
shapes in float32 are timed for plain torch and NumPy alone: the interpreter's time says nothing of
a kernel.

To add a kernel or a peer, add an Implementation to a list in peers.py; to add an entry, an Entry.
"""

import contextlib
import datetime
import hashlib
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


def rotation(args, device, touched):
    """Copies of the arguments, of which calls touch more than the cache holds; phi is shared.

    touched: bytes of the arguments that a call reads. Decoding reads one image in N.
    """
    if device == "cpu":
        return [args]
    cache = max(LEAST_CACHE, torch.cuda.get_device_properties(device).L2_cache_size)
    copies = max(1, math.ceil(4 * cache / touched))
    fresh = [tuple(x.detach().clone() if x.is_floating_point() else x for x in args)
             for _ in range(copies)]  # fmt: skip
    for x in (x for copy in fresh for x in floats(copy)):
        x.requires_grad_()
    return [args, *fresh]


def time_calls(step, copies, repeats, device):
    """(microseconds, the host's) of each of `repeats` calls step(i), i running round the copies."""
    for i in range(max(3, copies)):
        step(i % copies)
    return (_time_cuda if device == "cuda" else _time_cpu)(step, copies, repeats)


def _time_cpu(step, copies, repeats):
    taken = []
    for i in range(repeats):
        start = time.perf_counter()
        step(i % copies)
        taken.append((time.perf_counter() - start) * 1e6)
    return taken, taken


def _time_cuda(step, copies, repeats):
    torch.cuda.synchronize()
    start = time.perf_counter()
    step(0)
    pause = int((time.perf_counter() - start) * 4e9) + 100_000  # cycles: twice what the host needs
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(repeats)]
    host = []
    for i, (begin, end) in enumerate(events):
        torch.cuda._sleep(pause)
        begin.record()
        start = time.perf_counter()
        step(i % copies)
        host.append((time.perf_counter() - start) * 1e6)
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e3 for begin, end in events], host


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
    copy = summary(time_calls(lambda i: target.copy_(source), 1, repeats, device)[0])
    product = summary(time_calls(lambda i: a @ b, 1, repeats, device)[0])
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
    host_microseconds: float | None = None
    prepared_microseconds: float | None = None
    predicted_microseconds: float | None = None
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
    prepares: bool = False  # whether every call does


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


def measure_case(entry, shape, device, limits, repeats, wanted=lambda record, choice: True):
    """Yield a Record of each wanted implementation and direction: checked, then timed."""
    args = entry.make(shape, Draw(device))
    for x in floats(args):
        x.requires_grad_()
    dout = Draw(device, seed=1)(*args[0].shape)
    trials = [
        Trial(new_record(entry, shape, args, direction, choice, device, limits), choice)
        for choice in entry.implementations(shape)
        for direction in entry.directions
        if (choice.needs, device) != ("cpu", "cuda")
    ]
    trials = [trial for trial in trials if wanted(trial.record, trial.implementation)]
    if trials:
        expected, read = expect(entry, shape, args, dout), entry.work(shape, args, False)[0]
        copies = rotation(args, device, (read - dout.numel()) * dout.itemsize)
    while trials:
        trial = trials.pop(0)  # what it holds is free for the next
        attempt(trial, prepare, args)
        attempt(trial, check, args, dout, expected)
        attempt(trial, clock, copies, dout, repeats)
        yield trial.record


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
    state = trial.implementation.prepare(*args) if trial.prepares else trial.state
    return call(trial.implementation, state, args, dout)


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
    step = lambda i: call_trial(trial, copies[i], dout)  # noqa: E731
    taken, host = time_calls(step, len(copies), repeats, device)
    record.microseconds, record.halves, record.spread = summary(taken).values()
    record.host_microseconds = statistics.median(host)
    record.percent_of_floor = 100 * record.floor_microseconds / record.microseconds
    if trial.implementation.lists:
        trial.prepares = True
        taken, _ = time_calls(step, len(copies), 10, device)
        record.prepared_microseconds = statistics.median(taken)


def add_ratio(record, records):
    """Its time over the kernel's, of the same case, if that is among the records."""
    case = record.entry, record.shape, record.direction
    kernel = [r for r in records if r["is_kernel"] and r["microseconds"]
              and (r["entry"], r["shape"], r["direction"]) == case]  # fmt: skip
    if record.microseconds and kernel:
        record.ratio = record.microseconds / kernel[0]["microseconds"]


def add_prediction(record, gpu):
    """What predict.py said of this kernel on this GPU, if anything."""
    from . import devices, predict  # they need Triton

    device = devices.find(gpu)
    if device and record.is_kernel:
        case = record.entry, record.shape, record.direction
        record.predicted_microseconds = predict.look_up(device.name, *case)


def measure_fitting(entry, shape, *options):
    """measure_case, with half the batch (B or I) as long as memory does not allow it."""
    letter = "B" if "B" in shape else "I"
    while True:
        with contextlib.suppress(torch.OutOfMemoryError):
            yield from measure_case(entry, shape, *options)
            return
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
        raise ValueError("expected a GPU that torch can use (cuda), got none")
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
        "code": code_digest(),
        "quick": quick,
        "repeats": repeats,
    }


def code_digest(folder=Path(__file__).parent.parent):
    """A hash of the files that hold kernels, and of the peers."""
    texts = [path.read_bytes() for path in sorted(folder.rglob("*.py"))]
    texts = [text for text in texts if b"\n@triton.jit" in text or b"class Implementation" in text]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


SAME = ("gpu", "cpu", "torch", "triton", "code", "quick")


def begin(device, quick, repeats, json=None):
    """A document without records, or the one in the file `json`, if it is of this GPU and code."""
    now = meta(device, quick, repeats)
    if json is None or not Path(json).exists():
        return {"meta": now, "limits": measure_limits(device, repeats), "records": []}
    document = jsonlib.loads(Path(json).read_text("utf-8"))
    other = [key for key in SAME if document["meta"].get(key) != now[key]]
    if other:
        raise ValueError(f"--append: {json}: expected times of the same {other[0]}, "
                         f"{now[other[0]]}, got {document['meta'].get(other[0])}")  # fmt: skip
    return document


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


HEADER = ("us", 10), ("host", 8), ("prepared", 10), ("spread", 8), ("of floor", 10), ("ratio", 8), \
    ("MB", 8), ("error", 9), ("predicted", 11)  # fmt: skip


def print_head(r):
    """What stands above the rows of a case and direction."""
    print(
        f"\n{label(r.entry, r.shape)}, {r.dtype}, {r.direction}: {r.bytes / 1e6:.3g} MB, "
        f"{r.flops / 1e9:.3g} GFLOP, floor {r.floor_microseconds:.3g} us ({r.floor_by})"
    )
    print(f"  {'':<30}" + "".join(f"{name:>{width}}" for name, width in HEADER))


def row(r):
    """A record's figures, or the reason why there are none."""
    if r.reason:
        return f"  {r.implementation:<30}  - {r.reason}"
    fields = (
        f"{r.microseconds:.1f}",
        f"{r.host_microseconds:.1f}",
        f"{r.prepared_microseconds:.1f}" if r.prepared_microseconds else "",
        f"{r.spread:.1%}",
        f"{r.percent_of_floor:.1f}%",
        f"{r.ratio:.2f}" if r.ratio else "",
        f"{r.peak_bytes / 1e6:.0f}" if r.peak_bytes is not None else "",
        f"{r.error:.1e}",
        f"{r.predicted_microseconds:.1f}" if r.predicted_microseconds else "",
    )
    text = "".join(f"{field:>{width}}" for field, (_, width) in zip(fields, HEADER))
    above = f" {r.microseconds / r.predicted_microseconds - 1:+.0%}" if fields[-1] else ""
    return f"  {r.implementation:<30}{text}{above}"


def run(device="auto", json=None, quick=False, case="", plots=None, append=False):
    """The command: print the tables, write the file `json` and the figures; returns the exit code.

    Exit code 1 where a kernel is wrong or did not run on a GPU.
    """
    device = choose_device(device)
    cases = chosen(device, quick, case)
    outputs.check_file(json, COMMAND)
    if append and json is None:
        raise ValueError("--append: expected --json FILE, too, which is to grow")
    if plots and not Path(plots).is_dir():
        raise ValueError(f"--plots: expected an existing folder, got {plots}")
    drawn = (
        outputs.staged(plots, "bench", FIGURES, "--plots") if plots else contextlib.nullcontext()
    )
    with drawn as folder:
        document = begin(device, quick, 10 if quick else 50, json if append else None)
        print_limits(document)
        failed = measure_all(document, cases, json)
        if folder:
            draw_figures(document, folder)
    return 1 if failed else 0


def key(r):
    """What tells one row from all others."""
    return r["entry"], str(r["shape"]), r["direction"], r["implementation"]


def measure_all(document, cases, json, slow=(False, True), left=lambda: True):
    """Measure into the document, and its file, what it has not yet; True where a kernel failed.

    slow: in one go fast implementations and slow ones, or those of one kind alone. A row is begun
    as long as left().
    """
    device, repeats = document["meta"]["backend"], document["meta"]["repeats"]
    failed, had = False, {key(r) for r in document["records"]}
    if device == "cuda":
        # all implementations compile the same functions; past a limit torch runs them uncompiled
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    wanted = lambda record, choice: choice.slow in slow and key(asdict(record)) not in had  # noqa: E731
    for entry, shape in cases:
        options, head = (device, document["limits"], repeats, wanted), None
        rows = measure_fitting(entry, shape, *options) if left() else ()
        try:
            for record in rows:
                add(record, document, json)
                head = print_row(record, head)
                failed |= device == "cuda" and record.is_kernel and bool(record.reason)
                if not left():
                    break
        except GpuLost as error:
            print(f"\n{error}")
            return True
        if device == "cuda":
            torch.compiler.reset()  # or the next shapes would count as recompilations
    return failed


def add(record, document, json):
    """A new row of the document and, at once, of its file."""
    add_ratio(record, document["records"] + [asdict(record)])
    if document["meta"]["gpu"]:
        add_prediction(record, document["meta"]["gpu"])
    document["records"].append(asdict(record))
    if json:
        write_json(json, document)


def print_row(record, head):
    """Print it, below a head if it has not that of the row before -> its head."""
    mine = record.entry, record.shape, record.direction
    if mine != head:
        print_head(record)
    print(row(record), flush=True)
    return mine


def draw_figures(document, folder):
    """The figures of miniflamingo.plots, as PNG."""
    from miniflamingo import plots

    entry = "image_causal_attention"  # the one that has a cost for each number of images
    if any(r["entry"] == entry and r["microseconds"] for r in document["records"]):
        for direction, name in zip(DIRECTIONS, FIGURES):
            plots.plot_cost(document, entry, direction).savefig(folder / name)
    plots.plot_roofline(document).savefig(folder / FIGURES[-1])
