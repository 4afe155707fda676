"""Slides of the course for a lecture, from the committed notebooks: out/slides/06.slides.html.

    python -m miniflamingo.course.slides 06               one module; all without a number
    python -m miniflamingo.course.slides 06 --teacher     with notes and solutions: 06.teacher...

Both have the same slides, one thought on each: at most one figure, table or piece of code, and
about 70 words. Of a long paragraph the slide keeps the first sentence; the whole of it stands in
the speaker's notes (key S), and so do hints and the lists of the first slide. An exercise is its
task in one line. What is for working through at a desk is left out: checks, guesses, the library's
source, set-up. The teacher's slides have the teacher's notes in the speaker's notes, what a guess
should have been, and each solution on a slide below its exercise (arrow down). They are opened
from the folder, without a network: reveal.js and MathJax lie beside them, in `vendor/`.
"""

import ast
import re
import sys
from dataclasses import dataclass

import nbformat
from nbconvert import SlidesExporter
from traitlets.config import Config

from miniflamingo.command import Parser, a_path, run_command
from miniflamingo.outputs import staged

from . import render, timings
from .site import vendor

OUT = render.HERE.parent / "out" / "slides"
WORDS, ROWS, COLUMNS = 70, 16, 76  # on a slide, lines on a slide, letters in a line
FIGURE, CODE = 12, 0.65  # lines that a figure takes, and a line of code
LONG, SHORT = 30, 9  # words from which a paragraph is cut; up to which a sentence is no thought
DETAILS = re.compile(r"<details><summary>.*?</summary>(.*?)</details>", re.DOTALL)
HEADING = re.compile(r"(#{1,3}) (.+)")
TASK = re.compile(r"[★☆]{3} · (?:[^.]|\.(?!\s))*\.\s+")
EXERCISE = re.compile(r"Exercise (\d+\.\d+)")
ORDERS = re.compile(  # the first sentence of an exercise that begins so says what to do
    r"\W*(?:Write|Return|Compute|Build|Find|Give|Make|Count|Complete|Fill|Say|Measure|Implement|"
    r"Choose|Train|Change|Decide|Turn|Show|Derive|Draw|Take|Put|Plan|Split|Add|Repair|Work)\b"
)
GUESS = re.compile(r"\*\*Predict")
ABOUT_DOTS = re.compile(r"\bdots\b|guess(?:es)?\b.*\bdots|\(\w+ numbers?\.\)")
TOLD = re.compile(r"^[○✓✗] (\S+) (.+?)(?: \(no guess\)|, your guess was .*)?$", re.MULTILINE)
ABBREVIATED = re.compile(r"(?:\b(?:e\.g|i\.e|al|vs|cf|etc|Fig|fig|no|pp?)|\b[A-Z])\.$")
PROTECTED = re.compile(r"`[^`]+`|\$\$.+?\$\$|\$[^$]+\$|\]\([^)]*\)", re.DOTALL)
AT_A_DESK = {"check", "guess", "told", "source", "installed"}  # calls that no lecture needs
HIDDEN = "hidden-input"  # the tag of a cell whose code is left out


@dataclass(frozen=True)
class Piece:
    """A cell of the slides: a heading of a level (0: none), something to see, notes, what comes at
    a key."""

    cell: nbformat.NotebookNode
    level: int = 0
    visual: bool = False
    notes: bool = False
    fragment: bool = False


# --- text ---------------------------------------------------------------------------------------


def sentences(text):
    """The sentences of a paragraph, as they are; none ends inside of code, formulas, brackets."""
    masked = PROTECTED.sub(lambda found: "x" * len(found[0]), text)
    found, start = [], 0
    for end in re.finditer(r"[.!?][*_\")”\]]*(?=\s|$)", masked):
        part = masked[start : end.end()]
        is_open = part.count("**") % 2 or part.count("(") > part.count(")")
        if not is_open and not ABBREVIATED.search(part):
            found.append(text[start : end.end()].strip())
            start = end.end()
    rest = text[start:].strip()
    return found + ([rest] if rest else [])


def words(text):
    """How many words of prose a text has: formulas, fenced code and tables are none."""
    text = re.sub(r"^ *```.*?^ *```|\$\$.*?\$\$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^\|.*$|!?\[([^\]]*)\]\([^)]*\)", r"\1", text, flags=re.MULTILINE)
    return len(re.findall(r"\S*\w\S*", re.sub(r"\$[^$]+\$", "x", text)))


def shortened(block, leads=False):
    """A paragraph, or an item of a list, as a slide has it: its first sentence if it is long.

    A short one, such as a bold lead, takes the next with it. leads: a formula follows, which the
    last sentence leads to.
    """
    if GUESS.match(block):
        return _question(block)
    limit = 2 * LONG if leads else LONG
    if words(block) <= limit or block.startswith(("|", "```", "$$", "![", "<")):
        return block
    mark = re.match(r"(?:[-*]|\d+\.) +", block)
    mark = mark[0] if mark else ""
    found = sentences(block[len(mark) :])
    some = 1 + (words(found[0]) < SHORT and len(found) > 1)
    kept = found[:some] + found[max(some, len(found) - 1) :] * leads
    if words(" ".join(kept)) > 2 * LONG:
        kept = found[-1:] if leads else found[:1]
    return mark + " ".join(kept)


def _question(block):
    """What is asked of the audience: all of it, or what leads up to the last question mark."""
    kept = [s for s in sentences(block) if not ABOUT_DOTS.search(s)]
    while words(" ".join(kept)) > WORDS - 8 and len(kept) > 1:
        statements = [i for i, s in enumerate(kept) if "?" not in s]
        del kept[statements[-1] if statements else -1]
    return " ".join(kept)


def blocks(text):
    """The paragraphs, items, tables, fences and display formulas of a Markdown text."""
    found = [[]]
    fenced = formula = False
    for line in text.splitlines():
        begins = not (fenced or formula) and (
            not line.strip() or re.match(r"```|\$\$|(?:[-*]|\d+\.) |!\[", line)
        )
        if begins and found[-1]:
            found.append([])
        if line.strip() or fenced:
            found[-1].append(line)
        fenced ^= line.startswith("```")
        formula ^= line.count("$$") % 2 == 1
        if not fenced and not formula and re.search(r"^```\s*$|\$\$[^$]*$", line) and found[-1]:
            found.append([])
    return ["\n".join(lines) for lines in found if lines]


def _parts(text):
    """Markdown -> its sections; a heading in a code fence is none."""
    parts, fenced = [[]], False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if re.match(r"#{1,3} ", line) and not fenced and any(parts[-1]):
            parts.append([])
        parts[-1].append(line)
    return ["\n".join(part).strip() for part in parts]


# --- cells --------------------------------------------------------------------------------------


def pieces(notebook):
    """The Pieces of a notebook, without what is for a desk; in order, but that what comes out of a
    guess stands behind the question."""
    found, asked = [], {}
    for cell, some in _pieces(notebook):
        for piece in some:
            if piece.fragment and asked.get(_number(cell)) in found:
                found.insert(found.index(asked[_number(cell)]) + 1, piece)
            else:
                found.append(piece)
        if found and cell.cell_type == "code" and "guess" in _called(cell.source):
            asked[_number(cell)] = [piece for piece in found if not piece.notes][-1]
    return found


def _number(cell):
    """The number of the guess that a cell asks for, or tells; None without one."""
    found = re.search(r"\b(?:guess|told)\(\s*[\"'](\S+?)[\"']", cell.source)
    return found and found[1]


def _pieces(notebook):
    """Yield each cell with its Pieces."""
    for cell, after in zip(notebook.cells, [*notebook.cells[1:], None]):
        tags = render.tags(cell)
        if "notes" in tags:
            yield cell, [Piece(_markdown(cell.source, cell.id), notes=True)]
        elif "quiz" in tags or "exercise" in tags:
            continue
        elif cell.cell_type == "markdown":
            parts = _parts(cell.source)
            for i, part in enumerate(parts):
                is_last = part is parts[-1]
                yield cell, _text_pieces(part, f"{cell.id}-{i}", after if is_last else None)
        else:
            yield cell, _code_pieces(cell, tags)


def _markdown(text, name):
    return nbformat.v4.new_markdown_cell(text, id=name[:64])


def _text_pieces(part, name, after=None):
    """A section's heading, then its blocks, each with what was cut off as a note.

    A last paragraph that only leads to the cell `after`, of which nothing is shown, is a note.
    """
    hints = [hint.strip() for hint in DETAILS.findall(part)]
    first, *found = blocks(DETAILS.sub("", part).strip()) or [""]
    heading, level = HEADING.match(first), 0
    if heading:
        level = len(heading[1])
        first, _, rest = first.partition("\n")
        yield Piece(_markdown(first, name), level=level)
        found = [rest, *found] if rest.strip() else found
    elif first:
        found = [first, *found]
    whole = "\n\n".join(found)
    if level == 1:
        found = [block for block in found if block.startswith("**The question")]
    elif heading and EXERCISE.match(heading[2]):
        found = [b if b.startswith("$$") else _task(b) for b in found
                 if b.startswith("$$") or TASK.match(b)]  # fmt: skip
    for i, (block, then) in enumerate(zip(found, [*found[1:], ""])):
        cut = shortened(block, then.startswith("$$"))
        seen = _question(block) if level == 1 else block if TASK.match(block) else cut
        if block is found[-1] and after is not None and _leads_nowhere(block, after):
            seen = ""
        visual = block.startswith(("|", "```", "!["))
        if seen:
            yield Piece(_markdown(seen, f"{name}-{i}"), visual=visual)
        if level != 1 and seen != block and block in whole:
            yield Piece(_markdown(block, f"{name}-{i}-whole"), notes=True)
    if level == 1 or (heading and EXERCISE.match(heading[2])):
        hints.insert(0, whole)
    if text := "\n\n".join(filter(None, hints)):
        yield Piece(_markdown(text, f"{name}-notes"), notes=True)


def _leads_nowhere(block, after):
    """Whether a paragraph announces a cell that no slide shows: the library's source, a check."""
    if after.cell_type != "code" or GUESS.match(block):
        return False
    called, shown = _called(after.source), [*_code_pieces(after, render.tags(after))]
    return not shown and ("source" in called or block.endswith(":"))


def _task(block):
    """An exercise in one line: stars, minutes, and the sentence that says what to do."""
    lead = TASK.match(block)[0]
    found = sentences(block[len(lead) :])
    first = next((i for i, s in enumerate(found) if ORDERS.match(s)), 0)
    start = first - (words(found[first]) < 3 and first > 0) if found else 0  # `Return [n].`
    order = " ".join(found[start : first + 1])
    goes_on = "" if re.search(r"[.!?][\"”)*]*$", order) else " …"  # in a list, a formula
    return f"{lead.strip()}\n\n{order}{goes_on}".strip()


def _code_pieces(cell, tags):
    """A cell of code as a lecture shows it: a figure alone, or code with what it prints."""
    called = _called(cell.source)
    told = [f"- {value}" for output in cell.outputs
            for _, value in TOLD.findall(_text(output))]  # fmt: skip
    if "told" in called and told:  # the teacher's notebook has run them
        yield Piece(_markdown("\n".join(told), f"{cell.id}-told"), fragment=True)
    outputs = [o for o in cell.outputs if not DETAILS.search(_text(o)) and not TOLD.search(_text(o))
               and not re.search(r"^[○✓✗] ", _text(o), re.MULTILINE)]  # fmt: skip
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    shown = nbformat.v4.new_code_cell(
        cell.source, id=cell.id, metadata=dict(cell.metadata), outputs=pictures or outputs
    )
    shown.metadata["tags"] = sorted(tags)
    if pictures:
        shown.metadata["tags"] = sorted({*tags, HIDDEN})
    elif called & AT_A_DESK or not (outputs or "solution" in tags or _defines(cell.source)):
        return
    yield Piece(shown, visual=True)


def _called(code):
    """The names that a cell calls, without what they belong to."""
    calls = [n.func for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)]
    return {getattr(f, "id", None) for f in calls} - {None}


def _defines(code):
    """Whether a cell defines something; what only imports, sets up or asserts does not."""
    return any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in ast.parse(code).body)


def _text(output):
    data = output.get("data", {})
    return data.get("text/markdown") or data.get("text/plain") or output.get("text", "")


# --- slides -------------------------------------------------------------------------------------


def height(cell):
    """About how many lines of a slide a cell takes, with its outputs."""
    if HIDDEN in render.tags(cell):
        return FIGURE * len(cell.outputs)
    if cell.cell_type == "markdown":
        formulas = 2 * cell.source.count("$$") // 2
        return formulas + _lines(cell.source)
    return CODE * (_lines(cell.source) + sum(_lines(_text(o)) for o in cell.outputs))


def _lines(text):
    pictures = FIGURE * len(re.findall(r"^!\[", text, re.MULTILINE))
    paragraph = " ".join(text.splitlines()) if not re.match(r"\||```|[-*] ", text) else text
    return pictures + sum(1 + len(line) // COLUMNS for line in paragraph.splitlines())


@dataclass
class Slide:
    """What stands on the slide so far, its heading aside."""

    words: int
    rows: float = 2  # the heading's
    empty: bool = True
    full: bool = False  # it has something to see
    asked: bool = False  # it has a question to the audience
    exercise: str = ""  # the id of its heading: nothing else comes on the same slide

    def takes(self, piece):
        """Whether a piece still finds its place here."""
        if self.exercise and not piece.cell.id.startswith(f"{self.exercise}-"):
            return False
        if self.empty or (piece.fragment and self.asked):
            return True
        is_led = piece.cell.source.startswith("**")  # by a few bold words: a thought of its own
        apart = is_led or "solution" in render.tags(piece.cell)
        runs_over = self.words + prose(piece.cell) > WORDS or self.rows + height(piece.cell) > ROWS
        return not (self.full or self.asked or apart or runs_over)

    def add(self, piece):
        """Put a piece there."""
        self.words += prose(piece.cell)
        self.rows += height(piece.cell)
        self.empty, self.full = False, piece.visual
        self.asked |= bool(GUESS.match(piece.cell.source))


def prose(cell):
    """How many words a cell puts on a slide."""
    return words(cell.source) if cell.cell_type == "markdown" else 0


def arranged(found):
    """Yield (cell, what it begins): "slide", "subslide", "fragment", "notes", or "-", nothing.

    A slide that goes on with the one before has the section's heading again.
    """
    section = title = ""
    slide, number = Slide(0), 0
    for piece in found:
        if piece.notes:
            yield piece.cell, "notes"
        elif piece.level:
            title, slide = HEADING.match(piece.cell.source)[2], Slide(prose(piece.cell))
            if EXERCISE.match(title):
                slide.exercise = piece.cell.id
            else:
                section = title  # of all that follows, but for the exercises
            yield piece.cell, "subslide" if piece.level == 3 else "slide"
        else:
            if not slide.takes(piece):
                number += 1
                is_solution = "solution" in render.tags(piece.cell)
                again = f"### {'Solution of e' + title[1:] if is_solution else section}"
                yield _markdown(again, f"again-{number}"), "subslide"
                slide = Slide(words(again))
            slide.add(piece)
            yield piece.cell, "fragment" if piece.fragment else "-"


def deck(notebook):
    """The notebook as slides: cells cut to pieces, each with its slide_type."""
    cells = []
    for cell, kind in arranged(pieces(notebook)):
        cell.metadata["slideshow"] = {"slide_type": kind}
        cells.append(cell)
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
