"""Command lines: absurd options, and runs and checkpoints that are damaged."""

import functools
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

from miniflamingo import training
from miniflamingo.__main__ import KERNELS
from miniflamingo.prompt import build_batch
from miniflamingo.worlds.grammar import TOKENIZER
from tests.fuzz import corpus as whole_files
from tests.fuzz import small
from tests.fuzz.damage import damage, damage_tensors, mutate, mutate_text, pick
from tests.fuzz.media import SIZE, call
from tests.fuzz.runner import Target, perform

ROOT = str(Path(__file__).parents[2])


def act_command(case):
    """The case's command: in this process with the small defaults, or "real" in one of its own."""
    module, words = case["module"], case["words"]
    if case.get("real"):
        os.environ["PYTHONPATH"] = ROOT
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
        os.execv(sys.executable, [sys.executable, "-m", module, *words])
    try:
        small.run(module, words)
    except SystemExit as stop:
        return stop.code


# --- options --------------------------------------------------------------------------------------

FROZEN = ["--lm", "runs/lm", "--vision", "runs/vision"]
COMMANDS = [  # module, words, options that keep it short; what stands twice is tried twice as often
    *[("miniflamingo", ["generate"], ["--image", "picture.png", "--text", "what color ?"])] * 4,
    *[("miniflamingo", ["train", "lm"], ["--out", "new", "--steps", "2"])] * 2,
    ("miniflamingo", ["train", "vision"], ["--out", "new", "--steps", "2"]),
    *[("miniflamingo", ["train", "flamingo"], ["--out", "new", "--steps", "2", *FROZEN])] * 3,
    ("miniflamingo", ["evaluate"], ["--samples", "2"]),
    ("miniflamingo", ["demo"], ["--out", "new", "--steps", "1", "--samples", "2"]),
    *[("miniflamingo", ["ship"], ["runs", "--to", "shipped"])] * 2,
    ("miniflamingo", ["sizes"], ["mini"]),
    ("miniflamingo", ["compare"], ["--case", "no row has an image yet"]),
    ("miniflamingo", ["step"], ["--steps", "1"]),
    ("miniflamingo", ["bench"], ["--quick", "--case", "R = 1,"]),
    ("miniflamingo", ["predict"], ["--case", "no such case"]),
    ("miniflamingo", ["gpu"], []),
    *[("miniflamingo", ["train-torch", "flamingo"], ["--out", "new", "--steps", "2", *FROZEN])] * 2,
    ("miniflamingo", ["compile"], []),
]
NUMBERS = ["0", "1", "-1", "2", "3", "1000000", "9" * 30, "0.5", "1e300", "-1e300", "1e-320", "nan",
           "inf", "-inf", "1_0", "٣"]  # fmt: skip
PATHS = ["new", "out", "weights", "picture.png", "notes.txt", "metrics.json", "out/metrics.json",
         "runs", "runs/lm", "runs/lm/model.safetensors", "new/deeper/x", "nowhere/x.json", ".",
         "/dev/null/x", "/proc/none", "clip.gif"]  # fmt: skip
WORDS = ["", " ", "x", "cosine", "merge", "mini", "auto", "cuda", "a red circle", "--", "-x",
         "a\nb", "é", "\u202e", "\ud83d", "\0", "a" * 5000, "%s", "bf16", "mlp"]  # fmt: skip


@functools.cache
def options(module, *words):
    """The options that a command's help names -> {option: whether it takes a value}."""
    show = Target("help", None, lambda case: act_command(case), None, 0)
    done = perform(show, {"module": module, "words": [*words, "--help"]}, Path(__file__).parent)
    found = re.findall(r"^  (--[\w-]+)( \S)?", done.out, re.M)
    return {option: bool(value) for option, value in found}


def draw_command(rng, corpus):
    """A command with up to three options more than it needs, of any value."""
    shutil.copytree(Path(corpus, "user"), ".", dirs_exist_ok=True)
    for name in ("runs", "run"):
        shutil.copytree(Path(corpus, name), name)
    available = [c for c in COMMANDS if HAS_TORCH or c[1][0] not in KERNELS]
    module, words, base = pick(rng, available)
    more, known = [], options(module, *words)
    for _ in range(int(rng.integers(0, 4))):
        option = pick(rng, list(known) or ["--none"])
        values = pick(rng, [NUMBERS, NUMBERS, PATHS, PATHS, WORDS])
        more += [option] + [pick(rng, values)] * (known.get(option, False) and rng.random() < 0.98)
    more += [pick(rng, WORDS + PATHS)] if rng.random() < 0.1 else []
    base = [] if words != ["ship"] and rng.random() < 0.1 else base
    words = [*words, *base, *more]
    real = words[0] == "compile" or (rng.random() < 0.05 and not any(
        re.search("[\0\ud83d]", word) for word in words))  # fmt: skip
    asked = pick(rng, ["SIGINT", "SIGINT", "SIGTERM"])
    return {"module": module, "words": words, "own": own_files([*words, "nowhere"]),
            "real": bool(real), "signal": asked}  # fmt: skip


try:
    # here, so that no case has to wait for it
    import miniflamingo.kernels.tools.compare  # noqa: F401

    HAS_TORCH = True
except ImportError:
    HAS_TORCH = False

# --- checkpoints and runs -------------------------------------------------------------------------


def draw_checkpoint(rng, corpus):
    """A Flamingo's file, wounded, or one time in ten whole."""
    data, whole = Path(corpus, "model/model.safetensors").read_bytes(), rng.random() < 0.1
    Path("model.safetensors").write_bytes(data if whole else damage_tensors(rng, data))
    return {"whole": whole}


def act_checkpoint(case):
    """Load it, and let it read."""

    def work():
        model = training.load_flamingo(Path("model.safetensors"))
        pixels = build_batch([["a red circle"]], TOKENIZER, SIZE)
        model(**pixels.inputs())

    call(work, "accepted" if case["whole"] else None)


SHARDED = ["train-torch", "lm", "--out", "sharded", "--steps", "6", "--checkpoint-every", "4"]
WAYS = {  # folder -> commands that read it
    "run": [("miniflamingo", ["train", "lm", *whole_files.RUN, "--resume"])],
    "sharded": [("miniflamingo", [*SHARDED, how]) for how in ("--resume", "--export")],
    "runs": [
        ("miniflamingo", ["ship", "runs", "--to", "shipped"]),
        ("miniflamingo", ["train", "flamingo", "--out", "new", "--steps", "1", *FROZEN]),
        ("miniflamingo", ["generate", "--checkpoint", "runs/flamingo", "--text", "what color ?"]),
        ("miniflamingo", ["train", "vision", "--out", "runs/vision", "--steps", "2", "--resume"]),
    ],
}


def draw_run(rng, corpus):
    """A folder of a run with one or two files damaged or missing, and a command that reads it."""
    folder = pick(rng, ["run", "run", "runs", "sharded"] if HAS_TORCH else ["run", "runs"])
    shutil.copytree(Path(corpus, folder), folder)
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    for i in rng.permutation(len(files))[: rng.integers(0, 3)]:
        path = files[i]
        if rng.random() < 0.05:
            path.unlink()
        else:
            path.write_bytes(_wound(rng, path.suffix, path.read_bytes()))
    module, words = pick(rng, WAYS[folder])
    return {"module": module, "words": words, "own": own_files(words)}


def draw_foreign(rng, corpus):
    """Another project's checkpoint with one or two files damaged, and a command that reads it."""
    shutil.copytree(Path(corpus, "foreign"), "foreign")
    files = sorted(path for path in Path("foreign").rglob("*") if path.is_file())
    for i in rng.permutation(len(files))[: rng.integers(1, 3)]:
        path = files[i]
        path.write_bytes(_wound(rng, path.suffix, path.read_bytes()))
    where = "foreign/" + pick(rng, [path.name for path in sorted(Path("foreign").iterdir())])
    ask = ["generate", "--text", "red", "--max-new-tokens", "2", "--weights", where]
    ask += ["--image", f"{where}/a.png"] if where.endswith("flamingo") else []
    words = pick(rng, [ask, ask, [*ask, "--stream"], [*ask, "--chat"], ["inspect", where]])
    return {"module": "miniflamingo", "words": words, "own": []}


def own_files(words):
    """What a command may change: the files of the run that it goes on with."""
    resumes = "--out" in words and {"--resume", "--export"} & {*words}
    return [words[len(words) - words[::-1].index("--out")] + "/"] if resumes else []


def _wound(rng, suffix, data):
    if suffix == ".safetensors" and rng.random() < 0.8:
        return damage_tensors(rng, data)
    if suffix == ".json" and rng.random() < 0.7:
        return mutate_text(rng, data.decode()).encode(errors="surrogatepass")
    lines = data.splitlines(keepends=True)
    if suffix == ".jsonl" and rng.random() < 0.7:
        i = int(rng.integers(len(lines)))
        old, new = lines[i], json.dumps(mutate(rng, json.loads(lines[i]))).encode() + b"\n"
        lines[i : i + 1] = pick(rng, [[new], [], [old, old], [old[:-9]], [b"\n", old]])
        return b"".join(lines)
    return damage(rng, data)


def act_run(case):
    """The command; where it went on with a run, the log must tell of every step, once."""
    code = act_command(case)
    if not code and "--resume" in case["words"]:
        out = Path(case["words"][case["words"].index("--out") + 1])
        log = [
            json.loads(line)["step"] for line in (out / "log.jsonl").read_text("utf-8").splitlines()
        ]
        steps = int(case["words"][case["words"].index("--steps") + 1])
        assert log == [*range(1, steps + 1)], f"went on with a log of steps {log}"
    return code
