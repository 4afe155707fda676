"""What is handed out holds no solution, and works; nbgrader gives what the stars promise.

nbgrader itself is asked where it is installed (`pip install nbgrader`); without it, its schema.
"""

import ast
import csv
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

from miniflamingo.course import release as rel
from miniflamingo.course import timings

SOURCES = timings.sources()
# a Python that has nbgrader: this one, or the one that the variable names
NBGRADER = sys.executable if find_spec("nbgrader") else os.environ.get("NBGRADER_PYTHON")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder that the command wrote into, with nbgrader's tree."""
    folder = tmp_path_factory.mktemp("out")
    assert rel.main(["--nbgrader", "--out", str(folder)]) == 0
    return folder


def notebook(out, kind, path):
    return nbformat.read(out / "nbgrader" / kind / path.stem[:2] / f"{path.stem}.ipynb", 4)


def graded(book, key):
    return [c for c in book.cells if c.metadata.get("nbgrader", {}).get(key)]


# --- the student's folder -------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem[:2])
def test_no_file_holds_a_line_of_a_solution(out, path):
    folder, lines = out / "student-release", rel.solution_lines(path)
    library = {line.strip() for file in folder.rglob("*.py") for line in
               file.read_text(encoding="utf-8").splitlines()
               if file.relative_to(folder).as_posix().startswith(rel.KNOWS_ANSWERS)}  # fmt: skip
    secret = lines - library
    assert len(lines) > 3 and secret
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and not name.startswith(rel.KNOWS_ANSWERS):
            text = {line.strip() for line in rel._text(file).splitlines()}
            cells = {line.strip() for line in rel._cells(file).splitlines()}
            assert not secret & text, name
            assert file.stem != path.stem or not lines & cells, name


def test_neither_solutions_nor_tests_nor_sources_are_in_it(out):
    names = {p.relative_to(out / "student-release").as_posix()
             for p in (out / "student-release").rglob("*")}  # fmt: skip
    assert not [n for n in names if re.search(r"teacher|source|tests|cases_|__pycache__", n)]
    assert {f"notebooks/student/{path.stem}.ipynb" for path in SOURCES} <= names
    assert {"README.md", "requirements.txt", "notebooks/checks/core.py"} <= names
    with zipfile.ZipFile(out / "student-release.zip") as archive:
        inside = {n.removeprefix("miniflamingo-course/") for n in archive.namelist()}
    assert inside == {n for n in names if (out / "student-release" / n).is_file()}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem[:2])
def test_what_a_notebook_imports_is_in_it(out, path):
    """Of the project's own; each in a Python that knows of no other copy."""
    book = nbformat.read(out / "student-release" / "notebooks/student" / f"{path.stem}.ipynb", 4)
    nodes = [n for c in book.cells if c.cell_type == "code" for n in ast.walk(ast.parse(c.source))]
    imports = [ast.unparse(n) for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    own = [line for line in imports if re.match(r"(from|import) miniflamingo", line)]
    assert own
    if not find_spec("triton"):  # modules on kernels cannot be imported here
        own = [line for line in own if not re.search("kernels|triton", line)]
    code = "\n".join([*own, "from miniflamingo import course", "print(course.__file__)"])
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(out / "student-release")}
    done = subprocess.run(command, env=environment, cwd=out, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(out / "student-release/notebooks/__init__.py")


@pytest.mark.parametrize("where", ["a.py", "notebooks/student/a.ipynb", "output.ipynb"])
def test_a_solution_that_slips_in_is_found(where, tmp_path):
    line = sorted(rel.solution_lines(SOURCES[0]))[0]
    file = tmp_path / where
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".py":
        file.write_text(f"    {line}\n", "utf-8")
    else:
        cell = nbformat.v4.new_code_cell("1" if where == "output.ipynb" else f"  {line}")
        cell.outputs = [nbformat.v4.new_output("display_data", {"text/markdown": f"a\n{line}\n"})]
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), file)
    assert f"{where}: {line}" in list(rel.leaks(tmp_path))


def test_a_release_with_a_solution_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rel, "COPIED", (*rel.COPIED, "notebooks/teacher"))
    assert rel.main(["--out", str(tmp_path)]) == 1
    assert "notebooks/teacher/" in capsys.readouterr().err
    assert not (tmp_path / "student-release.zip").exists()


@pytest.mark.parametrize("name", ["student-release/notes.txt", "student-release.zip",
                                  "nbgrader/source/06/mine.ipynb"])  # fmt: skip
def test_a_release_deletes_nothing_of_a_teachers(name, tmp_path, capsys):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine", "utf-8")
    assert rel.main(["--nbgrader", "--out", str(tmp_path)]) == 2
    assert f"{name}: in the way" in capsys.readouterr().err
    assert (tmp_path / name).read_text("utf-8") == "mine"
    assert not (tmp_path / "nbgrader" / "release").exists()


def test_a_release_replaces_the_one_before(tmp_path):
    assert rel.main(["--nbgrader", "--out", str(tmp_path)]) == 0
    submitted = tmp_path / "nbgrader/submitted/a/00"
    shutil.copytree(tmp_path / "nbgrader/release/00", submitted)
    assert rel.main(["--nbgrader", "--out", str(tmp_path)]) == 0
    assert submitted.exists()


def test_the_students_readme_names_every_module(out):
    readme = (out / "student-release/README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", readme):
        assert (out / "student-release" / target).exists(), target
    assert readme.count("notebooks/student/") >= len(SOURCES) and "{modules}" not in readme


def test_the_released_course_works_by_itself(out):
    """Imports come from the folder that is handed out, and a check says that nothing is done."""
    code = (
        "from miniflamingo import course as c; print(c.__file__, c.check('7.1', lambda *a: None))"
    )
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=out / "student-release",
                          env=environment, capture_output=True, encoding="utf-8")  # fmt: skip
    assert str(out / "student-release") in done.stdout and "not done yet" in done.stdout, done


# --- nbgrader -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem[:2])
def test_every_exercise_has_an_answer_and_a_grade(out, path):
    book = notebook(out, "source", path)
    exercises = dict(rel.EXERCISE.findall("\n\n".join(c.source for c in book.cells)))
    points = {c.metadata["nbgrader"]["grade_id"]: c.metadata["nbgrader"]["points"]
              for c in graded(book, "grade")}  # fmt: skip
    assert points == {f"check-{number.replace('.', '-')}": stars.count("★")
                      for number, stars in exercises.items()}  # fmt: skip
    assert len(graded(book, "solution")) == len(exercises)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem[:2])
def test_the_cells_keep_to_nbgraders_schema(out, path):
    for kind in ("source", "release"):
        book = notebook(out, kind, path)
        nbformat.validate(book)
        entries = [c.metadata["nbgrader"] for c in book.cells if "nbgrader" in c.metadata]
        names = [entry["grade_id"] for entry in entries]
        assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w-]+", n) for n in names)
        for entry in entries:
            wanted = {"schema_version", "grade_id", "grade", "solution", "locked", "task"}
            assert set(entry) == wanted | ({"points"} if entry["grade"] else set())
            assert entry["schema_version"] == 3 and entry["grade"] == entry["locked"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem[:2])
def test_what_is_released_has_stubs_and_no_hidden_test(out, path):
    book, lines = notebook(out, "release", path), rel.solution_lines(path)
    text = "\n".join(cell.source for cell in book.cells)
    assert not [line for line in lines if line in text]
    assert not re.search(r"### (BEGIN|END)", text)
    assert all(rel.STUB in cell.source for cell in graded(book, "solution"))
    assert all("print(check(" in cell.source for cell in graded(book, "grade"))


def stub_and(answer):
    cell = nbformat.v4.new_code_cell(f"def f(x):  # a stub\n    {rel.STUB}", id="99-001")
    rel._solve(cell, answer)
    return cell


def test_helpers_of_a_solution_are_taken_out_too():
    cell = stub_and("import math\n\n\ndef f(x):\n    # why\n    return math.tau\n\n\nused = f(1)\n")
    assert cell.source.count(rel.BEGIN) == 3
    exec(cell.source, names := {})
    assert names["used"] == names["f"](0) > 6
    (stub,) = rel.released(nbformat.v4.new_notebook(cells=[cell])).cells
    assert "math" not in stub.source and "why" not in stub.source and "used" not in stub.source
    assert "def f(x):  # a stub\n    ...  # your code" in stub.source


@pytest.mark.parametrize("answer", [None, "g = 1", "def f(x): return 1"])
def test_a_stub_without_its_solution_is_refused(answer):
    with pytest.raises(ValueError, match="no solution defines f"):
        stub_and(answer)


def nbgrader(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(rel.ROOT), "OMP_NUM_THREADS": "1",
                   "PATH": f"{Path(NBGRADER).parent}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip
    command = [NBGRADER, "-m", "nbgrader", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


@pytest.mark.skipif(not NBGRADER, reason="nbgrader is not installed, and NBGRADER_PYTHON not set")
def test_nbgrader_gives_all_points_to_the_solutions_and_none_to_the_stubs(out, tmp_path):
    shutil.copytree(out / "nbgrader", tmp_path, dirs_exist_ok=True)
    path = next(p for p in SOURCES if p.stem.startswith("06"))
    nbgrader(tmp_path, "generate_assignment", "06", "--force")
    name = Path("06", f"{path.stem}.ipynb")
    made, ours = (nbformat.read(f / name, 4) for f in (tmp_path / "release",
                                                       out / "nbgrader/release"))  # fmt: skip
    assert [c.source for c in made.cells] == [c.source for c in ours.cells]
    for student in ("done", "undone"):
        shutil.copytree(tmp_path / "release/06", tmp_path / "submitted" / student / "06")
    solved = {c.metadata["nbgrader"]["grade_id"]: c.source
              for c in graded(notebook(out, "source", path), "solution")}  # fmt: skip
    for cell in graded(made, "solution"):
        cell.source = re.sub("### .*", "", solved[cell.metadata["nbgrader"]["grade_id"]])
    nbformat.write(made, tmp_path / "submitted/done" / name)
    assert "partial" not in nbgrader(tmp_path, "autograde", "06")
    nbgrader(tmp_path, "export")
    with (tmp_path / "grades.csv").open(encoding="utf-8") as file:
        scores = {row["student_id"]: (float(row["score"]), float(row["max_score"]))
                  for row in csv.DictReader(file)}  # fmt: skip
    most = sum(c.metadata["nbgrader"]["points"] for c in graded(made, "grade"))
    assert scores == {"done": (most, most), "undone": (0, most)}
