"""Slides of the course, from the committed notebooks: out/slides/06.slides.html.

    python -m miniflamingo.course.slides 06               as a student sees it; all without a number
    python -m miniflamingo.course.slides 06 --teacher     with the solutions: 06.teacher.slides.html

A heading of the second level begins a slide, one of the third a slide below it, and so does what
would run over the edge. Long code comes as a fragment, at a key. Hints go to the speaker's notes
(key S), and a cell that only shows a figure shows no code. The slides are opened from the folder,
without a network: reveal.js and MathJax lie beside them, in `vendor/`.
"""

import re
import sys

import nbformat
from nbconvert import SlidesExporter
from traitlets.config import Config

from miniflamingo.command import Parser, a_path, run_command
from miniflamingo.outputs import staged

from . import render, timings
from .site import vendor

OUT = render.HERE.parent / "out" / "slides"
ROWS, COLUMNS, FIGURE = 22, 90, 16  # lines on a slide, letters in a line, lines of a figure
DETAILS = re.compile(r"<details><summary>.*?</summary>(.*?)</details>", re.DOTALL)
NOTES = {"slideshow": {"slide_type": "notes"}}
HIDDEN = "hidden-input"  # the tag of a cell whose code is left out
LONG = 8  # lines of code from which a cell is shown at a key


def split(notebook):
    """The cells of a notebook, each Markdown cell cut before its headings, hints apart."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for i, part in enumerate(_parts(cell.source)):
                yield nbformat.v4.new_markdown_cell(
                    DETAILS.sub("", part).strip(), id=f"{cell.id}-{i}"
                )
                if hints := "\n\n".join(DETAILS.findall(part)):
                    yield nbformat.v4.new_markdown_cell(
                        hints, id=f"{cell.id}-{i}-hints", metadata=NOTES
                    )
        else:
            if cell.source.startswith("show("):
                cell.metadata["tags"] = [*cell.metadata.get("tags", ()), HIDDEN]
            # the words are the picture's alt text, too
            cell.outputs = [o for o in cell.outputs if not DETAILS.search(_text(o))]
            yield cell


def _text(output):
    data = output.get("data", {})
    return data.get("text/markdown") or data.get("text/plain") or output.get("text", "")


def _parts(text):
    """Markdown -> its sections; a heading in a code fence is none."""
    parts, fenced = [[]], False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if re.match(r"#{1,3} ", line) and not fenced and any(parts[-1]):
            parts.append([])
        parts[-1].append(line)
    return ["\n".join(part).strip() for part in parts]


def height(cell):
    """About how many lines of a slide a cell takes, with its outputs."""
    rows = 0 if HIDDEN in render.tags(cell) else _lines(cell.source)
    for output in cell.get("outputs", ()):
        rows += FIGURE if "image/png" in output.get("data", {}) else _lines(_text(output))
    return rows


def _lines(text):
    pictures = FIGURE * len(re.findall(r"^!\[", text, re.MULTILINE))
    return pictures + sum(1 + len(line) // COLUMNS for line in text.splitlines())


def slide_types(cells):
    """Yield for each cell what it begins: "slide", "subslide", "fragment", or "-", nothing."""
    used = 0
    for cell in cells:
        if "slideshow" in cell.metadata:
            yield "notes"
            continue
        rows, heading = height(cell), re.match(r"(#{1,3}) ", cell.source)
        if cell.cell_type == "markdown" and heading:
            kind = "subslide" if len(heading[1]) == 3 else "slide"
        elif used + rows > ROWS and used > 3:  # a heading does not stay alone
            kind = "subslide"
        else:
            long = cell.cell_type == "code" and cell.source.count("\n") >= LONG
            kind = "fragment" if long else "-"
        used = rows if kind.endswith("slide") else used + rows
        yield kind


def deck(notebook):
    """The notebook as slides: cells cut at headings, each with its slide_type."""
    cells = list(split(notebook))
    for cell, kind in zip(cells, slide_types(cells)):
        cell.metadata["slideshow"] = {"slide_type": kind}
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


def file_name(path, kind):
    """06.slides.html, 06.teacher.slides.html"""
    return path.stem.split("_")[0] + (".teacher" if kind == "teacher" else "") + ".slides.html"


def export(path, kind, out=OUT):
    """Write the slides of a module; kind is "student" or "teacher". -> the file."""
    notebook = nbformat.read(render.HERE / kind / f"{path.stem}.ipynb", as_version=4)
    config = Config(
        TagRemovePreprocessor={"remove_input_tags": {HIDDEN}},
        SlidesExporter={
            "reveal_url_prefix": "vendor/reveal",
            "reveal_theme": "white",  # the one with fonts of its own
            "mathjax_url": "vendor/mathjax.js",
            "template_name": "slides",
            "extra_template_basedirs": [str(render.HERE / "site")],
            "embed_images": True,
            "language_code": "en",
        },
    )
    resources = {"metadata": {"name": timings.describe(path).title,
                              "path": str(render.HERE / kind)}}  # fmt: skip
    html, _ = SlidesExporter(config=config).from_notebook_node(deck(notebook), resources)
    out.mkdir(parents=True, exist_ok=True)
    file = out / file_name(path, kind)
    file.write_text(html, encoding="utf-8")
    return file


def parser():
    """The command line's grammar."""
    top = Parser(prog="python -m miniflamingo.course.slides", description=__doc__)
    top.add_argument("modules", nargs="*", help="numbers or names, such as 06; all by default")
    top.add_argument("--teacher", action="store_true", help="with the solutions")
    top.add_argument("--out", type=a_path, default=OUT, help="the folder to write into")
    return top


def main(argv=None):
    """Run the command; returns the exit code."""
    return run_command("miniflamingo.course.slides", lambda: run(parser().parse_args(argv)))


def run(arguments):
    """Run the parsed command; returns the exit code. Failed when a script cannot be had."""
    paths, kind = timings.chosen(arguments.modules), "teacher" if arguments.teacher else "student"
    names = [file_name(source, kind) for source in paths]
    with staged(arguments.out, "slides", ["vendor", *names]) as new:
        vendor.copy_mathjax(new / "vendor")
        vendor.copy_reveal(new / "vendor")
        for source in paths:
            export(source, kind, new)
    print("\n".join(str(arguments.out / name) for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
