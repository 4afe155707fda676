"""The same on every machine: the tests and the course as other processors would run them.

    python -m tests.machines                    every setting
    python -m tests.machines nehalem strange    these alone
    python -m tests.machines --turn 2/4         the second quarter, and where this processor can run
                                                nothing of it the next that it can; --turn commit/4:
                                                another with every commit, the first without git
    python -m tests.machines --list             what each setting changes; runs nothing

A setting is an environment and the jobs that run in it. Before that, a small program multiplies
matrices in it and says what NumPy, its BLAS, torch and oneDNN made of it (`look`). A setting that
the processor cannot run, or that nothing in it listened to, is left out with the reason: it would
test nothing. The table names, for each job, what ran and the first failure; what failed jobs
printed follows. Exit code: 0 when all that ran passed, 1 when something failed or nothing ran.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from miniflamingo.command import Parser

ROOT = Path(__file__).resolve().parent.parent
NAME = "Flämingo, mit Leerzeichen"  # of the folder that the strange setting runs in


# --- what runs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A command, how to count its output -> (passed, failed, skipped), and what a failure is."""

    command: tuple[str, ...]
    count: Callable[[str], tuple[int, int, int]]
    failure: str  # its first group is the first failure


def tests(*arguments):
    """A job of pytest's."""

    def count(output):
        summary = output.rstrip().rpartition("\n")[2]
        found = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", summary)}
        failed = sum(found.get(word, 0) for word in ("failed", "error", "errors"))
        return found.get("passed", 0), failed, found.get("skipped", 0)

    command = ("-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *arguments)
    return Job(command, count, r"^(?:FAILED|ERROR) (.*)")


def notebooks(*modules):
    """A job that executes modules of the course and compares them with the committed ones."""

    def count(output):
        return len(re.findall(": ok, ", output)), len(re.findall(": differs, ", output)), 0

    command = ("-m", "miniflamingo.course.render", "--check", "--jobs", "2", *modules)
    return Job(command, count, r"(\w+: differs.*\n.*)")


def count_comparisons(output):
    """The last line of `compare` -> (passed, failed, 0)."""
    found = re.search(r"(\d+) comparisons, (\d+) failed", output)
    total, failed = map(int, found.groups()) if found else (0, 0)
    return total - failed, failed, 0


# what hangs on the system, the shell or the compiler, and on no processor: `make test` runs it and,
# but for the kernels' part, the strange setting
SYSTEM = (
    *("fuzz", "test_command.py", "test_house.py", "test_outputs.py", "test_packaging.py"),
    *("test_readme.py", "course/test_release.py", "course/test_render.py", "course/test_site.py"),
    *("course/test_slides.py", "course/test_timings.py"),
)
KERNELS_SYSTEM = ("test_compile.py", "test_package.py", "test_train.py")


def without(*names):
    """pytest's options that leave out files and folders of tests/."""
    return [f"--ignore=tests/{name}" for name in names]


NOT_NUMPY = without("kernels", "test_machines.py")
JOBS = {
    "rooms": tests("tests", *NOT_NUMPY, *without(*SYSTEM)),
    "commands": tests(*(f"tests/{name}" for name in SYSTEM)),
    "notebooks": notebooks(),
    "kernels": tests(
        "tests/kernels", "-n2", "--dist=loadfile",
        *without(*(f"kernels/{name}" for name in KERNELS_SYSTEM)),
    ),
    "compare": Job(("-m", "miniflamingo", "compare"), count_comparisons, r"^ *(.*FAILED)"),
    "torch's notebooks": notebooks("12", "13", "14", "15"),
}  # fmt: skip


# --- the settings ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """An environment; what `look` must then say; the feature that the processor needs for it."""

    name: str
    jobs: tuple[str, ...]
    threads: int
    environment: dict[str, str]
    shows: dict[str, str] = field(default_factory=dict)
    needs: str = ""
    elsewhere: bool = False  # runs in a copy of the project, in a folder with an odd name

    def variables(self):
        """What it changes in the environment, with its threads."""
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NOTEBOOK_THREADS")
        return {**dict.fromkeys(names, str(self.threads)), **self.environment}


def blas(core, threads, needs=""):
    """OpenBLAS as it computes on another processor."""
    environment = {"OPENBLAS_CORETYPE": core}
    shows = {"blas": core.lower()}
    return Setting(core.lower(), ("rooms", "notebooks"), threads, environment, shows, needs)


def torch(capability, isa, shown, threads):
    """torch and oneDNN, confined to narrower instructions; tests of inductor skip without any."""
    environment = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": isa}
    shows = {"torch": capability, "onednn": shown}
    jobs = ("kernels", "compare", "torch's notebooks")
    needs = "AVX2" if isa == "AVX2" else "SSE41"
    return Setting(f"torch-{capability}-{threads}", jobs, threads, environment, shows, needs)


# NumPy's own loops (the second line: as NumPy before 2.4 names them) and libm's functions, without
# wide or fused instructions
NARROW = {
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR "
    "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX,-AVX2,-FMA,-AVX512F",
}
STRANGE = {
    "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",  # files are ASCII by default
    "TZ": "Pacific/Chatham", "COLUMNS": "40", "NO_COLOR": "1",
    "PYTHONHASHSEED": "random", "PYTHONOPTIMIZE": "1", "HOME": os.devnull,
}  # fmt: skip
SETTINGS = [
    blas("SkylakeX", 1, "AVX512F"),  # a turn takes every fourth: this one, torch and the last
    blas("Nehalem", 1),
    blas("Haswell", 2, "AVX2"),
    Setting("narrow", ("rooms", "notebooks"), 2, NARROW, {"numpy": "narrow"}),
    torch("default", "SSE41", "Intel SSE4.1", 1),
    torch("avx2", "AVX2", "Intel AVX2", 2),
    torch("default", "SSE41", "Intel SSE4.1", 2),
    torch("avx2", "AVX2", "Intel AVX2", 1),
    Setting("strange", ("rooms", "commands"), 1, STRANGE, elsewhere=True),
]


# --- asking first ---------------------------------------------------------------------------------


def look():
    """Print, as JSON, what this process computes with; dies where instructions are missing."""
    import numpy as np
    from threadpoolctl import threadpool_info

    for dtype in (np.float32, np.float64):
        np.ones((300, 300), dtype) @ np.ones((300, 300), dtype)
    module = np._core._multiarray_umath
    features = module.__cpu_features__
    wide = [name for name in module.__cpu_dispatch__ if features.get(name)]
    found = {"numpy": " ".join(wide) or "narrow", "features": [f for f in features if features[f]]}
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    found["blas"] = pools[0].get("architecture", "unknown").lower() if pools else "not OpenBLAS"
    found["threads"] = str(pools[0]["num_threads"]) if pools else "unknown"
    with contextlib.suppress(ImportError):
        import torch

        found["torch"] = torch.backends.cpu.get_cpu_capability().lower()
        torch.conv2d(torch.ones(8, 16, 64, 64), torch.ones(16, 16, 3, 3))  # oneDNN says its isa
    print("\n" + json.dumps(found))


def ask(variables):
    """What `look` says in this environment, or None and the reason why it said nothing."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ONEDNN_VERBOSE": "1", **variables}
    command = [sys.executable, "-c", "from tests.machines import look; look()"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        last = (done.stderr.strip() or "nothing was printed").rpartition("\n")[2]
        return None, f"asking ended with {ending(done.returncode)}: {last}"
    found = json.loads(done.stdout.rpartition("\n{")[2].join(["{", ""]))
    isa = re.search(r"cpu,isa:(.+)", done.stdout)
    return {**found, "onednn": isa[1].strip() if isa else "not used"}, None


def ending(code):
    """An exit code in words."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def reason_to_leave_out(setting, plain, ask=ask):
    """Why a setting would test nothing on this machine, or None; `plain` is `look` without it."""
    if setting.needs and setting.needs not in plain["features"]:
        return f"this processor has no {setting.needs}"
    found, reason = ask(setting.variables())
    if reason:
        return reason
    expected = {**setting.shows, "threads": str(setting.threads)}
    ignored = [
        f"{key} is {found.get(key, 'missing')}, not {value}"
        for key, value in expected.items()
        if found.get(key) != value
    ]
    return f"no effect: {', '.join(ignored)}" if ignored else None


# --- running --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a job did: counts, seconds, the first failure (empty: it passed) and its output."""

    counts: tuple[int, int, int]
    seconds: float
    failure: str
    output: str


def start(job, setting, folder):
    """Start a job's process in `folder`; its output goes to a file that is deleted when closed."""
    output = tempfile.TemporaryFile()  # noqa: SIM115
    environment = {**os.environ, **setting.variables(), "PYTHONPATH": str(folder)}
    return subprocess.Popen(
        [sys.executable, *job.command], cwd=folder, env=environment, stdout=output,
        stderr=subprocess.STDOUT, start_new_session=True, umask=0o077 if setting.elsewhere else -1,
    ), output  # fmt: skip


def judge(job, code, output, seconds):
    """A finished job -> Result. The exit code decides; the output says what failed first."""
    counts = job.count(output)
    if not code and counts[0]:
        return Result(counts, seconds, "", output)
    found = re.search(job.failure, output, re.MULTILINE)
    last = output.strip().rpartition("\n")[2]
    failure = " ".join(found[1].split()) if found else f"{ending(code)}: {last}"
    return Result(counts, seconds, failure, output)


def run(setting, folder):
    """Run a setting's jobs side by side, and yield (name, Result) as each of them ends."""
    began, running = time.monotonic(), {}
    try:
        for name in setting.jobs:
            running[name] = start(JOBS[name], setting, folder)
        while running:
            time.sleep(0.1)
            for name in [
                name for name, (process, _) in running.items() if process.poll() is not None
            ]:
                process, output = running.pop(name)
                with output:
                    output.seek(0)
                    text = output.read().decode(errors="replace")
                yield name, judge(JOBS[name], process.returncode, text, time.monotonic() - began)
    finally:
        for process, _ in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def place(setting):
    """The folder to run in: the project, or a copy of it in a folder with an odd name."""
    if not setting.elsewhere:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        left = shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_cache", "out", "runs")
        yield shutil.copytree(ROOT, Path(folder) / NAME, ignore=left)


# --- the table ------------------------------------------------------------------------------------

WIDTHS = "{:<16} {:<18} {:>6} {:>6} {:>7} {:>7}  {}"


def table(settings, others=()):
    """Run the settings and print a row for each job; the exit code. Where the processor can run
    none of them, the first of the others that it can."""
    plain, reason = ask({})
    if reason:
        raise SystemExit(f"test-machines: error: {reason}")
    parts = (f"{key} {plain[key]}" for key in ("blas", "numpy", "torch", "onednn") if key in plain)
    print("here:", ", ".join(parts))
    print(
        WIDTHS.format("setting", "what", "passed", "failed", "skipped", "seconds", "first failure")
    )
    results = [result for setting in settings for result in rows(setting, plain)]
    for setting in others:
        results = results or rows(setting, plain)  # until one runs
    for setting, job, result in results:
        if result.failure:
            print(f"\n--- {setting}, {job}\n{result.output}")
    failed = sum(bool(result.failure) for *_, result in results)
    print(f"{len(results)} jobs ran, {failed} failed")
    return int(failed > 0 or not results)


def rows(setting, plain):
    """Print one setting's rows; its (setting, job, Result)."""
    if reason := reason_to_leave_out(setting, plain):
        print(f"{setting.name:<16} left out: {reason}", flush=True)
        return []
    results = []
    with place(setting) as folder:
        for job, result in run(setting, folder):
            counts = (*result.counts, round(result.seconds))
            print(WIDTHS.format(setting.name, job, *counts, result.failure[:200]), flush=True)
            results.append((setting.name, job, result))
    return results


def git(*arguments):
    """What git says about this checkout, or "" where there is no git or no checkout."""
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8")
        return done.stdout.strip()
    return ""


def turn_of_commit(turns, git=git):
    """1 .. turns: the next with every commit; drawn from its hash in a shallow clone; else 1."""
    if git("rev-parse", "--is-shallow-repository") == "true":
        return int(git("rev-parse", "HEAD"), 16) % turns + 1
    return int(git("rev-list", "--count", "HEAD") or 0) % turns + 1


def turn(text):
    """ "2/4" or "commit/4" -> (2, 4); ArgumentTypeError for anything else."""
    match = re.fullmatch(r"(\d+|commit)/([1-9])", text)
    if match:
        turns = int(match[2])
        which = turn_of_commit(turns) if match[1] == "commit" else int(match[1])
        if 1 <= which <= turns:
            return which, turns
    raise argparse.ArgumentTypeError(f"a turn is 1/4 to 4/4, or commit/4, got {text!r}")


def main(argv=None):
    """The command; returns the exit code."""
    parser = Parser(
        prog="tests.machines", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("settings", nargs="*", metavar="setting", help=f"of {', '.join(names)}")
    parser.add_argument("--turn", type=turn, default=(1, 1), help="2/4: the second quarter")
    parser.add_argument("--list", action="store_true", help="print the settings, run nothing")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.settings) - set(names):
        parser.error(f"no setting is called {sorted(unknown)[0]}: choose from {', '.join(names)}")
    which, turns = arguments.turn
    chosen = [s for s in SETTINGS[which - 1 :: turns] if s.name in (arguments.settings or names)]
    print(f"turn {which} of {turns}: {', '.join(setting.name for setting in chosen)}", flush=True)
    if arguments.list:
        for setting in chosen:
            print(
                f"{setting.name}: {', '.join(f'{k}={v}' for k, v in setting.variables().items())}"
            )
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return table(chosen, () if turns == 1 else SETTINGS[which:] + SETTINGS[: which - 1])
    except KeyboardInterrupt:
        print("test-machines: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
