"""The accelerators that `plan` knows, with the source of every figure; none was measured here.

kernels/tools/devices.py has others, of the same GPUs: cycles and instructions, which a plan does
not need. A TPU has none of those; a test holds the two tables' peaks together.
"""

from dataclasses import dataclass

from miniflamingo.command import some


@dataclass(frozen=True)
class Device:
    """What a plan needs of a device; bandwidths are one device's, in one direction.

    memory in bytes; flops the dense bfloat16 peak, a second; fp32_flops that in float32 (matrix
    units where they take float32, without TF32); bandwidth of the memory, bytes a second; link
    bytes a second to the devices nearby, of which there are `near` (itself counted); far bytes a
    second to all others.
    """

    memory: float
    flops: float
    fp32_flops: float
    bandwidth: float
    link: float
    near: int
    far: float
    sources: str


GB, GIB = 1e9, 2**30
NODE = "link: NVLink, half of its two directions; far, assumed: a network card a GPU"
DEVICES = {
    "tpuv4": Device(
        32 * GIB, 275e12, 275e12 / 4, 1.2e12, 300e9, 4096, 300e9,
        "Google Cloud's TPU v4 page: 275 TFLOP/s, 32 GiB, 1,200 GB/s, 4,096 chips a pod; link: "
        "6 of 50 GB/s (Jouppi et al., 2023; the page's all-reduce of 1.1 PB/s a pod makes 269); "
        "float32 assumed a quarter",
    ),
    "a100": Device(
        80 * GB, 312e12, 19.5e12, 2.039e12, 300e9, 8, 25e9,
        f"NVIDIA A100 80GB SXM datasheet; {NODE} of 200 Gb/s",
    ),
    "h100": Device(
        80 * GB, 989.4e12, 67e12, 3.35e12, 450e9, 8, 50e9,
        f"NVIDIA H100 SXM datasheet; {NODE} of 400 Gb/s",
    ),
    "h200": Device(
        141 * GB, 989.4e12, 67e12, 4.8e12, 450e9, 8, 50e9,
        f"NVIDIA H200 SXM datasheet; {NODE} of 400 Gb/s",
    ),
    "mi300x": Device(
        192 * GB, 1307.4e12, 163.4e12, 5.3e12, 448e9, 8, 50e9,
        "AMD MI300X datasheet; link: 7 of 64 GB/s; far, assumed: a network card a GPU of 400 Gb/s",
    ),
}  # fmt: skip


def find(name):
    """The Device of this name, in small letters or not; ValueError for another."""
    if (found := DEVICES.get(name.lower())) is None:
        raise ValueError(f"unknown device {name!r}: choose from {some(DEVICES)}")
    return found
