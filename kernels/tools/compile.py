"""Compile every kernel for GPUs that need not be here: `python -m miniflamingo compile`.

Triton compiles without a GPU and without a driver. This command records the launches that the
kernels' own launchers make, hands each to Triton's JIT as on a GPU (so with the same specialisation
on sizes and alignments), and reads from the binary what one program needs:

    registers   of a thread (gfx942: vector registers, accumulation registers among them)
    repeated    matrix products whose layout gives a tile to more warps than have a part of it, so
                that some compute what others have (see `repeated_tiles`)
    spilled     cuda: bytes of a thread's stack; the kernels have no arrays, so what lies there are
                registers that did not fit. gfx942: vector registers that went to memory
    shared      bytes of shared memory
    occupancy   warps that an SM holds at a time, of 64 (gfx942: waves of a SIMD, of 8). Computed
                from the above and the architecture's limits (see `resident`), not measured
    loads       loads from global memory in the code, and how many of them fetch 128 bits a thread
    tensor      tensor-core instructions in the code: HMMA, HGMMA; gfx942: v_mfma, by the type of
                its inputs. Instructions as written, not as executed: a loop's body counts once

A launch is fine if nothing is spilled or repeated and its shared memory fits. Float32 products are
exact (no tf32), so on sm_80 and sm_90, whose tensor cores have no float32, they run on the ordinary
cores; gfx942 has v_mfma for float32. Kernels without a matrix product have no tensor-core
instructions.

`--full` compiles more classes of shapes (see FULL), `--json FILE` writes the table as JSON:
`results/compiled.json` is what both gave. `--check` fails unless that file's digest is that of the
files with kernels and, with the same Triton and ptxas, compiling again gives its figures: every
kernel for one target, with `--full` the whole file. Exit code 1 if a launch or the check fails, 2
if something is missing.
"""

import datetime
import hashlib
import json as jsonlib
import math
import os
import platform
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

from miniflamingo import outputs
from miniflamingo.command import in_processes

from .. import (
    decode_attention,
    gated_linear,
    image_causal_attention,
    resampler_attention,
)
from ..common.runtime import INTERPRET, options_of, replaced, torch, triton

# of each kernel file: (K, dtype, R) -> None
EXAMPLES = (
    image_causal_attention.launch_examples,
    resampler_attention.launch_examples,
    decode_attention.launch_examples,
    gated_linear.launch_examples,
)
COMMITTED = Path(__file__).parent.parent / "results" / "compiled.json"
COMMAND = "python -m miniflamingo compile"
RENEW = "python -m miniflamingo compile --full --json kernels/results/compiled.json"

# --- the architectures --------------------------------------------------------------------------


@dataclass(frozen=True)
class GPU:
    """What a multiprocessor (NVIDIA: SM, AMD: compute unit) holds; it has 4 schedulers (SIMDs).

    Sources: CUDA C++ Programming Guide, technical specifications per compute capability, and the
    CUDA occupancy calculator; for gfx942 LLVM's AMDGPU backend (AMDGPUBaseInfo.cpp).
    """

    target: triton.backends.compiler.GPUTarget
    warps: int  # the most warps (AMD: waves) of a scheduler
    programs: int  # the most programs (blocks; AMD: workgroups of more than one wave)
    shared: int  # bytes of shared memory of all programs
    largest: int  # ... of one program
    reserved: int  # ... that the system takes for each program
    step: int  # ... come in multiples of this


GPUTarget, KIB = triton.backends.compiler.GPUTarget, 1024
TARGETS = {
    "sm_80": GPU(GPUTarget("cuda", 80, 32), 16, 32, 164 * KIB, 163 * KIB, 1 * KIB, 128),
    "sm_90": GPU(GPUTarget("cuda", 90, 32), 16, 32, 228 * KIB, 227 * KIB, 1 * KIB, 128),
    "gfx942": GPU(GPUTarget("hip", "gfx942", 64), 8, 16, 64 * KIB, 64 * KIB, 0, 512),
}
# of all three: a scheduler has 512 registers for each lane of a warp (SM: 65,536 = 4 * 512 * 32),
# and a warp gets a multiple of 8
SCHEDULERS, REGISTERS, REGISTERS_STEP = 4, 512, 8


def resident(target, registers, shared, num_warps):
    """How many programs a multiprocessor holds at a time, and which limit says so -> (int, str).

    The smallest of these, all rounded down; `up` rounds up to a multiple:

        warps       4 * warps of a scheduler / num_warps
        programs    the architecture's limit
        registers   4 * (512 / up(registers, 8)) / num_warps
        shared      shared memory of all / up(shared + reserved, step)
    """
    gpu = TARGETS[target]
    bytes_taken = _round_up(shared + gpu.reserved, gpu.step)
    warps = SCHEDULERS * (REGISTERS // _round_up(max(registers, 1), REGISTERS_STEP))
    limits = {
        "warps": SCHEDULERS * gpu.warps // num_warps,
        "programs": gpu.programs,
        "registers": warps // num_warps,
        "shared": gpu.shared // bytes_taken if bytes_taken else gpu.programs,
    }
    limit = min(limits, key=limits.get)
    return limits[limit], limit


def _round_up(x, step):
    return -(-x // step) * step


# --- what is compiled ---------------------------------------------------------------------------

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WIDTHS = (32, 64, 80, 96, 128)

# cases (dtype, K, R). R = 64 is the paper's; larger images have kernels of their own
USUAL = tuple(("bf16", K, R) for K in WIDTHS for R in (64, 256))
# the classes of R whose code differs: one row, blocks that are full, a last block that is not. Then
# two narrow heads. float16 is compiled as bfloat16 is, so the usual sizes are enough
FULL = (
    *((dtype, K, R) for dtype in ("bf16", "fp32") for K in WIDTHS for R in (1, 32, 64, 100, 256)),
    *(("fp16", K, R) for K in WIDTHS for R in (64, 256)),
    *((dtype, K, R) for dtype in ("bf16", "fp32") for K, R in ((16, 8), (40, 100))),
)


@dataclass
class Compiled:
    """One kernel, compiled for one launch and one target."""

    kernel: str
    dtype: str
    K: int
    R: int
    target: str
    options: dict  # blocks, warps and stages
    repeated: int
    registers: int
    spilled: int
    shared: int
    loads: int
    loads128: int
    tensor: dict  # instruction -> how often it is in the code

    @property
    def ok(self):
        """Whether it fits, and nothing is computed twice."""
        fits = self.spilled == 0 and self.shared <= TARGETS[self.target].largest
        return fits and self.repeated == 0

    def record(self):
        """The fields and what follows from them, for JSON."""
        gpu = TARGETS[self.target]
        num_warps = self.options["num_warps"]
        programs, limit = resident(self.target, self.registers, self.shared, num_warps)
        # of an SM; on AMD of one SIMD, as is customary there
        units = SCHEDULERS if gpu.target.backend == "hip" else 1
        warps = -(-programs * num_warps // units)
        most = SCHEDULERS * gpu.warps // units
        return asdict(self) | dict(programs=programs, warps=warps, most_warps=most, limit=limit)

    def __str__(self):
        record = self.record()
        fields = f"{self.kernel:<23}{self.dtype:>5}{self.K:>5}{self.R:>5}  {self.target:<7}"
        fields += f"{self.repeated:>9}{self.registers:>10}{self.spilled:>9}{self.shared:>9}"
        fields += f"{record['warps']:>7}/{record['most_warps']:<2} {record['limit']:<10}"
        fields += f"{self.loads128:>4}/{self.loads:<4}"
        tensor = " ".join(f"{count} {name}" for name, count in self.tensor.items()) or "-"
        options = " ".join(f"{k.split('_')[-1]}={int(v)}" for k, v in self.options.items())
        return f"{fields}{tensor:<18}{'ok' if self.ok else 'NO'}  {options}"


HEADER = (
    f"{'kernel':<23}{'dtype':>5}{'K':>5}{'R':>5}  {'target':<7}{'repeated':>9}{'registers':>10}"
    f"{'spilled':>9}{'shared':>9}  occupancy, limit   loads128 tensor                options"
)

# --- compiling ----------------------------------------------------------------------------------


class _Driver:
    """As much of a driver as the JIT asks for before it compiles; here a device is a target."""

    device = "sm_90"

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGETS[self.device].target


def missing():
    """What this machine lacks to compile, in one line; None if nothing."""
    if INTERPRET.value:
        return "compiling needs a process of its own with TRITON_INTERPRET=0"
    if __file__ != __file__.encode("utf-8", "replace").decode():  # names are ASCII to this Python
        return f"Triton takes no folder of the name {__file__!a}: start Python with -X utf8"
    backends = Path(triton.__file__).parent / "backends"
    needed = [_tool("cuobjdump"), _tool("nvdisasm"), backends / "amd" / "compiler.py"]
    absent = [str(path) for path in needed if not path.exists()]
    return f"this Triton lacks {', '.join(absent)}" if absent else None


def record_launches(dtype, K, R):
    """The launches [(kernel, arguments, options)] of every kernel, one for each set of options."""
    launches = {}

    def record(kernel, programs, *args, **options):
        launches[kernel.__name__, repr(options)] = (kernel, args, options)

    with replaced(launch=record):
        for examples in EXAMPLES:
            examples(K, DTYPES[dtype], R)
    return launches.values()


def binaries(case, kernels=None, targets=tuple(TARGETS)):
    """Compile the named kernels (None: all) for a case (dtype, K, R) and every target.

    Yields (kernel's name, options, target, Triton's binary).
    """
    for kernel, args, options in record_launches(*case):
        if kernels is None or kernel.__name__ in kernels:
            for target in targets:
                own, binary = compile_launch(kernel, args, options, target)
                yield kernel.__name__, own, target, binary


def compile_launch(kernel, args, options, target):
    """Compile one launch for a target -> (the options that count there, Triton's binary)."""
    driver = _Driver()
    driver.device = target
    triton.runtime.driver.set_active(driver)
    own = options_for_target(options, target)
    return own, kernel.warmup(*args, grid=(1,), **own)


def options_for_target(options, target):
    """A launch's options as they count for a target."""
    return options_of(options, "gfx" if target == "gfx942" else target)


def compile_one(case, kernels=None, targets=tuple(TARGETS)):
    """The same -> [Compiled]."""
    results = []
    for name, options, target, binary in binaries(case, kernels, targets):
        chosen = {k: v for k, v in options.items() if isinstance(v, int) and k not in ("R", "K")}
        chosen["num_warps"] = binary.metadata.num_warps
        usage = read_usage(binary)
        results.append(Compiled(name, *case, target, chosen, **usage))
    return results


def samples(cases):
    """Every kernel of some cases once, for one target, the targets taking turns -> jobs."""
    first = {}
    for case in cases:
        for kernel, _, _ in record_launches(*case):
            first.setdefault(kernel.__name__, case)
    return [(case, {name}, (t,)) for (name, case), t in zip(first.items(), cycle(TARGETS))]


def compile_all(jobs):
    """Compile jobs, arguments of `compile_one`, on all cores; yields Compiled, in order."""
    for results in in_processes(min(os.cpu_count(), len(jobs)), compile_one, *zip(*jobs)):
        yield from results


# --- reading the code ---------------------------------------------------------------------------


def _tool(name):
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def repeated_tiles(ttgir):
    """Of a kernel's matrix products, how many compute some of their result more than once -> int.

    ttgir is Triton's GPU dialect. A product's layout says how many warps lie along each axis, and
    what one of them covers there: an instruction's tile or, without tensor cores, the elements of
    its threads. Where that is more than the result has, the warps begin again at its start.
    """
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.\w+<\{(.*)\}>", ttgir, re.M))
    dots = r"(?:tt\.dot|ttng\.warp_group_dot) .*-> tensor<([\dx]+)x\w+, (#\w+)>"
    count = 0
    for shape, name in re.findall(dots, ttgir):
        fields = dict(re.findall(r"(\w+) = \[([\d, ]+)\]", layouts[name]))
        parts = ("warpsPerCTA", "instrShape", "sizePerThread", "threadsPerWarp")
        sizes = [map(int, fields[part].split(",")) for part in parts if part in fields]
        covered = [math.prod(axis) for axis in zip(*sizes)]
        count += any(c > int(size) for c, size in zip(covered, shape.split("x")))
    return count


def read_usage(binary):
    """The fields of Compiled that the binary tells."""
    read = _read_amd if "amdgcn" in binary.asm else _read_cuda
    repeated = repeated_tiles(binary.asm["ttgir"])
    return dict(shared=binary.metadata.shared, repeated=repeated, **read(binary))


def _read_cuda(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        commands = [_tool("cuobjdump"), "--dump-resource-usage"], [_tool("nvdisasm"), "-c"]
        usage, code = (
            subprocess.run(
                [*c, file.name], capture_output=True, encoding="utf-8", check=True
            ).stdout
            for c in commands
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    loads = re.findall(r"\bLDG(?:STS)?\.[\w.]+", code)  # LDGSTS: straight to shared memory
    wide = [load for load in loads if ".128" in load]
    tensor = Counter(re.findall(r"\b(HG?MMA)\.", code))
    return _reading(registers, stack, loads, wide, tensor)


def _read_amd(binary):
    code = binary.asm["amdgcn"]
    fields = ("vgpr_count", "vgpr_spill_count")
    registers, spilled = (int(re.search(rf"\.{f}:\s*(\d+)", code).group(1)) for f in fields)
    loads = re.findall(r"\b(?:global|buffer)_load_\w+", code)
    wide = [load for load in loads if load.endswith("dwordx4")]
    tensor = Counter(re.findall(r"\b(v_mfma)_\w+_([a-z]+\d+)\b", code))
    return _reading(registers, spilled, loads, wide, {"_".join(k): n for k, n in tensor.items()})


def _reading(registers, spilled, loads, wide, tensor):
    tensor = dict(sorted(tensor.items()))
    counts = dict(loads=len(loads), loads128=len(wide), tensor=tensor)
    return dict(registers=registers, spilled=spilled, **counts)


# --- the committed file -------------------------------------------------------------------------


def digest(folder=Path(__file__).parent.parent):
    """A hash of the files that have kernels or helpers of kernels: of every byte of them."""
    texts = [path.read_bytes() for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(b"".join(t for t in texts if b"\n@triton.jit" in t)).hexdigest()


def tools():
    """The versions that decide what the code looks like."""
    return {"triton": triton.__version__, "ptxas": triton.knobs.nvidia.ptxas.version}


def write_json(path, results):
    """Write {"meta": {...}, "columns": [...], "rows": [...]}, one row a line."""
    meta = {
        "made_by": COMMAND,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **tools(),
        "digest": digest(),
    }
    records = [result.record() for result in results]
    compact = (",", ":")
    rows = ",\n".join(jsonlib.dumps([*r.values()], separators=compact) for r in records)
    text = f'{{"meta": {jsonlib.dumps(meta, indent=1)},\n'
    text += f'"columns": {jsonlib.dumps([*records[0]])},\n"rows": [\n{rows}\n]}}\n'
    outputs.write_file(path, text.encode(), COMMAND)


def read_json(path):
    """-> (meta, [record]): what write_json wrote, each record a dict."""
    document = jsonlib.loads(Path(path).read_text("utf-8"))
    return document["meta"], [dict(zip(document["columns"], row)) for row in document["rows"]]


def stale(meta):
    """Why a file is not of these sources, in one sentence; None if it is."""
    if meta["digest"] == digest():
        return None
    return f"the files with kernels are not those of {COMMITTED.name}; renew it: {RENEW}"


def differences(records, results):
    """Compare with new results; yields a sentence for every figure that is not the records'."""
    committed = {_key(record): record for record in records}
    for new in (result.record() for result in results):
        old = committed.get(_key(new), {})
        for field in new:
            if old.get(field) != new[field]:
                what = " ".join(map(str, _key(new)))
                yield f"{what}: {field} is {new[field]}, in the file {old.get(field)}"


def _key(record):
    what = (record[field] for field in ("kernel", "dtype", "K", "R", "target"))
    return *what, *(f"{name}={value}" for name, value in record["options"].items())


# --- the command --------------------------------------------------------------------------------


def check_committed(full):
    """Whether the committed file is current: print what was found; returns the exit code."""
    meta, records = read_json(COMMITTED)
    if stale(meta):
        print(stale(meta))
        return 1
    print(f"{COMMITTED.name}: {len(records)} records, of the files with kernels as they are")
    if any(meta[name] != version for name, version in tools().items()):
        print(f"not compiled again: the file's compilers are others than these, {tools()}")
        return 0
    jobs = [(case,) for case in FULL] if full else samples(USUAL)
    results = list(compile_all(jobs))
    found = list(differences(records, results))
    print("\n".join(found) or f"{len(results)} of them, compiled again: the file's figures")
    return 1 if found else 0


def run(full=False, json=None, check=False):
    """The command: print the table, and write it to the file `json`; returns the exit code."""
    outputs.check_file(json, COMMAND)
    if missing():
        raise ValueError(missing())
    return check_committed(full) if check else print_table(FULL if full else USUAL, json)


def print_table(cases, json):
    """Compile cases, print the results, write them to the file `json` unless it is None."""
    print(HEADER)
    results, before = [], _cpu_seconds()
    for result in compile_all([(case,) for case in cases]):
        print(result, flush=True)
        results.append(result)
    seconds, bad = _cpu_seconds() - before, sum(not result.ok for result in results)
    print(f"{len(results)} compiled, {bad} with spills, repeated tiles or too much shared memory")
    if json:
        write_json(json, results)
        # little where Triton's cache had the code
        print(f"{seconds:.0f} seconds of CPU time; written to {json}")
    return 1 if bad else 0


def _cpu_seconds():
    import resource  # not on Windows, where the rest of this file can be read

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
