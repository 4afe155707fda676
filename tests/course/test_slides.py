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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem[:2])
def test_every_heading_begins_a_slide_and_nothing_is_lost(path):
    notebook = committed(path)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    deck = slides.deck(notebook)
    for cell in deck.cells:
        kind = cell.metadata["slideshow"]["slide_type"]
        heading = re.match(r"(#{1,3}) ", cell.source)
        if cell.cell_type == "markdown" and heading:
            assert kind == ("subslide" if len(heading[1]) == 3 else "slide"), cell.source
    assert [cell.source for cell in deck.cells if cell.cell_type == "code"] == code
    hints = [cell for cell in deck.cells if cell.metadata["slideshow"]["slide_type"] == "notes"]
    assert hints and all(cell.source.strip() for cell in hints)
    shown = "\n".join(cell.source for cell in deck.cells if cell not in hints)
    assert "<details>" not in shown
    nbformat.validate(deck)


def test_cells_are_cut_at_headings_but_not_inside_a_fence():
    text = "# A\n\nb\n\n## C\n```\n# not a heading\n```\n### D\n\ne"
    assert slides._parts(text) == ["# A\n\nb", "## C\n```\n# not a heading\n```", "### D\n\ne"]


def test_what_would_not_fit_begins_a_new_slide():
    markdown, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    cells = [markdown("## A"), code("a\n" * 15), code("b"), code("c\n" * 12), markdown("### D"),
             markdown("e")]  # fmt: skip
    kinds = ["slide", "fragment", "-", "subslide", "subslide", "-"]
    assert list(slides.slide_types(cells)) == kinds


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
    assert pictures and all(re.search(r'alt="[^"]{30,}', picture) for picture in pictures)
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
