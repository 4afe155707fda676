"""Compile every kernel for GPUs that are not here: `python -m kernels compile`.

Triton compiles without a GPU or a driver. This command records the launches that the kernels' own
launchers would make, hands each to Triton's compiler as the JIT would (with the same specialisation
of sizes and alignments), and reads the resources from the result:

    registers   of one thread (gfx942: vector registers)
    spilled     bytes of a thread's stack (gfx942: registers); the kernels have no arrays, so that
                anything on the stack is a register that did not fit
    shared      bytes of shared memory of a program

A launch is fine if nothing is spilled and its shared memory fits the target.
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from kernels import image_causal_attention
from kernels.runtime import INTERPRET, replaced

# name -> Triton's target, and the shared memory that one program can have there
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# (K, R): what the presets and the paper have, and the corners of what is allowed
SMALL = ((64, 64), (128, 64), (128, 256))
FULL = (*SMALL, (40, 64), (64, 40), (80, 7), (96, 64), (128, 1), (32, 32), (64, 128), (40, 100))


@dataclass
class Compiled:
    """One kernel, compiled for one launch and one target."""

    kernel: str
    target: str
    dtype: str
    K: int
    R: int
    registers: int
    spilled: int
    shared: int
    options: str

    @property
    def ok(self):
        """Whether it fits."""
        return self.spilled == 0 and self.shared <= TARGETS[self.target][1]


class _Driver:
    """As much of a driver as the JIT asks for before it compiles; each target is a device."""

    def __init__(self):
        self.device = next(iter(TARGETS))

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGETS[self.device][0]


def record_launches(K, dtype, R):
    """The launches [(kernel, arguments, options)] of every registered kernel."""
    launches = []

    def record(kernel, programs, *args, **options):
        launches.append((kernel, args, options))

    with replaced(launch=record):
        image_causal_attention.launch_examples(K, dtype, R)
    return launches


def compile_all(sizes, dtypes=tuple(DTYPES), targets=tuple(TARGETS)):
    """Compile for every (K, R) of sizes, dtype and target; yields Compiled, one after another."""
    driver = _Driver()
    triton.runtime.driver.set_active(driver)
    for K, R in sizes:
        for dtype in dtypes:
            for kernel, args, options in record_launches(K, DTYPES[dtype], R):
                for target in targets:
                    driver.device = target
                    binary = kernel.warmup(*args, grid=(1,), **options)
                    shown = " ".join(f"{k}={options[k]}" for k in ("BLOCK_M", "num_warps") if k in options)
                    read = _read_amd if target.startswith("gfx") else _read_nvidia
                    yield Compiled(kernel.__name__, target, dtype, K, R, *read(binary), binary.metadata.shared, shown)


def _read_nvidia(binary):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


def _read_amd(binary):
    assembly = binary.asm["amdgcn"]
    def field(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly).group(1))
    return field("vgpr_count"), field("vgpr_spill_count") + field("sgpr_spill_count")
