"""How commands end: errors in a line, signals at any moment, nothing left running."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from miniflamingo import command
from miniflamingo.__main__ import KERNELS
from tests.processes import (
    ODD,
    ROOT,
    Command,
    assert_interrupted,
    has_child,
    later,
    minds_signals,
    printed,
)

INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def needs(words):
    """Skips where a command's packages are not installed, or Triton cannot work."""
    module, command = f"{words} -".split()[:2]
    package = "triton" if command in KERNELS else "nbclient" if "course" in module else "numpy"
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")
    if command == "compile" and str(ROOT) != str(ROOT).encode("utf-8", "replace").decode():
        pytest.skip("Triton takes no folder whose name is not text in this environment")


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("a\n  b\n  c"), 2, "x: error: a b; c"),
        (OSError(2, "No such file", "f"), 2, "x: error: [Errno 2] No such file: 'f'"),
        (FloatingPointError("nan"), 1, "x: error: nan"),
        (command.Failed("it differs"), 1, "x: error: it differs"),
        (MemoryError(), 2, "x: error: not enough memory"),
        (KeyboardInterrupt(), 130, "x: interrupted"),
        (ModuleNotFoundError("no", name="torch.nn"), 2, 'pip install "miniflamingo[kernels]"'),
        (ModuleNotFoundError("no", name="numpy"), 2, 'pip install "numpy"'),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(error, code, line, capsys):
    def work():
        raise error

    assert command.run_command("x", work) == code
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


def test_a_mistake_in_the_code_stays_a_traceback():
    with pytest.raises(ZeroDivisionError):
        command.run_command("x", lambda: 1 / 0)


def test_a_long_list_shows_ten_names():
    lines = command.one_line("30 faults:\n" + "\n".join(f"  {i}" for i in range(30)))
    assert lines == "30 faults: 0; 1; 2; 3; 4; 5; 6; 7; 8; 9, ... and 20 more"
    assert command.some(range(3)) == "0, 1, 2"


def test_what_the_terminal_cannot_show_is_no_error():
    code = "import sys; from miniflamingo import command;"
    code += "sys.exit(command.run_command('x', lambda: print('\\ufffd \\xe4 \\udcff')))"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for encoding in ("", "ascii", "cp1252", "ascii:strict"):
        environment = {**os.environ, **plain, "PYTHONIOENCODING": encoding}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True
        )
        shown = b"\\ufffd \xe4" if encoding == "cp1252" else b"\\ufffd \\xe4"
        assert done.returncode == 0 and done.stderr == b""
        assert done.stdout.strip() == shown + b" \\udcff"


def test_a_folder_that_triton_cannot_name_is_said(tmp_path):
    needs("miniflamingo compile")
    names = ("miniflamingo", "kernels", "notebooks")
    copy = tmp_path / ODD
    for name in names:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.safetensors"))
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(copy)}
    started = Command("miniflamingo", "compile", cwd=tmp_path, **plain)
    code, out, err = started.end()
    assert (code, out) == (2, "") and err.count("\n") == 1 and "start Python with -X utf8" in err


def test_a_reader_that_leaves_is_no_error():
    words = f"{sys.executable} -m miniflamingo sizes | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode in (0, 141) and not done.stderr


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0", "6", "-1", "nan", "inf", "1e3", "", "2.5", "9" * 5000])
def test_a_whole_number_outside_its_range_is_refused(text):
    with pytest.raises(command.argparse.ArgumentTypeError, match="whole number from 1 to 5, got"):
        command.whole(1, 5)(text)


@pytest.mark.parametrize("text", ["0", "1.01", "-1", "nan", "inf", "1e300", "x", "-0.0"])
def test_a_number_outside_its_range_is_refused(text):
    with pytest.raises(command.argparse.ArgumentTypeError, match="above 0 and up to 1, got"):
        command.real(0, 1, above=True)(text)


# --- what is missing ------------------------------------------------------------------------------

BLOCKED = """
import importlib.util, runpy, sys
find_spec, missing = importlib.util.find_spec, {missing!r}
importlib.util.find_spec = lambda name, *a: None if name in missing else find_spec(name, *a)
sys.modules.update(dict.fromkeys(missing))
sys.argv, sys.orig_argv = ["-m", *{options!r}], ["python", "-m", {module!r}]
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


def run_without(missing, words):
    """A command where some packages are not installed -> (exit code, stdout, stderr)."""
    module, *options = words.split()
    code = BLOCKED.format(missing=missing, module=module, options=options)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8"
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "missing, words, extra",
    [
        *(
            (["torch", "triton"], f"miniflamingo {words}", "kernels")
            for words in (
                "compare",
                "compile",
                "step",
                "bench",
                "train-torch lm --out x",
                "train-torch --help",
            )
        ),
        (["triton"], "miniflamingo compare", "kernels"),
        (["triton"], "miniflamingo compile", "kernels"),
        (["jupytext"], "miniflamingo.course.render 06", "course"),
        (["nbclient"], "miniflamingo.course.timings 06", "course"),
        (["nbformat"], "miniflamingo.course.release", "course"),
        (["nbconvert"], "miniflamingo.course.slides 06", "course"),
        (["sphinx"], "miniflamingo.course.site.build", "site"),
        (["IPython"], "miniflamingo.course.slides 06", "course"),
    ],
)
def test_what_is_missing_is_named_with_the_way_to_get_it(missing, words, extra, tmp_path):
    needs(words)
    code, _, err = run_without(missing, words)
    assert code == 2 and err.count("\n") == 1, err
    assert missing[0] in err and f'pip install "miniflamingo[{extra}]"' in err


def test_help_needs_neither_torch_nor_triton():
    code, out, _ = run_without(["torch", "triton"], "miniflamingo --help")
    assert code == 0 and "compare" in out


# --- signals --------------------------------------------------------------------------------------


@needs_proc
@pytest.mark.parametrize("which", [INT, TERM], ids=["INT", "TERM"])
@pytest.mark.parametrize("wait", [0, 0.1, 0.3])
@pytest.mark.parametrize(
    "words", ["miniflamingo evaluate", "miniflamingo step", "miniflamingo.course.slides 06"]
)
def test_a_signal_while_a_command_is_being_imported(words, wait, which, tmp_path):
    needs(words)
    started = Command(*words.split(), cwd=tmp_path)
    assert_interrupted(started, later(minds_signals, wait), which)


ENDS_IN_EXEC = """
import contextlib, sys
from miniflamingo import training
from miniflamingo.command import run_command
code = "import os, signal; os.kill(os.getpid(), signal.SIGTERM); list(range(9))"
def work():
    with {context}():
        exec("; ".join([code] * {signals}))
sys.exit(run_command("x", work))
"""


@needs_proc
@pytest.mark.parametrize(
    "context, signals", [("contextlib.nullcontext", 1), ("training.asked_to_stop", 2)]
)
def test_a_signal_inside_an_exec_of_a_library_is_the_same_exit_code(context, signals, tmp_path):
    code = ENDS_IN_EXEC.format(context=context, signals=signals)
    (tmp_path / "in_exec.py").write_text(code, encoding="utf-8")
    assert Command("in_exec", cwd=tmp_path).end() == (130, "", "x: interrupted\n")


MOMENTS = {
    "evaluate, pictures": ("miniflamingo evaluate", printed("pictures"), INT),
    "evaluate, questions": ("miniflamingo evaluate --samples 200",
                            later(printed("100%"), 1), TERM),
    "demo, photograph": ("miniflamingo demo --out o --steps 1", minds_signals, TERM),
    "demo, training": ("miniflamingo demo --out o", printed("loss="), INT),
    "demo, questions": ("miniflamingo demo --out o --steps 1", later(printed("questions"), 1), INT),
    # so long a prompt that it is being read when the signal comes, on a fast machine too
    "generate": (f"miniflamingo generate {'--text a ' * 5000}", later(minds_signals, 1), TERM),
    "compare": ("miniflamingo compare", printed("fp32"), INT),
    "step": ("miniflamingo step --steps 1000", later(minds_signals, 6), TERM),
    "bench": ("miniflamingo bench --device cpu", printed("no GPU"), INT),
    "compile, Ctrl-C": ("miniflamingo compile", has_child("ptxas"), INT),
    "compile, TERM": ("miniflamingo compile", later(has_child("compile"), 3), TERM),
    "compile, at once": ("miniflamingo compile", has_child("compile"), INT),
    "render": ("miniflamingo.course.render --check 08", has_child("ipykernel"), INT),
    "timings": ("miniflamingo.course.timings 08", has_child("ipykernel"), TERM),
}  # fmt: skip


@needs_proc
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_is_one_line_and_nothing_is_left(moment, tmp_path):
    words, happened, which = MOMENTS[moment]
    needs(words)
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    started = Command(*words.split(), cwd=tmp_path, **cache)
    assert_interrupted(started, happened, which)
    assert not list(tmp_path.glob("o/*")) and not (tmp_path / "a.json").exists()


SLOW_KERNEL = """
import asyncio, sys
from jupyter_client.manager import AsyncKernelManager
from miniflamingo.course.timings import main
async def is_alive(manager):
    return True
def sleep(seconds, sleep=asyncio.sleep):
    return sleep(max(seconds, 1))
AsyncKernelManager.is_alive, asyncio.sleep = is_alive, sleep
if __name__ == "__main__":
    sys.exit(main(["08"]))
"""


@needs_proc
@pytest.mark.parametrize("seconds", [0, 0.5])
def test_a_notebooks_kernel_that_is_slow_to_die_is_no_traceback(seconds, tmp_path):
    needs("miniflamingo.course.timings")
    (tmp_path / "slow_kernel.py").write_text(SLOW_KERNEL, encoding="utf-8")
    started = Command("slow_kernel", cwd=tmp_path)
    assert_interrupted(started, later(has_child("ipykernel"), seconds), TERM)


@needs_proc
@pytest.mark.parametrize(
    "words, happened",
    [("miniflamingo compile", has_child("ptxas")),
     ("miniflamingo.course.render --check 08", has_child("ipykernel"))],
)  # fmt: skip
def test_processes_end_when_their_parent_is_killed(words, happened, tmp_path):
    needs(words)
    started = Command(*words.split(), cwd=tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    started.wait_for(happened)
    assert len(started.family()) > 1
    started.send(KILL)
    started.end()
    assert not started.left(20)


@needs_proc
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_pool_whose_processes_are_killed_says_nothing_itself():
    results = command.in_processes(2, abs, range(20_000))  # so long a list that threads meet
    next(results)
    command.end_children()
    with pytest.raises(command.BrokenExecutor):
        list(results)


@needs_proc
def test_a_training_that_is_interrupted_says_how_to_go_on_and_does(tmp_path):
    words = ["miniflamingo", "train", "lm", "--out", "run", "--steps", "40", "--batch", "8"]
    line = "go on with --resume --out run"
    assert_interrupted(Command(*words, cwd=tmp_path), printed("loss="), INT, line)
    assert Command(*words, "--resume", cwd=tmp_path).end()[0] == 0
    assert len((tmp_path / "run" / "log.jsonl").read_text("utf-8").splitlines()) == 40


@needs_proc
def test_a_command_that_resumes_by_itself_does_not_ask_for_an_option(tmp_path):
    pytest.importorskip("scipy")
    started = Command("miniflamingo", "ablate", "--run", "run", cwd=tmp_path)
    assert_interrupted(started, printed("loss="), INT, "the same command goes on")


def test_a_closed_output_is_no_traceback():
    code = "import sys; sys.stdout = None; from miniflamingo.__main__ import main; main(['sizes'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
