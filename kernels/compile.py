"""Compile every kernel for GPUs that need not be here: `python -m kernels compile [--full]`.

Triton compiles without a GPU and without a driver. This command records the launches that the
kernels' own launchers make, hands each to Triton's JIT as on a GPU (so with the same specialisation
on sizes and alignments), and reads from the binary what one program needs:

    registers   of a thread (gfx942: vector registers)
    spilled     cuda: bytes of a thread's stack; the kernels have no arrays, so what lies there are
                registers that did not fit. gfx942: vector registers that went to memory
    shared      bytes of shared memory

A launch is fine if nothing is spilled and its shared memory fits. Exit code 1 if one is not, 2 if
something is missing.
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kernels import (
    decode_attention,
    gated_linear,
    image_causal_attention,
    layer_norm,
    resampler_attention,
    squared_relu_linear,
)
from kernels.runtime import INTERPRET, replaced, torch, triton

# of each kernel file: (K, dtype, R) -> None
EXAMPLES = (
    image_causal_attention.launch_examples,
    resampler_attention.launch_examples,
    decode_attention.launch_examples,
    gated_linear.launch_examples,
    squared_relu_linear.launch_examples,
    layer_norm.launch_examples,
)

GPUTarget = triton.backends.compiler.GPUTarget
# name -> Triton's target, and the shared memory that one program can have there
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# (dtype, K, R), the paper's R = 64 first. The usual ones touch every kernel and both widths
USUAL = (
    ("bf16", 64, 64),
    ("bf16", 128, 64),
    ("fp32", 16, 8),
    ("fp32", 128, 64),
    ("bf16", 128, 256),
)
SHAPES = ((64, 64), (128, 64), (16, 8), (128, 256), (32, 32), (40, 64), (64, 40), (80, 7), (96, 64))
SHAPES += ((128, 1), (64, 128), (40, 100), (128, 32), (16, 64), (16, 256))
FULL = (
    *((dtype, K, R) for K, R in SHAPES for dtype in ("bf16", "fp32")),
    *(("fp16", K, R) for K, R in SHAPES[:4]),  # compiles as bf16 does but for the conversions
)


@dataclass
class Compiled:
    """One kernel, compiled for one launch and one target."""

    kernel: str
    dtype: str
    K: int
    R: int
    target: str
    registers: int
    spilled: int
    shared: int
    options: str

    @property
    def ok(self):
        """Whether it fits."""
        return self.spilled == 0 and self.shared <= TARGETS[self.target][1]

    def __str__(self):
        fields = f"{self.kernel:<23}{self.dtype:>5}{self.K:>5}{self.R:>5}  {self.target:<8}"
        fields += f"{self.registers:>9}{self.spilled:>9}{self.shared:>9}  {self.options:<24}"
        return fields + ("ok" if self.ok else "NO")


class _Driver:
    """As much of a driver as the JIT asks for before it compiles; here a device is a target."""

    device = "sm_90"

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGETS[self.device][0]


def missing():
    """What this machine lacks to compile, in one line; None if nothing."""
    if INTERPRET.value:
        return "compiling needs a process of its own with TRITON_INTERPRET=0"
    backends = Path(triton.__file__).parent / "backends"
    needed = [_cuobjdump(), backends / "amd" / "compiler.py"]
    absent = [str(path) for path in needed if not path.exists()]
    return f"this Triton lacks {', '.join(absent)}" if absent else None


def record_launches(dtype, K, R):
    """The launches [(kernel, arguments, options)] of every kernel, each only once."""
    launches = {}

    def record(kernel, programs, *args, **options):
        launches[kernel.__name__] = (kernel, args, options)

    with replaced(launch=record):
        for examples in EXAMPLES:
            examples(K, DTYPES[dtype], R)
    return launches.values()


def compile_one(case, targets=tuple(TARGETS)):
    """Compile every kernel for a case (dtype, K, R) and every target -> [Compiled]."""
    driver, results = _Driver(), []
    triton.runtime.driver.set_active(driver)
    for kernel, args, options in record_launches(*case):
        keys = [key for key in ("BLOCK_M", "BLOCK", "num_warps") if key in options]
        shown = " ".join(f"{key}={options[key]}" for key in keys)
        for target in targets:
            driver.device = target
            binary = kernel.warmup(*args, grid=(1,), **options)
            read = _read_amd if TARGETS[target][0].backend == "hip" else _read_cuda
            usage = *read(binary), binary.metadata.shared
            results.append(Compiled(kernel.__name__, *case, target, *usage, shown))
    return results


def _cuobjdump():
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _read_cuda(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()))


def _read_amd(binary):
    fields = ("vgpr_count", "vgpr_spill_count")
    return tuple(int(re.search(rf"\.{f}:\s*(\d+)", binary.asm["amdgcn"]).group(1)) for f in fields)


def compile_all(cases):
    """Compile the cases side by side, one process for each core; yields Compiled."""
    with ProcessPoolExecutor(min(os.cpu_count(), len(cases))) as pool:
        for results in pool.map(compile_one, cases):
            yield from results


def run(full=False):
    """The command: print the table; returns the exit code."""
    if INTERPRET.value:  # a process compiles or interprets, never both
        command = [sys.executable, "-m", "kernels", "compile", *["--full"] * full]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}).returncode
    if missing():
        print(f"kernels: error: {missing()}", file=sys.stderr)
        return 2
    names = "kernel", "dtype", "K", "R", "target", "registers", "spilled", "shared", "options"
    print("{:<23}{:>5}{:>5}{:>5}  {:<8}{:>9}{:>9}{:>9}  {}".format(*names))
    counts = {True: 0, False: 0}
    for result in compile_all(FULL if full else USUAL):
        print(result, flush=True)
        counts[result.ok] += 1
    print(f"{sum(counts.values())} compiled, {counts[False]} with spills or too much shared memory")
    return 1 if counts[False] else 0
