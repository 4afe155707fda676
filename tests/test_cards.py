"""Model cards: three tiny runs are shipped; a run that is not finished is refused."""

import json
import shutil
from pathlib import Path

import pytest

from miniflamingo import cards, outputs, training
from miniflamingo.__main__ import main
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
    (folder / "flamingo" / "metrics.json").write_text(json.dumps(metrics), "utf-8")
    return folder


def test_ship_copies_the_models_and_says_where_they_come_from(runs, tmp_path):
    cards.ship([runs], tmp_path)
    for stage in cards.ABOUT:
        shipped = (tmp_path / stage / "model.safetensors").read_bytes()
        assert shipped == (runs / stage / "model.safetensors").read_bytes()
        text = (tmp_path / stage / "card.md").read_text("utf-8")
        assert "| command | `python -m miniflamingo" in text
        assert "| steps | 2 |" in text and "1.5 s" in text
    count = training.load_flamingo(tmp_path / "flamingo" / "model.safetensors").num_parameters()
    assert f"| parameters | {count:,}, float32 |" in text
    assert "binding_8way" in text and "gates |tanh(alpha)|" in text
    alphas = json.loads((tmp_path / "flamingo" / "alphas.json").read_text("utf-8"))
    assert alphas["steps"] == [1, 2]
    seeds = json.loads((tmp_path / "flamingo" / "seeds.json").read_text("utf-8"))
    assert list(seeds) == [runs.name]
    assert list(seeds[runs.name]) == list(cards.HEADLINES)


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_set_is_replaced_whole_and_by_its_own_maker_alone(runs, tmp_path):
    to = tmp_path / "set"
    cards.ship([runs], to)
    first = tree(to)
    cards.ship([runs], to)
    assert tree(to) == first and {p.name for p in tmp_path.iterdir()} == {
        "set", ".made-by-ship.json"}  # fmt: skip
    for name in ("notes.txt", "lm/model.safetensors"):
        (to / name).write_text("mine", "utf-8")
        with pytest.raises(ValueError, match=f"^--to: .*{name}.*: in the way"):
            cards.ship([runs], to)
        assert (to / name).read_text("utf-8") == "mine"


def test_the_package_s_own_set_can_be_replaced():
    package = training.WEIGHTS.parent
    renew = "outputs.record(training.WEIGHTS.parent, 'ship', ['weights']) renews the list"
    assert not list(outputs.in_the_way(package, "ship", ["weights"])), renew


def edit(path, change):
    """Rewrite a JSON file, or the metadata of a checkpoint."""
    if path.suffix == ".json":
        values = json.loads(path.read_text("utf-8"))
        change(values)
        path.write_text(json.dumps(values), "utf-8")
        return
    tensors, about = training.load_tensors(path)
    config = json.loads(about["config"])
    change(config)
    training.save_tensors(path, tensors, about | {"config": json.dumps(config)})


def more_steps(config):
    config["optimiser"]["steps"] = 3


def perturb(path):
    tensors, about = training.load_tensors(path)
    name = sorted(tensors)[0]
    training.save_tensors(path, tensors | {name: tensors[name] + 1}, about)


WRONG = {
    "unfinished": (lambda r: edit(r / "lm/checkpoint.safetensors", more_steps),
                   "lm: the run is not finished: step 2 of 3"),
    "another stage": (lambda r: shutil.copytree(r / "lm", r / "vision", dirs_exist_ok=True),
                      "expected a run of the stage vision, got lm"),
    "a model of another run": (lambda r: perturb(r / "lm/model.safetensors"),
                               "is not of the checkpoint beside it"),
    "another frozen part": (
        lambda r: edit(r / "flamingo/checkpoint.safetensors",
                       lambda c: c["frozen"].update(lm="0" * 64)),
        "was not trained on the lm beside it"),
    "gates of another checkpoint": (
        lambda r: edit(r / "flamingo/metrics.json", lambda m: m["alpha"]["alpha_xattn"].pop()),
        "is of another checkpoint"),
    "metrics of another checkpoint": (
        lambda r: edit(r / "flamingo/metrics.json", lambda m: m.update(checkpoint="0")),
        "is of another checkpoint"),
    "metrics without a figure": (
        lambda r: edit(r / "flamingo/metrics.json", lambda m: m.pop("captions")),
        "expected what evaluate writes, got no 'captions'"),
    "metrics that are a list": (
        lambda r: (r / "flamingo/metrics.json").write_bytes(b"[]"), "expected a JSON object"),
    "a damaged run.json": (lambda r: (r / "vision/run.json").write_text('{"comm', "utf-8"),
                           "vision/run.json is damaged"),
    "a run.json without a field": (
        lambda r: edit(r / "vision/run.json", lambda v: v.pop("python")), "lacks 'python'"),
    "a damaged log": (lambda r: (r / "lm/log.jsonl").write_text('{"step": 2, "lo', "utf-8"),
                      "lm/log.jsonl is damaged"),
    "an empty log": (lambda r: (r / "lm/log.jsonl").write_bytes(b""), "expected a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_belong_together_is_refused_in_a_line(kind, runs, tmp_path, capsys):
    damage, message = WRONG[kind]
    copy, to = tmp_path / "runs", tmp_path / "to"
    shutil.copytree(runs, copy)
    damage(copy)
    assert main(["ship", str(copy), "--to", str(to)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not to.exists() and not list(tmp_path.glob(".*unfinished"))


def test_runs_of_several_seeds_differ_in_nothing_else(runs, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(runs, other)
    to = ["--to", str(tmp_path / "to")]
    assert main(["ship", str(runs), str(runs), *to]) == 2
    assert "got twice" in capsys.readouterr().err
    assert main(["ship", str(runs), str(other), *to]) == 2
    assert "different seeds" in capsys.readouterr().err
    for stage in cards.ABOUT:
        edit(other / stage / "checkpoint.safetensors", lambda config: config.update(seed=1))
    assert main(["ship", str(runs), str(other), *to]) == 0
    edit(other / "vision/checkpoint.safetensors", lambda config: config.update(batch=1))
    assert main(["ship", str(runs), str(other), *to]) == 2
    assert "batch: 1 there, 12 here" in capsys.readouterr().err


def test_a_summary_is_the_median_and_the_range_over_the_seeds():
    seeds = {s: dict.fromkeys(cards.HEADLINES, v) for s, v in (("0", 0.9), ("1", 0.5), ("2", 0.6))}
    rows = list(cards.summary(seeds))
    assert rows[0] == "| 8-way at 32 shots | 0.600 | 0.500 to 0.900 |"
    assert len(rows) == len(cards.HEADLINES)


def test_the_readme_quotes_the_shipped_seeds():
    seeds = json.loads((training.WEIGHTS / "flamingo" / "seeds.json").read_text("utf-8"))
    readme = (Path(__file__).parent.parent / "miniflamingo" / "README.md").read_text("utf-8")
    for row in cards.summary(seeds):
        assert row in readme


def test_the_cards_quote_the_shipped_metrics():
    shipped = training.WEIGHTS / "flamingo"
    metrics = json.loads((shipped / "metrics.json").read_text("utf-8"))
    figures = [*table(metrics), cards._gates(metrics["alpha"])]
    assert (
        (shipped / "card.md").read_text("utf-8").endswith("```\n" + "\n".join(figures) + "\n```\n")
    )
    assert cards._text_only(metrics, "lm") in (training.WEIGHTS / "lm" / "card.md").read_text(
        "utf-8"
    )
    seeds = json.loads((shipped / "seeds.json").read_text("utf-8"))
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
    metrics = json.loads((shipped / "metrics.json").read_text("utf-8"))
    alphas = json.loads((shipped / "alphas.json").read_text("utf-8"))
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
    metrics = json.loads((shipped / "metrics.json").read_text("utf-8"))
    sample = Evaluation(model, samples=200, seed=3_000_000, per_class=20)
    curve = sample.binding("binding_8way")
    for shots in ("0", "4", "32"):
        low, high = curve[shots]["interval"]
        known = metrics["few_shot"]["binding_8way"][shots]
        assert low - 0.03 <= known <= high + 0.03, (shots, known, low, high)
    low, high = sample.motion()["direction"]["interval"]
    assert low - 0.03 <= metrics["motion"]["direction"]["accuracy"] <= high + 0.03
