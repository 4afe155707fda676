"""Build the course's site into out/site/: pages to read, an API reference, figures measured.

    python -m miniflamingo.course.site.build              all modules; with numbers (06 08), those
    python -m miniflamingo.course.site.build --no-lite    without JupyterLite, see lite.py

Pages are first written aside, as Sphinx wants them: from the committed notebooks, which are not
executed, the project's pages and the library's docstrings. Pages ask nothing of another
host; MathJax is copied beside them (vendor.py).
"""

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat

from miniflamingo.command import Failed, Parser, a_path, require, run_command
from miniflamingo.outputs import staged
from miniflamingo.rooms import name_of

from .. import render, timings
from . import lite as browser
from . import vendor

HERE, ROOT = Path(__file__).resolve().parent, render.HERE.parent
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^()\s]+)\)")
LIBRARY = ("miniflamingo", "kernels")  # folders
PAGES = {  # of the repository -> their names on the site
    "README.md": "project",
    "miniflamingo/README.md": "library",
    "miniflamingo/INSTALL.md": "installing",
    "miniflamingo/real/README.md": "real",
    "miniflamingo/fewshot/README.md": "never-seen",
    "miniflamingo/ablations/README.md": "choices",
    "miniflamingo/interop/README.md": "interop",
    "kernels/README.md": "kernels",
    "kernels/model/README.md": "own-model",
    "tests/README.md": "tests",
    "notebooks/README.md": "teaching",
}
DIRECTIONS = ("forward", "forward + backward")  # bench_entries.py has them, and torch
SPEED = """# Speed of the kernels

How fast the fused kernels are beside plain torch and other projects' kernels, as figures of
measured times.
"""
NOT_MEASURED = """Not measured yet. On a machine with an NVIDIA GPU

    python -m miniflamingo bench --json kernels/results/NAME.json

measures them; the next `make site` draws what it wrote.
"""


# --- links --------------------------------------------------------------------------------------


def page_of(path):
    """The page that shows a file of the repository, from the site's root, or None."""
    if path.is_dir():
        path = next(filter(Path.exists, (path / "README.md", path / "__init__.py")), path)
    if path.is_relative_to(ROOT) and path.relative_to(ROOT).as_posix() in PAGES:
        return f"/{PAGES[path.relative_to(ROOT).as_posix()]}.md"
    if path.suffix == ".ipynb" and path.parent.name == "student":
        return f"/course/{path.name}"
    name = dotted(path)
    has_page = name and path.relative_to(ROOT).parts[0] in LIBRARY
    return f"/api/{name}.md" if has_page else None


def dotted(path):
    """The module's name of a Python file of the repository; None for anything else."""
    if path.suffix != ".py" or not path.is_relative_to(ROOT):
        return None
    return name_of(path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__"))


def relink(text, folder, shown):
    """Point the links of a Markdown text, which stood in `folder`, to the pages of the site.

    A file without a page, and a module that is not among those shown, keeps its name as text.
    """
    names = {f"{path.stem}.ipynb" for path in shown}

    def replace(found):
        label, target = found.groups()
        if re.match(r"[a-z]+:|#|/", target):  # elsewhere, here, or a page by its place on the site
            return found[0]
        name, _, anchor = target.partition("#")
        path = (folder / name).resolve()
        page = page_of(path) if path.suffix != ".ipynb" or path.name in names else None
        return f"[{label}]({page}{'#' * bool(anchor)}{anchor})" if page else label

    return LINK.sub(replace, text)


def with_pictures(text, folder, pages):
    """Copy the pictures of a page, which stood in `folder`, into pages/, and point to them."""

    def copy(found):
        path = (folder / found[2]).resolve()
        (pages / "pictures").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, pages / "pictures" / path.name)
        return f"![{found[1]}](/pictures/{path.name})"

    return PICTURE.sub(copy, text)


# --- pages --------------------------------------------------------------------------------------


def write_pages(folder, paths, lite=False):
    """Write all pages, for Sphinx, into a new folder; paths are the modules' sources."""
    (folder / "course").mkdir(parents=True)
    for name in ("conf.py", "static"):
        copy = shutil.copytree if (HERE / name).is_dir() else shutil.copy
        copy(HERE / name, folder / name)
    for path in paths:
        nbformat.write(course_page(path, paths, lite), folder / "course" / f"{path.stem}.ipynb")
    targets = render.HERE / "student" / "targets"
    if targets.exists():
        shutil.copytree(targets, folder / "course" / "targets")
    table = "| module | asks | minutes | more |\n|---|---|---|---|\n" + "".join(
        f"| [{m.title}](student/{m.path.stem}.ipynb) | {m.question} | {m.minutes} "
        f"| {m.more or '–'} |\n"
        for m in map(timings.describe, paths)
    )
    pages = "\n".join(f"course/{path.stem}" for path in paths)
    texts = {"index": front_page(table, pages, paths)}
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        text = relink(
            with_pictures(text, (ROOT / name).parent, folder), (ROOT / name).parent, paths
        )
        texts[page] = text.replace("# miniflamingo\n", "# The project\n", 1)
    texts["index"] = relink(with_pictures(texts["index"], HERE, folder), HERE, paths)
    for page, text in texts.items():
        write(folder / f"{page}.md", text)
    write_api(folder / "api")
    write_benchmarks(folder)
    write(folder / "browser.md", browser.page(paths if lite else ()))


def front_page(table, pages, paths):
    """The first page, with links as they are in the repository."""
    words = next(words for words, target in PICTURE.findall((ROOT / "README.md").read_text("utf-8"))
                 if target.endswith("answers.png"))  # fmt: skip
    filled = {"{modules}": table.replace("](student/", "](../student/"), "{pages}": pages,
              "{words}": words, "{number}": paths[0].stem.split("_")[0],
              "{first}": f"../student/{paths[0].stem}.ipynb"}  # fmt: skip
    text = (HERE / "index.md").read_text(encoding="utf-8")
    for name, value in filled.items():
        text = text.replace(name, value)
    return text


def write(file, text):
    """Write a text file and the folder it stands in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def course_page(path, shown, lite=False):
    """The student's notebook as a page: links of the site, figures with their words as alt text,
    no cell that says what to install."""
    folder = render.HERE / "student"
    notebook = nbformat.read(folder / f"{path.stem}.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.source != render.ALONE]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source, folder, shown)
        alts = [output.metadata["image/png"]["alt"] for output in cell.get("outputs", ())
                if "image/png" in output.get("data", {})]  # fmt: skip
        if alts:
            cell.metadata["mystnb"] = {"image": {"alt": " ".join(alts)}}
    if lite and browser.chosen([path]):
        link = f"<a href='../lite/lab/index.html?path={path.stem}.ipynb'>Run it in the browser</a>"
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(link, id="in-the-browser"))
    return notebook


def write_api(folder):
    """A page for each module of the library, filled by autodoc, and a list of them."""
    names = {}
    for package in LIBRARY:
        files = sorted((ROOT / package).rglob("*.py"))
        names[package] = [dotted(f) for f in files if f.stem != "__main__"]
    for name in (name for some in names.values() for name in some):
        write(folder / f"{name}.md",
              f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n"
              "   :show-inheritance:\n```\n")  # fmt: skip
    lists = [f"```{{toctree}}\n:caption: {p}\n\n" + "\n".join(some) + "\n```\n"
             for p, some in names.items()]  # fmt: skip
    head = "# API reference\n\nWhat the docstrings say, module by module.\n\n"
    write(folder / "index.md", head + "\n".join(lists))


def write_benchmarks(folder, results=ROOT / "kernels" / "results"):
    """The page of the measured figures, drawn from the data files of kernels/results."""
    parts = [SPEED]
    for file in sorted(results.glob("*.json")):
        document = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(document, dict) and {"records", "limits", "meta"} <= document.keys():
            parts.append(_benchmark(document, file.stem, folder / "figures"))
    write(folder / "benchmarks.md", "\n".join(parts if parts[1:] else [*parts, NOT_MEASURED]))


def _benchmark(document, name, folder):
    """The section of one data file: what was measured on, and every figure that it holds."""
    from miniflamingo import plots

    folder.mkdir(parents=True, exist_ok=True)
    meta = document["meta"]
    facts = (f"- {key}: {value}" for key, value in meta.items() if isinstance(value, str | int))
    parts = [f"## {name}\n", *facts, ""]
    figures = {"roofline": ("Flops a second against flops a byte, under the measured roof",
                            lambda: plots.plot_roofline(document))}  # fmt: skip
    for way in DIRECTIONS:
        figures[f"cost {way}"] = (
            f"Microseconds of image-causal attention, {way}, against the number of images",
            lambda way=way: plots.plot_cost(document, "image_causal_attention", way),
        )
    for title, (alt, draw) in figures.items():
        try:
            figure = draw()
        except ValueError:
            continue  # the file holds no such time
        file = f"{name}-{title}.png".replace(" ", "-").replace("+", "and")
        figure.savefig(folder / file)
        parts.append(f"![{alt}; {name}.](figures/{file})\n")
    return "\n".join(parts)


# --- command line -------------------------------------------------------------------------------


def build(out, pages, paths, lite=True):
    """Build the site in two new folders. Failed when a script cannot be had, or Sphinx finds a
    fault."""
    from sphinx.cmd.build import build_main

    write_pages(pages, paths, lite)
    vendor.copy_mathjax(pages / "static")
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels are imported, never run
    if build_main(["-q", "-W", "--keep-going", "-b", "html", "-d", str(pages) + ".cache",
                   str(pages), str(out)]):  # fmt: skip
        raise Failed("Sphinx found faults; they stand above")
    if lite:
        browser.build(out / "lite", paths)


def parser():
    """The command line's grammar."""
    top = Parser(prog="python -m miniflamingo.course.site.build", description=__doc__)
    top.add_argument("modules", nargs="*", help="numbers or names, such as 06; all by default")
    top.add_argument("--no-lite", action="store_true", help="without JupyterLite")
    top.add_argument("--out", type=a_path, default=ROOT / "out" / "site", help="where to")
    return top


def main(argv=None):
    """Run the command; returns the exit code."""
    return run_command("miniflamingo.course.site.build", lambda: run(parser().parse_args(argv)))


def run(arguments):
    """Run the parsed command; returns the exit code. Failed where `build` fails."""
    paths, lite = timings.chosen(arguments.modules), not arguments.no_lite
    require("sphinx", "myst_nb", "furo")
    if lite:
        require("jupyterlite_core", "jupyterlite_pyodide_kernel")
    out = arguments.out.absolute()
    aside = tempfile.TemporaryDirectory()
    with staged(out.parent, "site", [out.name]) as new, aside as pages:
        build(new / out.name, Path(pages) / "pages", paths, lite)
    print(f"{out / 'index.html'}; to read it: python -m http.server -d {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
