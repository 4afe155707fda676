"""Commands as real processes: started, interrupted, and what is left of them."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parent.parent
ODD = os.fsdecode("späces and ä".encode())  # a folder's name, also where names are ASCII
SECONDS = 180  # most that a test waits for anything, on a machine that is busy


class Command:
    """`python -m ...` in a session of its own; its process and all below it carry a mark."""

    def __init__(self, *words, cwd, **environment):
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MARK": self.mark, **environment}
        environment.pop("TRITON_INTERPRET", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", *map(str, words)], cwd=cwd, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
            start_new_session=True,
        )  # fmt: skip
        self.said = {"out": "", "err": ""}
        streams = (("out", self.process.stdout), ("err", self.process.stderr))
        self.readers = [threading.Thread(target=self._read, args=pair) for pair in streams]
        for reader in self.readers:
            reader.start()

    def _read(self, name, stream):
        while piece := os.read(stream.fileno(), 2**16):
            self.said[name] += piece.decode(errors="replace")

    def wait_for(self, happened):
        """Until happened(self), for as long as the process runs."""
        end = time.monotonic() + SECONDS
        while not happened(self):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.01)

    def send(self, which):
        """A signal: Ctrl-C to the whole group, as a terminal sends it, others to one process."""
        (os.killpg if which == signal.SIGINT else os.kill)(self.process.pid, which)

    def end(self):
        """Wait for its end -> (exit code, stdout, stderr)."""
        code = self.process.wait(SECONDS)
        for reader in self.readers:
            reader.join(SECONDS)
        return code, self.said["out"], self.said["err"]

    def family(self):
        """{pid: command line} of the processes that carry the mark."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_alive = "\nState:\tZ" not in (folder / "status").read_text("utf-8")
                if is_alive and self.mark.encode() in (folder / "environ").read_bytes():
                    words = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(folder.name)] = words.decode(errors="replace")
        return found

    def left(self, seconds):
        """What of the family still runs after some seconds, at most."""
        end = time.monotonic() + seconds
        while (family := self.family()) and time.monotonic() < end:
            time.sleep(0.05)
        return family


def printed(text):
    """A moment: the process has printed this."""
    return lambda command: text in command.said["out"] + command.said["err"]


def has_child(text):
    """A moment: a process below it runs, with this in its command line."""
    return lambda command: any(text in words for pid, words in command.family().items()
                               if pid != command.process.pid)  # fmt: skip


def minds_signals(command):
    """A moment: Python has started, and the package's handler of SIGTERM stands."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        status = Path(f"/proc/{command.process.pid}/status").read_text("utf-8")
        caught = int(status.split("SigCgt:\t")[1].split()[0], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1)
    return False


def later(moment, seconds):
    """A moment: some seconds after another."""

    def happened(command):
        if not moment(command):
            return False
        time.sleep(seconds)
        return True

    return happened


def assert_interrupted(command, moment, which, line="interrupted"):
    """Send a signal at a moment: one line, exit code 130, and nothing left."""
    try:
        command.wait_for(moment)
        command.send(which)
        code, out, err = command.end()
        assert code == 130, (code, out, err)
        assert "Traceback" not in out + err and "Exception ignored" not in err, err
        assert (out + err).count(line) == 1, (out, err)
        assert not command.left(5)
    finally:
        for pid in command.family():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
