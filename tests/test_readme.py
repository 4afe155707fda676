"""Every command that the READMEs and the commands' docstrings give is run, as it is written there.

A command that is not in COMMANDS makes a test fail until it says how it is tried, and so does one
in COMMANDS that nobody gives any more.
"""

import ast
import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from miniflamingo import __main__ as miniflamingo_main
from miniflamingo import demo, evaluation, training
from miniflamingo.cost import scaling
from miniflamingo.worlds import datasets, shapes
from tests.interop import made
from tests.pages import PAGES

ROOT = Path(__file__).parent.parent
READMES = (*PAGES, "notebooks/README_students.md")
PROGRAMS = r"make|python[\d.]*|torchrun|pip|jupyter|nbgrader"
COMMAND = re.compile(rf"(?:\w+=\S+\s+)*(?:\.venv/bin/)?(?:{PROGRAMS})\s+\S.*")


def texts():
    """{where: text} of everything that gives commands."""
    found = {name: (ROOT / name).read_text(encoding="utf-8") for name in READMES}
    for package in ("miniflamingo", "kernels", "notebooks"):
        for file in sorted((ROOT / package).rglob("*.py")):
            if "source" not in file.parts:
                text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
                found[file.relative_to(ROOT).as_posix()] = text
    return found


def commands(text):
    """The commands of a text, in indented blocks and in code spans, without their comments."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = re.findall(r"^    (\S.*)$", re.sub(r"\\\n\s*", "", text), re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", re.sub(r"\n(?!\n)", " ", text))
    for line in lines + spans:
        line = re.split(r"\s{2,}#|\s{2,}\S|\s#\s", re.sub(r"^\.venv/bin/", "", line.strip()))[0]
        if COMMAND.fullmatch(line):
            yield " ".join(line.split())


# --- how each is tried ----------------------------------------------------------------------------

ELSEWHERE = {  # not ours, or a whole test of its own
    "jupyter lab": "opens a browser",
    "jupyter lab notebooks/student": "opens a browser",
    "nbgrader autograde 06": "tests/course/test_release.py",
    "nbgrader export": "tests/course/test_release.py",
    "nbgrader generate_assignment 06": "tests/course/test_release.py",
    'pip install ".[kernels]"': "tests/test_packaging.py compares the extras",
    'pip install "transformers>=5,<6"': "tests/test_packaging.py compares the extras",
    'pip install -e ".[course,kernels]"': "tests/test_packaging.py compares the extras",
    'pip install -e ".[course]"': "tests/test_packaging.py compares the extras",
    "pip install .": "installs",
    "python -m http.server -d out/site": "serves until it is stopped",
    "python -m venv .venv": "installs",
    "python -m jupyterlab notebooks/student": "opens a browser",
    "python -m miniflamingo generate --weights idefics-9b --stream --image a.png --text "
    '"what color ?"': "tests/interop/test_generation.py, with a small one",
    "python -m miniflamingo inspect idefics-9b --plot gates.png": "tests/interop/"
    "test_inspection.py, with a small one",
    "python -m miniflamingo gpu --minutes 9 --out FILE": "tests/kernels/test_gpu.py",
    "python -m miniflamingo ablate --run runs/ablate --jobs 2 --torch --json "
    "ablations.json": "tests/ablations/test_commands.py, with few steps",
    "python -m miniflamingo ablate --write": "tests/ablations/test_commands.py compares the page",
    "python -m miniflamingo limits": "tests/test_limits.py",
    "python -m miniflamingo limits --json limits.json": "tests/test_limits.py",
    "python -m miniflamingo real": "tests/real/test_page.py, with small parts",
    "python -m miniflamingo real fetch": "tests/real/test_parts.py, with small parts",
    "python -m miniflamingo real front": "tests/real/test_page.py, with small parts",
    "python -m miniflamingo real table": "tests/real/test_page.py",
    "python -m miniflamingo real table --write": "tests/real/test_page.py compares the README",
    "python -m miniflamingo real train --run runs/real/0 --seed 0": "tests/real/test_page.py, "
    "with small parts",
    "python -m miniflamingo real measure runs/real/0 --json runs/real/figures.json": "tests/real/"
    "test_page.py, with small parts",
    "python -m miniflamingo real ship runs/real/0 runs/real/figures.json": "tests/real/"
    "test_page.py, with small parts",
    "python -m miniflamingo real without --run runs/real/without --json without.json": "tests/real/"
    "test_without.py, with small parts",
    "python -m miniflamingo real speed --json speed.json": "tests/real/test_without.py",
    "python -m miniflamingo real examples --json miniflamingo/real/results/examples.json": "tests/"
    "real/test_examples.py, with small parts",
    'python -m miniflamingo generate --real --image photo.jpg --text "What is this?"': "tests/real/"
    "test_page.py, with small parts",
    "python -m miniflamingo fewshot": "tests/fewshot/test_commands.py",
    "python -m miniflamingo fewshot train runs/glyphs/0 --seed 0": "tests/fewshot/"
    "test_commands.py, with small models",
    "python -m miniflamingo fewshot measure runs/glyphs/0 --json runs/glyphs/figures.json": "tests/"
    "fewshot/test_commands.py, with small models",
    "python -m miniflamingo fewshot train runs/glyphs/0 --seed 0 --torch": "tests/fewshot/"
    "test_commands.py, with small models",
    "python -m miniflamingo fewshot measure runs/glyphs/0 runs/glyphs/1 runs/glyphs/2 "
    "runs/glyphs/3 runs/glyphs/4 --split test --json figures.json": "tests/fewshot/"
    "test_commands.py, with small models",
    "python -m miniflamingo fewshot table --write": "tests/fewshot/test_commands.py",
    "python -m miniflamingo fewshot experiment classes --out runs/glyphs --json "
    "classes.json": "tests/fewshot/test_commands.py, with small models",
    "python -m miniflamingo fewshot experiment classes --out runs/glyphs --json "
    "classes.json --seeds 0 1 --torch": "tests/fewshot/test_commands.py, with small models",
    "python -m miniflamingo.worlds.glyph_masks": "tests/worlds/test_glyphs.py draws a part",
    "python -m miniflamingo.worlds.glyph_masks --write": "tests/worlds/test_glyphs.py compares",
    "python -m pytest": "these tests",
    "python -m pytest -n 2 --dist loadfile": "these tests",
    "python -m pytest tests/course": "these tests",
    "python -m pytest tests/course/test_site.py -rs": "these tests",
    "python -m pytest tests/interop": "these tests",
    "python -m tests.fuzz": "tests/fuzz/test_fuzz.py runs its short run",
    "python -m tests.fuzz kills --each 20": "its figures are in tests/fuzz/results.json",
    "python -m tests.fuzz table": "tests/fuzz/test_fuzz.py compares it with the README",
    "python -m tests.fuzz table --write": "tests/fuzz/test_fuzz.py compares it with the README",
    "python -m tests.interop": "tests/interop/test_table.py",
    "python -m tests.interop table --write": "tests/interop/test_table.py compares the README",
    "python -m tests.machines": "tests/test_machines.py",
    "python -m ruff check .": "CI runs it",
    "python -m ruff format --check .": "CI runs it",
}
# a list of commands, or a reference to one
NAMED = {
    "python -m miniflamingo compare [--json FILE] [--device DEVICE]",
    "python -m miniflamingo demo | train | evaluate | generate | ship | sizes | plan | scaling | "
    "inspect",
    "python -m miniflamingo plan",
    "python -m miniflamingo bench-generate [--json FILE] [--larger]",
    'python -m miniflamingo generate --weights FOLDER_OR_FILE --text "The capital of France is"',
    "python -m miniflamingo inspect CHECKPOINT [--plot FILE.png]",
    "python -m miniflamingo train",
}
RUN_HERE = {
    "python -m miniflamingo ablate",
    "python -m miniflamingo ablate --plot ablations.png",
    "python -m miniflamingo ablate --stability",
    "python -m miniflamingo fewshot table",
    "python -m miniflamingo fewshot table classes",
    "python -m miniflamingo fewshot plot classes classes.png",
    "python -m miniflamingo bench",
    "python -m miniflamingo bench --json FILE --plots DIR",
    "python -m miniflamingo compare",
    "python -m miniflamingo compile",
    "python -m miniflamingo compile --check --full",
    "python -m miniflamingo compile --full --json FILE",
    "python -m miniflamingo predict",
    "python -m miniflamingo step",
    "python -m miniflamingo train-torch flamingo --out runs/big",
    "python -m miniflamingo train-torch flamingo --out runs/big --resume",
    "python -m miniflamingo train-torch flamingo --out runs/bridge",
    "python -m miniflamingo train-torch flamingo --out runs/bridge --export",
    "python -m miniflamingo train-torch flamingo --out runs/bridge --resume",
    "python -m miniflamingo demo",
    "python -m miniflamingo demo --full",
    "python -m miniflamingo evaluate",
    "python -m miniflamingo evaluate --checkpoint runs/flamingo",
    "python -m miniflamingo evaluate --checkpoint runs/0/flamingo --json "
    "runs/0/flamingo/metrics.json",
    "python -m miniflamingo bench-generate",
    "python -m miniflamingo bench-generate --table",
    'python -m miniflamingo generate --image a.png --text "what color ?"',
    'python -m miniflamingo generate --weights smollm2.gguf --text "The capital of France is"',
    "python -m miniflamingo inspect runs/flamingo --plot gates.png",
    "python -m miniflamingo plan --fsdp2",
    "python -m miniflamingo plan --model 80B --devices 16 --device h200",
    "python -m miniflamingo plan --paper",
    "python -m miniflamingo scaling",
    "python -m miniflamingo ship runs/0 runs/1 runs/2",
    "python -m miniflamingo sizes",
    "python -m miniflamingo train flamingo --lm runs/lm --vision runs/vision --out runs/flamingo",
    "python -m miniflamingo train flamingo --seed 0 --lm runs/0/lm --vision runs/0/vision "
    "--out runs/0/flamingo",
    "python -m miniflamingo train lm --out runs/lm",
    "python -m miniflamingo train lm --seed 0 --out runs/0/lm",
    "python -m miniflamingo train vision --out runs/vision",
    "python -m miniflamingo train vision --seed 0 --out runs/0/vision",
    "python -m miniflamingo.course.quiz",
    "python -m miniflamingo.course.quiz 06",
    "python -m miniflamingo.course.release",
    "python -m miniflamingo.course.release --nbgrader",
    "python -m miniflamingo.course.render",
    "python -m miniflamingo.course.render --check",
    "python -m miniflamingo.course.render 06",
    "python -m miniflamingo.course.site.build",
    "python -m miniflamingo.course.site.build --no-lite",
    "python -m miniflamingo.course.site.build 06 --no-lite",
    "python -m miniflamingo.course.slides",
    "python -m miniflamingo.course.slides 06",
    "python -m miniflamingo.course.slides 06 --teacher",
    "python -m miniflamingo.course.timings",
    "python -m miniflamingo.course.timings --table",
    "python -m miniflamingo.course.timings 06",
}


def given():
    """Every command that a text gives, {command: where}; how make and torchrun begin one aside."""
    return {c: where for where, text in texts().items() for c in commands(text)}


def behind(command):
    """What `make ...` would run, without the installation: the commands of `make -n`."""
    words = [w for w in shlex.split(command) if not re.match(r"\w*(INDEX_URL|PYODIDE|LITE)=", w)]
    # without what the make that perhaps runs this test hands on
    handed_on = re.compile("M(AKE|FLAGS)|ARGS|SEEDS")
    environment = {k: v for k, v in os.environ.items() if not handed_on.match(k)}
    done = subprocess.run(
        [words[0], "-n", *words[1:]], cwd=ROOT, env=environment, capture_output=True,
        encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    recipe = done.stdout.replace("\\\n", " ").replace("$seed", "0")
    for line in re.findall(r"/python (-m (?!pip|venv)[^;&|>\n]*)", recipe):
        yield f"python {' '.join(line.split())}"


def test_what_make_hands_on_to_its_commands_changes_no_other_make(monkeypatch):
    expected = list(behind("make test"))
    for name, value in dict(MAKEFLAGS=" -- ARGS=--turn\\ 1/4", ARGS="--turn 1/4").items():
        monkeypatch.setenv(name, value)
    assert list(behind("make test")) == expected != []


def plain(command):
    """Without settings of the environment, and without torchrun and its options."""
    command = re.sub(r"^(\w+=\S+ )+", "", command)
    return re.sub(r"^torchrun .*?(?=-m )", "python ", command)


def all_commands():
    """What is given, and what is behind make."""
    found = set()
    for command in given():
        is_make = plain(command).startswith("make")
        found |= set(behind(command)) if is_make else {plain(command)}
    return found


def test_every_command_that_is_given_is_tried_and_no_other():
    known = RUN_HERE | NAMED | ELSEWHERE.keys()
    unknown = {c: where for c, where in given().items()
               if not plain(c).startswith("make") and plain(c) not in known}  # fmt: skip
    assert not unknown, "say in tests/test_readme.py how these are tried"
    assert sorted(all_commands()) == sorted(known)


@pytest.mark.parametrize("command", sorted(c for c in NAMED if "|" in c or "[" in c))
def test_what_a_list_names_exists(command):
    module = import_module(
        "miniflamingo.kernels.commands"
        if {"compare", "bench-generate"} & {*command.split()}
        else "miniflamingo.__main__"
    )
    actions = next(a for a in module.parser()._actions if a.dest == "command").choices
    for name in re.findall(r"\b[a-z-]+", re.sub(r"\[.*?\]", "", command).split(None, 3)[-1]):
        assert name in actions
    for option in re.findall(r"\[(--\w+)", command):
        assert option in actions[command.split()[3]].format_help()


@pytest.mark.parametrize("command", sorted(c for c in given() if "torchrun" in c))
def test_torchrun_takes_its_options(command):
    pytest.importorskip("torch")
    from torch.distributed.run import get_args_parser

    words = shlex.split(command)
    arguments = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert arguments.module and arguments.training_script == "miniflamingo"


# --- small, and otherwise as written --------------------------------------------------------------


class Stop:
    """An event that is set the third time it is asked: a training ends after two steps or three."""

    asked = 0

    def is_set(self):
        self.asked += 1
        return self.asked > 2


def shrink(patch, tmp_path):
    """Make what takes long short, and move what is written beside the sources to tmp_path."""
    draw = datasets.Pool.draw

    def few(encoder, seed, split, *sizes, **others):
        if "per_class" in others:  # an evaluation's, which is small by its samples
            return draw(encoder, seed, split, **others)
        return draw(encoder, seed, split, 2, 8, 4, sizes[3], 1, **others)

    patch.setattr(training, "asked_to_stop", lambda: contextlib.nullcontext(Stop()))
    patch.setattr(training.datasets.Pool, "draw", few)
    examine = evaluation.Evaluation

    def brief(model, samples, *args, **kwargs):
        assert samples in (300, 1000)  # the defaults of demo and evaluate
        return examine(model, 8, per_class=20)

    patch.setattr(miniflamingo_main, "Evaluation", brief)
    patch.setattr(demo, "Evaluation", brief)
    case = scaling.CASES["self-attention"]
    small = dataclasses.replace(case, sizes=((4, 8), (4, 8)))
    patch.setattr(scaling, "CASES", {case.name: small})
    train_live = demo.train_live
    patch.setattr(demo, "train_live", lambda folder, steps, bar: live(train_live, folder, steps))


def live(train_live, folder, steps):
    """demo.train_live, two steps of the 300, or of all."""
    assert steps in (300, training.BridgeRun().optimiser.steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "asked_to_stop", lambda: contextlib.nullcontext(Event()))
        return train_live(folder, 2, False)


def shrink_kernels(patch):
    """The same for the commands of kernels."""
    from miniflamingo.kernels.model import resident, step
    from miniflamingo.kernels.tools import bench, bench_generate, compare, predict
    from miniflamingo.kernels.tools import compile as compiler

    one = {"images": compare.KERNELS[0].cases["adjacent images"]}
    patch.setattr(compare, "KERNELS", [dataclasses.replace(compare.KERNELS[0], cases=one)])
    patch.setattr(compare, "DTYPES", {"fp32": compare.DTYPES["fp32"]})
    limits = {"copy_bytes_per_second": 1e9, "product_side": 8, "flops_per_second": 1e9}
    patch.setattr(bench, "measure_limits", lambda *args: limits)
    patch.setattr(bench, "measure_all", lambda *args: False)
    patch.setattr(bench, "draw_figures", lambda *args: None)
    row = dict.fromkeys(("prefill_s", "ms_a_token", "peak_mb"), 1.0)
    patch.setattr(bench_generate, "fresh", lambda work, *arguments: row | {"tokens": [1, 2]})
    patch.setattr(bench_generate, "write_table", lambda: 0)
    patch.setattr(predict, "predict_case", lambda case: predict.committed()["records"][:1])
    patch.setattr(step, "measure", lambda steps: {"numpy": 2.0, "torch": 1.0, "ratio": 2.0})
    held = dict.fromkeys(("frozen weights", "trained weights", "gradients", "moments"), 8)
    patch.setattr(resident, "measure", lambda *args: [held, held])
    patch.setattr(compiler, "missing", lambda: None)
    sizes = ("sm_90", {"num_warps": 4}, 0, 100, 0, 0, 1, 1, {})
    result = compiler.Compiled("_forward", "bf16", 64, 64, *sizes)
    patch.setattr(compiler, "compile_all", lambda jobs: [result] * len(jobs))
    patch.setattr(compiler, "differences", lambda *args: [])


def shrink_notebooks(patch, tmp_path):
    """The same for the commands of notebooks."""
    from miniflamingo.course import quiz, release, render, slides, timings
    from miniflamingo.course.site import build

    for module in (release, slides):
        patch.setattr(module, "OUT", tmp_path / "out")
    patch.setattr(quiz, "OUT", tmp_path / "out")
    for name in ("copy_mathjax", "copy_reveal"):
        patch.setattr(slides.vendor, name, lambda folder: folder.mkdir(exist_ok=True))
    patch.setattr(build, "ROOT", tmp_path)
    patch.setattr(build, "require", lambda *names: None)
    patch.setattr(build, "build", lambda out, *args: out.mkdir())
    patch.setattr(render, "_process", lambda path, checks, fresh: ([], 1.0))
    patch.setattr(render, "in_processes", lambda jobs, work, *rows, method: map(work, *rows))
    patch.setattr(timings, "update", lambda path, timings: path.stem)
    patch.setattr(timings, "README", Path(shutil.copy(timings.README, tmp_path)))


def inputs(words):
    """What a command reads: the shipped runs under the names that it gives, a picture, folders."""
    for option, path in pairwise(words):
        if option in ("--lm", "--vision", "--checkpoint", "inspect"):
            stage = option[2:] if option in ("--lm", "--vision") else "flamingo"
            shutil.copytree(training.WEIGHTS / stage, path, ignore=lambda *_: ["metrics.json"])
        elif option == "--image":
            picture = shapes.draw_objects(*np.array([[0], [0], [1]]), np.random.default_rng(5))
            shapes.save_picture(path, picture[0])
        elif option == "--weights":
            metadata, tensors = made.gguf_llama()
            made.save_gguf(Path(path), metadata | made.tables(made.trained()), tensors)
        elif option == "--plots":
            Path(path).mkdir()


NEEDS = {"--weights": "gguf", "bench-generate": "transformers", "--fsdp2": "triton"}


@pytest.mark.parametrize("command", sorted(RUN_HERE))
def test_the_command_runs_as_written(command, tmp_path, monkeypatch, capsys):
    _, _, module, *options = shlex.split(command)
    is_kernels = options[:1] and options[0] in miniflamingo_main.KERNELS
    needed = "triton" if is_kernels else "nbconvert" if "course" in module else "numpy"
    needed = next((package for word, package in NEEDS.items() if word in options), needed)
    if not find_spec(needed):
        pytest.skip(f"{needed} is not installed")
    monkeypatch.chdir(tmp_path)
    shrink(monkeypatch, tmp_path)
    if is_kernels or "--fsdp2" in options:
        shrink_kernels(monkeypatch)
    if "course" in module:
        shrink_notebooks(monkeypatch, tmp_path)
    inputs(options)
    module += ".__main__" * (module == "miniflamingo")
    main = import_module(module).main
    if {"train", "train-torch"} & {*options}:
        assert_trains(main, options, capsys)
    elif "ship" in options:  # what these folders hold is tried in tests/test_cards.py
        assert main(options) == 2
        assert "runs/0/lm/model.safetensors" in capsys.readouterr().err
    else:
        assert main(options) == 0
        if "--json" in options or module == "miniflamingo.course.release":
            assert main(options) == 0  # again: what it has made itself is not in its way


def assert_trains(main, options, capsys):
    """Two steps or three, a checkpoint, and on from there."""
    out = Path(options[options.index("--out") + 1])
    start = [word for word in options if word not in ("--resume", "--export")]
    for words, steps in ((start, 2), ([*start, "--resume"], 4)):
        assert main(words) == 130
        assert "Interrupted after step" in capsys.readouterr().out
        assert len((out / "log.jsonl").read_text("utf-8").splitlines()) >= steps
    if "--export" in options:
        assert main(options) == 0 and (out / "model.safetensors").exists()
