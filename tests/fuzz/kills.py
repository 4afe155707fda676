"""kill -9 at random moments of a training, and going on, until it ends as if nothing had happened.

Every training is the real command, with smaller models and pools behind its defaults (see small),
and a few of the bridge's with none of that ("at its real size"). Half of the kills come at any time
between the command's start and its end, the others when a save is seen, by its temporary file.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = ["-m", "tests.fuzz.small"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@dataclass(frozen=True)
class Training:
    """A command to kill; share: of `each`, how often."""

    name: str
    words: tuple
    share: float = 1.0
    restarts: int = 0  # how often torchrun starts anew what is killed

    def command(self, out):
        """The command line."""
        return [sys.executable, *self.words, "--out", str(out), "--resume"]


STEPS = ["--steps", "12", "--checkpoint-every", "1"]
WEIGHTS = ROOT / "miniflamingo" / "weights"
FROZEN = ["--lm", str(WEIGHTS / "lm"), "--vision", str(WEIGHTS / "vision")]
LM, VISION, BRIDGE = (["train", stage, *STEPS] for stage in ("lm", "vision", "flamingo"))
SHARDED = [*SMALL, "miniflamingo", "train-torch", *BRIDGE[1:], *FROZEN]
TRAININGS = [
    Training("train lm", (*SMALL, "miniflamingo", *LM)),
    Training("train vision", (*SMALL, "miniflamingo", *VISION)),
    Training("train flamingo", (*SMALL, "miniflamingo", *BRIDGE, *FROZEN)),
    Training("train flamingo, at its real size", ("-m", "miniflamingo", *BRIDGE), 0.1),
    Training("train-torch, both processes killed", (*TORCHRUN, *SHARDED), 0.5),
    Training("train-torch, one of two killed", (*TORCHRUN, "--max-restarts=3", *SHARDED), 0.5, 3),
]


def run(each, seed, only=""):
    """Yield a row of the table for every training."""
    for training in (t for t in TRAININGS if only in t.name):
        with tempfile.TemporaryDirectory() as place:
            yield attack(training, max(1, round(each * training.share)), seed, Path(place))


def attack(training, count, seed, place):
    """Kill a training `count` times, each time another run -> a row."""
    begin, rng = time.monotonic(), random.Random(f"{seed} {training.name}")
    row = {"training": training.name, "kills": 0, "inside a save": 0, "equal": 0, "losses": []}
    if lost := finish(training, place / "whole"):  # without any kill
        return row | {"losses": 1, "found": [lost]}
    seconds = time.monotonic() - begin
    while row["kills"] < count:
        out = place / f"run{row['kills']}"
        inside = killed(training, out, rng, seconds)
        if inside is None:  # it was quicker
            shutil.rmtree(out)
            continue
        row["kills"] += 1
        row["inside a save"] += inside
        lost = finish(training, out) or differences(place / "whole", out)
        row["losses"] += [f"kill {row['kills']}: {lost}"] if lost else []
        row["equal"] += not lost
        print(f"{training.name}: {row['kills']} of {count} {lost or ''}".rstrip(), flush=True)
        shutil.rmtree(out, ignore_errors=True)
    return row | {"losses": len(row["losses"]), "found": row["losses"]}


def start(training, out):
    """The command as a process, in a group of its own; what it prints goes to a file."""
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    one["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see kernels/model/train.py
    with open(f"{out}.txt", "ab") as said:
        return subprocess.Popen(training.command(out), env=os.environ | one, stdout=said,
                                stderr=said, cwd=out.parent, start_new_session=True)  # fmt: skip


def killed(training, out, rng, seconds):
    """Start, and kill at a random moment -> whether inside a save; None if it was too late."""
    process = start(training, out)
    wait_for(rng.random() < 0.5, process, out, rng.random() * seconds)
    time.sleep(rng.random() * 0.002)
    workers = descendants(process.pid)
    if process.poll() is not None:
        return None
    victims = [rng.choice(workers)] if training.restarts and workers else [*workers, process.pid]
    for pid in victims:
        _kill(pid)
    while any(_read(f"/proc/{pid}/maps") for pid in victims):  # until they hold no memory
        time.sleep(0.001)
    inside = bool(_unfinished(out))
    process.wait()
    return inside


def wait_for(save, process, out, seconds):
    """Wait so long; then, or after half of it, for the next save if that is asked for."""
    begin = time.monotonic()
    while process.poll() is None:
        late = time.monotonic() - begin > (seconds / 2 if save else seconds)
        if late and (not save or _unfinished(out)):
            return
        time.sleep(0.0003)


def _unfinished(out):
    """Temporary files of writers, and checkpoints in parts without their last one."""
    parts = [p for p in out.glob("checkpoints/*") if not (p / ".metadata").exists()]
    return [*out.glob(".*.safetensors.*"), *parts]


def descendants(pid):
    """All processes below one, the nearest first."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, _read(path).split()):
            found += [child, *descendants(child)]
    return found


def _read(path):
    try:
        return Path(path).read_text("utf-8")
    except OSError:  # it has just ended
        return ""


def _kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def finish(training, out):
    """Go on until the end -> what went wrong, or None."""
    process = start(training, out)
    try:
        code = process.wait(300)
    except subprocess.TimeoutExpired:
        for pid in [*descendants(process.pid), process.pid]:
            _kill(pid)
        return "hang: going on took more than 300 s"
    return f"exit code {code}: {Path(f'{out}.txt').read_text('utf-8')[-600:]}" if code else None


def differences(whole, out):
    """Which files are not what they are without a kill, byte for byte; None if all are."""
    names = ("model.safetensors", "log.jsonl")
    different = [n for n in names if (whole / n).read_bytes() != (out / n).read_bytes()]
    return f"{different} differ" if different else None
