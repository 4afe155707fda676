"""What every module keeps to, and what stands in the committed notebooks; nothing is executed."""

import re
from itertools import pairwise
from statistics import median

import nbformat
import pytest

from miniflamingo.course import release, timings
from miniflamingo.course import render as r

SOURCES = sorted((r.HERE / "source").glob("[0-9]*.py"))
EXERCISE = re.compile(r"### Exercise (\d+\.\d+): .+\n\n([★☆]{3}) · (\d+) minutes · [^.]* lines?\.")

pytestmark = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem[:2])


def source_cells(path, kind=None):
    return [c for c in r.read_source(path).cells if kind in (None, c.cell_type)]


def prose(path):
    return "\n\n".join(cell.source for cell in source_cells(path, "markdown"))


def committed(path, kind):
    return nbformat.read(r.HERE / kind / f"{path.stem}.ipynb", as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


# --- the source -----------------------------------------------------------------------------------


def test_the_template(path):
    text, number = prose(path), path.stem[:2]
    assert text.startswith(f"# {number} ")
    for part in ("**The question:", "After this module you can", "**You need:**", "**Time:**",
                 "**Predict, then run:**", "## Break it", "## Takeaways", "**In the paper:**",
                 "**Next:**"):  # fmt: skip
        assert part in text, part


def test_headings_go_down_one_level_at_a_time(path):
    levels = [len(h) for h in re.findall(r"^(#+) ", prose(path), re.MULTILINE)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_code_cells_are_short(path):
    lines = [cell.source.count("\n") + 1 for cell in source_cells(path, "code")]
    assert median(lines) <= 8 and max(lines) <= 25


def test_no_set_up_code(path):
    code = "\n".join(cell.source for cell in source_cells(path, "code"))
    assert not re.search(r"^\s*[%!]|sys\.path|chdir|pip install|pyplot", code, re.MULTILINE)


def test_exercises_have_stub_hints_solution_and_check(path):
    text, code = prose(path), source_cells(path, "code")
    numbers = [number for number, _, _ in EXERCISE.findall(text)]
    assert 3 <= len(numbers) <= 5 and numbers == sorted(set(numbers))
    assert text.count("### Exercise") == len(numbers)
    assert all("<details>" in part for part in text.split("### Exercise")[1:])
    checks = [n for cell in code for n in re.findall(r'^check\("([\d.]+)"', cell.source, re.M)]
    assert checks == numbers
    names = {
        tag: [
            m
            for cell in code
            if tag in r.tags(cell)
            for m in re.findall(r"^(?:@triton\.jit\n)?def (\w+)", cell.source)
        ]
        for tag in ("exercise", "solution")
    }
    assert names["exercise"] == names["solution"] and len(names["exercise"]) == len(numbers)


def test_the_minutes_are_counted_and_the_core_is_short(path):
    assert timings.with_minutes(path) == path.read_text("utf-8"), "run `timings --table`"
    module = timings.describe(path)
    core = [title for title in re.findall(r"^### Exercise .+$", prose(path), re.MULTILINE)
            if not title.endswith("(optional)")]  # fmt: skip
    assert 30 <= module.minutes <= 60 and 2 <= len(core) <= 4


def test_the_teacher_gets_notes_and_three_questions(path):
    notes, quiz = ([c.source for c in source_cells(path, "markdown") if tag in r.tags(c)]
                   for tag in ("notes", "quiz"))  # fmt: skip
    for part in ("**Minutes.**", "**Predictions.**", "**Open questions.**", "**Misconceptions.**",
                 "**To cut.**"):  # fmt: skip
        assert "\n".join(notes).count(part) == 1, part
    (text,) = quiz
    answer = r"^\*\*(\d)\.\*\* .+?<details><summary>Answer</summary>\n\n.+?</details>"
    questions = re.findall(answer, text, re.MULTILINE | re.DOTALL)
    assert questions == ["1", "2", "3"] and text.startswith("### Quiz\n")


def test_no_source_of_the_library_shows_an_answer_before_its_check(path):
    assert not [*release.shown_early(path), *release.unfolded(path)]


# --- the committed notebooks ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", r.LEFT_OUT)
def test_committed_notebooks_come_from_the_source(path, kind):
    expected = r.cells_of(r.read_source(path), kind)
    cells = committed(path, kind).cells
    assert [c.id for c in cells] == [c.id for c in expected]
    for cell, source in zip(cells, expected):
        if kind == "teacher" or "target" not in r.tags(cell):
            assert cell.source == source.source, cell.id


@pytest.mark.parametrize("kind", r.LEFT_OUT)
def test_committed_notebooks_have_run_without_noise(path, kind):
    notebook = committed(path, kind)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(o.output_type != "error" and o.get("name") != "stderr" for o in outputs(notebook))
    assert (r.HERE / kind / f"{path.stem}.ipynb").stat().st_size < 2**20


@pytest.mark.parametrize("kind", r.LEFT_OUT)
def test_every_figure_is_described(path, kind):
    data = [output for output in outputs(committed(path, kind)) if "data" in output]
    for i, output in enumerate(data):
        if "image/png" in output.data:
            alt = output.metadata["image/png"]["alt"]
            assert len(alt) > 40 and output.data["text/plain"] == alt
            assert "<details>" in data[i + 1].data["text/markdown"]
    for cell in committed(path, kind).cells:
        if cell.cell_type == "markdown":
            assert all(len(alt) > 40 for alt in re.findall(r"!\[(.*?)\]\(", cell.source))


def test_the_student_sees_no_solution(path):
    student = "\n".join(cell.source for cell in committed(path, "student").cells)
    lines = {True: set(), False: set()}  # of solutions, of all other cells
    for cell in source_cells(path):
        kept = {line.strip() for line in cell.source.splitlines() if len(line.strip()) > 12}
        lines["solution" in r.tags(cell)] |= kept
    solutions = lines[True] - lines[False]
    assert len(solutions) > 3
    assert not [line for line in solutions if line in student]


def test_checks_say_right_to_the_teacher_and_not_done_yet_to_the_student(path):
    for kind, message in (("teacher", "right"), ("student", "not done yet")):
        for cell in committed(path, kind).cells:
            if cell.source.startswith("check("):
                assert message in cell.outputs[0].data["text/plain"], cell.id
