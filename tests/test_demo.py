"""The demo: what it shows is what the model did."""

import json
import re
from functools import partial

import numpy as np
import pytest

from miniflamingo import demo, training


@pytest.fixture(scope="module")
def small_demo():
    """demo.demo with a small pool of pictures, so that most of its time is not drawing them."""
    small = partial(training.BridgeRun, pool_per_class=4, pool_pairs=40, pool_clips=20)
    few = partial(demo.Evaluation, per_class=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "BridgeRun", small)
        patch.setattr(demo, "Evaluation", few)
        yield partial(demo.demo, samples=8, progress=False)


@pytest.fixture(scope="module")
def shown(tmp_path_factory, small_demo):
    """A demo of two steps: (its folder, its report)."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, small_demo(out, steps=2)


def test_the_photograph_s_report_says_what_the_model_does(shown):
    report = shown[1]["photograph"]
    assert report["gates_shut"] == {"equal_to_the_frozen_lm": True, "largest_difference": 0.0}
    assert not report["gates_open"]["equal_to_the_frozen_lm"]
    for image, tokens in report["tokens_reached_in_the_first_layer"].items():
        assert tokens == [i for i, phi in enumerate(report["phi"]) if phi == image]
    assert max(report["phi"]) == 3


def test_it_writes_every_figure_and_one_page_that_needs_nothing_else(shown):
    out, _ = shown
    for model in ("live", "shipped"):
        for sheet in demo.SECTIONS:
            assert (out / model / f"{sheet}.png").stat().st_size > 5000
    page = (out / "index.html").read_text("utf-8")
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 2 + 2 * len(demo.SECTIONS)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert len(re.findall(r'alt="[^"]+"', page)) == len(sources)
    assert not re.search(r"https?://", page)


def test_the_metrics_hold_the_figures_numbers(shown):
    out, report = shown
    metrics = json.loads((out / "metrics.json").read_text("utf-8"))
    assert metrics["few_shot"] == report["shipped"]["few_shot"]
    assert list(metrics["few_shot"]["binding_8way"]) == ["0", "1", "2", "4", "8", "16", "32"]
    assert metrics["live"]["alpha"]["steps"] == [1, 2]
    assert np.shape(metrics["live"]["alpha"]["alpha_xattn"]) == (2, 3)
    assert metrics["live"]["alpha"]["alpha_xattn"][0] != [0, 0, 0]  # the first update opens them


def test_a_second_demo_replaces_the_first(shown, small_demo):
    out, _ = shown
    assert small_demo(out, steps=1)["live"]["alpha"]["steps"] == [1]
    assert json.loads((out / "metrics.json").read_text("utf-8"))["live"]["alpha"]["steps"] == [1]
    made = {path.name for path in out.iterdir()}
    assert made == {*demo.MADE, ".made-by-demo.json"}


@pytest.mark.parametrize("name", ["live/notes.txt", "metrics.json", "phi.png", "shipped/a.png"])
def test_a_demo_deletes_and_overwrites_nothing_that_it_has_not_made(name, tmp_path, monkeypatch):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine", "utf-8")
    monkeypatch.setattr(demo, "show_photograph", None)  # it is refused before the work
    with pytest.raises(ValueError, match=f"^--out: .*{name}: in the way"):
        demo.demo(tmp_path, steps=1, progress=False)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [name.split("/")[-1]]
    assert (tmp_path / name).read_text("utf-8") == "mine"


def test_a_long_log_is_thinned_and_keeps_its_last_step(tmp_path):
    log = tmp_path / "log.jsonl"
    records = [{"step": i, "alpha_xattn": [i / 1e3], "alpha_dense": [0.0]} for i in range(1, 1001)]
    log.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    alphas = demo.read_alphas(log, most=100)
    assert len(alphas["steps"]) <= 102 and alphas["steps"][-1] == 1000
    assert alphas["alpha_xattn"][-1] == [1.0]
    log.write_text("", "utf-8")
    with pytest.raises(ValueError, match="holds no step"):
        demo.read_alphas(log)


def test_an_answer_does_not_depend_on_its_neighbours_in_the_batch():
    model = training.load_flamingo(training.WEIGHTS / "flamingo" / "model.safetensors")
    media, questions, _, _ = demo.exhibits()["questions"]
    together = demo.ask(model, media, questions)
    assert together == [demo.ask(model, [m], [q])[0] for m, q in zip(media, questions)]


def test_latent_maps_are_shares_of_attention():
    model = training.load_flamingo(training.WEIGHTS / "flamingo" / "model.safetensors")
    maps = demo.latent_maps(model, demo.exhibits()["captions"][0][0])
    assert maps.shape == (8, 6, 6)
    assert (maps >= 0).all() and (maps.sum(axis=(1, 2)) <= 1 + 1e-5).all()
    assert maps.std() > 0
