"""The GPUs that `predict` knows, with the source of every figure.

A processor is NVIDIA's SM, AMD's compute unit; how many programs one holds at a time is in
compile.py (`resident`). None of these figures was measured by this project.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A GPU's rates, in units of seconds, bytes, flops and cycles.

    clock, from the datasheet: its matrix rate over processors and flops a cycle. issue: the
    instructions that a processor starts in a cycle, a warp's (AMD: wave's) each. latency: cycles
    from a load to its data when nothing else is under way, cache_latency: where the L2 has them.
    launch: seconds of a kernel's start and end.
    """

    name: str  # as torch.cuda names it, or the part of that which tells it from the others
    target: str  # compile.TARGETS
    processors: int
    clock: float
    issue: float
    latency: int
    cache_latency: int
    cache: int  # bytes of the L2 (MI300X: the Infinity Cache behind it)
    peak_bandwidth: float  # bytes a second, datasheet
    bandwidth: float  # ... of a large copy, read and written
    peak_flops: float  # dense bfloat16 flops a second, datasheet
    flops: float  # ... of a large product
    sources: str

    launch = 2e-6  # assumed for all: an empty kernel between two others takes about as long


MIB = 2**20
SHARES = "copy and product assumed: 0.9 and 0.8 of the peak, about what an H200 reaches"
HOPPER = "clock: 989.4 TFLOP/s over 132 * 4096 flops a cycle; latency: arXiv 2402.13499"
DEVICES = {
    device.name: device
    for device in (
        Device(
            "A100-SXM4-80GB", "sm_80", 108, 1.41e9, 4, 466, 262, 40 * MIB, 2.039e12, 1.835e12,
            312e12, 250e12,
            f"NVIDIA A100 80GB datasheet; clock: 312 TFLOP/s over 108 * 2048; {SHARES}; "
            "latency: arXiv 2402.13499",
        ),
        Device(
            "H100 80GB HBM3", "sm_90", 132, 1.83e9, 4, 479, 263, 50 * MIB, 3.35e12, 3.0e12,
            989.4e12, 790e12,
            f"NVIDIA H100 SXM datasheet; copy and product of torch 2.11, as others measured; "
            f"{HOPPER}",
        ),
        Device(
            "H200", "sm_90", 132, 1.83e9, 4, 479, 263, 60 * MIB, 4.8e12, 4.3e12, 989.4e12, 790e12,
            "NVIDIA H200 SXM datasheet; copy, product and cache of torch 2.11, as others measured; "
            f"{HOPPER}",
        ),
        Device(
            # a SIMD of 16 lanes takes 4 cycles for a wave of 64: four of them start one a cycle
            "MI300X", "gfx942", 304, 2.1e9, 1, 730, 460, 256 * MIB, 5.3e12, 4.77e12,
            1307.4e12, 1046e12,
            f"AMD MI300X datasheet, CDNA 3 white paper; {SHARES}; latencies assumed: 350, 220 ns",
        ),
    )
}  # fmt: skip


def find(name):
    """The device that a GPU's name, as torch tells it, belongs to; None if it is not known."""
    found = [device for key, device in DEVICES.items() if key in name]
    return found[0] if len(found) == 1 else None
