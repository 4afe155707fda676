"""One case at a time, each in a process of its own, and judged from outside.

A case is a folder of files and some JSON values, both drawn from a seed. Its process is a fork, so
that a hang, a crash, or all the memory of the machine ends that case alone. What stood in the
folder before is compared with what stands there afterwards: whatever is changed is a loss.
"""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

MEMORY = 3 << 30  # bytes a case may ask for, beyond what its process began with
NO_ERROR = r"streaming \d|miniflamingo: warning: "  # what may be said before one
OUTCOMES = ("accepted", "refused", "skipped", "stopped")


class Failure(Exception):
    """What must not happen: a traceback, a hang, a loss, many lines for one error."""


class Done(NamedTuple):
    """What a case's process left behind: its exit code or "hang", and files that it changed."""

    code: int | str
    out: str
    err: str
    changed: list
    left: list  # command lines of processes that outlived it
    case: dict


@dataclass(frozen=True)
class Target:
    """A kind of input.

    draw(rng, corpus) fills the present folder and returns the case, which JSON can hold. act(case)
    runs there, in the case's own process, and returns its exit code. judge(done) returns what
    became of the inputs, as {outcome: count}, or raises Failure. After `patience` seconds of
    computing, where there is one, the process gets the case's "signal"; after `limit` it hangs.
    """

    name: str
    draw: Callable
    act: Callable
    judge: Callable
    short: int  # cases of the short run in the test suite
    limit: float = 20
    patience: float | None = None


@dataclass
class Result:
    """A row of the table."""

    target: str
    tried: int = 0
    counts: Counter = field(default_factory=Counter)
    failures: Counter = field(default_factory=Counter)  # by kind
    again: dict = field(default_factory=dict)  # kind -> the folder of its first case
    seconds: float = 0.0

    def row(self):
        """As JSON values."""
        outcomes = {name: self.counts[name] for name in OUTCOMES}
        failed = sum(self.failures.values())
        return {"target": self.target, "tried": self.tried, **outcomes, "failures": failed,
                "seconds": round(self.seconds, 1)}  # fmt: skip


# --- a case's process -----------------------------------------------------------------------------


def perform(target, case, folder):
    """Act on a case in a process of its own -> Done."""
    before = snapshot(folder)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            _become(target.act, case, folder, out, err)
        code = _wait(pid, target, signal.Signals[case.get("signal", "SIGINT")])
        left = _end_group(pid)
        printed = [_text(file) for file in (out, err)]
    after = snapshot(folder)
    changed = [name for name, content in before.items() if after.get(name) != content]
    return Done(code, *printed, changed, left, case)


def _become(act, case, folder, out, err):
    """The rest of the forked process's life."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.resetwarnings()  # those of the tests are stricter than a user's
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        now = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
        code = act(case) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid, target, asked):
    """The exit code; "hang" when there is none within the limit."""
    begin, patience = time.monotonic(), target.patience
    while (spent := _seconds(pid, begin)) < target.limit:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if patience is not None and spent > patience:
            # Ctrl-C reaches all processes of a terminal's foreground, kill only the one it names
            (os.killpg if asked == signal.SIGINT else os.kill)(pid, asked)
            patience = None
        time.sleep(0.003)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hang"


def _seconds(pid, begin):
    """What a process has computed; where that is more, a sixth of the time since it began: other
    work on the machine is not its fault."""
    ticks = Path(f"/proc/{pid}/stat").read_text("utf-8").rsplit(")", 1)[1].split()[11:13]
    computed = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return max(computed, (time.monotonic() - begin) / 6)


def _end_group(group, grace=2.0):
    """Kill what is left of a process group -> the names of what was still there after a moment."""
    begin = time.monotonic()
    while (left := list(_members(group))) and time.monotonic() - begin < grace:
        time.sleep(0.02)
    if left:
        os.killpg(group, signal.SIGKILL)
    return left


def _members(group):
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = path.read_text("utf-8").split("(", 1)[1].rsplit(")", 1)
        except OSError:  # it has just ended
            continue
        if int(rest.split()[2]) == group and rest.split()[0] != "Z":
            yield name


def _text(file):
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def snapshot(folder):
    """{relative path: digest} of every file below a folder."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha1(p.read_bytes()).hexdigest() for p in files}


# --- what may happen ------------------------------------------------------------------------------


def no_accident(done):
    """Failure for a hang, a crash, a traceback, or processes left behind."""
    if done.code == "hang":
        raise Failure("hang: it had not ended within its time")
    if "Traceback" in done.err:
        raise Failure(done.err.split("Traceback", 1)[1][-3000:])
    if done.code < 0:
        raise Failure(f"died of {signal.Signals(-done.code).name}")
    if done.left:
        raise Failure(f"left running: {done.left}")


def judge_command(done):
    """Of a command: answered, refused in one line, or stopped; and no file of the user touched."""
    no_accident(done)
    lines = _said(done.err)
    own = tuple(done.case.get("own", [])) if done.code != 2 else ()
    if lost := [name for name in done.changed if not name.startswith(own or "\0")]:
        raise Failure(f"lost (exit code {done.code}): {lost}\n" + "\n".join(lines))
    if done.code in (1, 2):
        usage = bool(lines) and lines[0].startswith("usage:")
        lines = [line for line in lines if not re.match(NO_ERROR, line)]
        one = len(lines) == 1 and re.match(r"miniflamingo: error: \S", lines[0])
        if not usage and not one:
            raise Failure(f"exit code {done.code} with {len(lines)} lines:\n" + "\n".join(lines))
        return {"refused": 1}
    if done.code == 130 and len(lines) > 1:
        raise Failure(f"stopped with {len(lines)} lines:\n" + "\n".join(lines))
    if done.code not in (0, 130):
        raise Failure(f"exit code {done.code}:\n" + done.err[-1000:])
    return {"stopped" if done.code else "accepted": 1}


def _said(err):
    """The lines on stderr, without progress bars."""
    bar = re.compile(r"\d%\|.*\| \d+/|\d+it \[|it/s\]")
    pieces = re.split(r"[\r\n]|\x1b\[A", err)
    return [piece for piece in pieces if piece.strip() and not bar.search(piece)]


def judge_calls(done):
    """Of calls from Python: act printed {outcome: count} as its last line."""
    no_accident(done)
    if done.code != 0:
        raise Failure(f"exit code {done.code}:\n" + done.err[-1000:])
    return json.loads(done.out.splitlines()[-1])


def kind_of(failure):
    """A failure's own line without what differs from case to case, to count failures by."""
    lines = [line for line in str(failure).splitlines() if line.strip()] or [""]
    error = re.compile(r"[| ]{,4}[\w.]*(Error|Exception|Interrupt)\b")
    raised = [line for line in lines if error.match(line)]
    line = lines[0] if re.match("lost|exit|stopped|left", lines[0]) else [lines[-1], *raised][-1]
    return re.sub(r"'[^']*'|\"[^\"]*\"|[\w./-]*/[\w./-]*|-?\d[\d.e+-]*", "#", line)[:110]


# --- attacks --------------------------------------------------------------------------------------


def make(target, seed, number, corpus, folder):
    """Draw case `number` into a new folder -> its JSON values."""
    Path(folder).mkdir(parents=True)
    rng = np.random.default_rng([seed, number, *target.name.encode()])
    before = os.getcwd()
    os.chdir(folder)
    try:
        return target.draw(rng, corpus)
    finally:
        os.chdir(before)


def attack(targets, corpus, keep, seed=0, seconds=None, say=print):
    """Try cases of all targets in turn for some seconds, or the short run's -> [Result].

    Each kind of failure keeps the files of its first case in a folder below `keep`.
    """
    results = {target.name: Result(target.name) for target in targets}
    begin = time.monotonic()
    while time.monotonic() - begin < (seconds or float("inf")):
        todo = [t for t in targets if seconds or results[t.name].tried < t.short]
        if not todo:
            break
        target = min(todo, key=lambda t: results[t.name].seconds)
        attempt(target, corpus, Path(keep), seed, results[target.name], say)
    return list(results.values())


def attempt(target, corpus, keep, seed, result, say):
    """One case more of a target's Result."""
    begin, number = time.monotonic(), result.tried
    with tempfile.TemporaryDirectory() as place:
        case = make(target, seed, number, corpus, Path(place) / "case")
        try:
            result.counts.update(target.judge(perform(target, case, Path(place) / "case")))
        except Failure as failure:
            kind = kind_of(failure)
            result.failures[kind] += 1
            if kind not in result.again:
                folder = keep / f"{target.name.replace(' ', '-')}-{seed}-{number}"
                result.again[kind] = folder
                _keep(target, seed, number, corpus, folder, failure)
                say(f"{target.name}: {kind}\n    python -m tests.fuzz again {folder}")
                sys.stdout.flush()
    result.tried += 1
    result.seconds += time.monotonic() - begin


def _keep(target, seed, number, corpus, folder, failure):
    shutil.rmtree(folder, ignore_errors=True)
    case = make(target, seed, number, corpus, folder / "files")
    about = {"target": target.name, "seed": seed, "number": number, "case": case}
    (folder / "case.json").write_text(json.dumps(about, indent=1), "utf-8")
    (folder / "found.txt").write_text(str(failure), errors="backslashreplace", encoding="utf-8")


def again(targets, folder):
    """Run a kept case once more -> Done, what became of it (a dict, or the Failure)."""
    about = json.loads((Path(folder) / "case.json").read_text("utf-8"))
    target = next(target for target in targets if target.name == about["target"])
    with tempfile.TemporaryDirectory() as place:
        files = shutil.copytree(Path(folder) / "files", Path(place) / "case", symlinks=True)
        done = perform(target, about["case"], files)
        try:
            return done, target.judge(done)
        except Failure as failure:
            return done, failure
