"""The command line: `python -m kernels compare | compile | step | bench | train`.

Errors are one line and exit code 2.
"""

import argparse
import sys
from importlib import import_module


def main(argv=None):
    """Run a command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("compare", help="every kernel beside its NumPy twin, as a table")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--json", metavar="FILE", help="also write the table as JSON")
    command.add_argument("--case", metavar="TEXT", default="", help="only cases that contain TEXT")
    command = commands.add_parser("compile", help="registers, spills, occupancy; needs no GPU")
    command.add_argument("--full", action="store_true", help="every class of shapes (minutes)")
    command.add_argument("--json", metavar="FILE", help="also write the table as JSON")
    command.add_argument("--check", action="store_true", help="is results/compiled.json right?")
    command = commands.add_parser("step", help="seconds a training step, NumPy beside torch")
    command.add_argument("--steps", type=int, default=20)
    command = commands.add_parser("bench", help="time and memory beside every peer's; needs a GPU")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    command.add_argument(
        "--quick", action="store_true", help="three shapes of each entry, few calls"
    )
    command.add_argument("--case", metavar="TEXT", default="", help="only shapes with TEXT in them")
    command.add_argument("--plots", metavar="DIR", help="also draw the figures into DIR")
    commands.add_parser("train", add_help=False, help="the bridge, on one process or many")
    arguments, rest = parser.parse_known_args(argv)
    arguments = vars(arguments)
    if arguments["command"] == "train":
        arguments["options"] = rest  # it knows its own
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        # imported late: each command needs its own part of torch and Triton
        return import_module(f"kernels.{arguments.pop('command')}").run(**arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"kernels: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
