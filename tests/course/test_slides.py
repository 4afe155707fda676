"""Slides follow the headings, hold no solution unless asked, and ask for nothing from elsewhere."""

import base64
import hashlib
import io
import re
import tarfile

import nbformat
import pytest

from miniflamingo.course import render, slides, timings
from miniflamingo.course.release import solution_lines
from miniflamingo.course.site import vendor

SOURCES = timings.sources()


def committed(path, kind="student"):
    return nbformat.read(render.HERE / kind / f"{path.stem}.ipynb", as_version=4)


KINDS = ("student", "teacher")
every_deck = pytest.mark.parametrize(
    ("path", "kind"), [(path, kind) for path in SOURCES for kind in KINDS],
    ids=lambda value: value if isinstance(value, str) else value.stem[:2],
)  # fmt: skip


def kind_of(cell):
    return cell.metadata["slideshow"]["slide_type"]


def on_slides(deck):
    """The cells of each slide, without the speaker's notes."""
    found = []
    for cell in deck.cells:
        if kind_of(cell) in ("slide", "subslide"):
            found.append([])
        if kind_of(cell) != "notes":
            found[-1].append(cell)
    return found


def is_visual(cell):
    return cell.cell_type == "code" or cell.source.startswith(("|", "```", "!["))


def outputs(cell):
    return "\n".join(map(slides._text, cell.get("outputs", ())))


@every_deck
def test_every_heading_begins_a_slide_and_a_slide_has_one_thought(path, kind):
    deck = slides.deck(committed(path, kind))
    nbformat.validate(deck)
    assert kind_of(deck.cells[0]) == "slide"
    for cells in on_slides(deck):
        first, *others = cells
        heading = re.match(r"(#{1,3}) ", first.source)
        assert heading and kind_of(first) == ("subslide" if len(heading[1]) == 3 else "slide")
        assert not [c for c in others if c.cell_type == "markdown" and c.source.startswith("#")]
        assert sum(map(is_visual, others)) <= 1
        counted = [slides.prose(c) for c in cells if kind_of(c) != "fragment"]
        alone = len(others) == 1 + sum(kind_of(c) == "fragment" for c in others)
        assert sum(counted) <= (90 if alone else slides.WORDS), first.source
        assert sum(map(slides.height, others)) <= 20 or len(others) == 1, first.source


@every_deck
def test_what_is_for_a_desk_is_on_no_slide(path, kind):
    for cell in (cell for cells in on_slides(slides.deck(committed(path, kind))) for cell in cells):
        tags = set(cell.metadata.get("tags", ()))
        assert not tags & {"notes", "quiz", "exercise"}
        text = cell.source + outputs(cell)
        assert "<details>" not in text and "not done yet" not in text
        assert not re.search("^[○✓✗] ", outputs(cell) + "\n" + cell.source, re.MULTILINE)
        if cell.cell_type == "code" and slides.HIDDEN not in tags:
            assert not slides._called(cell.source) & slides.AT_A_DESK
        if any("image/png" in o.get("data", {}) for o in cell.get("outputs", ())):
            assert slides.HIDDEN in tags  # a figure without the code that draws it


@every_deck
def test_figures_and_formulas_stay_and_what_is_cut_is_in_the_notes(path, kind):
    notebook = committed(path, kind)
    deck = slides.deck(notebook)
    notes = "\n".join(c.source for c in deck.cells if kind_of(c) == "notes")
    shown = "\n".join(c.source for cells in on_slides(deck) for c in cells)
    pictures, kept = (
        [o.data["image/png"] for c in book.cells for o in c.get("outputs", ())
         if "image/png" in o.get("data", {})] for book in (notebook, deck)
    )  # fmt: skip
    assert pictures == kept
    texts = [c.source for c in notebook.cells if c.cell_type == "markdown"
             and not {"notes", "quiz"} & set(c.metadata.get("tags", ()))]  # fmt: skip
    whole = "\n".join(texts)
    seen = slides.DETAILS.sub("", whole)
    for formula in re.findall(r"\$\$.+?\$\$", seen, re.DOTALL):
        assert formula in shown, formula
    for target in re.findall(r"^!\[[^\]]*\]\([^)]+\)", seen, re.MULTILINE):
        assert target in shown
    said = re.sub(r"\W+", " ", shown + "\n" + notes)
    paragraphs = [p for text in texts for part in slides._parts(text) for p in
                  slides.blocks(slides.DETAILS.sub("\n\n", part))]  # fmt: skip
    for paragraph in paragraphs + slides.DETAILS.findall(whole):
        assert re.sub(r"\W+", " ", paragraph).strip() in said, paragraph


@every_deck
def test_an_exercise_is_its_task_in_one_line(path, kind):
    found = 0
    for first, *others in on_slides(slides.deck(committed(path, kind))):
        if first.source.startswith("### Exercise"):
            found += 1
            prose = [c.source for c in others if not c.source.startswith("$$")]
            assert len(prose) == 1 and all(c.cell_type == "markdown" for c in others)
            lead, task = prose[0].split("\n\n")
            assert re.match("[★☆]{3} · ", lead) and 2 < slides.words(task) < 60
    assert found >= 2


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem[:2])
def test_the_teacher_s_slides_are_the_student_s_with_solutions_and_notes(path):
    decks = {kind: slides.deck(committed(path, kind)) for kind in KINDS}
    tags = {k: [set(c.metadata.get("tags", ())) for c in d.cells] for k, d in decks.items()}
    assert not any("solution" in t for t in tags["student"])
    sources = [c.source for c in committed(path, "teacher").cells if "solution" in render.tags(c)]
    shown = [c.source for c in decks["teacher"].cells if "solution" in c.metadata.get("tags", ())]
    assert shown == sources
    for cell in (c for c in render.read_source(path).cells if "notes" in render.tags(c)):
        kept = {k: [c for c in d.cells if c.source == cell.source] for k, d in decks.items()}
        assert not kept["student"]
        assert all(kind_of(c) == "notes" for c in kept["teacher"])


def book(*cells):
    """A notebook of Markdown (text), and code (a tuple: source, output, tags ...)."""
    new = []
    for cell in cells:
        if isinstance(cell, str):
            new.append(nbformat.v4.new_markdown_cell(cell))
        else:
            source, text, *tags = cell
            data = {"text/plain": text}
            out = [nbformat.v4.new_output("display_data", data)] if text else []
            new.append(nbformat.v4.new_code_cell(source, outputs=out, metadata={"tags": tags}))
    return nbformat.v4.new_notebook(cells=new)


def layout(*cells):
    return [(kind_of(c), c.source) for c in slides.deck(book(*cells)).cells]


def test_a_guess_is_a_question_and_its_answer_comes_at_a_key():
    found = layout(
        "## A",
        "**Predict, then run:** how many? Write your guess for the dots.",
        ('guess("1.a", shut=...)', "○ guess 1.a: write what you expect for shut, then run"),
        ("def f(x):\n    return x", ""),
        ('told("1.a", shut=2)', "○ 1.a shut: 2 (no guess)"),
        ('check("1.1", f)', "✓ exercise 1.1: right"),
    )
    assert found[:3] == [
        ("slide", "## A"), ("-", "**Predict, then run:** how many?"), ("fragment", "- shut: 2"),
    ]  # fmt: skip
    assert found[3][0] == "notes"
    assert found[4:] == [("subslide", "### A"), ("-", "def f(x):\n    return x")]


def test_a_long_paragraph_keeps_its_first_sentence_and_what_leads_to_a_formula():
    long = "It is the first thought of ten words, said at once. " + "Then follow others. " * 12
    assert slides.shortened(long) == "It is the first thought of ten words, said at once."
    assert slides.shortened("- " + long).startswith("- It is") and slides.shortened(long[:60])
    led = long * 2 + "And so we find:"
    assert slides.shortened(led, leads=True).endswith("once. And so we find:")
    bold = "**Why one?** Because it is right so. " + long
    assert slides.shortened(bold) == "**Why one?** Because it is right so."


def test_a_sentence_does_not_end_inside_of_code_formulas_and_brackets():
    text = "Alayrac et al. write `f. G` (see fig. 3. Or not) and $a. B$. **All. Of it.** End"
    assert slides.sentences(text) == [
        "Alayrac et al. write `f. G` (see fig. 3. Or not) and $a. B$.", "**All. Of it.**", "End",
    ]  # fmt: skip


def test_what_announces_the_library_s_source_is_no_slide():
    found = layout("## A\n\nThe library's:", ("source(f)", "def f(): ..."), "Text.")
    assert found == [("slide", "## A"), ("notes", "The library's:"), ("-", "Text.")]


def test_cells_are_cut_at_headings_but_not_inside_a_fence():
    text = "# A\n\nb\n\n## C\n```\n# not a heading\n```\n### D\n\ne"
    assert slides._parts(text) == ["# A\n\nb", "## C\n```\n# not a heading\n```", "### D\n\ne"]
    assert slides.blocks("a\nb\n\n- c\n- d\n$$e$$\nf\n```\n- g\n\nh\n```\n| i |") == [
        "a\nb", "- c", "- d", "$$e$$", "f", "```\n- g\n\nh\n```", "| i |",
    ]  # fmt: skip


def test_what_would_not_fit_begins_a_new_slide_with_the_heading_again():
    code = ("def f():\n" + "    a\n" * 8, "")
    found = layout("## A", "b", code, "c", "### D", *["word " * 28] * 3)
    assert [kind for kind, _ in found] == [
        "slide", "-", "-", "subslide", "-", "subslide", "-", "-", "subslide", "-",
    ]  # fmt: skip
    assert found[3][1] == "### A" and found[8][1] == "### D"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem[:2])
def test_the_page_asks_for_nothing_from_elsewhere(path, tmp_path):
    html = slides.export(path, "student", tmp_path).read_text(encoding="utf-8")
    asked = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"([^\"]*)\"", html)
    asked += re.findall(r"url\(['\"]?([^'\")]+)", html) + re.findall(
        r"@import ['\"]([^'\"]+)", html
    )
    assert asked and all(a.startswith(("vendor/", "data:", "#")) for a in asked), [
        a[:80] for a in asked if not a.startswith(("vendor/", "data:"))
    ]
    pictures = re.findall(r"<img[^>]*>", html)
    drawn = "image/png" in (render.HERE / "student" / f"{path.stem}.ipynb").read_text("utf-8")
    assert bool(pictures) == drawn
    assert all(re.search(r'alt="[^"]{30,}', picture) for picture in pictures)
    assert f"<title>{timings.describe(path).title.replace(chr(38), '&amp;')} slides" in html


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_solutions_are_shown_to_the_teacher_alone(kind, tmp_path):
    path = SOURCES[0]
    file = slides.export(path, kind, tmp_path)
    text = re.sub(r"<[^>]*>", "", file.read_text(encoding="utf-8"))
    plain = [line for line in solution_lines(path) if not re.search("[<>&\"']", line)]
    found = [line for line in plain if line in text]
    assert len(plain) > 3 and found == (plain if kind == "teacher" else [])
    assert file.name == path.stem[:2] + (".teacher" if kind == "teacher" else "") + ".slides.html"


def archive(folder, monkeypatch, right=True):
    """A package `tiny` in the cache, with the checksum that is expected, or another."""
    file = folder / "tiny-1.tgz"
    with tarfile.open(file, "w:gz") as tar:
        tar.addfile(entry := tarfile.TarInfo("package/a.js"), io.BytesIO())
        assert entry.size == 0
    checksum = base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()
    monkeypatch.setitem(vendor.PACKAGES, "tiny", ("1", checksum if right else "other"))
    return file


def test_a_package_is_unpacked_once_its_checksum_is_right(tmp_path, monkeypatch):
    archive(tmp_path, monkeypatch)
    assert (vendor.fetch("tiny", tmp_path) / "a.js").exists()


@pytest.mark.parametrize("downloaded", [True, False])
def test_a_package_with_another_checksum_is_refused(downloaded, tmp_path, monkeypatch):
    """And deleted, if it was downloaded just now; what was there before stays."""
    file = archive(tmp_path, monkeypatch, right=False)
    data = file.read_bytes()
    if downloaded:
        file.unlink()
        monkeypatch.setattr(vendor, "_download", lambda *args: file.write_bytes(data))
    with pytest.raises(RuntimeError, match="sha512 other is expected, got"):
        vendor.fetch("tiny", tmp_path)
    assert file.exists() is not downloaded and not (tmp_path / "tiny-1").exists()


def test_slides_replace_their_own_alone(tmp_path, monkeypatch, capsys):
    for name in ("copy_mathjax", "copy_reveal"):
        monkeypatch.setattr(vendor, name, lambda folder: folder.mkdir(exist_ok=True))
    for number in ("00", "00", "01"):
        assert slides.main([number, "--out", str(tmp_path)]) == 0
    (tmp_path / "00.slides.html").write_text("mine", "utf-8")
    assert slides.main(["01", "--out", str(tmp_path)]) == 0
    assert slides.main(["00", "--out", str(tmp_path)]) == 2
    assert "00.slides.html: in the way" in capsys.readouterr().err
    assert (tmp_path / "00.slides.html").read_text("utf-8") == "mine"


def test_without_npm_one_line_says_what_is_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vendor.shutil, "which", lambda name: None)
    monkeypatch.setattr(vendor, "CACHE", tmp_path)
    monkeypatch.setattr(vendor.fetch, "__defaults__", (tmp_path,))
    assert slides.main(["06", "--out", str(tmp_path)]) == 1
    assert "npm, which comes with Node.js, is needed" in capsys.readouterr().err


def test_an_unknown_module_is_an_error_of_the_command_line(capsys):
    assert slides.main(["97"]) == 2
    assert "no module is called 97" in capsys.readouterr().err
