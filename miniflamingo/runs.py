"""A run's folder: one process in it, what killed ones left behind, its log, what it has cost.

Shared by miniflamingo.training.Run and the runs of kernels/model/train.py.
"""

import hashlib
import io
import json
import os
import shlex
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from miniflamingo.checks import from_json
from miniflamingo.command import some
from miniflamingo.module import write_atomically
from miniflamingo.tensorfile import shown

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

FILES = ("checkpoint.safetensors", "model.safetensors", "log.jsonl", "run.json")  # ours, in a run


class Lock:
    """Keeps two processes out of one run's folder, which is made where there is none.

    A lock of the operating system on the file `.lock`: it ends with the process, however that ends.
    ValueError when another process has it, or the folder cannot be written to.
    """

    def __init__(self, folder):
        self.folder, self.file = Path(folder), None
        self.acquire()

    def acquire(self):
        """Take the lock, unless this object has it already."""
        if self.file is not None:
            return
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            # not where a link leads
            flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            self.file = open(os.open(self.folder / ".lock", flags, 0o644), "wb")  # noqa: SIM115 (held until release)
        self._lock()
        with self._writing():
            tempfile.TemporaryFile(dir=self.folder).close()

    @contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            self.release()
            why = error.strerror
            raise ValueError(f"cannot write to the folder {self.folder}: {why}") from None

    def _lock(self):
        try:
            if "fcntl" in globals():
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)
        except (BlockingIOError, PermissionError):
            self.release()
            raise ValueError(f"another process is training in the folder {self.folder}") from None
        except OSError as error:  # a file system without locks
            warnings.warn(f"{self.folder} cannot be locked: {error.strerror}", stacklevel=3)

    def release(self):
        """Let others in; nothing happens where that was done before."""
        if self.file is not None:
            self.file.close()
            self.file = None


def sweep(folder):
    """Remove the temporary files that killed writers left in a run's folder; call it locked."""
    for path in Path(folder).glob(".*"):
        name, _, end = path.name[1:].rpartition(".")
        if name in FILES and len(end) == 8 and set(end) <= set("0123456789abcdef"):
            path.unlink(missing_ok=True)


def check_free(folder, resume, checkpoint_every, beginning=("log.jsonl",)):
    """ValueError if a folder without a checkpoint, or one that is not to be resumed, holds a run.

    Resumed, what stands there at the `beginning` will do, with a log of a few steps: of a process
    that was killed before its first checkpoint.
    """
    found = [name for name in (*FILES, "checkpoints") if (folder / name).exists()]
    if not resume and found:
        raise ValueError(
            f"{folder} already holds a run: choose another folder, or resume it (found {found[0]})"
        )
    steps = count_records(folder / "log.jsonl") if "log.jsonl" in found else 0
    if set(found) - set(beginning) or steps > checkpoint_every:
        found = f"{', '.join(found)} of {steps} steps"
        raise ValueError(f"{folder} holds {found}, but no checkpoint to go on from")


def check_unfinished(folder, step, steps):
    """ValueError if a run that has not reached its last step has what only its end writes."""
    found = [name for name in ("model.safetensors", "run.json") if (folder / name).exists()]
    if found and step < steps:
        raise ValueError(
            f"{folder / found[0]} is in the way: the run is at step {step} of {steps}, and has not "
            "made it: move it, or choose another folder"
        )


# --- the log --------------------------------------------------------------------------------------


def cut_log(path, step):
    """Drop the log's lines behind `step`, which will be made again, and a half-written one.

    ValueError that names file and line unless steps 1..step stand there whole; nothing is dropped
    then.
    """
    data = path.read_bytes() if path.exists() else b""
    lines = io.BytesIO(data).readlines()
    for number in range(1, step + 1):
        line = lines[number - 1] if number <= len(lines) else None
        if fault := _fault(line, number):
            raise ValueError(
                f"{path}, line {number}: {fault}, but the checkpoint is at step {step}"
            )
    kept = b"".join(lines[:step])
    if kept != data or not path.exists():
        write_atomically(path, kept)


def count_records(path):
    """How many steps a log of a run without a checkpoint has; ValueError if it is none."""
    lines = io.BytesIO(path.read_bytes()).readlines()
    for number, line in enumerate(lines, 1):
        cut_off = number == len(lines) and not line.endswith(b"\n")
        if not cut_off and (fault := _fault(line, number)):
            raise ValueError(f"{path} is in the way, no log of a run: line {number}: {fault}")
    return len(lines)


def _fault(line, step):
    """What is wrong with a line of the log that should hold the record of `step`, or None."""
    if line is None:
        return "the log ends before it"
    if not line.endswith(b"\n"):
        return "it is cut off"
    try:
        record = from_json(line.decode(), "it")
    except ValueError as error:
        return shown(error, 120)
    found = record.get("step") if isinstance(record, dict) else None
    if type(found) is not int or found != step:
        return f"expected the record of step {step}, got {shown(line[:40])}"
    return None


# --- checkpoints ----------------------------------------------------------------------------------


def check_identity(folder, theirs, ours):
    """ValueError that lists the differences of a run's config from the one to be resumed."""
    theirs, ours = (json.loads(json.dumps(config)) for config in (theirs, ours))  # tuples as lists
    if different := list(differences(theirs, ours)):
        different = some(different, "\n  ")
        raise ValueError(f"the run in {folder} has another config:\n  {different}")


def differences(theirs, ours, path=""):
    """Yield 'optimiser.steps: 1500 there, 2000 here' for every value that differs."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            yield from differences(theirs.get(key), ours.get(key), f"{path}.{key}".lstrip("."))
    elif theirs != ours:
        yield f"{shown(path)}: {shown(theirs)} there, {shown(ours)} here"


def digest(parts):
    """sha256 over byte strings, each with its length."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()


def file_digest(path):
    """sha256 of what a file holds."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            total.update(block)
    return total.hexdigest()


def checked_step(value, steps, where):
    """A checkpoint's step; ValueError unless it is an int in 0..steps."""
    if type(value) is not int or not 0 <= value <= steps:
        raise ValueError(f"{where}: step must be an integer in 0..{steps}, got {shown(value)}")
    return value


def checked_rng(value, where):
    """A checkpoint's random state, taken up once to see that it is one; ValueError if not."""
    try:
        np.random.default_rng(0).bit_generator.state = value
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"{where}: rng is no state of a generator: {shown(error)}") from None
    return value


class Costs:
    """The parts of a run: [{"command", "processor_seconds"}, ...], the last of them this one.

    They lie in the checkpoints, so that what a killed process has cost counts up to its last one.
    """

    def __init__(self):
        self.before, self.start = [], time.process_time()
        self.command = shlex.join(["python", "-m", "miniflamingo", *sys.argv[1:]])

    def seconds(self):
        """The processor time of this process since it has taken up the run."""
        return time.process_time() - self.start

    def parts(self, seconds):
        """All parts up to now, the last one of so many seconds."""
        return [*self.before, {"command": self.command, "processor_seconds": round(seconds, 3)}]

    def load(self, parts, where):
        """Take up the parts of a checkpoint; ValueError unless they are as `parts` made them."""
        whole = isinstance(parts, list) and all(isinstance(part, dict) for part in parts)
        for part in parts if whole else ():
            seconds = part.get("processor_seconds")
            number = isinstance(seconds, (int, float)) and 0 <= seconds < float("inf")
            whole = whole and isinstance(part.get("command"), str) and number
        if not whole:
            raise ValueError(f"{where}: parts must be a list of commands with their seconds")
        self.before = parts


def seconds(parts):
    """What the parts of a run have cost together."""
    return sum(part["processor_seconds"] for part in parts)
