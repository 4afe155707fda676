"""The quiz questions of all modules with their answers, in one file: out/quiz.md.

    python -m miniflamingo.course.quiz          all modules
    python -m miniflamingo.course.quiz 06       one of them

They stand in cells tagged `quiz`, which only the teacher's notebooks have.
"""

import sys

from miniflamingo.command import Parser, a_path, run_command
from miniflamingo.outputs import staged

from . import render, timings

OUT, FILE = render.HERE.parent / "out", "quiz.md"


def quiz(paths):
    """The questions and answers of modules, as Markdown."""
    parts = ["# Quiz\n"]
    for path in paths:
        cells = render.read_source(path).cells
        texts = [cell.source for cell in cells if "quiz" in render.tags(cell)]
        texts = [text.split("\n", 1)[1].strip() for text in texts]  # without the heading
        parts += [f"## {timings.describe(path).title}\n", *(f"{text}\n" for text in texts)]
    return "\n".join(parts)


def parser():
    """The command line's grammar."""
    top = Parser(prog="python -m miniflamingo.course.quiz", description=__doc__)
    top.add_argument("modules", nargs="*", help="numbers or names, such as 06; all by default")
    top.add_argument("--out", type=a_path, default=OUT, help="the folder to write into")
    return top


def main(argv=None):
    """Run the command; returns the exit code."""
    return run_command("miniflamingo.course.quiz", lambda: run(parser().parse_args(argv)))


def run(arguments):
    """Run the parsed command; returns the exit code."""
    text = quiz(timings.chosen(arguments.modules))
    with staged(arguments.out, "quiz", (FILE,)) as new:
        (new / FILE).write_text(text, encoding="utf-8")
    print(arguments.out / FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
