"""The command line: `python -m kernels compare | compile`. Errors are one line and exit code 2."""

import argparse
import sys


def main(argv=None):
    """Run a command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("compare", help="every kernel beside its NumPy twin, as a table")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--json", metavar="FILE", help="also write the table as JSON")
    command.add_argument("--case", metavar="TEXT", default="", help="only cases that contain TEXT")
    command = commands.add_parser("compile", help="registers, spills, shared memory; needs no GPU")
    command.add_argument("--full", action="store_true", help="every class of shapes (minutes)")
    arguments = vars(parser.parse_args(argv))
    try:
        if arguments.pop("command") == "compile":
            from kernels import compile as command
        else:
            from kernels import compare as command
        return command.run(**arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"kernels: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
