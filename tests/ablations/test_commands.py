"""The command: what is trained is not trained again, and the table says what can be told."""

import json
import re
import shlex

import pytest

pytest.importorskip("scipy")

from miniflamingo.__main__ import main
from miniflamingo.ablations import commands
from miniflamingo.ablations.rows import ROWS, STABILITY, baseline_of
from miniflamingo.ablations.stage import CHANCE


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    def inline(jobs, work, *columns, method=None):
        return (work(*row) for row in zip(*columns))

    monkeypatch.setattr(commands, "in_processes", inline)


def ablate(run_folder, *arguments):
    small = "--run", str(run_folder), "--samples", "6", "--steps", "2"
    return main(["ablate", *small, *arguments])


def test_rows_are_trained_once_and_compared_with_their_baseline(run_folder, tmp_path, capsys):
    out = tmp_path / "a.json"
    assert ablate(run_folder, "no gate", "--seeds", "2", "--json", str(out)) == 0
    document = json.loads(out.read_text("utf-8"))
    assert {row: [one["seed"] for one in runs] for row, runs in document["rows"].items()} == {
        "baseline": [0, 1], "no gate": [0, 1]}  # fmt: skip
    assert {"made_by", "date", "samples", "steps", "config"} <= document["about"].keys()
    words = shlex.split(document["about"]["command"])
    assert words == [*commands.COMMAND.split(), "no gate", "--run", run_folder.name, "--steps", "2"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:] == list(commands.table(document))[-4:] and lines[-1].startswith("| chance |")
    models = {p: p.stat().st_mtime_ns for p in run_folder.glob("*/*/model.safetensors")}
    (run_folder / "1" / "no-gate" / "figures.json").unlink()  # killed before it was asked
    assert ablate(run_folder, "no gate", "--seeds", "2", "--json", str(out)) == 0
    assert models == {p: p.stat().st_mtime_ns for p in run_folder.glob("*/*/model.safetensors")}
    again = json.loads(out.read_text("utf-8"))["rows"]["no gate"][1]
    assert again["overall"] == document["rows"]["no gate"][1]["overall"]


def test_a_folder_of_other_steps_is_not_taken_for_these(run_folder, capsys):
    rows = "merged", "--seeds", "1"
    assert ablate(run_folder, *rows) == 0
    path = run_folder / "0" / "merged" / "figures.json"
    assert ablate(run_folder, *rows, "--samples", "8") == 0  # asked again, not trained again
    assert json.loads(path.read_text("utf-8"))["samples"] == 8
    assert ablate(run_folder, *rows, "--steps", "1") == 2
    assert "optimiser.steps" in capsys.readouterr().err


def test_stability_is_a_table_of_its_own(run_folder, tmp_path, capsys):
    row = next(row for row in STABILITY if row.endswith("no gate"))
    out = tmp_path / "s.json"
    assert ablate(run_folder, row, "--stability", "--seeds", "2", "--json", str(out)) == 0
    document = json.loads(out.read_text("utf-8"))
    assert list(document["rows"]) == [baseline_of(row), row]
    assert capsys.readouterr().out.splitlines()[-1] == list(commands.stability_table(document))[-1]


def test_a_training_that_breaks_down_is_a_result(run_folder, monkeypatch):
    def breaks(self, progress=True):
        raise FloatingPointError("step 1: the loss is nan")

    monkeypatch.setattr(commands.training.Run, "train", breaks)
    commands.one(str(run_folder), "no clips", 0, 2, 6)
    found = json.loads((run_folder / "0" / "no-clips" / "figures.json").read_text("utf-8"))
    assert found["broke"] and found["overall"] == 0 and found["spikes"] == 0


def test_a_training_that_is_interrupted_is_none(run_folder, monkeypatch):
    monkeypatch.setattr(commands.training.Run, "train", lambda self, progress=True: False)
    commands.one(str(run_folder), "round robin", 0, 2, 6)
    assert not (run_folder / "0" / "round-robin" / "figures.json").exists()


def test_spikes_are_counted():
    calm = [1.0] * 40
    assert commands.spikes(calm) == 0 and commands.spikes([]) == 0
    assert commands.spikes([*calm, 2.5, *calm, 2.1, 1.9]) == 2


def made_up(shift, seeds=3):
    """Runs of a baseline and of one row that is worse by `shift` with every seed."""
    made = {}
    for row, lower in (("baseline", 0.0), ("no gate", shift)):
        same = dict.fromkeys(CHANCE, 0.5) | {
            "seconds": 90,
            "steps": 900,
            "gradients": "NumPy",
            "learn": 7,
        }
        made[row] = [
            same | {"seed": s, "overall": 0.8 + 0.01 * s - lower * (1 + s / 99)}
            for s in range(seeds)
        ]
    document = {"about": {"steps": 900, "samples": 9, "date": "today"}, "rows": made}
    return document | {"compared": commands.compared(document)}


@pytest.mark.parametrize("shift, verdict", [(0.2, "same direction"), (-0.2, "opposite"),
                                            (0.0, "not separable")])  # fmt: skip
def test_the_verdict_stands_beside_the_paper_s_points(shift, verdict):
    found = made_up(shift)["compared"]["no gate"]
    assert found["verdict"] == verdict and found["paper"] == pytest.approx(-4.2)
    line = next(x for x in commands.table(made_up(shift)) if x.startswith("| no gate"))
    assert f"| {verdict} |" in line and "| -4.2 |" in line and "| 0.10, NumPy |" in line


def test_the_picture_has_every_run(run_folder, tmp_path, monkeypatch):
    figure = commands.draw(made_up(0.2))
    assert len(figure.axes) == 5
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["baseline", "no gate"]
    committed, png = tmp_path / "results.json", tmp_path / "rows.png"
    committed.write_text(json.dumps(made_up(0.2)), "utf-8")
    monkeypatch.setitem(commands.RESULTS, False, committed)
    assert main(["ablate", "--plot", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert main(["ablate", "--plot", str(committed)]) == 2  # nobody else's file


def test_without_a_folder_the_committed_rows_are_shown(tmp_path, monkeypatch, capsys):
    document, copy = made_up(0.2), tmp_path / "copy.json"
    document["rows"] |= {"no clips": document["rows"]["no gate"]}
    committed = tmp_path / "results.json"
    committed.write_text(json.dumps(document), "utf-8")
    monkeypatch.setitem(commands.RESULTS, False, committed)
    assert main(["ablate", "no gate", "--json", str(copy)]) == 0
    assert [line.split(" |")[0] for line in capsys.readouterr().out.splitlines()[4:]] == [
        "| baseline", "| no gate", "| chance"]  # fmt: skip
    assert list(json.loads(copy.read_text("utf-8"))["rows"]) == ["baseline", "no gate"]


@pytest.mark.parametrize(
    "option", ["--seeds 5", "--steps 900", "--samples 9", "--jobs 2", "--torch"]
)
def test_what_is_to_be_trained_needs_a_folder(option, capsys):
    assert main(["ablate", *option.split()]) == 2
    name = option.split()[0]
    assert f"{name}: expected a folder to train in, too, got no --run" in capsys.readouterr().err


def test_the_page_is_written_from_the_committed_figures_alone(tmp_path, capsys):
    assert main(["ablate", "--write", "--run", str(tmp_path)]) == 2
    assert "--write and --run exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize("stability", [False, True])
def test_the_committed_tables(stability, tmp_path, monkeypatch):
    """Every row with every seed, what was compared, and the page that quotes them."""
    document = commands.committed(stability)
    assert list(document["rows"]) == list(STABILITY if stability else ROWS)
    seeds = {tuple(one["seed"] for one in runs) for runs in document["rows"].values()}
    assert len(seeds) == 1 and len(seeds.pop()) >= (3 if stability else 5)
    again = commands.compared(document)
    assert again.keys() == document["compared"].keys()
    for row, found in document["compared"].items():
        assert found == pytest.approx(again[row], nan_ok=True)
    said = commands.README.read_text("utf-8")
    page = tmp_path / "README.md"
    page.write_text(re.sub(r"^\| (baseline|3 blocks)", "| old", said, flags=re.MULTILINE), "utf-8")
    assert page.read_text("utf-8") != said
    monkeypatch.setattr(commands, "README", page)
    assert main(["ablate", "--write"]) == 0
    assert page.read_text("utf-8") == said


def test_one_seed_gets_no_verdict():
    assert made_up(0.2, seeds=1)["compared"] == {}
    assert len(list(commands.table(made_up(0.2, seeds=1)))) == 7


def test_a_row_that_does_not_exist(capsys):
    assert main(["ablate", "no gates"]) == 2
    error = capsys.readouterr().err
    assert "ROW must be one of baseline" in error and "'no gates'" in error
    assert main(["ablate", "baseline", "--stability"]) == 2
    assert set(map(baseline_of, ROWS)) == {None, "baseline", "6 blocks"}
