"""The renderer, on a tiny module: the same bytes twice, and every difference is found."""

import base64
import io

import nbformat
import numpy as np
import pytest
from PIL import Image

from miniflamingo.course import render as r

TINY = """# %% [markdown]
# # 99 A tiny module

# %%
from matplotlib.figure import Figure

from miniflamingo.course import check, show, source

# %% tags=["exercise"]
def answer():
    ...

# %% tags=["solution"]
def answer():
    return 6 * 7

# %%
print("the answer is", answer())
check("7.1", lambda tokens, image: answer())

# %% tags=["target"]
figure = Figure((3, 2))
figure.add_subplot().plot([0, answer()])
show(figure, alt="A line that rises.")

# %% tags=["exercise"]
show(lambda: Figure((3, answer() + 1)), alt="Nothing yet.")

# %%
figure = Figure((3, 2))
figure.add_subplot().plot([1, 0])
show(figure, alt="A line that falls.")

# %%
source(check)

# %% tags=["volatile"]
import time

print(time.perf_counter())
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny module's source, its renderings, and the folder that they were written to."""
    folder = tmp_path_factory.mktemp("course")
    path = folder / "99_tiny.py"
    path.write_text(TINY, "utf-8")
    rendered, pictures = r.render(path)
    r.write(path, rendered, pictures, folder)
    return path, rendered, pictures, folder


def committed(folder, kind):
    return nbformat.read(folder / kind / "99_tiny.ipynb", as_version=4)


def text_of(notebook):
    return "\n".join(cell.source for cell in notebook.cells)


def test_rendering_twice_gives_the_same_bytes(tiny):
    path, _, _, folder = tiny
    files = [p for p in sorted(folder.rglob("*")) if p.suffix in (".ipynb", ".png")]
    before = {p: p.read_bytes() for p in files}
    r.write(path, *r.render(path), folder)  # the volatile cell keeps its output
    assert len(files) == 3
    assert {p: p.read_bytes() for p in files} == before


def test_the_student_gets_the_stub_and_the_picture_but_not_the_solution(tiny):
    _, _, _, folder = tiny
    student, teacher = (text_of(committed(folder, kind)) for kind in ("student", "teacher"))
    assert "6 * 7" in teacher and "..." not in teacher
    assert (
        "6 * 7" not in student
        and "..." in student
        and "figure.add_subplot().plot([0" not in student
    )
    assert "![A line that rises.](targets/99-005.png)" in student
    png = (folder / "student" / "targets" / "99-005.png").read_bytes()
    assert Image.open(io.BytesIO(png)).size == (300, 200)


def test_nothing_stops_with_the_exercise_undone(tiny):
    outputs = [o for c in tiny[1]["student"].cells for o in c.get("outputs", ())]
    said = "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs)
    assert "the answer is None" in said and "not done yet" in said and "no picture yet" in said


def test_figures_carry_their_alternative_text(tiny):
    outputs = [o for c in tiny[1]["teacher"].cells for o in c.get("outputs", ())]
    alts = [o.metadata["image/png"]["alt"] for o in outputs if "image/png" in o.get("data", {})]
    assert alts == ["A line that rises.", "A line that falls."]
    words = [o.data["text/markdown"] for o in outputs if "text/markdown" in o.get("data", {})]
    assert "A line that rises." in words[0] and "<details>" in words[0]
    name = "<code>check</code> in <code>notebooks/checks/core.py</code>"
    assert words[-1].startswith(f"<details><summary>{name}, ")
    assert "</summary>\n\n```python\ndef check(number" in words[-1]
    assert words[-1].endswith("```\n\n</details>")


def test_equal_renderings_have_no_difference(tiny):
    path, rendered, pictures, folder = tiny
    assert list(r.check(path, rendered, pictures, folder)) == []


def spoil_text(cell):
    cell.outputs[0].text = cell.outputs[0].text.replace("42", "43")


def spoil_figure(cell):
    image = Image.open(io.BytesIO(base64.b64decode(cell.outputs[0].data["image/png"])))
    pixels = np.asarray(image.convert("RGB")).copy()
    pixels[50:100, 50:100] = 0
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "png")
    cell.outputs[0].data["image/png"] = base64.b64encode(png.getvalue()).decode()


def spoil_source(cell):
    cell.source += "\n# changed"


def spoil_number_of_outputs(cell):
    cell.outputs = cell.outputs[:-1]


SPOILS = [
    ("99-004", spoil_text, "stdout: committed 'the answer is 43', now 'the answer is 42'"),
    ("99-004", spoil_source, "its source or tags differ"),
    ("99-004", spoil_number_of_outputs, "are committed, now there are"),
    ("99-007", spoil_figure, "of the pixels differ"),
    ("99-009", lambda cell: cell.update(execution_count=None), "the committed cell has not run"),
]


@pytest.mark.parametrize(("cell_id", "spoil", "message"), SPOILS)
def test_a_difference_is_found_and_its_cell_is_named(tiny, cell_id, spoil, message):
    _, rendered, _, folder = tiny
    old = committed(folder, "teacher")
    spoil(next(cell for cell in old.cells if cell.id == cell_id))
    (line,) = r.compare(rendered["teacher"], old)
    assert line.startswith(f"cell {cell_id}: ") and message in line


def test_a_volatile_output_may_differ_and_a_missing_cell_may_not(tiny):
    _, rendered, _, folder = tiny
    old = committed(folder, "teacher")
    old.cells[-1].outputs[0].text = "0.0\n"
    assert list(r.compare(rendered["teacher"], old)) == []
    del old.cells[3]
    assert "the source has 9 cells, the committed notebook 8" in next(
        r.compare(rendered["teacher"], old)
    )


def test_a_missing_file_is_found(tiny, tmp_path):
    path, rendered, pictures, _ = tiny
    lines = list(r.check(path, rendered, pictures, tmp_path))
    assert len(lines) == 3 and all("is missing" in line for line in lines)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
    return file.getvalue()


def test_pictures_are_compared_within_a_tolerance():
    rng = np.random.default_rng(0)
    pixels = rng.integers(40, 200, (100, 200, 3))
    assert (
        r.compare_pictures(png(pixels + rng.integers(-20, 20, pixels.shape)), png(pixels)) is None
    )
    assert "pixels differ" in r.compare_pictures(png(np.roll(pixels, 3, axis=1)), png(pixels))
    assert "committed 200 x 100" in r.compare_pictures(png(pixels[:, 1:]), png(pixels))


NOISE = [
    ("import warnings; warnings.warn('look')", "writes to stderr"),
    ("object()", "prints a memory address"),
    ("1 / 0", "ZeroDivisionError"),
    ("import os; os.kill(os.getpid(), 9)", "Kernel died"),
    ("while True: pass", "timed out"),
]


@pytest.mark.parametrize(("code", "message"), NOISE)
def test_a_noisy_or_failing_cell_is_refused(code, message, tmp_path, monkeypatch):
    if "while" in code:
        monkeypatch.setattr(r, "PATIENCE", 2)
    cell = nbformat.v4.new_code_cell(code, id="99-000")
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata=r.METADATA)
    with pytest.raises(ValueError, match=message):
        r.execute(notebook, tmp_path)


def test_an_unknown_tag_is_refused(tmp_path):
    path = tmp_path / "99_tags.py"
    path.write_text('# %% tags=["excercise"]\nx = 1\n', "utf-8")
    with pytest.raises(ValueError, match=r"unknown tags .'excercise'"):
        r.read_source(path)


def test_an_unknown_module_is_an_error_of_the_command_line(capsys):
    assert r.main(["97"]) == 2
    assert "no module is called 97" in capsys.readouterr().err
