"""The kept answers: how they are made, with small parts, and what is committed."""

import json

import numpy as np
import pytest

from miniflamingo.__main__ import main
from miniflamingo.real import examples, kept, parts
from miniflamingo.real import model as models
from miniflamingo.tensorfile import TensorFile

pytest.importorskip("torch")


@pytest.fixture
def small(monkeypatch):
    for name, value in dict(CHOSEN=("red 0", "green 1"), RANDOM=1, TABLE=3, ASKED=2).items():
        monkeypatch.setattr(examples, name, value)


def test_the_command_keeps_answers_and_their_pictures(folder, small, tmp_path, monkeypatch):
    monkeypatch.setattr(examples.models, "load_bridge", lambda f, b: models.assemble(f))
    monkeypatch.setattr(examples, "PROMPTS", dict(list(examples.PROMPTS.items())[:5]))
    file = tmp_path / "examples.json"
    assert main(["real", "--parts", str(folder), "examples", "--json", str(file)]) == 0
    document = kept.read(file)
    assert document["made_by"] == examples.COMMAND and "date" in document
    told = [t for some in document["shown"].values() for t in some]
    assert len(document["shown"]["chosen"]) <= 4 and len(told) >= 3
    for t in told:
        picture = document["pictures"][t["picture"]]
        assert kept.pixels(picture).shape == (224, 224, 3) and picture["artist"] in t["picture"]
        assert all(0 <= token["p"] <= 1 for token in t["name"]["tokens"])
    table = document["tables"]["concepts never seen"]
    assert np.shape(table["nats"]) == (3, 3) and np.shape(table["nats_gates_shut"]) == (3,)
    assert document["asked"]["n"] == 2 and len(document["asked"]["prompts"]) == 5


def test_shut_gates_are_opened_again(folder):
    model, _ = models.assemble(folder)
    layer = model.gated_xattn[0]
    layer.alpha_xattn.data = np.float32(0.5)
    with pytest.raises(ZeroDivisionError), examples.shut(model):
        assert layer.alpha_xattn.data == 0
        raise ZeroDivisionError
    assert layer.alpha_xattn.data == np.float32(0.5)


def test_where_the_parts_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parts, "ready", lambda folder: False)
    assert kept.parts_folder() is None
    monkeypatch.setattr(parts, "ready", lambda folder: True)
    assert kept.parts_folder() == parts.FOLDER


def test_what_is_committed_may_be_given_away_and_says_what_the_figures_say():
    assert kept.FILE.stat().st_size < 300_000
    document = kept.read()
    artists = {picture["artist"] for picture in document["pictures"].values()}
    assert artists <= document["licences"].keys() == examples.LICENCES.keys()
    assert all(
        0 <= x.min() <= x.max() <= 1 for x in map(kept.pixels, document["pictures"].values())
    )
    figures = json.loads((models.SHIPPED / "figures.json").read_text("utf-8"))["runs"]["0"]
    for split, table in document["tables"].items():
        nats, tokens = np.array(table["nats"]), np.array(table["tokens"])
        right = nats[np.eye(len(nats), dtype=bool)]
        assert abs(right.sum() / tokens.sum() - figures["nats"][split]["nats_right"]) < 1
    trained = sum(np.prod(shape, dtype=int) for name, shape in document["shapes"].items()
                  if name.startswith(("resampler", "gated_xattn")))  # fmt: skip
    assert trained == sum(np.prod(s, dtype=int) for s in
                          TensorFile(models.BRIDGE_FILE).shapes.values())  # fmt: skip
