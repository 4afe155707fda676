"""`python -m miniflamingo fewshot`: trainings, figures, tables, pictures."""

import json

import pytest
from PIL import Image

from miniflamingo.__main__ import main
from miniflamingo.fewshot import experiments, measure, report
from miniflamingo.worlds import glyphs


@pytest.fixture
def few(briefly):
    """Two groups of six classes."""

    def groups(self):
        ids = glyphs.classes(self.split)
        return {"seen": ids[:6]} if self.split == "train" else {"letters": ids[:6],
                                                                 "symbols": ids[-6:]}  # fmt: skip

    briefly.setattr(measure.Measure, "groups", groups)
    return briefly


def test_train_resumes_and_measure_writes_what_table_prints(few, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["fewshot", "train", "run", "--seed", "3"]) == 0
    config = json.loads((tmp_path / "run/flamingo/log.jsonl").read_text("utf-8").splitlines()[-1])
    assert config["step"] == 2 and set(config["losses"]) == {"glyphs", "glyph_captions"}
    options = ["--samples", "8", "--json", "figures.json"]
    assert main(["fewshot", "measure", "run", *options]) == 0
    printed = capsys.readouterr().out.strip()
    assert main(["fewshot", "table", "figures.json"]) == 0
    assert capsys.readouterr().out.strip() == printed
    document = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert document["split"] == "validation" and document["samples"] == 8
    assert printed.count("| letters |") == 11 and "blind" in printed.splitlines()[0]


@pytest.mark.parametrize("experiment", ["classes", "burstiness", "shots"])
def test_an_experiment_goes_on_where_it_was(few, tmp_path, experiment, capsys):
    cells = {name: changes for name, changes in list(experiments.cells(experiment).items())[:2]}
    few.setattr(experiments, "cells", lambda name: cells)
    path = tmp_path / "f.json"
    command = ["fewshot", "experiment", experiment, "--out", str(tmp_path / "runs"), "--json",
               str(path), "--steps", "2", "--samples", "8"]  # fmt: skip
    assert main(command) == 0
    document = json.loads(path.read_text("utf-8"))
    assert [c["setting"] for c in document["cells"]] == list(cells)
    few.setattr(experiments, "train", None)  # nothing is trained again
    assert main(command) == 0 and json.loads(path.read_text("utf-8")) == document
    assert main(["fewshot", "plot", str(path), str(tmp_path / "f.png")]) == 0
    assert Image.open(tmp_path / "f.png").size[0] > 600
    assert main(["fewshot", "table", str(path)]) == 0
    assert all(f"| {name}: letters |" in capsys.readouterr().out for name in list(cells)[:1])
    assert main([*command[:-4], "--steps", "3"]) == 2
    assert "expected steps 3, got 2" in capsys.readouterr().err


def test_cells_change_what_they_name():
    every = {name: experiments.cells(name) for name in ("classes", "burstiness", "shots")}
    assert next(iter(every["classes"])) == "7" and int(list(every["classes"])[-1]) > 3000
    assert every["burstiness"]["0.25"] == {"flamingo": {"bursts": 0.25}}
    assert every["shots"]["up to 5"]["lm"] == {"long_share": 0.0, "length": 21}


def test_the_median_of_seeds_keeps_their_range():
    beside = dict.fromkeys(report.BESIDE, 0.5)
    each = [{"accuracy": a, "interval": (a, a), "n": 9} | beside for a in (0.7, 0.9, 0.8)]
    found = report.median(each)
    assert found["accuracy"] == 0.8 and found["range"] == (0.7, 0.9)
    assert found["interval"] == (0.8, 0.8) and found["blind"] == 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        (["measure", "nowhere"], "nowhere"),
        (["table", "nowhere.json"], "no figures at nowhere.json"),
        (["table", "other.json"], "other.json: expected a file of fewshot"),
        (["plot", "other.json", "f.jpg"], "expected a file that ends in .png, got f.jpg"),
        (["measure", "run", "--split", "tset"], "invalid choice: 'tset'"),
        (["train"], "run"),
    ],
)
def test_bad_input_is_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text('{"a": 1}', "utf-8")
    try:
        assert main(["fewshot", *options]) == 2
    except SystemExit as left:
        assert left.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_page_quotes_the_committed_figures(tmp_path, monkeypatch, capsys):
    document = report.read(report.RESULTS)
    assert (
        document["split"] == "test" and document["samples"] >= 2000 and len(document["runs"]) >= 5
    )
    page = tmp_path / "README.md"
    page.write_text(report.README.read_text("utf-8").replace("| letters |", "| old |"), "utf-8")
    monkeypatch.setattr(report, "README", page)
    assert main(["fewshot", "table", "--write"]) == 0 and capsys.readouterr().out == ""
    assert page.read_text("utf-8") == (report.RESULTS.parent / "README.md").read_text("utf-8")
    assert main(["fewshot", "table", "x.json", "--write"]) == 2
    assert "--write: expected figures.json, got x.json" in capsys.readouterr().err
