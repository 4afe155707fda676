"""What the kernels should cost on GPUs that are not here: `python -m miniflamingo predict`.

A prediction, written down before the measurement that will judge it. For each device of
devices.py and each case of the benchmark (bfloat16, images evenly spread) the kernels' own
launchers are called, and their launches recorded. Of each launch is then found out

    programs   how many; how many a processor holds at a time (compile.resident); waves of them
    MB         each tensor that its programs touch, once (dry_run.py). A tensor that an earlier
               launch of the same call touched is free where the whole call fits in the L2
    GFLOP      of the matrix instructions in the compiled code, repeated ones too
    issue      instructions of a warp: those of each loop in the compiled code (sass.py) times its
               turns (dry_run.py), and those of the longest way outside
    chain      cycles that a program would take alone: latencies, one after the other

and from these the time that each resource alone would need:

    memory     bytes over the bandwidth of a large copy
    tensor     flops over the rate of a large product
    issue      issue * warps over what the processors can start
    latency    chains, one after the other in each of the places for a program
    launch     starting and ending the kernels, one after the other
    tail       what is left: the last wave, and programs of different length

us: the programs enter their places in order; each runs as fast as its chain allows, or, while that
would ask for more than the busiest resource has, all slow down alike. Overlap within a program is
taken for perfect, clocks for those of the datasheet, and 16-byte loads for whole: it errs on the
fast side. The largest part binds. of floor is the benchmark's floor over us.
"""

import datetime
import functools
import heapq
import json as jsonlib
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np

from miniflamingo import outputs

from .. import decode_attention, image_causal_attention, resampler_attention
from ..common.feature_list import FeatureList, choose_chunk
from ..common.runtime import replaced, torch
from ..common.work_list import WorkList, choose_chunks, most_splits
from . import bench, sass
from . import compile as code_of
from .bench_entries import ENTRIES
from .devices import DEVICES
from .dry_run import DryRun

COMMAND = "python -m miniflamingo predict"
COMMITTED = Path(__file__).parent.parent / "results" / "predicted.json"
RENEW = f"{COMMAND} --json kernels/results/predicted.json"
FIGURE = "predicted.png"
BYTES = 2  # of a bfloat16
DIRECTIONS = ("forward", "backward")
PARTS = ("memory", "tensor", "issue", "latency", "launch", "tail")

# --- what is launched -----------------------------------------------------------------------------


class Shapes:
    """Draws the benchmark's arguments without memory for them; what is in lists is real."""

    def __call__(self, *size, scale=1.0):
        return torch.empty(size, dtype=torch.bfloat16, device="meta")

    def place(self, x):
        return x


def cut(runs, chunk):
    """The items of runs of lengths `runs`, one behind the other: [run, begin, end, slot of partial
    sums or -1], and the runs with slots [run, first slot, number of slots]."""
    items, splits, begin, slots = [], [], 0, 0
    for run, length in enumerate(runs):
        count = max(1, -(-length // chunk))
        first = slots if count > 1 and run else None  # run 0 has no sums
        for part in range(count):
            start = begin + part * chunk
            slot = -1 if first is None else first + part
            items.append([run, start, min(start + chunk, begin + length), slot])
        if first is not None:
            splits.append([run, first, count])
            slots += count
        begin += length
    return items, splits


def filled(rows, room, spare):
    """A list as the kernels read it, int32 [room, columns], with spare rows behind."""
    return torch.tensor([*rows, *[spare] * (room - len(rows))], dtype=torch.int32)


def work_of(phi, N, heads):
    """phi's WorkList, built here: where kernels are compiled, none can be launched."""
    (B, L), chunks = phi.shape, choose_chunks(phi.numel() * heads)
    counts = [row.bincount(minlength=N + 1).tolist() for row in phi]
    lists = []
    for chunk in chunks:
        num_splits, num_slots = most_splits(N, L, chunk)
        items, splits = [], []
        for b, row in enumerate(counts):
            own, shared = cut(row, chunk)
            own = [[b, n, begin, end, s + (s >= 0) * b * num_slots] for n, begin, end, s in own]
            items += [*own, *[[b, 0, 0, 0, -1]] * (N + 1 + L // chunk - len(own))]
            shared = [[b * N + n - 1, b * num_slots + s, c] for n, s, c in shared]
            splits += [*shared, *[[0, 0, 0]] * (num_splits - len(shared))]
        lists.append(filled(items, len(items), None))
    order = phi.argsort(dim=1, stable=True).int()
    return WorkList(order, *lists, filled(splits, len(splits), None), (B, L, N), chunks)


def features_of(images, M, heads):
    """The FeatureList of images with M features each, as `work_of`."""
    chunk = choose_chunk(images, images * M, heads)
    items, splits = cut([0, *[M] * images], chunk)
    rows = [[n - 1, begin, end, end, s, int((begin == (n - 1) * M) & (n > 0))]
            for n, begin, end, s in items]  # fmt: skip
    rows = filled(rows, images + 1 + images * M // chunk, [-1, 0, 0, 0, -1, 0])
    splits = [[n - 1, first, count] for n, first, count in splits]
    splits = filled(splits, most_splits(images, images * M, chunk)[0], [0, 0, 0])
    return FeatureList(rows, splits, (images, images * M), chunk)


def attend(direction, q, k, v, phi):
    """Launch image-causal attention."""
    work = work_of(phi, k.shape[1], q.shape[2])
    with replaced(launch=lambda *_, **__: None):
        out, statistics = image_causal_attention._launch_forward(q, k, v, work)
    if direction == "forward":
        return image_causal_attention._launch_forward(q, k, v, work)
    inputs = torch.empty_like(q), q, k, v, out, statistics
    return image_causal_attention._launch_backward(*inputs, work)


def resample(direction, q, k_x, v_x, k_l, v_l):
    """Launch the resampler's attention; every image has all M features."""
    (images, M), heads = k_x.shape[:2], q.shape[2]
    work, inputs = (
        features_of(images, M, heads),
        (q, k_x.flatten(0, 1), v_x.flatten(0, 1), k_l, v_l),
    )
    with replaced(launch=lambda *_, **__: None):
        results = resampler_attention._launch_forward(*inputs, work)
    if direction == "forward":
        return resampler_attention._launch_forward(*inputs, work)
    return resampler_attention._launch_backward(torch.empty_like(q), *inputs, *results, work)


def decode(direction, q, k, v, phi):
    """Launch the attention of one token a row."""
    return decode_attention._launch_decode(q[:, 0], k, v, phi[:, 0])


LAUNCHERS = {
    "image_causal_attention": attend,
    "resampler_attention": resample,
    "decode_attention": decode,
}


def cases(text=""):
    """Yield (entry, shape, direction) whose label contains text."""
    for entry in ENTRIES:
        for shape in entry.shapes["cuda"] if entry.name in LAUNCHERS else ():
            for direction in DIRECTIONS[: len(entry.directions)]:
                case = entry, shape, direction
                if shape.get("phi", "even") == "even" and text in label(*case):
                    yield case


def label(entry, shape, direction):
    """A case as printed."""
    return f"{bench.label(entry.name, shape)} {direction}"


def launches_of(entry, shape, direction):
    """-> ([(kernel, number of programs, arguments, options)], bytes and flops of the floor)."""
    launches, args = [], entry.make(shape, Shapes())
    record = lambda kernel, programs, *args, **options: launches.append(  # noqa: E731
        (kernel, programs, args, options)
    )
    with replaced(launch=record):
        LAUNCHERS[entry.name](direction, *args)
    forward, both = (np.array(entry.work(shape, args, b)) for b in (False, True))
    moved, flops = forward if direction == "forward" else both - forward
    return launches, int(moved) * BYTES, int(flops)


class Launch:
    """A launch that was run on shapes: what does not hang on the device.

    kinds are the different programs [(turns, busy)], order the kind of each program. Programs of
    different heads do the same, so one of each H is run.
    """

    def __init__(self, kernel, programs, arguments, options):
        self.launch = kernel, arguments, options
        self.run, self.programs = DryRun(*self.launch), programs
        heads = dict(zip(kernel.arg_names, arguments)).get("H", 1)
        heads = 1 if programs % heads else heads
        ran = [self.run.program(i) for i in range(0, programs, heads)]
        keys = [(tuple(sorted(turns.items())), busy) for turns, busy in ran]
        self.kinds = list(dict.fromkeys(keys))
        self.order = np.repeat([self.kinds.index(key) for key in keys], heads)
        sizes = {id(x): x.nbytes for x in arguments if isinstance(x, torch.Tensor)}
        self.loaded, self.stored = (
            {x: min(heads * n, sizes[x]) for x, n in counter.items()}
            for counter in (self.run.loaded, self.run.stored)
        )

    def moved(self, warm=()):
        """Bytes, without the loads of tensors that the L2 holds."""
        loads = (n for x, n in self.loaded.items() if x not in warm)
        return sum(loads) + sum(self.stored.values())


# --- what it takes --------------------------------------------------------------------------------


@functools.cache
def read(binary):
    """Triton's binary -> (its Code, its resources)."""
    return sass.read(binary), code_of.read_usage(binary)


def match(run, code):
    """{loop of the dry run: loop of the code}: those with products in order, others the shortest.

    A loop whose number of turns the compiler knew may be written out. ValueError if more differ.
    """
    loops = [x for x in code.loops if any(code.instructions[i].flops for i in x)]
    others = [x for x in code.loops if x not in loops]
    dotted = sorted(run.dotted)
    written_out = [x for x in dotted if run.fixed[x]]
    while len(dotted) > len(loops) and written_out:
        dotted.remove(written_out.pop(0))
    if len(dotted) != len(loops):
        raise ValueError(f"expected {len(dotted)} loops with products in code, got {len(loops)}")
    plain = {x: min(others, key=len) for x in run.fixed if x not in run.dotted and others}
    return dict(zip(dotted, loops)) | plain


@functools.cache
def cost_of(code, part, device):
    """Of a warp in a loop, once round, or on the "longest" or "shortest" way past all loops:
    [instructions, cycles alone, flops]."""
    loop = isinstance(part, range)
    some = code.body(part) if loop else code.path(part == "longest")
    alone = sass.cycles(some, device, repeats=4 if loop else 1)
    return np.array([len(some), alone, sum(x.flops for x in some)])


def cost(kind, loops, code, device, warps):
    """The same of a program of this kind; its warps share the starting of instructions."""
    turns, busy = kind
    parts = [(1, "longest" if busy else "shortest")]
    parts += [(n, loops[loop]) for loop, n in turns if loop in loops]
    total = sum(n * cost_of(code, part, device) for n, part in parts)
    return np.maximum(total, [0, total[0] * warps / device.issue, 0])


def share(durations, places, work):
    """Seconds until programs are done that enter the places in order, each for its duration alone.

    work: seconds that the busiest resource needs for all of them. While n programs run that would
    use it up faster than that, they all slow down.
    """
    free = [0.0] * min(places, len(durations))
    events = Counter()  # time, were there no slowing down -> change of n
    for duration in durations:
        start = heapq.heappop(free)
        heapq.heappush(free, start + duration)
        events[start] += 1
        events[start + duration] -= 1
    times = np.array(sorted(events))
    n = np.cumsum([events[t] for t in times])[:-1]
    return float(np.sum(np.diff(times) * np.maximum(1, n * work / sum(durations))))


def predict_launch(launch, device, warm):
    """A launch on a device -> its row of figures."""
    kernel, arguments, options = launch.launch
    _, binary = code_of.compile_launch(kernel, arguments, options, device.target)
    (code, usage), warps = read(binary), binary.metadata.num_warps
    held, limit = code_of.resident(device.target, usage["registers"], usage["shared"], warps)
    loops = match(launch.run, code)
    costs = np.array([cost(kind, loops, code, device, warps) for kind in launch.kinds])
    counts = np.bincount(launch.order)
    issued, _, flops = warps * (counts @ costs)
    durations, moved = costs[launch.order, 1] / device.clock, launch.moved(warm)
    places = device.processors * held
    parts = {
        "memory": moved / device.bandwidth,
        "tensor": flops / device.flops,
        "issue": issued / device.issue / device.processors / device.clock,
        "latency": durations.sum() / min(places, len(durations)),
        "launch": device.launch,
    }
    work = max(parts["memory"], parts["tensor"], parts["issue"])
    seconds = share(durations.tolist(), places, work)
    parts["tail"] = seconds - max(work, parts["latency"])
    parts = {name: 1e6 * max(0.0, x) for name, x in parts.items()}
    figures = dict(programs=launch.programs, resident=held, limit=limit)
    figures |= dict(waves=launch.programs / places, bytes=moved, flops=int(flops))
    figures |= dict(instructions=int(issued), chain=int(costs[:, 1].max()))
    return dict(kernel=kernel.__name__, us=1e6 * (seconds + device.launch), **figures, **parts)


def predict_case(case, devices=tuple(DEVICES)):
    """A case on each device -> [record]: its launches, and their sum beside the floor."""
    entry, shape, direction = case
    recorded, moved, flops = launches_of(*case)
    recorded, ran = [launch for launch in recorded if launch[1]], {}
    for device in (DEVICES[name] for name in devices):
        launches = []
        for i, (*launch, options) in enumerate(recorded):
            own = code_of.options_for_target(options, device.target)
            key = i, *sorted(own.items())  # several devices share a launch
            ran[key] = ran.get(key) or Launch(*launch, own)
            launches.append(ran[key])
        touched = {x: n for y in launches for x, n in (*y.loaded.items(), *y.stored.items())}
        rows, warm, seen = [], sum(touched.values()) < device.cache, set()
        for launch in launches:
            rows.append(predict_launch(launch, device, seen if warm else ()))
            seen |= {*launch.loaded, *launch.stored}
        us, floor = sum(r["us"] for r in rows), max(moved / device.bandwidth, flops / device.flops)
        whole = {part: sum(r[part] for r in rows) for part in PARTS}
        yield dict(
            device=device.name, entry=entry.name, shape=shape, direction=direction, us=us,
            floor=1e6 * floor, percent=1e8 * floor / us, binds=max(whole, key=whole.get),
            launches=rows,
        )  # fmt: skip


# --- the file, and its use ------------------------------------------------------------------------


def rounded(x):
    """Figures to four digits, so that a file shows what changed."""
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def write(path, records):
    """Write {"made_by", "meta", "devices", "records"}, a record a line."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    head = {"made_by": COMMAND, "meta": {"date": date, "predicted": True, **code_of.tools()}}
    head["devices"] = [asdict(device) for device in DEVICES.values()]
    lines = ",\n".join(jsonlib.dumps(record) for record in records)
    text = jsonlib.dumps(head, indent=1)[:-2] + f',\n "records": [\n{lines}\n]}}\n'
    outputs.write_file(path, text.encode(), COMMAND)


@functools.cache
def committed():
    """The committed document, {} if there is none."""
    return jsonlib.loads(COMMITTED.read_text("utf-8")) if COMMITTED.exists() else {}


def look_up(device, entry, shape, direction):
    """Predicted microseconds from the committed file; "forward + backward" is the sum, and None
    where there is no prediction. device is a key of DEVICES."""
    found = {
        r["direction"]: r["us"]
        for r in committed().get("records", ())
        if (r["device"], r["entry"], r["shape"]) == (device, entry, shape)
    }
    wanted = DIRECTIONS if "backward" in direction else DIRECTIONS[:1]
    return sum(found[d] for d in wanted) if found.keys() >= set(wanted) else None


HEADER = f"{'':<16}{'us':>8}{'floor':>8}{'of floor':>10}  {'binds':<9}programs, held, waves"


def line(record):
    """A record as printed."""
    launches = ", ".join(
        "{kernel} {programs} {resident} {waves:.1f}".format(**r) for r in record["launches"]
    )
    return (
        f"{record['device']:<16}{record['us']:>8.1f}{record['floor']:>8.1f}"
        f"{record['percent']:>9.0f}%  {record['binds']:<9}{launches}"
    )


def run(json=None, plots=None, case=""):
    """The command: print, and write the file `json` and the figure; returns the exit code."""
    outputs.check_file(json, COMMAND)
    if code_of.missing():
        raise ValueError(code_of.missing())
    if plots and not Path(plots).is_dir():
        raise ValueError(f"--plots: expected an existing folder, got {plots}")
    chosen = list(cases(case))
    if not chosen:
        raise ValueError(f"--case: expected part of a case such as {label(*next(cases()))!r}")
    records = []
    print("predicted, not measured; microseconds")
    for one in chosen:
        print(f"\n{label(*one)}\n{HEADER}")
        for record in predict_case(one):
            records.append(rounded(record))
            print(line(record), flush=True)
    if json:
        write(json, records)
    if plots:
        from miniflamingo import plots as figures

        with outputs.staged(plots, "predict", (FIGURE,), "--plots") as folder:
            figures.plot_prediction(records).savefig(folder / FIGURE)
    return 0
