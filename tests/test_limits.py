"""Questions about the limits: what is shown, what is asked, and what counts as which answer."""

import json

import numpy as np
import pytest

from miniflamingo import limits, training
from miniflamingo.__main__ import main
from miniflamingo.limits import Limits
from miniflamingo.prompt import IMAGE
from miniflamingo.worlds import grammar
from miniflamingo.worlds.grammar import COLOUR_IDS, SHAPE_IDS, TOKENIZER


@pytest.fixture(scope="module")
def model():
    return training.load_flamingo(training.WEIGHTS / "flamingo" / "model.safetensors")


@pytest.fixture
def asker(model, monkeypatch):
    """Limits that remember what they read: (tokens, labels of the pictures)."""
    asker = Limits(model, 12, per_class=12)
    asker.read = []
    logits = asker.logits

    def remember(tokens, media):
        asker.read.append((tokens, media))
        return logits(tokens, media)

    monkeypatch.setattr(asker, "logits", remember)
    return asker


def text(row):
    return TOKENIZER.decode(row)


def test_the_prior_s_shots_agree_and_the_picture_does_not(asker):
    found = asker.prior(shots=(3,))
    assert found.keys() == {"shots agree", "control"} and found["control"]["3"].keys() == {
        "right", "prior"}  # fmt: skip
    agree, control = (tokens for tokens, _ in asker.read)
    for row in agree:
        said = [word for word in row if word in COLOUR_IDS]
        shown = [word for word in row if word in SHAPE_IDS]
        assert len(said) == 3 and len(set(said)) == 1 and len(set(shown)) == 1
        assert np.sum(row == IMAGE) == 4 and row[-2] == TOKENIZER.ids["a"]
    assert any(len({w for w in row if w in COLOUR_IDS}) > 1 for row in control)


def test_an_absent_shape_is_in_no_part_of_the_picture(asker, monkeypatch):
    chosen, pick = [], asker.pool.pick_pairs

    def remember(size, rng, held_out=False):
        chosen.append(pick(size, rng, held_out))
        return chosen[-1]

    monkeypatch.setattr(asker.pool, "pick_pairs", remember)
    found = asker.absent(shots=(0, 4))
    assert found["plain"].keys() == {"0", "4"} and found["remedy"].keys() == {"4"}
    runs = [(c, fit) for c in chosen for fit in (True, False)]
    for (pictures, fit), (tokens, _) in zip(runs, asker.read):
        shape = asker.pool.pairs[1][pictures[:, -1]]
        asked = np.argmax(SHAPE_IDS == tokens[:, -2:-1], axis=1)
        assert ((asked[:, None] == shape).any(axis=1) == fit).all()
    declined = [np.sum(tokens == limits.NOTHING, axis=1) for tokens, _ in asker.read]
    assert [set(d) for d in declined] == [{0}] * 4 + [{2}] * 2  # half of the remedy's four shots
    for part in ("fits", "absent"):
        shares = found["plain"]["4"][part]
        whole = sum(shares[k]["accuracy"] for k in ("of what is there", "ungrounded", "declined"))
        assert whole == pytest.approx(1)


def test_yes_and_no_are_asked_of_what_the_picture_has_and_lacks(asker, monkeypatch):
    chosen, pick = [], asker.pool.pick_pairs

    def remember(size, rng, held_out=False):
        chosen.append(pick(size, rng, held_out))
        return chosen[-1]

    def knows(tokens, media):  # the name that the shots gave to yes, where the shape is there
        truth = there(tokens[:, -1], chosen[-1][:, -1])
        logits = np.zeros((*tokens.shape, len(TOKENIZER)), np.float32)
        for row, (words, pictures, yes) in enumerate(zip(tokens, chosen[-1], truth)):
            said = [there(words[2 + 4 * i : 3 + 4 * i], pictures[i : i + 1])[0] for i in range(4)]
            assert sum(said) == 2  # of the four shots
            names = {bool(was): words[3 + 4 * i] for i, was in enumerate(said)}
            assert len(set(words[3:-2:4])) == 2 and names[True] != names[False]
            logits[row, -1, names[bool(yes)]] = 9
        return logits

    def there(words, pictures):
        shape = np.argmax(SHAPE_IDS == words[:, None], axis=1)
        return (shape[:, None] == asker.pool.pairs[1][pictures]).any(axis=1)

    monkeypatch.setattr(asker.pool, "pick_pairs", remember)
    monkeypatch.setattr(asker, "logits", knows)
    found = asker.probing(shots=(4,))["4"]
    assert found["right"]["accuracy"] == 1 and 0 < found["yes"]["accuracy"] < 1


def test_the_asked_class_is_shown_once_and_at_its_place(asker, monkeypatch):
    shown, bind = [], asker._binding

    def remember(rng, index, called=None):
        shown.append((index, called))
        return bind(rng, index, called)

    monkeypatch.setattr(asker, "_binding", remember)
    assert list(asker.order(k=3)) == ["1", "2", "3"]
    for place, (index, called) in enumerate(shown):
        assert called is None
        assert ((index[:, :3] == 0) == (np.arange(3) == place)).all() and (index[:, 3] == 0).all()
    shown.clear()
    asker.wrong_labels(k=4)
    for m, (index, called) in zip((0, 1, 2), shown):
        assert (np.sum(index != called, axis=1) == m).all() and (index == called)[:, -1].all()


def test_a_reader_of_shots_that_never_looks_is_found_out(asker, monkeypatch):
    def last_name(tokens, media):  # says the last shot's name or colour, whatever is asked
        logits = np.zeros((*tokens.shape, len(TOKENIZER)), np.float32)
        names = np.isin(tokens, [*grammar.NAME_IDS, *COLOUR_IDS])
        for row, (tag, words) in enumerate(zip(tokens, names)):
            if words.any():
                logits[row, -1, tag[np.flatnonzero(words)[-1]]] = 9
        return logits

    monkeypatch.setattr(asker, "logits", last_name)
    prior = asker.prior(shots=(2,))["shots agree"]["2"]
    assert prior["prior"]["accuracy"] == 1 and prior["right"]["accuracy"] == 0
    order = asker.order(k=3)
    assert order["3"]["right"]["accuracy"] == 1
    for place in ("1", "2"):
        assert order[place]["right"]["accuracy"] == 0
        assert order[place]["last of wrong"]["accuracy"] == 1


def test_calibration_is_the_distance_of_sure_and_right():
    logp = np.log(np.array([[0.75, 0.25], [0.75, 0.25], [0.55, 0.45], [0.45, 0.55]]))
    found = limits._calibrated(logp, np.array([0, 1, 0, 1]), bins=10)
    assert [row["n"] for row in found["bins"]] == [2, 2]
    assert [row["sure"] for row in found["bins"]] == pytest.approx([0.55, 0.75])
    assert found["error"] == pytest.approx((2 * abs(0.55 - 1) + 2 * abs(0.75 - 0.5)) / 4)
    assert found["right"]["accuracy"] == 0.75


def test_the_command_writes_what_the_table_shows(tmp_path, capsys):
    out = tmp_path / "limits.json"
    assert main(["limits", "--samples", "20", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(out.read_text("utf-8"))
    assert printed.splitlines() == list(limits.table(document))
    assert {"made_by", "date", "command", "samples", "checkpoint"} <= document.keys()
    noise, thing = document["limits"]["nothing"]["noise"], document["limits"]["nothing"]["object"]
    assert noise["sure above 0.9"]["accuracy"] < thing["sure above 0.9"]["accuracy"]
    out.write_text("mine", "utf-8")
    assert main(["limits", "--samples", "20", "--json", str(out)]) == 2
    assert out.read_text("utf-8") == "mine"


def test_the_committed_figures_are_a_table(capsys):
    assert main(["limits", "--table"]) == 0
    document = json.loads(limits.RESULTS.read_text("utf-8"))
    assert capsys.readouterr().out.splitlines() == list(limits.table(document))
    assert document["samples"] >= 1000 and document["made_by"] == limits.COMMAND
