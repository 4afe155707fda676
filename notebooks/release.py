"""Make what a teacher hands out: the student's folder without solutions, and nbgrader's tree.

    python -m miniflamingo.course.release              out/student-release/, and as a zip beside it
    python -m miniflamingo.course.release --nbgrader   also out/nbgrader/: source/, release/, ...

The folder holds the student's notebooks, the checks, the library and a README. It is read through
before it is packed: no line of a solution may stand in it, outside of the library and the checks,
which cannot do without right answers. `leaks` says what that guarantees.

In nbgrader's tree each module is an assignment. A stub's cell is a `solution` cell; a check's cell
is an autograded `grade` cell, locked, worth a point for each star of its exercise. What makes it
fail is a hidden test, so that the student's "Run all" does not stop there.

Answer and check share a process there: checks/untouched.py says what a cell can do about that.
"""

import ast
import io
import re
import shutil
import sys
import textwrap
import tokenize
import zipfile
from difflib import SequenceMatcher

import nbformat

from miniflamingo.command import Failed, Parser, a_path, run_command, some
from miniflamingo.outputs import staged

from . import render, timings

ROOT = render.HERE.parent
OUT = ROOT / "out"
HELPERS = ("__init__.py", "ablations.py", "display.py", "guesses.py", "imitation.py",
           "triton_cpu.py", "widgets.py")  # fmt: skip
COPIED = ("miniflamingo", "kernels", "LICENSE", "requirements.txt", "pyproject.toml",
          *(f"notebooks/{name}" for name in (*HELPERS, "checks", "data", "student")))  # fmt: skip
KNOWS_ANSWERS = ("miniflamingo/", "kernels/", "notebooks/checks/")  # the library and its judges
EXERCISE = re.compile(r"^### Exercise (\d+\.\d+): .+\n\n([★☆]{3}) ", re.MULTILINE)
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
STUB = "...  # your code"
LIKE, RUN, SHORT = 0.5, 4, 30  # a share of tokens, tokens in a row, tokens
STUB_LINE = re.compile(r"^([ \t]+)\.\.\.[^\n]*", re.MULTILINE)
CONFIG = f"""c = get_config()  # noqa: F821  nbgrader defines it
c.CourseDirectory.course_id = "miniflamingo"
c.ClearSolutions.code_stub = {{"python": "{STUB}"}}
c.ExecutePreprocessor.timeout = {render.SECONDS}
"""


# --- the student's folder -----------------------------------------------------------------------


def write_release(folder):
    """Write the student's folder, a new one. Failed where a solution would be handed out."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".ipynb_checkpoints")
    for name in COPIED:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=ignore)
        else:
            shutil.copy(ROOT / name, target)
    readme = (render.HERE / "README_students.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(readme.replace("{modules}\n", _modules()), encoding="utf-8")
    found = list(leaks(folder))
    for path in timings.sources():
        found += [f"{path.stem}: {line}" for line in (*shown_early(path), *unfolded(path))]
    if found:
        raise Failed(f"solutions in the release: {some(found, '; ')}")


def _modules():
    for_all = map(timings.describe, timings.sources())
    return "".join(
        f"| [{m.title}](notebooks/student/{m.path.stem}.ipynb) | {m.minutes} | {m.more or '–'} | "
        f"{', '.join(m.needs) or '–'} |\n" for m in for_all
    )  # fmt: skip


def solution_lines(path):
    """The lines that stand in a source's solutions and in none of its other cells."""
    lines = {True: set(), False: set()}
    for cell in render.read_source(path).cells:
        kept = {line.strip() for line in cell.source.splitlines() if len(line.strip()) > 12}
        lines["solution" in render.tags(cell)] |= kept
    return lines[True] - lines[False]


def leaks(folder):
    """Yield one line for each solution's line that a file of the folder holds.

    Looked for are whole lines of more than 12 characters, word for word, in code, text and outputs.
    A solution in other words is not found, and the library and the checks are left out: they
    compute what is right, and a student who looks for it there finds it. So a line that stands in
    them is no secret where their source is shown; in the cells of its own module, it is.
    """
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    public = {line.strip() for name, path in files.items() if name.startswith(KNOWS_ANSWERS)
              and path.suffix == ".py" for line in _text(path).splitlines()}  # fmt: skip
    wanted = {path.stem: solution_lines(path) for path in timings.sources()}
    for name, path in files.items():
        if not name.startswith(KNOWS_ANSWERS):
            lines, cells = ({line.strip() for line in text.splitlines()}
                            for text in (_text(path), _cells(path)))  # fmt: skip
            found = (set().union(*wanted.values()) - public) & lines
            found |= wanted.get(path.stem, set()) & cells
            yield from (f"{name}: {line}" for line in sorted(found))


def shown_early(path):
    """Yield a line for each exercise whose answer the library's source shows before its check."""
    cells = render.read_source(path).cells
    shown, number, origins = {}, None, {}
    for cell in cells:
        if cell.cell_type == "markdown":
            number = next(iter(re.findall(r"^### Exercise (\d+\.\d+)", cell.source, re.M)), number)
        elif "solution" in render.tags(cell):
            for name, code in shown.items():
                if (share := likeness(cell.source, code)) >= LIKE:
                    yield f"source({name}) stands before exercise {number} and is {share:.0%} of it"
        else:
            shown |= timings.shown_source(cell.source, origins)


def likeness(answer, code):
    """The share of an answer's tokens that stand in other code, in runs of RUN and more.

    0 for an answer of fewer than SHORT tokens: any code has them.
    """
    a, b = _tokens(answer), _tokens(code)
    blocks = SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return sum(m.size for m in blocks if m.size >= RUN) / len(a) if len(a) >= SHORT else 0.0


def _tokens(code):
    """The tokens of Python code that do something: no comment, no text, no layout."""
    found = tokenize.generate_tokens(io.StringIO(textwrap.dedent(code)).readline)
    kept = tokenize.NAME, tokenize.OP, tokenize.NUMBER
    return [token.string for token in found if token.type in kept]


def unfolded(path):
    """Yield a line for each cell of a student's notebook that shows Python code unfolded."""
    notebook = nbformat.read(render.HERE / "student" / f"{path.stem}.ipynb", as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            text = output.get("data", {}).get("text/markdown", "")
            if "```python" in re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL):
                yield f"cell {cell.id} shows the library's source unfolded"


def _cells(path):
    """The source of a notebook's cells, without what they put out; "" for any other file."""
    is_notebook = path.suffix == ".ipynb"
    return "\n".join(c.source for c in nbformat.read(path, 4).cells) if is_notebook else ""


def _text(path):
    """All that can be read in a file; of a notebook, what its cells and outputs say."""
    if path.suffix != ".ipynb":
        return path.read_bytes().decode("utf-8", errors="ignore")
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    said = [o.get("text", "") + "\n".join(map(str, o.get("data", {}).values())) for o in outputs]
    return "\n".join([cell.source for cell in cells] + said)


def pack(folder, file):
    """Zip a folder; the same files give the same bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(f"miniflamingo-course/{path.relative_to(folder).as_posix()}")
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, path.read_bytes())


# --- nbgrader -----------------------------------------------------------------------------------


def write_nbgrader(folder):
    """Write nbgrader's course folder, a new one: source/NN, release/NN and nbgrader_config.py."""
    for path in timings.sources():
        number = path.stem.split("_")[0]
        notebook = gradable(path)
        for kind, content in (("source", notebook), ("release", released(notebook))):
            (folder / kind / number / "targets").mkdir(parents=True)
            nbformat.write(content, folder / kind / number / path.name.replace(".py", ".ipynb"))
            for png in (render.HERE / "student" / "targets").glob(f"{number}-*.png"):
                shutil.copy(png, folder / kind / number / "targets")
    (folder / "nbgrader_config.py").write_text(CONFIG, "utf-8")


def gradable(path):
    """A module as nbgrader's source: the student's notebook, solutions between markers, no outputs.

    ValueError for an exercise without stars, stub, solution or check.
    """
    committed = render.HERE / "student" / f"{path.stem}.ipynb"
    notebook = nbformat.read(committed, as_version=4)
    stars = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            stars |= {number: s.count("★") for number, s in EXERCISE.findall(cell.source)}
    answers = {_defined(cell): cell.source for cell in render.read_source(path).cells
               if "solution" in render.tags(cell)}  # fmt: skip
    graded = set()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            call = _check_call(cell.source)
            if call and call.args[0].value in stars:
                graded.add(_grade(cell, call, stars))
            elif "exercise" in render.tags(cell) and STUB_LINE.search(cell.source):
                _solve(cell, answers.pop(_defined(cell), None))
    if answers or graded != set(stars):
        raise ValueError(f"{path.name}: no stub for {list(answers)}, no check for "
                         f"{sorted(set(stars) - graded)}")  # fmt: skip
    return notebook


def _defined(cell):
    """The name of the first function of a cell; None without one."""
    return next(iter(re.findall(r"^def (\w+)", cell.source, re.MULTILINE)), None)


def _check_call(code):
    """The call `check("7.1", f)` that a cell makes as a statement, or None."""
    for node in ast.parse(code).body:
        call = getattr(node, "value", None)
        is_call = isinstance(node, ast.Expr) and isinstance(call, ast.Call)
        if is_call and getattr(call.func, "id", "") == "check":
            return call
    return None


def _grade(cell, call, stars):
    """Make a check's cell an autograded one; -> the number of its exercise."""
    number, asked = call.args[0].value, ", ".join(map(ast.unparse, call.args))
    hidden = ["### BEGIN HIDDEN TESTS", "from miniflamingo.course.checks import check",
              f"assert check({asked}).ok, check({asked})", "### END HIDDEN TESTS"]  # fmt: skip
    # printed: what a graded cell displays would be read as partial credit
    shown = ast.get_source_segment(cell.source, call)
    cell.source = "\n".join([*hidden, cell.source.replace(shown, f"print({shown})")])
    name = f"check-{number.replace('.', '-')}"
    cell.metadata["nbgrader"] = _metadata(name, grade=True, locked=True) | {"points": stars[number]}
    return number


def _metadata(name, grade=False, solution=False, locked=False):
    """A cell's entry for nbgrader, by version 3 of its schema."""
    kinds = {"grade": grade, "solution": solution, "locked": locked, "task": False}
    return {"schema_version": 3, "grade_id": name} | kinds


def _solve(cell, answer):
    """Put the solution in the place of the stub, between nbgrader's markers."""
    name = _defined(cell)
    head, indent, tail = STUB_LINE.split(cell.source, maxsplit=1)
    before, body, after = _around(name, answer or "", cell)
    parts = [f"{BEGIN}\n{before}\n{END}\n\n"] if before else []
    parts.append(f"{head}{indent}{BEGIN}\n{body}\n{indent}{END}")
    parts.append(tail or (f"\n\n\n{BEGIN}\n{after}\n{END}" if after else ""))
    cell.source = "".join(parts)
    cell.metadata["nbgrader"] = _metadata(f"answer-{name}", solution=True)


def _around(name, answer, cell):
    """The lines of a solution's cell before function `name`, its body, and the lines after it."""
    lines, tree = answer.split("\n"), ast.parse(answer).body
    function = next((f for f in tree if getattr(f, "name", None) == name), None)
    if not function or function.body[0].lineno == function.lineno:
        raise ValueError(f"cell {cell.id}: no solution defines {name} in lines of its own")
    start, first = function.lineno - 1, function.body[0].lineno - 1
    while lines[first - 1].lstrip().startswith("#"):
        first -= 1
    parts = lines[:start], lines[first : function.end_lineno], lines[function.end_lineno :]
    return ["\n".join(part).strip("\n") for part in parts]


def released(notebook):
    """What nbgrader makes of its source for the students: stubs again, and no hidden test."""
    notebook = nbformat.from_dict(notebook)
    for cell in notebook.cells:
        kind = cell.metadata.get("nbgrader", {})
        if kind.get("solution"):
            cell.source = re.sub(f"{BEGIN}.*?{END}", STUB, cell.source, flags=re.DOTALL)
        elif kind.get("grade"):
            cell.source = cell.source.split("### END HIDDEN TESTS\n")[1]
    return notebook


# --- command line -------------------------------------------------------------------------------


def parser():
    """The command line's grammar."""
    top = Parser(prog="python -m miniflamingo.course.release", description=__doc__)
    top.add_argument("--nbgrader", action="store_true", help="write nbgrader's tree, too")
    top.add_argument("--out", type=a_path, default=OUT, help="the folder to write into")
    return top


def main(argv=None):
    """Run the command; returns the exit code."""
    return run_command("miniflamingo.course.release", lambda: run(parser().parse_args(argv)))


def run(arguments):
    """Run the parsed command; returns the exit code. Failed where a solution would be given out."""
    timings.chosen()
    names = ("student-release", "student-release.zip")
    with staged(arguments.out, "release", names) as new:
        write_release(new / names[0])
        pack(new / names[0], new / names[1])
    print(f"{arguments.out / names[0]} and {names[1]} beside it")
    if arguments.nbgrader:
        tree = arguments.out / "nbgrader"
        with staged(tree, "release", ("source", "release", "nbgrader_config.py")) as new:
            write_nbgrader(new)
        print(f"{tree}: source/, release/, nbgrader_config.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
