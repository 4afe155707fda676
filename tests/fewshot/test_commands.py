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
        if self.split == "train":
            return {"seen": ids[:6]}
        return {"letters": ids[:6], "symbols": ids[-6:], "Georgian": ids[6:12]}

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
    document, measure_groups = json.loads(path.read_text("utf-8")), experiments.GROUPS
    assert [c["setting"] for c in document["cells"]] == list(cells)
    with few.context() as nothing:
        nothing.setattr(experiments, "train", None)  # what is trained is not trained again
        assert main(command) == 0 and json.loads(path.read_text("utf-8")) == document
    assert main(["fewshot", "plot", str(path), str(tmp_path / "f.png")]) == 0
    assert Image.open(tmp_path / "f.png").size[0] > 600
    assert main(["fewshot", "table", str(path)]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} | 1 | {group} |" in printed for name in cells for group in measure_groups)
    assert set(document["cells"][0]["figures"]) == set(measure_groups)
    assert main([*command[:-4], "--steps", "3"]) == 2
    assert "expected steps 3, got 2" in capsys.readouterr().err
    path.unlink()  # the runs of 2 steps are still there
    assert main([*command[:-4], "--steps", "3"]) == 2
    assert "optimiser.steps" in capsys.readouterr().err


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
    assert found["interval"] == (0.8, 0.8) and found["blind"] == 0.5 and found["seeds"] == 3
    assert report.median(each[:2])["interval"] == (0.7, 0.9)


@pytest.mark.parametrize(
    "options, message",
    [
        (["measure", "nowhere"], "nowhere"),
        (["table", "nowhere.json"], "no figures at nowhere.json"),
        (["table", "other.json"], "other.json: expected a file of fewshot"),
        (["table", "list.json"], "list.json: expected a file of fewshot"),
        (["table", "half.json"], "half.json: expected a file of fewshot"),
        (["table", "none.json"], "none.json: expected a file of fewshot"),
        (["plot", "cells.json", "f.png"], "cells.json: expected a file of fewshot"),
        (["table", "classe"], "nor one of figures, classes, burstiness, shots, both"),
        (["plot", "other.json", "f.jpg"], "expected a file that ends in .png, got f.jpg"),
        (["measure", "run", "--split", "tset"], "invalid choice: 'tset'"),
        (["train"], "run"),
    ],
)
def test_bad_input_is_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in (("other", '{"a": 1}'), ("list", "[]"), ("half", '{"runs": {}}'),
                       ("none", '{"runs": {}, "split": "test"}'),
                       ("cells", '{"cells": [], "experiment": "classes"}')):  # fmt: skip
        (tmp_path / f"{name}.json").write_text(text, "utf-8")
    try:
        assert main(["fewshot", *options]) == 2
    except SystemExit as left:
        assert left.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_page_quotes_the_committed_figures(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text(report.README.read_text("utf-8").replace("| letters |", "| old |"), "utf-8")
    monkeypatch.setattr(report, "README", page)
    assert main(["fewshot", "table", "--write"]) == 0 and capsys.readouterr().out == ""
    assert page.read_text("utf-8") == (report.RESULTS.parent / "README.md").read_text("utf-8")
    assert main(["fewshot", "table", "x.json", "--write"]) == 2
    assert "--write: expected no file, got x.json" in capsys.readouterr().err


def test_what_is_committed_is_what_the_page_says():
    for name in ("figures", "both"):
        document = report.read(report.COMMITTED[name])
        assert document["split"] == "test" and document["samples"] >= 2000
    assert len(report.read(report.RESULTS)["runs"]) >= 5
    for name in report.LABELS:
        document = report.read(report.COMMITTED[name])
        assert document["experiment"] == name and document["samples"] >= 1000
        each = [(c["setting"], c["seed"]) for c in document["cells"]]
        seeds = {seed for _, seed in each}
        assert len(seeds) >= 2
        assert sorted(each) == sorted((s, n) for s in experiments.cells(name) for n in seeds)


def test_a_name_prints_and_draws_what_is_committed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fewshot", "table", "classes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| classes that the bridge learns of | seeds | asked of |")
    assert lines[-1].startswith("| blind | | letters | 0.")
    assert {line.count("|") for line in lines} == {10}
    assert main(["fewshot", "plot", "classes", "classes.png"]) == 0
    assert Image.open("classes.png").size[0] > 600


def test_shapes_are_asked_too_and_stand_beside_models_of_one_world(few, tmp_path, capsys, trained):
    path = tmp_path / "both.json"
    small = ["--samples", "8", "--json", str(path)]
    assert main(["fewshot", "measure", str(trained), "--shapes", *small]) == 0
    (run,) = json.loads(path.read_text("utf-8"))["runs"].values()
    motion = run["shapes"]["motion"]["direction"]
    low, high = motion["interval"]
    line = f"| shapes: motion | {motion['accuracy']:.3f} ({low:.3f} to {high:.3f}) | 1 | 0.998 (0."
    assert any(x.startswith(line) for x in capsys.readouterr().out.splitlines())
    both, alone = {"accuracy": 0.5, "interval": (0.4, 0.6)}, {"accuracy": 0.7, "interval": (0, 1)}
    asked = "x", [both, both | {"accuracy": 0.6}], [alone]
    line = "| x | 0.550 (0.500 to 0.600) | 2 | 0.700 (0.000 to 1.000) | 1 |"
    assert report._beside(*asked) == line
    again = ["fewshot", "measure", str(trained), f"{trained}/../{trained.name}"]
    assert main(again) == 2 and "folders of different names" in capsys.readouterr().err
    assert main(["fewshot", "measure", str(trained), "--shapes", "--split", "train"]) == 2
    assert "expected --split validation or test, got train" in capsys.readouterr().err
