"""The command: what is trained is not trained again, and the table says what can be told."""

import json

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
    return main(["ablate", *arguments, "--run", str(run_folder), "--samples", "6", "--steps", "2"])


def test_rows_are_trained_once_and_compared_with_their_baseline(run_folder, tmp_path, capsys):
    out = tmp_path / "a.json"
    assert ablate(run_folder, "no gate", "--seeds", "2", "--json", str(out)) == 0
    document = json.loads(out.read_text("utf-8"))
    assert {row: [one["seed"] for one in runs] for row, runs in document["rows"].items()} == {
        "baseline": [0, 1], "no gate": [0, 1]}  # fmt: skip
    assert {"made_by", "command", "date", "samples", "steps", "config"} <= document["about"].keys()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:] == list(commands.table(document))[-4:] and lines[-1].startswith("| chance |")
    models = {p: p.stat().st_mtime_ns for p in run_folder.glob("*/*/model.safetensors")}
    (run_folder / "1" / "no-gate" / "figures.json").unlink()  # killed before it was asked
    assert ablate(run_folder, "no gate", "--seeds", "2", "--json", str(out)) == 0
    assert models == {p: p.stat().st_mtime_ns for p in run_folder.glob("*/*/model.safetensors")}
    again = json.loads(out.read_text("utf-8"))["rows"]["no gate"][1]
    assert again["overall"] == document["rows"]["no gate"][1]["overall"]


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
    return {"about": {"steps": 900, "samples": 9, "date": "today"}, "rows": made}


@pytest.mark.parametrize("shift, verdict", [(0.2, "same direction"), (-0.2, "opposite"),
                                            (0.0, "not separable")])  # fmt: skip
def test_the_verdict_stands_beside_the_paper_s_points(shift, verdict):
    found = commands.judged(made_up(shift))["no gate"]
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


def test_one_seed_gets_no_verdict():
    assert commands.judged(made_up(0.2, seeds=1)) == {}
    assert len(list(commands.table(made_up(0.2, seeds=1)))) == 7


def test_a_row_that_does_not_exist(capsys):
    assert main(["ablate", "no gates"]) == 2
    error = capsys.readouterr().err
    assert "ROW must be one of baseline" in error and "'no gates'" in error
    assert main(["ablate", "baseline", "--stability"]) == 2
    assert set(map(baseline_of, ROWS)) == {None, "baseline", "6 blocks"}
