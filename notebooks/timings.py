"""How long the modules of the course take, in the README and in their headers.

    python -m miniflamingo.course.timings            all modules
    python -m miniflamingo.course.timings 06         one of them
    python -m miniflamingo.course.timings --table    measure nothing, write what is counted

The reader's minutes are counted from the source: words, lines of code and of the library, figures,
guesses, and what the exercises say of themselves (`RATES`). Headings that end with (optional), and
what stands below them, are no part of the core path. `--table` writes the minutes into the headers
and the README's table.

Measuring runs every code cell of both renderings, one thread, and adds up the processor time of the
kernel and its children. It writes timings.json, the sentence "Computing takes about N seconds of
one core." in the source, and the table. Notebooks change with their source: `make notebooks` next.
"""

import ast
import datetime
import json
import os
import platform
import re
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import repeat
from pathlib import Path

import nbformat

from miniflamingo.command import Parser, in_processes, run_command
from miniflamingo.module import write_atomically
from miniflamingo.rooms import path_of

from . import render

ROOT = render.HERE.parent
FILE, README = render.HERE / "timings.json", render.HERE / "README.md"
PROBE = "import os as _os; print(list(_os.times()))"  # processor and wall seconds so far
STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300)
NEAR, LEAST = 0.25, 1  # a claim stands while it is within 25 %, or a second, of the measurement
SENTENCE = re.compile(r"(Computing[\s#]+takes[\s#]+about[\s#]+)(\d+)([\s#]+)seconds?\b")
MARKERS = (
    "<!-- modules: made by `python -m miniflamingo.course.timings --table` -->\n",
    "<!-- end -->",
)
TIME = re.compile(
    r"(?<=\*\*Time:\*\* )about (\d+) minutes(?:.*?, and (\d+) for .*?)?(?=\.)", re.DOTALL
)
RATES = {  # a minute of reading: so many words, ...; assumed, not measured
    "words": 200,
    "code": 10,  # lines of a notebook's code that are no exercise
    "library": 20,  # lines of what source() shows
    "figures": 2,
    "guesses": 1,
}
STEP = 5  # minutes that a header is rounded to
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
EXERCISE = re.compile(r"[★☆]{3} · (\d+) minutes")
HEAD = """| module | asks | needs | computing | minutes | more | explains |
|---|---|---|---|---|---|---|
"""


def sources(numbers=()):
    """The sources of the modules whose numbers or names start so; all by default."""
    found = sorted((render.HERE / "source").glob("[0-9]*.py"))
    return [path for path in found if not numbers or path.stem.startswith(tuple(numbers))]


def chosen(numbers=()):
    """The same; ValueError for a number or name that is no module's, or without any sources."""
    if not sources():
        raise ValueError(f"the course is made in its repository; no sources in {render.HERE}")
    if unknown := [number for number in numbers if not sources([number])]:
        raise ValueError(f"no module is called {' or '.join(unknown)}")
    return sources(numbers)


# --- measuring ----------------------------------------------------------------------------------


def measure(path, kind):
    """Run a rendering's code cells: {"processor_seconds", "wall_seconds"}; kind as in render."""
    notebook = render.read_source(path)
    left_out = render.LEFT_OUT[kind] | ({"target"} if kind == "student" else set())
    cells = [cell for cell in notebook.cells
             if cell.cell_type == "code" and not left_out & render.tags(cell)]  # fmt: skip
    probes = [nbformat.v4.new_code_cell(PROBE, id=name) for name in ("before", "after")]
    notebook.cells = [probes[0], *cells, probes[1]]
    render.execute(notebook, render.HERE / kind)
    before, after = (ast.literal_eval(probe.outputs[0].text) for probe in probes)
    return {
        "processor_seconds": round(sum(after[:4]) - sum(before[:4]), 2),
        "wall_seconds": round(after[4] - before[4], 2),
    }


def machine():
    """What was measured on: date, processor, cores, system, and the versions that matter."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text("utf-8")) if info.exists() else []
    return {
        "date": datetime.date.today().isoformat(),
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("numpy", "matplotlib", "torch", "triton")},
    }


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def read():
    """What timings.json holds: {module: {"student", "teacher", "machine"}}; {} without the file."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def agrees(claim, measured):
    """Whether "about `claim` seconds" may be said of `measured` seconds."""
    return abs(claim - measured) <= max(LEAST, NEAR * claim)


def rounded(measured, claim=None):
    """Seconds to claim: the old claim while it agrees, so that it is stable, else a round step."""
    if claim is not None and agrees(claim, measured):
        return claim
    return min(STEPS, key=lambda step: abs(step - measured))


def claim_in(text):
    """The seconds that a module's text claims. ValueError where the sentence is missing."""
    found = SENTENCE.search(text)
    if not found:
        raise ValueError("no sentence `Computing takes about N seconds of one core.` in the header")
    return int(found[2])


def with_claim(text, measured):
    """The text, its sentence rewritten for `measured` seconds."""
    seconds = rounded(measured, claim_in(text))
    noun = "second" if seconds == 1 else "seconds"
    return SENTENCE.sub(lambda found: f"{found[1]}{seconds}{found[3]}{noun}", text, count=1)


# --- the reader's minutes -------------------------------------------------------------------------


def amounts(path):
    """{False: of the core path, True: of what is optional}, each {"words", "code", ...: how many}.

    "exercises" is the sum of the minutes that they state.
    """
    found = {part: Counter() for part in (False, True)}
    cells, origins, headings = render.read_source(path).cells, {}, {}
    for cell in cells:
        if not {"solution", "notes", "quiz"} & render.tags(cell):
            for text in _sections(cell):
                if cell.cell_type == "markdown" and (heading := HEADING.match(text)):
                    level = len(heading[1])
                    headings = {n: title for n, title in headings.items() if n < level}
                    headings[level] = heading[2]
                optional = any(title.endswith("(optional)") for title in headings.values())
                found[optional].update(_amounts(cell, text, origins))
    return found


def _sections(cell):
    """A Markdown cell's text, cut before its headings; any other cell's as a whole."""
    if cell.cell_type != "markdown":
        return [cell.source]
    return [text for text in re.split(r"^(?=#+ )", cell.source, flags=re.MULTILINE) if text]


def _amounts(cell, text, origins):
    if cell.cell_type == "markdown":
        return {"words": len(text.split()), "exercises": sum(map(int, EXERCISE.findall(text)))}
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    names = [getattr(call.func, "id", "") for call in calls]
    sources = shown_source(text, origins).values()
    counted = Counter(
        figures=names.count("show"),
        guesses=names.count("guess"),
        library=sum(code.count("\n") + 1 for code in sources),
    )
    if not {"check", "guess", "source"} & set(names) and "exercise" not in render.tags(cell):
        counted["code"] = len([line for line in text.splitlines() if line.strip()])
    return counted


def shown_source(code, origins):
    """{dotted name: source} of what a cell shows by source(); origins gains what it imports."""
    tree, shown = ast.parse(code), {}
    for node in ast.walk(tree):
        origins |= _imported(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "source":
            name = _dotted(node.args[0], origins)
            shown[name] = _definition(name)
    return shown


def _definition(name):
    """The source of the function or class of a dotted name; "" for one that is not in our files."""
    text = (ROOT / file).read_text(encoding="utf-8") if (file := _file(name)) else ""
    body, found = ast.parse(text).body, ""
    for part in name.removesuffix(".fn").split("."):
        for node in body:
            if getattr(node, "name", None) == part:
                body, found = node.body, ast.get_source_segment(text, node, padded=True)
    return found


def minutes(amount):
    """The reader's minutes of amounts, not rounded."""
    return sum(amount[what] / rate for what, rate in RATES.items()) + amount["exercises"]


def with_minutes(path):
    """A source's text, its header's minutes counted anew."""
    core, more = (STEP * round(minutes(amount) / STEP) for amount in amounts(path).values())
    said = f"about {core} minutes"
    said += f" for the core path, and {more} for what is marked optional" if more else ""
    text = path.read_text(encoding="utf-8")
    found = re.search(r"\*\*Time:\*\* (about.*?\.)[\s#]+(Computing[^.]*\.)", text, re.DOTALL)
    if not found:
        raise ValueError(f"{path.name}: its header has no `**Time:** about N minutes. Computing`")
    lines = textwrap.fill(
        f"**Time:** {said}. {' '.join(found[2].replace('#', ' ').split())}", 100,
        initial_indent="# ", subsequent_indent="# ",
    ).removeprefix("# ")  # fmt: skip
    return text[: found.start()] + lines + text[found.end() :]


# --- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    """What a module's source says of itself."""

    path: Path
    title: str  # "06 φ and image-causal masking"
    question: str
    objectives: str  # what a reader can do afterwards, parted by semicolons
    needs: tuple  # numbers of earlier modules
    minutes: int  # of the core path
    more: int  # of what is optional
    files: tuple  # paths of the library, from the repository's root, in the order of appearance

    @property
    def number(self):
        """The two digits that the file's name begins with."""
        return self.path.stem.split("_")[0]


def describe(path):
    """Read a source into a Module. ValueError for a header without one of its parts."""
    cells = render.read_source(path).cells
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")

    def part(what, pattern):
        found = re.search(pattern, text, re.DOTALL | re.MULTILINE)
        if not found:
            raise ValueError(f"{path.name}: its header has no {what}, as in /{pattern}/")
        return " ".join(found[1].split())

    number = path.stem.split("_")[0]
    part("time", TIME.pattern)
    minutes, more = TIME.search(text).groups()
    return Module(
        path,
        part("title", r"\A# (\d\d [^\n]+)"),
        part("question", r"\*\*The question: (.+?)\*\*"),
        part("objectives", r"After this module you can\n\n- (.+?)\n\n").replace("; - ", "; "),
        _numbers(part("prerequisites", r"\*\*You need:\*\* (.+?)(?:\n\n|\Z)"), number),
        int(minutes),
        int(more or 0),
        tuple(_files(cells)),
    )


def _numbers(text, own):
    """The modules before `own` that a text names, as in "module 01", "modules 03 and 05 to 07"."""
    numbers = set()
    for phrase in re.findall(r"modules? (\d\d(?:(?:, | and |, and | to )\d\d)*)", text):
        for first, last in re.findall(r"(\d\d)(?: to (\d\d))?", phrase):
            numbers |= {f"{n:02d}" for n in range(int(first), int(last or first) + 1)}
    return tuple(sorted(n for n in numbers if n < own))


def _files(cells):
    """The library's files whose source the cells show, or which they name, each once."""
    origins, seen = {}, {}
    for cell in cells:
        if cell.cell_type == "markdown":
            found = re.findall(r"\b(?:miniflamingo|kernels)/[\w/]+\.py", cell.source)
            seen |= dict.fromkeys(name for name in found if (ROOT / name).is_file())
            continue
        for node in ast.walk(ast.parse(cell.source)):
            origins |= _imported(node)
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "source":
                seen |= dict.fromkeys(_shown(node.args[0], origins))
    return seen


def _imported(node):
    """Name -> dotted origin, for what an import statement brings."""
    if isinstance(node, ast.ImportFrom):
        return {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    if isinstance(node, ast.Import):
        return {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0]
                for a in node.names}  # fmt: skip
    return {}


def _shown(expression, origins):
    """The file of what is shown, of an expression such as `xattn.compute_phi`; none if unknown."""
    name = _dotted(expression, origins)
    if name.startswith("miniflamingo."):
        yield from filter(None, [_file(name)])


def _dotted(expression, origins):
    """The dotted name of an expression such as `xattn.compute_phi`, from where it is defined."""
    first, *rest = ast.unparse(expression).split(".")
    return ".".join([origins.get(first, first), *rest])


def _file(name):
    """The file that defines `package.module.thing`, following a package's re-exports."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        base = ROOT / path_of(".".join(parts[:end]))
        if base.with_suffix(".py").is_file():
            return base.with_suffix(".py").relative_to(ROOT).as_posix()
        if (base / "__init__.py").is_file() and end < len(parts):
            for node in ast.parse((base / "__init__.py").read_text(encoding="utf-8")).body:
                if parts[end] in _imported(node):
                    return _file(_imported(node)[parts[end]])
    return None


def row(module, timings):
    """A module's row of the table; timings as `read` returns them."""

    def link(f):
        return f"[{Path(f).name}](../{f})"

    measured = timings.get(module.number)
    seconds = "not measured"
    if measured:
        seconds = f"{claim_in(module.path.read_text(encoding='utf-8'))} s"
    cells = [
        f"[{module.title}](student/{module.path.stem}.ipynb)",
        module.question.replace("|", r"\|"),
        ", ".join(module.needs) or "–",
        seconds,
        str(module.minutes),
        str(module.more) if module.more else "–",
        ", ".join(map(link, module.files)) or "–",
    ]
    return f"| {' | '.join(cells)} |\n"


def table():
    """The table of all modules and their objectives, from their sources and timings.json."""
    timings, modules = read(), [describe(path) for path in sources()]
    objectives = "".join(f"- **{m.number}** {m.objectives}\n" for m in modules)
    rows = "".join(row(module, timings) for module in modules)
    return f"{HEAD}{rows}\nAfter each module you can\n\n{objectives}"


def with_table(readme):
    """The README's text with the table between its markers. ValueError where they are missing."""
    start, end = MARKERS
    if readme.count(start) != 1 or end not in readme.split(start)[-1]:
        raise ValueError(f"the table stands between {start.strip()} and {end}: not found")
    before, after = readme.split(start)
    return before + start + table() + end + after.split(end, 1)[1]


# --- command line -------------------------------------------------------------------------------


def update(path, timings):
    """Measure a module; writes timings.json and the sentence in the source. -> a line to print."""
    number = path.stem.split("_")[0]
    kinds = ("student", "teacher")
    measured = in_processes(1, measure, repeat(path), kinds, method="spawn")
    record = dict(zip(kinds, measured))
    timings[number] = record | {"machine": machine()}
    lines = json.dumps(dict(sorted(timings.items())), indent=1, ensure_ascii=False)
    write_atomically(FILE, f"{lines}\n".encode())
    text = path.read_text(encoding="utf-8")
    seconds = record["student"]["processor_seconds"]
    if (new := with_claim(text, seconds)) != text:
        write_atomically(path, new.encode())
    spent = ", ".join(f"{kind} {record[kind]['processor_seconds']:.1f} s" for kind in record)
    return f"{path.stem}: {spent}; the header says {claim_in(new)} s"


def parser():
    """The command line's grammar."""
    top = Parser(prog="python -m miniflamingo.course.timings", description=__doc__)
    top.add_argument("modules", nargs="*", help="numbers or names, such as 06; all by default")
    top.add_argument("--table", action="store_true", help="measure nothing, write what is counted")
    return top


def main(argv=None):
    """Run the command; returns the exit code."""
    return run_command("miniflamingo.course.timings", lambda: run(parser().parse_args(argv)))


def run(arguments):
    """Run the parsed command; returns the exit code."""
    if arguments.table and arguments.modules:
        raise ValueError("--table measures nothing: expected no module beside it, got "
                         + " ".join(arguments.modules))  # fmt: skip
    paths, timings = chosen(arguments.modules), read()
    for path in () if arguments.table else paths:
        print(update(path, timings), flush=True)
    for path in paths:
        if (new := with_minutes(path)) != path.read_text(encoding="utf-8"):
            write_atomically(path, new.encode())
    write_atomically(README, with_table(README.read_text(encoding="utf-8")).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
