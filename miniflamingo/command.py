"""What all command lines share: one line for every error, signals, ranges of options, processes.

    exit code    what happened
    0            done
    1            a training broke down, or a check failed
    2            bad input, or something is missing here
    130          Ctrl-C or SIGTERM: nothing is left running
    141          whoever read the output has closed it (`| head`); nothing is said

It needs nothing but Python, so that a package can import it before anything else (`starting`).
"""

import argparse
import contextlib
import importlib.util
import math
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

PACKAGE = "miniflamingo"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
MOST = 10  # names of a long list that a message shows
# what brings a package that may be missing: an extra of pyproject.toml
EXTRAS = {
    **dict.fromkeys(("torch", "triton"), "kernels"),
    **dict.fromkeys(("IPython", "jupyterlab", "jupytext", "nbclient", "nbconvert", "nbformat",
                     "traitlets"), "course"),
    **dict.fromkeys(("sphinx", "myst_nb", "furo", "jupyterlite_core",
                     "jupyterlite_pyodide_kernel"), "site"),
    **dict.fromkeys(("gguf", "tokenizers"), "interop"),
    "av": "video",
    "ipywidgets": "widgets",
    "resvg_py": "real",
    "scipy": "statistics",
}  # fmt: skip

# --- errors ---------------------------------------------------------------------------------------


class Failed(RuntimeError):
    """What was to be made or checked is not as it must be: exit code 1."""


def run_command(name, work):
    """Call work() as the command `name` -> its exit code; what stops it is one line on stderr, and
    so is a warning.

    An exception that is nobody's bad input stays a traceback: it is a mistake in the code. What a
    terminal's encoding lacks is printed as Python writes it in a string, \\xe4.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    with _Interruptible(), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say(name, f"warning: {message}", 0)
        try:
            return _flushed(work)
        except KeyboardInterrupt:
            end_children()
            return _say(name, "interrupted", 130)
        except BrokenPipeError:
            # or Python would try again, and complain, when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (FloatingPointError, Failed) as error:
            return _say(name, f"error: {error}", 1)
        except (ValueError, OSError, ImportError, MemoryError, BrokenExecutor) as error:
            return _say(name, f"error: {_explained(error)}", 2)


def _flushed(work):
    try:
        return work()
    finally:
        if sys.stdout is not None:  # closed, `>&-`
            sys.stdout.flush()


def _explained(error):
    if isinstance(error, ImportError):
        return missing(error)
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}".removesuffix(": ")
    if isinstance(error, BrokenExecutor):
        end_children()
        return f"a process of this command was killed, perhaps for its memory: {error}"
    return error


def _say(name, message, code):
    print(f"{name}: {one_line(message)}", file=sys.stderr, flush=True)
    return code


def one_line(message):
    """A message of several lines as one: the first line, at most ten others, how many are left."""
    first, *rest = [line.strip() for line in str(message).splitlines() if line.strip()] or [""]
    return " ".join(filter(None, [first, some(rest, "; ")]))


def some(names, separator=", "):
    """At most ten names of a list, and how many more there are."""
    names = list(map(str, names))
    more = f", ... and {len(names) - MOST} more" if len(names) > MOST else ""
    return separator.join(names[:MOST]) + more


def missing(error):
    """What an ImportError says, and how to get the package where that is known."""
    package = (error.name or "").split(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package == PACKAGE:
        return str(error)
    extra = f"miniflamingo[{EXTRAS[package]}]" if package in EXTRAS else package
    return f'the package {package} is missing: pip install "{extra}"'


def require(*packages):
    """ModuleNotFoundError for the first of some packages that is not installed; imports none."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


# --- signals --------------------------------------------------------------------------------------


def starting():
    """Called at the top of a package: while a command of ours is being imported, a signal or a
    missing package is one line and an exit code, too. Does nothing in other programs."""
    words = [*sys.orig_argv, "-m", ""]
    name = words[words.index("-m") + 1]
    if sys.argv[:1] != ["-m"] or name.split(".")[0] != PACKAGE:
        return

    def leave(*_):
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        os._exit(130)

    def explain(kind, error, trace):
        if not issubclass(kind, ModuleNotFoundError):
            return sys.__excepthook__(kind, error, trace)
        _say(name, f"error: {missing(error)}", 2)
        os._exit(2)

    if threading.current_thread() is threading.main_thread():
        for s in SIGNALS:
            signal.signal(s, leave)
    sys.excepthook = explain


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM. A class of its own, because Python remembers a plain KeyboardInterrupt
    that leaves an exec("...") of a library, and then ends by SIGINT although it was caught."""


class _Interruptible:
    """SIGINT and SIGTERM end all children and raise Interrupted; the second leaves at once.

    A library may swallow the exception where Python ignores what is raised (in a `__del__`): the
    process then leaves at once, as well. Signals reach the main thread alone.
    """

    def __enter__(self):
        self.owner, self.asked, self.before = os.getpid(), False, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self.ask) for s in SIGNALS}
        self.hook, sys.unraisablehook = sys.unraisablehook, self.swallowed

    def __exit__(self, *_):
        sys.unraisablehook = self.hook
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def ask(self, *_):
        if os.getpid() != self.owner:  # a child that is just being made
            os._exit(130)
        end_children()  # first, or a pool of processes would wait for them
        if self.asked:
            os._exit(130)
        self.asked = True
        raise Interrupted

    def swallowed(self, unraisable):
        if self.asked and issubclass(unraisable.exc_type, KeyboardInterrupt):
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(130)
        self.hook(unraisable)


# --- processes ------------------------------------------------------------------------------------


def in_processes(jobs, work, *columns, method=None):
    """Yield work(*row) of every row, in order, from `jobs` processes that end with this one."""
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(jobs, context, initializer=_serve) as pool:
        with _deaf():
            waiting = [pool.submit(work, *row) for row in zip(*columns)][::-1]
        try:
            while waiting:
                yield waiting.pop().result()
        finally:
            # the pool's own thread cancels what is left: it stumbles over what another cancels
            # (as `pool.map` does) while it counts the processes that were killed
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _deaf():
    """What is started in a `with` block does not hear Ctrl-C: its parent does, and ends it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield  # Windows
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve():
    """At the start of a process of a pool: end when the parent does, in whatever way it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def watch():
        multiprocessing.parent_process().join()
        end_children()
        os._exit(130)

    threading.Thread(target=watch, daemon=True).start()


def end_children():
    """Kill every process below this one, where /proc lists them; elsewhere see `_serve`."""
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid):
    """The processes below a process, nearest first -> [pid]."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = int(
                stat.read_text(errors="replace", encoding="utf-8").rpartition(")")[2].split()[1]
            )
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]


# --- options --------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and takes no abbreviated options."""

    def __init__(self, *args, **kwargs):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": layout} | kwargs)

    def error(self, message):
        name = self.prog.removeprefix("python -m ").split()[0]
        self.exit(_say(name, f"error: {message} (see {self.prog} --help)", 2))


def whole(low, high):
    """An option's type: a whole number from low to high."""
    return _ranged(int, f"a whole number from {low:,} to {high:,}", lambda x: low <= x <= high)


def real(low, high, above=False):
    """An option's type: a number from low (above: not low itself) to high."""
    expected = f"a number {'above' if above else 'from'} {low:g} {'and up ' * above}to {high:g}"
    return _ranged(float, expected, lambda x: low <= x <= high and not (above and x == low))


def _ranged(kind, expected, fits):
    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if math.isfinite(value) and fits(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text[:40]!r}")

    return parse


def a_path(text):
    """An option's type: the path of a file or folder."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    return Path(text)


def exclude(arguments, *pairs):
    """ValueError if both options of a pair are given, such as ("--beam", "--top-k")."""
    values = {"--" + name.replace("_", "-"): value for name, value in vars(arguments).items()}
    for pair in pairs:
        if all(values.get(option) not in (None, False) for option in pair):
            raise ValueError(f"{pair[0]} and {pair[1]} exclude each other: give one of them")
