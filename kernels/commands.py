"""The kernels' commands, such as `python -m miniflamingo compare`.

miniflamingo/__main__.py lists them, and hands over to `run`: each is a file with a function of that
name, which takes the options below (train-torch: a list of options).
"""

import os
import sys
from importlib import import_module

from miniflamingo.command import Parser, a_path, exclude, real, whole

# of other commands: in tools/
FILES = {"step": "model.step", "train-torch": "model.train",
         "bench-generate": "tools.bench_generate"}  # fmt: skip
DEVICES = ("auto", "cpu", "cuda")


def parser():
    """The command line's grammar; train-torch's options are its own (kernels/model/train.py)."""
    top = Parser(prog="python -m miniflamingo", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser("compare", help="every kernel beside its NumPy twin, as a table")
    command.add_argument("--device", choices=DEVICES, default="auto")
    _add_json(command)
    command.add_argument("--case", metavar="TEXT", default="", help="only cases that contain TEXT")
    command = commands.add_parser("compile", help="registers, spills, occupancy; needs no GPU")
    command.add_argument("--full", action="store_true", help="every class of shapes (minutes)")
    _add_json(command)
    command.add_argument("--check", action="store_true", help="is results/compiled.json right?")
    command = commands.add_parser("predict", help="microseconds on GPUs not here, and what binds")
    _add_json(command)
    command.add_argument("--case", metavar="TEXT", default="", help="only cases with TEXT in them")
    plots = "also draw the figure into DIR, a folder that exists"
    command.add_argument("--plots", metavar="DIR", type=a_path, help=plots)
    command = commands.add_parser("step", help="seconds a training step, NumPy beside torch")
    command.add_argument("--steps", type=whole(1, 10**5), default=20)
    command = commands.add_parser("bench", help="time and memory beside every peer's; needs a GPU")
    command.add_argument("--device", choices=DEVICES, default="auto")
    _add_json(command)
    quick = "three shapes of each entry, few calls"
    command.add_argument("--quick", action="store_true", help=quick)
    command.add_argument("--append", action="store_true", help="go on with FILE: keep its rows")
    command.add_argument("--case", metavar="TEXT", default="", help="only shapes with TEXT in them")
    plots = "also draw the figures into DIR, a folder that exists"
    command.add_argument("--plots", metavar="DIR", type=a_path, help=plots)
    _add_generate(commands.add_parser("bench-generate", help="transformers beside ours, on a CPU"))
    command = commands.add_parser("gpu", help="test, then bench, what the minutes allow, on a GPU")
    command.add_argument("--minutes", type=real(0, 10**4, above=True), default=9)
    out = "the benchmark's file: what it has is kept, and not measured again"
    command.add_argument("--out", metavar="FILE", type=a_path, default="bench-gpu.json", help=out)
    commands.add_parser("train-torch", add_help=False, help="the bridge, on one process or many")
    return top


def _add_generate(command):
    threads = "one or several numbers"
    command.add_argument("--threads", type=whole(1, 256), nargs="+", default=[1, 2], help=threads)
    command.add_argument("--rounds", type=whole(1, 100), default=3, help="of each side; medians")
    command.add_argument("--new-tokens", type=whole(2, 1000), default=32)
    command.add_argument("--larger", action="store_true", help="an IDEFICS 1024 wide, too")
    text = "write the figures to this file"
    command.add_argument("--json", metavar="FILE", type=a_path, dest="file", help=text)
    text = "put the committed figures into miniflamingo/interop/README.md, and measure nothing"
    command.add_argument("--table", action="store_true", help=text)


def _add_json(command):
    command.add_argument("--json", metavar="FILE", type=a_path, help="also write it as JSON")


def run(argv):
    """Parse and run a command; returns the exit code."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    exclude(arguments, ("--check", "--json"))
    arguments = vars(arguments)
    command = arguments.pop("command")
    if command == "train-torch":
        arguments["options"] = rest  # it knows its own
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if command in ("compile", "predict") and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "0"  # a process compiles or interprets, never both
    # imported late: each command needs its own part of torch and Triton
    file = FILES.get(command, f"tools.{command}")
    return import_module(f"miniflamingo.kernels.{file}").run(**arguments)
