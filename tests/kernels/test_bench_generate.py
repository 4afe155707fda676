"""bench-generate: both sides write the same tokens, and what it prints and writes."""

import json

import pytest

from miniflamingo.__main__ import main
from miniflamingo.command import Failed
from miniflamingo.kernels.tools import bench_generate as bench

pytest.importorskip("transformers")
SMALL_EYE = {"embed_dim": 16, "image_size": 224, "patch_size": 56, "intermediate_size": 32,
             "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
TINY = {
    "IDEFICS, 512 wide": bench.idefics(64, 2) | {"vision_config": SMALL_EYE},
    "Llama, SmolLM2-135M": bench.SMOLLM2 | {"vocab_size": 500, "num_hidden_layers": 2},
}


@pytest.fixture
def here(monkeypatch):
    """Small models, each side in this process."""
    models = {name: (*bench.MODELS[name][:2], options) for name, options in TINY.items()}
    monkeypatch.setattr(bench, "MODELS", models)
    monkeypatch.setattr(bench, "fresh", lambda work, *arguments: work(*arguments))


def test_both_sides_write_the_same_and_the_figures_are_kept(here, tmp_path, capsys):
    file = tmp_path / "bench.json"
    words = ["--threads", "1", "--rounds", "1", "--new-tokens", "5", "--json", str(file)]
    assert main(["bench-generate", *words]) == 0
    printed = capsys.readouterr().out
    document = json.loads(file.read_text("utf-8"))
    assert document["made_by"] == bench.COMMAND and document["rounds"] == 1
    assert [row["model"] for row in document["rows"]] == [*TINY]
    for row in document["rows"]:
        assert row["model"] in printed and row["threads"] == 1
        for side, ratios in row["ratio"].items():
            for key, ratio in ratios.items():
                assert ratio == row[side][key] / row["transformers"][key] > 0


def test_sides_that_differ_fail(here, monkeypatch, tmp_path):
    def measure(side, *_):
        return {"tokens": [len(side)], "prefill_s": 1, "ms_a_token": 1, "peak_mb": 1}

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(Failed, match="write different tokens"):
        bench.compare("IDEFICS, 512 wide", 1, 1, 5, tmp_path)


def test_a_process_of_its_own():
    assert bench.fresh(pow, 2, 5) == 32


@pytest.mark.parametrize("words", [["--threads", "0"], ["--rounds", "0"], ["--new-tokens", "1"]])
def test_options_have_ranges(words):
    with pytest.raises(SystemExit) as stop:
        main(["bench-generate", *words])
    assert stop.value.code == 2


def test_the_readme_shows_the_committed_figures(monkeypatch, tmp_path):
    start, end = bench.MARKERS
    readme = bench.README.read_text("utf-8")
    results = json.loads(bench.RESULTS.read_text("utf-8"))
    assert readme.split(start)[1].split(end)[0] == bench.markdown(results)
    copy = tmp_path / "README.md"
    copy.write_text(readme.replace(bench.markdown(results), ""), "utf-8")
    monkeypatch.setattr(bench, "README", copy)
    assert main(["bench-generate", "--table"]) == 0
    assert copy.read_text("utf-8") == readme
