"""Where Triton does not exist, its imitation runs the same kernels: the modules go to their end."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the kernels' modules need torch")

HERE = Path(__file__).parent
WITHOUT = "import sys\nsys.modules['triton'] = None  # makes `import triton` fail\n"
IMITATED = WITHOUT + "from miniflamingo.course.triton_cpu import IMITATED\nassert IMITATED\n"


def run(code, *arguments):
    """What a program prints that cannot import Triton."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True,
        encoding="utf-8", timeout=300, cwd=HERE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


NOTEBOOKS = """
from IPython.core.interactiveshell import InteractiveShell

from miniflamingo.course import render, timings

for number in sys.argv[1:]:
    shell = InteractiveShell.instance()
    shell.reset()
    for cell in render.cells_of(render.read_source(*timings.chosen([number])), "student"):
        if cell.cell_type == "code" and "target" not in render.tags(cell):
            done = shell.run_cell(cell.source)
            assert done.success, (cell.id, done.error_in_exec or done.error_before_exec)
    print("the end of", number)
"""


def test_the_students_notebooks_run_to_their_end():
    order = ["14", "12", "13"]  # 14 first: it must ask for the imitation itself
    said = run(WITHOUT + NOTEBOOKS, *order)
    assert [line for line in said.splitlines() if line.startswith("the end of")] == [
        f"the end of {number}" for number in order
    ]


ANSWERS = """
import cases_12, cases_13
from miniflamingo.course.checks import check
from miniflamingo.kernels.tools.compare import KERNELS, compare

for module in (cases_12, cases_13):
    for number, answer in module.RIGHT:
        assert check(number, answer).message == "right", (number, answer, check(number, answer))
    for number, answer, *words in module.WRONG:
        said = check(number, answer).message
        assert all(word in said for word in words), (number, answer, words, said)
for name in ("R = 37, K = 40", "text before the first image"):
    assert next(compare(KERNELS[0], name, "fp32", "cpu")).ok
"""


def test_answers_are_judged_and_the_library_s_kernels_run_as_in_triton():
    run(IMITATED + ANSWERS)
