"""The commands, with small parts: train, measure, ship, table, the page, and asking."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from miniflamingo.__main__ import main
from miniflamingo.real import commands, features, front, measure, page, parts
from miniflamingo.real import model as models
from tests.real.made import draw

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A finished run of a few steps, and its figures."""
    out = tmp_path_factory.mktemp("runs")
    real = ["real", "--parts", str(folder), "--out", str(out / "page")]
    steps = ["--warm-steps", "2", "--steps", "3", "--threads", "1"]
    assert main([*real, "train", "--run", str(out / "0"), "--seed", "0", *steps]) == 0
    figures = ["--samples", "4", "--json", str(out / "figures.json")]
    assert main([*real, "measure", str(out / "0"), *figures]) == 0
    return out


def test_a_run_has_its_log_its_gates_and_its_bridge(run):
    for stage, steps in (("warm", 2), ("bridge", 3)):
        lines = (run / "0" / stage / "log.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    assert len(json.loads(lines[-1])["alpha_xattn"]) == 2  # blocks 4 and 10 of 14


def test_a_finished_run_is_not_trained_again(run, folder, capsys):
    real = ["real", "--parts", str(folder), "train", "--run", str(run / "0"), "--steps", "3"]
    assert main([*real, "--warm-steps", "2"]) == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_without_torch_s_gradients_it_is_the_same_run(run, folder, tmp_path):
    real = ["real", "--parts", str(folder), "train", "--run", str(tmp_path / "0"), "--numpy"]
    steps = ["--warm-steps", "2", "--steps", "3", "--threads", "1"]
    assert main([*real, *steps]) == 0
    for stage in ("warm", "bridge"):
        logs = [(where / "0" / stage / "log.jsonl").read_text("utf-8").splitlines()
                for where in (run, tmp_path)]  # fmt: skip
        for ours, theirs in zip(*logs):
            assert json.loads(ours)["loss"] == pytest.approx(json.loads(theirs)["loss"], rel=1e-3)


def test_the_figures_say_when_and_with_what(run):
    found = json.loads((run / "figures.json").read_text("utf-8"))
    assert {"made_by", "date", "machine", "python", "numpy", "samples"} <= found.keys()
    assert set(found["runs"]["0"]) >= set(measure.ROWS)
    assert found["training"]["steps"] == 3 and found["training"]["warm"] == 2


def test_shipped_and_shown(run, folder, tmp_path, capsys, monkeypatch):
    to = tmp_path / "weights"
    assert main(["real", "ship", str(run / "0"), str(run / "figures.json"), "--to", str(to)]) == 0
    assert sorted(p.name for p in to.iterdir()) == [
        "alphas.json", "card.md", "figures.json", "model.safetensors"]  # fmt: skip
    card = (to / "card.md").read_text("utf-8")
    for part in parts.PARTS:
        assert part.licence in card
    assert "2 steps, then the bridge, 3 steps" in card
    monkeypatch.setattr(commands, "FIGURES", to / "figures.json")
    monkeypatch.setattr(commands, "RESULTS", to)
    capsys.readouterr()
    assert main(["real", "table"]) == 0
    assert capsys.readouterr().out.splitlines() == card.split("over pictures.\n\n")[1].split(
        "\n\n## Limits")[0].splitlines()  # fmt: skip
    out = tmp_path / "page"
    monkeypatch.setattr(page, "photographs", lambda: {})
    bridge = ["--bridge", str(to / "model.safetensors")]
    assert main(["real", "--parts", str(folder), "--out", str(out), *bridge]) == 0
    html = (out / "index.html").read_text("utf-8")
    assert html.count("<figure>") == len(page.SECTIONS) - 1  # without photographs
    answers = json.loads((out / "answers.json").read_text("utf-8"))
    assert answers["gates"]["equal"] is True and len(answers["dialogue"]) == 3


def test_the_front_page_s_pictures_are_drawn_and_drawn_again(run, folder, tmp_path, capsys):
    bridge = ["--bridge", str(run / "0" / "bridge" / "model.safetensors")]
    command = ["real", "--parts", str(folder), *bridge, "front", "--to", str(tmp_path)]
    for _ in range(2):
        assert main(command) == 0
    assert all((tmp_path / name).stat().st_size > 500 for name in front.MADE)
    document = json.loads((tmp_path / "answers.json").read_text("utf-8"))
    assert "Twemoji" in document["pictures"] and document["answers"]
    assert {a["in training"] for a in document["answers"]} == {True, False}
    (tmp_path / "gates.png").write_bytes(b"mine")
    assert main(command) == 2 and "gates.png" in capsys.readouterr().err


def test_shipping_refuses_what_is_not_finished(run, tmp_path, capsys):
    assert main(["real", "ship", str(tmp_path), str(run / "figures.json")]) == 2
    assert "is the run finished?" in capsys.readouterr().err
    other = tmp_path / "other.json"
    other.write_text("[1]", "utf-8")
    assert main(["real", "ship", str(run / "0"), str(other), "--to", str(tmp_path / "w")]) == 2
    assert "holds no figures" in capsys.readouterr().err


def ask(folder, run, *arguments):
    bridge = run / "0" / "bridge" / "model.safetensors"
    return main(["generate", "--real", str(folder), "--checkpoint", str(bridge), *arguments,
                 "--max-new-tokens", "3"])  # fmt: skip


def test_anybody_s_picture_is_asked_from_the_command_line(run, folder, tmp_path, capsys):
    draw(3, "noto").save(tmp_path / "photo.jpg".replace("jpg", "png"))
    picture = ["--image", str(tmp_path / "photo.png")]
    assert ask(folder, run, *picture, "--text", "What is this?") == 0
    one = capsys.readouterr()
    assert one.out.endswith("\n") and "reading" in one.err and "ms each" in one.err
    assert ask(folder, run, *picture, "--text", "red", *picture) == 0
    frames = [Image.new("RGB", (40, 30), (i * 40, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    assert ask(folder, run, "--video", str(tmp_path / "clip.gif")) == 0


def test_what_is_no_picture_and_what_is_not_there(run, folder, tmp_path, capsys):
    (tmp_path / "no.png").write_bytes(b"not a picture")
    for arguments, expected in (
        (["--image", str(tmp_path / "no.png")], "no.png"),
        (["--image", str(tmp_path / "gone.png")], "no image or video at"),
    ):
        assert ask(folder, run, *arguments) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
    assert ask(tmp_path, run, "--text", "hello") == 2
    assert "real fetch" in capsys.readouterr().err


def test_a_bridge_is_named_that_is_none(folder, tmp_path, capsys):
    shutil.copy(folder / "eye.safetensors", tmp_path / "other.safetensors")
    wrong = ["--bridge", str(tmp_path / "other.safetensors")]
    assert main(["real", "--parts", str(folder), "--out", str(tmp_path / "p"), *wrong]) == 2
    assert "holds no bridge" in capsys.readouterr().err


def test_too_little_memory_is_said_before_the_work(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "available_memory", lambda: 0.4)
    assert main(["real", "--parts", str(folder), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "miniflamingo: error: this needs 1.5 GB of memory, 0.4 GB are free\n")  # fmt: skip


def test_features_that_are_there_are_kept(folder, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in folder.glob("features-*.npy")}
    assert main(["real", "--parts", str(folder), "--out", str(tmp_path), "features"]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("features-*.npy")}
    assert len(before) == len(features.VERSIONS)


def test_the_shipped_bridge_says_what_its_card_and_figures_say(capsys):
    assert models.BRIDGE_FILE.stat().st_size <= 8_000_000
    figures = json.loads((models.SHIPPED / "figures.json").read_text("utf-8"))
    card = (models.SHIPPED / "card.md").read_text("utf-8")
    assert "\n".join(measure.table(figures)) in card
    readme = commands.README.read_text("utf-8")
    assert main(["real", "table"]) == 0
    assert capsys.readouterr().out == readme.split(commands.MARKERS[0])[1].split(
        commands.MARKERS[1])[0]  # fmt: skip
    alphas = json.loads((models.SHIPPED / "alphas.json").read_text("utf-8"))
    assert np.allclose(alphas["alpha_xattn"][0], 0, atol=0.05)
