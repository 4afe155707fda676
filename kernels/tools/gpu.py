"""For the day a GPU is at hand: `python -m miniflamingo gpu --minutes 9 --out FILE`, or `make gpu`.

What a lent machine must tell, the most important first, on torch 2.11 and Triton 3.6 or newer, with
nothing to install: what it is; the tests of the kernels, in order of risk, as far as four tenths of
the minutes go; compute-sanitizer on small cases, where it is there, for one tenth; then the
benchmark, from the paper's smallest model up, and what is slow to prepare last. Every finished row
is in the file at once. The same command again goes on where this one has stopped, or was stopped:
the tests that have passed for these kernels on this GPU, and the rows, are not made again.
"""

import contextlib
import importlib.util
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from miniflamingo import outputs

from . import bench
from .bench_entries import ENTRIES

ROOT = Path(__file__).parents[2]
# of tests/kernels, without test_ and .py: what could be wrong in a way that only a GPU shows, first
TESTS = (
    "image_causal_attention", "decode_attention", "resampler_attention", "operators", "operands",
    "layers", "adapter", "train", "compare",
)  # fmt: skip
NO_TESTS = 5  # pytest's exit code: none of a file needs a GPU
SANITIZED = ("memcheck", "image_causal"), ("racecheck", "image_causal"), ("memcheck", "resampler")
SHARE_OF_TESTS, SHARE_OF_SANITIZER = 0.4, 0.1
ORDER = (  # of the benchmark: entry, and what its shape has; the rest follows as it stands there
    ("image_causal_attention", dict(H=16, K=128, phi="even")),
    ("decode_attention", dict(H=16)),
    ("resampler_attention", {}),
    ("gated_xattn_dense", dict(D=2048)),
    ("image_causal_attention", dict(phi="even")),
)


class Clock:
    """The minutes that are left, and the longest step so far: one like it must still fit."""

    def __init__(self, minutes, now=time.monotonic):
        self.now, self.start, self.longest = now, now(), 0.0
        self.seconds, self.before = 60 * minutes, self.start

    def left(self):
        """Seconds."""
        return self.start + self.seconds - self.now()

    def step(self):
        """Called between two steps: whether there is time for one more."""
        now = self.now()
        self.longest, self.before = max(self.longest, now - self.before), now
        return self.left() > self.longest


class TimeUp(BaseException):
    """No Exception, or it would be taken for an implementation's."""


@contextlib.contextmanager
def ended_after(seconds):
    """Leave the `with` block when the time is up, in the middle of a row: one may compile long."""

    def leave(*_):
        raise TimeUp

    before = signal.signal(signal.SIGALRM, leave)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds))
    try:
        yield
    except TimeUp:
        print("\nthe time is up; the row in the making is lost")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_for(command, seconds):
    """Run a command for that long at most -> (exit code or None, its last line)."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, timeout=max(1, seconds), encoding="utf-8", errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"stopped after {seconds:.0f} s"
    return done.returncode, (done.stdout.strip().splitlines() or [""])[-1]


def say(name, code, text):
    """One line of what was run."""
    mark = {0: "ok", None: "..", NO_TESTS: ".."}.get(code, "NO")
    print(f"  {mark}  {name:<30}{text}", flush=True)


def run_all(steps, document, out, seconds, clock):
    """Run {name: command} that have not passed before, in `seconds`; True if one failed."""
    passed, until, failed = document.setdefault("passed", []), clock.left() - seconds, False
    for name, command in steps.items():
        if name in passed:
            say(name, 0, "passed before")
            continue
        if clock.left() <= until:
            print(f"  ..  no time left for {name} and what follows")
            break
        code, text = run_for(command, clock.left() - until)
        say(name, code, text)
        failed |= code not in (0, None, NO_TESTS)
        if code in (0, NO_TESTS):
            passed.append(name)
            bench.write_json(out, document)
    return failed


def tests():
    """{name: command} of the tests; says what is missing for them."""
    files = {name: ROOT / "tests" / "kernels" / f"test_{name}.py" for name in TESTS}
    files = {f"tests of {name}": str(path) for name, path in files.items() if path.exists()}
    lacking = [x for x in ("pytest", "hypothesis") if importlib.util.find_spec(x) is None]
    if lacking or not files:
        print(f"  ..  no tests: {' and '.join(lacking) or 'their files'} missing here")
        return {}
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "gpu"]
    return {name: [sys.executable, *options, path] for name, path in files.items()}


def sanitized():
    """{name: command} of compute-sanitizer, where it is installed."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        print("  ..  no compute-sanitizer here")
        return {}
    command = [sys.executable, "-m", "miniflamingo", "compare", "--device", "cuda", "--case"]
    return {
        f"{check} of {case}": [tool, "--tool", check, "--error-exitcode", "9", *command, case]
        for check, case in SANITIZED
    }


def in_order():
    """The benchmark's (entry, shape) on a GPU, the most important first."""
    every = [(entry, shape) for entry in ENTRIES for shape in entry.shapes["cuda"]]

    def place(case):
        wanted = ((name, {**case[1], **sizes} == case[1]) for name, sizes in ORDER)
        return next((i for i, x in enumerate(wanted) if x == (case[0].name, True)), len(ORDER))

    return sorted(every, key=place)


def run(minutes=9, out="bench-gpu.json", clock=None):
    """The command; returns the exit code: 1 if a test or a kernel failed."""
    outputs.check_file(out, bench.COMMAND, "--out")
    clock = clock or Clock(minutes)
    device = bench.choose_device("cuda")
    document = bench.begin(device, quick=False, repeats=50, json=out)
    bench.print_limits(document)
    bench.write_json(out, document)
    print(f"\ntests, {SHARE_OF_TESTS:.0%} of the time at most")
    failed = run_all(tests(), document, out, SHARE_OF_TESTS * clock.seconds, clock)
    print("\ncompute-sanitizer")
    failed |= run_all(sanitized(), document, out, SHARE_OF_SANITIZER * clock.seconds, clock)
    clock.before = clock.now()
    with ended_after(clock.left()):
        for slow in (False, True):
            failed |= bench.measure_all(document, in_order(), out, (slow,), clock.step)
    rest = "" if clock.left() > clock.longest else "; the same command goes on with the rest"
    print(f"\n{len(document['records'])} rows in {out}{rest}")
    return 1 if failed else 0
