"""The front page: short, with its two pictures, and no number that a data file does not hold."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from miniflamingo import plots
from miniflamingo.real import front, measure, parts
from tests.pages import PAGES, ROOT, text_of

TEXT = text_of("README.md")
SHIPPED = ROOT / "miniflamingo" / "real" / "weights"


def test_the_list_of_pages_is_whole():
    found = {p.relative_to(ROOT).as_posix() for folder in ("kernels", "miniflamingo", "tests")
             for p in (ROOT / folder).rglob("*.md") if p.name != "card.md"}  # fmt: skip
    assert found <= PAGES.keys()


def test_the_front_page_is_short_and_has_its_doors():
    assert len(TEXT.splitlines()) <= 90
    assert re.findall("^## (.+)$", TEXT, re.MULTILINE) == ["Learn", "Compare", "Use"]
    assert "    make demo  " in TEXT and "    make test  " in TEXT
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", TEXT)
    assert len(pictures) == 2
    for words, target in pictures:
        assert len(words) > 60 and (ROOT / target).stat().st_size < 150_000


@pytest.mark.parametrize("name", sorted(PAGES.keys() - {"README.md"}))
def test_every_page_is_reached_from_the_front_and_leads_back(name):
    assert f"]({name}" in TEXT
    assert re.search(r"\]\((\.\./)+README\.md", text_of(name).split("\n## ")[0])
    paragraph = text_of(name).split("\n\n")[1]
    assert paragraph[0] not in "|`<#" and len(paragraph) > 100  # says what the page is


def quoted(answers):
    """The numbers of the front page -> where they come from."""
    alphas = json.loads((SHIPPED / "alphas.json").read_text("utf-8"))
    table = list(measure.table(json.loads((SHIPPED / "figures.json").read_text("utf-8"))))
    splits = [cell.strip() for cell in table[0].split("|")]
    row = next(line for line in table if line.startswith("| kind, open-ended")).split("|")
    shares = {split: re.search(r"\d\.\d\d", cell)[0] for split, cell in zip(splits, row)
              if re.search(r"\d\.\d\d", cell)}  # fmt: skip
    return {
        f"{alphas['steps'][-1]:,} steps": "alphas.json",
        "seventeen notebooks": len(list((ROOT / "notebooks" / "source").glob("[01]*.py"))) == 17,
        "five gated layers": len(alphas["alpha_xattn"][-1]) == 5,
        f"({round(sum(p.megabytes for p in parts.PARTS), -1)} MB)": "parts.py",
        f"a share of {shares['artist never seen']}": "figures.json",
        f"of {shares['both never seen']} of": "figures.json",
        "CC-BY 4.0": "4.0" in answers["pictures"],
    }


def test_every_number_of_the_front_page_comes_from_a_data_file():
    answers = json.loads((front.FOLDER / "answers.json").read_text("utf-8"))
    known, text = quoted(answers), re.sub(r"\s+", " ", TEXT)
    assert all(known.values())
    for phrase in known:
        assert phrase in text, f"the front page does not say {phrase!r}"
        text = text.replace(phrase, "")
    text = re.sub(r"\([^()\s]*[/#][^()\s]*\)|`[^`]*`|<[^>]*>", "", text)  # links and code
    text = re.sub(r"SmolLM2-135M|\(2022\)|Python 3\.10|00 Start|step 0|at 0\b|1,000 steps|ARGS=06",
                  "", text)  # fmt: skip
    assert re.findall(r"\d+", text) == []


def test_the_gates_are_those_of_the_shipped_bridge(tmp_path):
    alphas = json.loads((SHIPPED / "alphas.json").read_text("utf-8"))
    figure = plots.plot_alphas(alphas["steps"], alphas["alpha_xattn"], alphas["alpha_dense"])
    front.save(figure, tmp_path / "gates.png")
    ours, committed = (np.asarray(Image.open(folder / "gates.png").convert("RGB"), int)
                       for folder in (tmp_path, front.FOLDER))  # fmt: skip
    assert ours.shape == committed.shape
    assert (abs(ours - committed).max(axis=-1) > 48).mean() < 0.005


def test_the_answers_are_of_things_that_were_drawn_by_lot():
    document = json.loads((front.FOLDER / "answers.json").read_text("utf-8"))
    answers = document["answers"]
    assert [a["in training"] for a in answers] == [True] * front.EACH + [False] * front.EACH
    assert len({a["picture"] for a in answers}) == 2 * front.EACH
    wrong = [a for a in answers if a["answer"] != a["truth"]]
    assert wrong, "the page says that errors are shown"
    with Image.open(front.FOLDER / "answers.png") as picture:
        assert picture.size == (1050, 450)
