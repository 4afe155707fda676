"""Every kernel beside its NumPy twin, as a table.

    python -m miniflamingo compare [--json FILE] [--device DEVICE]

For each case, dtype and direction the inputs are drawn in float64 and rounded to the dtype once.
The reference is the NumPy twin in float64 on these rounded inputs. Two errors against it are
measured, |x - reference| / |reference| with Euclidean norms (|x| where the reference is all zero):

    error   of the kernel, whose outputs held NaN before it ran
    peer    of plain torch in the same precision, with the dense mask

A kernel passes if error <= 2 * max(peer, eps / 2) for each of its outputs: a fused kernel may round
elsewhere than plain torch does, but not worse. eps is the dtype's; eps / 2 is the largest relative
error of one rounding, and errors below it are not told apart. Where the reference is all zero the
error must be 0. A row shows the output with the largest ratio (dq, dk and dv are the backward's).

A peer can be wrong itself: plain torch gives NaN on some processors (see operands.py). Where it is
not finite, or off by more than WRONG floors, the row says so, and the kernel is held against the
floor alone: eps / 2 in 16 bits, 8 times that in float32, whose errors are the sums of many
roundings. (Beside peers that were right, on an AMD EPYC, the kernels' largest errors were 1.2 and
7.6 times eps / 2, a gate's gradient left out; the peers' 1.8 and 8.2.) Kernels get tensors whose
gaps between the rows hold NaN, peers contiguous ones.

A gate's gradient is one number, a sum whose terms cancel: its errors are relative to the root of
the terms' summed squares (`scales`), where that is more; and as one number may be right by luck,
while a norm over many may not, peer errors of it below 2 eps are not told apart.

To add a kernel, add a Comparison to KERNELS.
"""

import datetime
import json as jsonlib
import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from miniflamingo import outputs, xattn
from miniflamingo.command import some

from .. import gated_linear
from ..common.runtime import INTERPRET, poisoned, torch, triton
from ..decode_attention import decode_attention
from ..image_causal_attention import image_causal_attention, image_causal_attention_backward
from ..resampler_attention import resampler_attention, resampler_attention_backward
from . import twins

COMMAND = "python -m miniflamingo compare"
BOUND = 2
LUCK = 4  # floors of a single number's error
WRONG = 64  # floors of a peer that is wrong itself
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Comparison:
    """A kernel, its NumPy twin, plain torch, and the cases in which they must agree.

    twin, kernel and peer take a case's arguments, backwards take dout before them and return one
    gradient for each of the leading floating-point arguments; the peer's come from torch.autograd.
    A kernel that has only a forward pass has None for both backwards.
    cases maps a name to a function of a np.random.Generator that draws the arguments.
    """

    name: str
    kernel: Callable
    kernel_backward: Callable | None
    twin: Callable
    twin_backward: Callable | None
    peer: Callable
    cases: dict
    scales: Callable | None = None  # as twin_backward -> a scale for each gradient, or 0


@dataclass(frozen=True)
class Record:
    """One row of the table."""

    kernel: str
    case: str
    dtype: str
    direction: str
    backend: str
    error: float
    peer_error: float
    ratio: float
    bound: float
    ok: bool
    peer: str = ""  # what is wrong with the peer, where something is


# --- one case -----------------------------------------------------------------------------------


def compare(comparison, case, dtype, device):
    """One case in both directions, or in the only one -> Records; dtype "fp32", "fp16", "bf16"."""
    rng = np.random.default_rng(0)
    args = [to_torch(x, DTYPES[dtype], device) for x in comparison.cases[case](rng)]
    rounded = [to_numpy(x) for x in args]
    expected = comparison.twin(*rounded)
    dout = to_torch(rng.normal(size=expected.shape), DTYPES[dtype], device)
    with poisoned():
        out = comparison.kernel(*args)
        grads = comparison.kernel_backward and comparison.kernel_backward(dout, *args)
    args = [x.contiguous() for x in args]
    floats = [x.requires_grad_() for x in args if x.is_floating_point()]
    peer_out, where = comparison.peer(*args), backend(device)
    names = comparison.name, case, dtype
    yield judge(*names, "forward", where, [out], [peer_out], [expected])
    if grads:
        peer_grads = torch.autograd.grad(peer_out, floats, dout)
        expected_grads = comparison.twin_backward(to_numpy(dout), *rounded)
        scales = comparison.scales and comparison.scales(to_numpy(dout), *rounded)
        yield judge(*names, "backward", where, grads, peer_grads, expected_grads, scales)


def judge(kernel, case, dtype, direction, backend, outs, peers, expected, scales=None):
    """The Record of one direction, from the results of kernel, peer and reference."""
    eps, rows = torch.finfo(DTYPES[dtype]).eps, []
    scales = scales or [0] * len(expected)
    for out, peer, reference, scale in zip(outs, peers, expected, scales, strict=True):
        error, peer_error = (relative_error(x, reference, scale) for x in (out, peer))
        floor = eps / 2 * (LUCK if scale else 1)
        fault = fault_of(peer_error, floor) if reference.any() else ""
        alone = floor if eps > 2**-12 else 8 * floor
        allowed = alone if fault else max(peer_error, floor)
        allowed = allowed if reference.any() else 0.0
        # NaN counts as infinite: compared as it is, it could hide
        ratio = math.inf if math.isnan(error) or error > 0 == allowed else error / (allowed or 1)
        rows.append((ratio, error, peer_error, fault))
    fault = next((row[3] for row in rows if row[3]), "")
    ratio, error, peer_error, _ = max(rows)
    ok = ratio <= BOUND
    numbers = error, peer_error, ratio, BOUND
    return Record(kernel, case, dtype, direction, backend, *numbers, ok, fault)


def fault_of(peer_error, floor):
    """What is wrong with a peer of this error: "" for nothing."""
    if not math.isfinite(peer_error):
        return "NaN" if math.isnan(peer_error) else "infinite"
    return "far off" if peer_error > WRONG * floor else ""


def relative_error(x, reference, scale=0.0):
    """|x - reference| / |reference|, or |x| where the reference is all zero; NaN if x has one.

    A scale above |reference| takes its place.
    """
    scale = max(np.linalg.norm(reference), scale)
    return float(np.linalg.norm(to_numpy(x) - reference) / (scale or 1))


def to_torch(x, dtype, device):
    """An argument as a tensor: floats rounded to dtype, integers as they are; strides are kept.

    Gaps between the rows hold NaN.
    """
    tensor = torch.from_numpy(x)
    if not tensor.is_floating_point():
        return tensor.to(device, copy=True)
    out = torch.empty_strided(x.shape, tensor.stride(), dtype=dtype, device=device)
    size = out.untyped_storage().nbytes() // out.itemsize
    out.as_strided((size,), (1,)).fill_(torch.nan)
    return out.copy_(tensor)


def to_numpy(x):
    """A tensor as float64 (or integers, as they are)."""
    x = x.detach().cpu()
    return (x.double() if x.is_floating_point() else x).numpy()


# --- image-causal attention ---------------------------------------------------------------------


def dense_attention(q, k, v, phi):
    """Plain torch in the precision of its inputs: a dense mask over all N*R visual tokens."""
    (B, _, H, K), (N, R) = q.shape, k.shape[1:3]
    image = torch.arange(1, N + 1, device=q.device).repeat_interleave(R)
    mask = (phi[:, :, None] == image)[:, None]  # [B, 1, L, N*R]
    q, k, v = (x.reshape(B, -1, H, K).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT * K**-0.5).masked_fill(~mask, float("-inf"))
    scores = scores.masked_fill(~mask.any(-1, keepdim=True), 0.0)  # else the softmax is NaN
    p = scores.softmax(-1).masked_fill(~mask, 0.0)
    return (p @ v).transpose(1, 2)


def attention_case(phi, R=64, H=2, K=64, N=None, strided=False):
    """A function of a generator that draws q, k, v for phi, a list of rows."""
    phi = np.array(phi, np.int32)
    (B, L), N = phi.shape, int(phi.max()) if N is None else N

    def draw(rng):
        q, k, v = (rng.normal(size=s) for s in ((B, L, H, K), (B, N, R, H, K), (B, N, R, H, K)))
        if strided:  # as from one projection of [.., 3, K]: only the last axis is contiguous
            q, k, v = (np.repeat(x[..., None, :], 3, axis=-2)[..., 1, :] for x in (q, k, v))
        return q, k, v, np.asfortranarray(phi) if strided else phi

    return draw


def runs(*counts):
    """A row of phi from the number of tokens before the first image, then of each image."""
    return np.repeat(np.arange(len(counts)), counts)


ATTENTION_CASES = {
    "text before the first image": attention_case([runs(9, 20, 11), runs(1, 2, 37)]),
    "adjacent images": attention_case([runs(3, 1, 1, 0, 20)], R=16),
    "an image nobody attends to": attention_case([runs(0, 12, 0, 8)] * 2, N=4, R=32),
    "a row without images": attention_case([runs(5, 9), runs(14)], R=24, K=32),
    "no row has images": attention_case([runs(6)], N=2, R=8, K=16),
    "decreasing phi": attention_case([runs(4, 9, 9, 8)[::-1]], R=20),
    "shuffled phi": attention_case([np.arange(40) * 7 % 5, np.arange(40) * 3 % 4]),
    "R = 1": attention_case([runs(2, 5, 6)], R=1, K=16),
    "R = 37, K = 40": attention_case([runs(2, 30, 9)], R=37, K=40),
    "R = 50, K = 80": attention_case([runs(3, 20, 12)], R=50, K=80),
    "K = 96": attention_case([runs(3, 20, 12)], K=96, H=1),
    "K = 128": attention_case([runs(3, 20, 12)], K=128, H=1),
    "R = 100": attention_case([runs(3, 12, 5)], R=100, K=32),
    "R = 256, K = 128": attention_case([runs(3, 12, 5)], R=256, K=128, H=1),
    "strided inputs": attention_case([runs(3, 20, 12)] * 2, strided=True),
    "strided inputs, R = 70": attention_case([runs(3, 12, 5)] * 2, R=70, K=16, strided=True),
    "N = 1, a long run": attention_case([runs(7, 300)], R=64, K=64, H=1),
    "N = 1, a long run, R = 70": attention_case([runs(7, 150)], R=70, K=32, H=1),
}

KERNELS = [
    Comparison(
        "image_causal_attention",
        image_causal_attention,
        image_causal_attention_backward,
        xattn.image_causal_attention,
        xattn.image_causal_attention_backward,
        dense_attention,
        ATTENTION_CASES,
    ),
    Comparison(
        "resampler_attention",
        resampler_attention,
        resampler_attention_backward,
        twins.resampler_attention,
        twins.resampler_attention_backward,
        twins.concatenated_attention,
        twins.RESAMPLER_CASES,
    ),
    Comparison(
        "decode_attention",
        decode_attention,
        None,
        twins.decode_attention,
        None,
        twins.gathered_attention,
        twins.DECODE_CASES,
    ),
    Comparison(
        "gated_linear",
        gated_linear.gated_linear,
        gated_linear.gated_linear_backward,
        twins.gated_linear,
        twins.gated_linear_backward,
        twins.torch_gated_linear,
        twins.GATED_CASES,
        twins.gated_linear_scales,
    ),
]

# --- the command --------------------------------------------------------------------------------


def choose_device(device):
    """The torch device for "auto", "cpu" or "cuda"; ValueError where it cannot run kernels."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a GPU that torch can use, got none")
    if device == "cpu" and not INTERPRET.value:
        raise ValueError("--device cpu needs TRITON_INTERPRET=1 in the environment, got it unset")
    if device == "auto":
        return "cpu" if INTERPRET.value else "cuda"
    return device


def backend(device):
    """Where the kernels run: the interpreter, or the GPU's name."""
    return "interpreter" if INTERPRET.value else torch.cuda.get_device_name(device)


def compare_all(device, case="", kernels=None):
    """Yield the Records of every kernel, case (whose name contains `case`), dtype and direction."""
    kernels = KERNELS if kernels is None else kernels
    chosen = [(kernel, name) for kernel in kernels for name in kernel.cases if case in name]
    if not chosen:
        names = some(repr(name) for kernel in kernels for name in kernel.cases)
        raise ValueError(f"--case: expected part of one of {names}; got {case!r}")
    for kernel, name in chosen:
        for dtype in DTYPES:
            yield from compare(kernel, name, dtype, device)


def meta():
    """Where and when the figures were made."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "floor": "peer errors below eps / 2 of the dtype count as eps / 2",
    }


def write_json(path, records):
    """Write {"meta": {...}, "records": [...]}; NaN and infinities become null."""
    rows = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in map(asdict, records)
    ]
    document = {"made_by": COMMAND, "meta": meta(), "records": rows}
    data = jsonlib.dumps(document, indent=1, allow_nan=False).encode()
    outputs.write_file(path, data, COMMAND)


def verdict(record):
    """How a row ends."""
    blame = f"  peer: {record.peer} (plain torch on this processor)" if record.peer else ""
    return ("ok" if record.ok else "FAILED") + blame


def run(device="auto", json=None, case=""):
    """The command: print the table, and write it to the file `json`; returns the exit code."""
    device = choose_device(device)
    outputs.check_file(json, COMMAND)
    print(f"{'case':<29}{'dtype':<6}{'direction':<10}{'error':>9}{'peer':>10}{'ratio':>7}")
    records = []
    for record in compare_all(device, case):
        if not records or records[-1].kernel != record.kernel:
            print(f"{record.kernel} on {record.backend}")
        records.append(record)
        print(
            f"  {record.case:<27}{record.dtype:<6}{record.direction:<10}{record.error:>9.1e}"
            f"{record.peer_error:>10.1e}{record.ratio:>7.2f}  {verdict(record)}"
        )
    failed = sum(not record.ok for record in records)
    print(f"{len(records)} comparisons, {failed} failed (bound: ratio <= {BOUND})")
    if json:
        write_json(json, records)
    return 1 if failed else 0
