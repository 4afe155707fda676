"""Model cards: three tiny runs are shipped; a run that is not finished is refused."""

import json
from pathlib import Path

import pytest

from miniflamingo import cards, training
from miniflamingo.evaluation import Evaluation, table


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The three stages, two steps each, and the figures of the bridged model."""
    folder = tmp_path_factory.mktemp("runs")
    two = training.OptimiserConfig(steps=2)
    lm = training.LanguageRun(optimiser=two, batch=12)
    vision = training.VisionRun(optimiser=two, batch=12)
    bridge = training.BridgeRun(
        optimiser=two, batches=(6, 2, 2, 2), pool_per_class=2, pool_pairs=8, pool_clips=4
    )
    stages = {
        "lm": lambda: training.LanguageStage(lm),
        "vision": lambda: training.VisionStage(vision),
        "flamingo": lambda: training.BridgeStage(bridge, folder / "lm", folder / "vision"),
    }
    for name, make in stages.items():
        training.Run(make(), folder / name).train(progress=False)
        cards.record_run(folder / name, seconds=1.5)
    model = training.load_flamingo(folder / "flamingo" / "model.safetensors")
    metrics = Evaluation(model, samples=4, per_class=20).run()
    (folder / "flamingo" / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_ship_copies_the_models_and_says_where_they_come_from(runs, tmp_path):
    cards.ship([runs], tmp_path)
    for stage in cards.ABOUT:
        shipped = (tmp_path / stage / "model.safetensors").read_bytes()
        assert shipped == (runs / stage / "model.safetensors").read_bytes()
        text = (tmp_path / stage / "card.md").read_text()
        assert "| command | `python -m miniflamingo" in text
        assert "| steps | 2 |" in text and "1.5 s" in text
    count = training.load_flamingo(tmp_path / "flamingo" / "model.safetensors").num_parameters()
    assert f"| parameters | {count:,}, float32 |" in text
    assert "binding_8way" in text and "gates |tanh(alpha)|" in text
    alphas = json.loads((tmp_path / "flamingo" / "alphas.json").read_text())
    assert alphas["steps"] == [1, 2]
    seeds = json.loads((tmp_path / "flamingo" / "seeds.json").read_text())
    assert list(seeds) == [runs.name]
    assert list(seeds[runs.name]) == list(cards.HEADLINES)


def test_a_summary_is_the_median_and_the_range_over_the_seeds():
    seeds = {s: dict.fromkeys(cards.HEADLINES, v) for s, v in (("0", 0.9), ("1", 0.5), ("2", 0.6))}
    rows = list(cards.summary(seeds))
    assert rows[0] == "| 8-way at 32 shots | 0.600 | 0.500 to 0.900 |"
    assert len(rows) == len(cards.HEADLINES)


def test_the_readme_quotes_the_shipped_seeds():
    seeds = json.loads((training.WEIGHTS / "flamingo" / "seeds.json").read_text())
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for row in cards.summary(seeds):
        assert row in readme


def test_the_cards_quote_the_shipped_metrics():
    shipped = training.WEIGHTS / "flamingo"
    metrics = json.loads((shipped / "metrics.json").read_text())
    figures = [*table(metrics), cards._gates(metrics["alpha"])]
    assert (shipped / "card.md").read_text().endswith("```\n" + "\n".join(figures) + "\n```\n")
    assert cards._text_only(metrics, "lm") in (training.WEIGHTS / "lm" / "card.md").read_text()
    seeds = json.loads((shipped / "seeds.json").read_text())
    assert seeds["0"] == cards.headlines(metrics) and list(seeds) == ["0", "1", "2"]


def test_an_unfinished_run_is_refused_and_nothing_is_written(runs, tmp_path):
    (runs / "vision" / "run.json").rename(runs / "vision" / "kept")
    try:
        with pytest.raises(ValueError, match=r"missing: .*vision/run\.json$"):
            cards.ship([runs], tmp_path / "to")
    finally:
        (runs / "vision" / "kept").rename(runs / "vision" / "run.json")
    assert not (tmp_path / "to").exists()


def test_shipped_weights_are_what_their_cards_say():
    shipped = training.WEIGHTS / "flamingo"
    model = training.load_flamingo(shipped / "model.safetensors")
    metrics = json.loads((shipped / "metrics.json").read_text())
    alphas = json.loads((shipped / "alphas.json").read_text())
    assert metrics["alpha"] == model.alphas()
    assert [alphas["alpha_xattn"][-1], alphas["alpha_dense"][-1]] == list(metrics["alpha"].values())
    for part in ("lm", "vision"):  # the frozen parts lie in the bridged model, unchanged
        own = training.load_tensors(training.WEIGHTS / part / "model.safetensors")[0]
        inside = {"lm": model.lm, "vision": model.vision_encoder}[part].state_dict()
        assert all((own[name] == inside[name]).all() for name in inside)


def test_the_shipped_model_still_answers_as_its_metrics_say():
    """A fresh sample, of another seed than the card's, within what chance explains."""
    shipped = training.WEIGHTS / "flamingo"
    model = training.load_flamingo(shipped / "model.safetensors")
    metrics = json.loads((shipped / "metrics.json").read_text())
    sample = Evaluation(model, samples=200, seed=3_000_000, per_class=20)
    curve = sample.binding("binding_8way")
    for shots in ("0", "4", "32"):
        low, high = curve[shots]["interval"]
        known = metrics["few_shot"]["binding_8way"][shots]
        assert low - 0.03 <= known <= high + 0.03, (shots, known, low, high)
    low, high = sample.motion()["direction"]["interval"]
    assert low - 0.03 <= metrics["motion"]["direction"]["accuracy"] <= high + 0.03
