"""Render the course: one source, two notebooks, the same bytes at every run.

    python -m miniflamingo.course.render            all modules
    python -m miniflamingo.course.render 06         one of them
    python -m miniflamingo.course.render --check    execute again, compare with what is committed

source/NN_name.py is py:percent. Tags of a cell decide where it goes:

    exercise   the student's stub: only in student/
    solution   its answer: only in teacher/
    target     a solution's figure: run in teacher/, only the picture is kept in student/
    volatile   its output may differ from run to run (times): the check only wants it to have run,
               and rendering again keeps the committed output while the cell is the same (--fresh
               runs it anew)
    reveal     what a guess is compared with: it runs in both, and the student's rendering has none
               of its output, which comes with the reader's own run
    notes      for whoever teaches: only in teacher/
    quiz       questions and their answers: only in teacher/, and in one file with the others

After the header both get a cell that says what to install (alone.py). A cell must not write to
stderr (no warning reaches a reader) and must not print a memory address.
"""

import base64
import copy
import io
import os
import re
import sys
import threading
import time
from itertools import repeat
from pathlib import Path

import jupytext
import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image

from miniflamingo.command import Parser, exclude, in_processes, run_command, whole

HERE = Path(__file__).resolve().parent
LEFT_OUT = {  # rendering -> the tags that it leaves out
    "teacher": {"exercise"},
    "student": {"solution", "notes", "quiz"},
}
TAGS = {"exercise", "solution", "target", "volatile", "reveal", "notes", "quiz"}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# the same random hashes and the same order of additions at every run; NOTEBOOK_THREADS asks whether
# what is printed holds for another order, too
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "PYTHONPATH": str(HERE.parent),
    "MINIFLAMINGO_RENDERING": "1",  # widgets show a still picture: their ids would differ
    **dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
        os.environ.get("NOTEBOOK_THREADS", "1"),
    ),
}
ALONE = (HERE / "alone.py").read_text("utf-8").split('"""\n', 1)[1].strip()
FOLDED = {"jupyter": {"source_hidden": True}}
SECONDS = 300  # most for one cell that a student wrote
PATIENCE = 1800  # for one of ours: the slowest takes 30 s of a processor that others may share
PIXEL, SHARE = 48, 0.005  # a pixel differs by more than 48 of 255; more than 0.5 % of them do


def tags(cell):
    """The tags of a cell, as a set."""
    return set(cell.metadata.get("tags", ()))


# --- rendering ----------------------------------------------------------------------------------


def read_source(path):
    """source/NN_name.py -> a notebook with fixed cell ids NN-000, NN-001, ...

    ValueError for an unknown tag.
    """
    notebook = jupytext.read(path)
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for i, cell in enumerate(notebook.cells):
        cell.id = f"{path.stem.split('_')[0]}-{i:03d}"
        cell.metadata = nbformat.from_dict({"tags": sorted(tags(cell))} if tags(cell) else {})
        if tags(cell) - TAGS:
            unknown = sorted(tags(cell) - TAGS)
            raise ValueError(f"{path.name}, cell {cell.id}: unknown tags {unknown}, not in {TAGS}")
    return notebook


def render(path):
    """Execute both renderings of a source: {"teacher": notebook, "student": notebook}, pictures.

    pictures is {relative path: png}, the targets in the student's rendering.
    """
    teacher = _rendering(path, "teacher")
    execute(teacher, HERE / "teacher")
    student, pictures = _rendering(path, "student"), {}
    outputs = {cell.id: cell.get("outputs") for cell in teacher.cells}
    for i, cell in enumerate(student.cells):
        if "target" in tags(cell):
            student.cells[i], name, png = _target(cell, outputs[cell.id])
            pictures[name] = png
    execute(student, HERE / "student")
    for cell in student.cells:
        if "reveal" in tags(cell):
            cell.outputs = []
    return {"teacher": teacher, "student": student}, pictures


def _rendering(path, kind):
    notebook = read_source(path)
    notebook.cells = cells_of(notebook, kind)
    return notebook


def cells_of(notebook, kind):
    """The cells of a source that a rendering has; behind the header, what alone.py says."""
    cells = [cell for cell in notebook.cells if not LEFT_OUT[kind] & tags(cell)]
    number = cells[0].id.split("-")[0]
    return [cells[0], nbformat.v4.new_code_cell(ALONE, id=f"{number}-alone", metadata=FOLDED),
            *cells[1:]]  # fmt: skip


def _target(cell, outputs):
    """A solution's cell -> a markdown cell that holds nothing but its picture; name; png."""
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    if len(pictures) != 1:
        raise ValueError(f"cell {cell.id} is a target and must show one figure: {len(pictures)}")
    name, alt = f"targets/{cell.id}.png", pictures[0].metadata["image/png"]["alt"]
    text = f"**The target:** what a right answer draws.\n\n![{alt}]({name})"
    markdown = nbformat.v4.new_markdown_cell(text, id=cell.id, metadata=cell.metadata)
    return markdown, name, base64.b64decode(pictures[0].data["image/png"])


def execute(notebook, folder):
    """Run a notebook in place, in `folder`. ValueError for a cell that fails or makes noise.

    A command calls it in a process of its own (`in_processes`): nbclient ends the kernel once more
    when its process exits, and stumbles where a signal has just killed it.
    """
    folder.mkdir(exist_ok=True)
    client = NotebookClient(
        notebook, timeout=PATIENCE, startup_timeout=600, kernel_name="python3", record_timing=False,
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--IPKernelApp.log_level=40"],  # errors only
        coalesce_streams=True,  # a slow loop prints in pieces, differently at every run
    )  # fmt: skip
    try:
        _execute_aside(client)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise ValueError(f"a cell fails:\n{error}") from None
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            _refuse_noise(cell, output)


def _execute_aside(client):
    """Execute in a thread: in the main one nbclient would take the signals from the command."""
    failed = []

    def work():
        try:
            client.execute(env={**os.environ, **ENVIRONMENT})
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _refuse_noise(cell, output):
    text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
    if output.get("name") == "stderr":
        raise ValueError(f"cell {cell.id} writes to stderr: {text.strip()}")
    if re.search(r"\b0x[0-9a-f]{8,}", text):
        raise ValueError(f"cell {cell.id} prints a memory address: {text.strip()}")


def keep_volatile(new, old):
    """Give the volatile cells of `new` the outputs they have in `old`, where the cell is equal."""
    committed = {cell.id: cell for cell in old.cells}
    for cell in new.cells:
        before = committed.get(cell.id)
        if "volatile" in tags(cell) and before and before.source == cell.source:
            cell.outputs = copy.deepcopy(before.outputs)


def write(path, notebooks, pictures, folder=HERE, fresh=False):
    """Write the renderings of source `path` below `folder`."""
    for kind, notebook in notebooks.items():
        target = folder / kind / f"{path.stem}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not fresh:
            keep_volatile(notebook, nbformat.read(target, as_version=4))
        nbformat.write(notebook, target)
    targets = folder / "student" / "targets"
    for old in targets.glob(f"{path.stem.split('_')[0]}-*.png"):
        old.unlink()
    for name, png in pictures.items():
        targets.mkdir(exist_ok=True)
        (folder / "student" / name).write_bytes(png)


# --- comparing ----------------------------------------------------------------------------------


def compare(new, old):
    """Yield one line for each difference of two executed notebooks; figures within a tolerance."""
    if [cell.id for cell in new.cells] != [cell.id for cell in old.cells]:
        yield f"the source has {len(new.cells)} cells, the committed notebook {len(old.cells)}"
        return
    for cell, before in zip(new.cells, old.cells):
        if (cell.cell_type, cell.source, cell.metadata) != (
            before.cell_type, before.source, before.metadata,
        ):  # fmt: skip
            yield f"cell {cell.id}: its source or tags differ from the committed ones"
        elif cell.cell_type == "code" and "volatile" in tags(cell):
            if not before.execution_count:
                yield f"cell {cell.id}: the committed cell has not run"
        elif cell.cell_type == "code":
            yield from (f"cell {cell.id}: {line}" for line in _compare_outputs(cell, before))


def _compare_outputs(cell, before):
    outputs, committed = _contents(cell), _contents(before)
    if [kind for kind, _ in outputs] != [kind for kind, _ in committed]:
        kinds = [[kind for kind, _ in one] for one in (committed, outputs)]
        yield f"outputs {kinds[0]} are committed, now there are {kinds[1]}"
        return
    for (kind, value), (_, expected) in zip(outputs, committed):
        if kind == "image/png":
            difference = compare_pictures(base64.b64decode(value), base64.b64decode(expected))
            if difference:
                yield f"figure: {difference}"
        elif value != expected:
            yield f"{kind}: {_first_difference(value, expected)}"


def _contents(cell):
    """The outputs of a cell as a flat list of (kind, value)."""
    contents = []
    for output in cell.outputs:
        if output.output_type == "stream":
            contents.append((output.name, output.text))
        else:
            contents += sorted(output.data.items())
            contents.append(("metadata", str(output.metadata)))
    return contents


def _first_difference(value, expected):
    lines = zip(f"{value}\n<end>".splitlines(), f"{expected}\n<end>".splitlines())
    now, committed = next((a, b) for a, b in lines if a != b)
    return f"committed {committed!r}, now {now!r}"


def _pixels(png):  # -> int16 [height, width, 3]
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.int16)


def compare_pictures(png, expected):
    """None when two PNG files show the same, or how they differ, in words."""
    a, b = (_pixels(data) for data in (png, expected))
    if a.shape != b.shape:
        return f"committed {b.shape[1]} x {b.shape[0]} pixels, now {a.shape[1]} x {a.shape[0]}"
    share = (abs(a - b).max(axis=-1) > PIXEL).mean()
    return f"{share:.2%} of the pixels differ" if share > SHARE else None


def check(path, notebooks, pictures, folder=HERE):
    """Yield one line for each way in which the committed renderings differ from new ones."""
    for kind, notebook in notebooks.items():
        committed = folder / kind / f"{path.stem}.ipynb"
        if not committed.exists():
            yield f"{kind}: {committed.name} is missing"
            continue
        old = nbformat.read(committed, as_version=4)
        yield from (f"{kind}: {line}" for line in compare(notebook, old))
    for name, png in pictures.items():
        committed = folder / "student" / name
        if not committed.exists():
            yield f"student: {name} is missing"
        elif difference := compare_pictures(png, committed.read_bytes()):
            yield f"student: {name}: {difference}"


# --- command line -------------------------------------------------------------------------------


def parser():
    """The command line's grammar."""
    top = Parser(prog="python -m miniflamingo.course.render", description=__doc__)
    top.add_argument("modules", nargs="*", help="numbers or names, such as 06; all by default")
    top.add_argument("--check", action="store_true", help="compare, write nothing")
    top.add_argument("--fresh", action="store_true", help="run volatile cells anew, too")
    jobs = "how many modules at a time; one for each processor by default"
    top.add_argument("--jobs", type=whole(1, 61), default=min(os.cpu_count(), 61), help=jobs)
    return top


def main(argv=None):
    """Run the command; returns the exit code, 1 when a notebook differs or fails."""
    return run_command("miniflamingo.course.render", lambda: run(parser().parse_args(argv)))


def run(arguments):
    """Run the parsed command; returns the exit code."""
    from . import timings  # which imports this file

    exclude(arguments, ("--check", "--fresh"))
    paths, failed = timings.chosen(arguments.modules), False
    options = repeat(arguments.check), repeat(arguments.fresh)
    done = in_processes(arguments.jobs, _process, paths, *options, method="spawn")
    for path, (faults, seconds) in zip(paths, done):
        print(f"{path.stem}: {'differs' if faults else 'ok'}, {seconds:.0f} s")
        print("".join(f"  {fault}\n" for fault in faults), end="", flush=True)
        failed |= bool(faults)
    return int(failed)


def _process(path, checks, fresh):
    """Render one module, and compare or write it -> its faults, wall seconds."""
    start, faults = time.perf_counter(), []
    try:
        notebooks, pictures = render(path)
        if checks:
            faults = list(check(path, notebooks, pictures))
        else:
            write(path, notebooks, pictures, fresh=fresh)
    except ValueError as error:
        faults = [str(error)]
    return faults, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
