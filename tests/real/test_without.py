"""What had to differ, with and without; and the speed's table."""

import json

import pytest

from miniflamingo.__main__ import main
from miniflamingo.real import commands, without
from miniflamingo.real.stages import RealRun
from miniflamingo.training import OptimiserConfig

pytest.importorskip("torch")
SHORT = OptimiserConfig(steps=2, rate=1e-3, warmup=1)


def test_every_variant_differs_in_what_it_says():
    base, warm = without.config("the recipe", 150, 3)
    assert warm and base.seed == 3 and base.optimiser.steps == 150
    assert without.config("no warm start", 150, 3) == (base, False)
    for variant, field in (
        ("branches as they are drawn", "scale"),
        ("gates at everybody's rate", "optimiser"),
    ):
        config, warm = without.config(variant, 150, 3)
        differs = [name for name in vars(base) if getattr(base, name) != getattr(config, name)]
        assert warm and differs == [field], variant
    assert without.config("neither of the two", 9, 0)[0].scale == 0 != RealRun().scale


def test_the_command_trains_each_once_and_asks_it(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands.stages, "WARM", SHORT)
    monkeypatch.setattr(without, "VARIANTS", dict(list(without.VARIANTS.items())[:2]))
    real = ["real", "--parts", str(folder), "--out", str(tmp_path / "page"), "without"]
    options = ["--run", str(tmp_path / "runs"), "--seeds", "2", "--steps", "3", "--samples", "4"]
    options += ["--threads", "1", "--json", str(tmp_path / "without.json")]
    assert main([*real, *options]) == 0
    found = json.loads((tmp_path / "without.json").read_text("utf-8"))
    assert found["made_by"] == without.COMMAND and found["steps"] == 3 and "date" in found
    (recipe, again), (cold, _) = found["runs"].values()
    assert recipe != again and recipe["nats"] != cold["nats"]
    table = capsys.readouterr().out
    assert "| no warm start |" in table and "2 seeds" in table
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.safetensors")}
    assert main([*real, *options]) == 0  # what is trained is asked again, and not trained again
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.safetensors")}
    assert json.loads((tmp_path / "without.json").read_text("utf-8"))["runs"] == found["runs"]
    options[options.index("3")] = "4"
    assert main([*real, *options]) == 2  # nor are others taken for these
    assert "optimiser.steps" in capsys.readouterr().err


def test_speed_is_shown_beside_transformers():
    rows = {"theirs": {"prefill_s": 1.0, "ms_a_token": 50.0, "ratio": 1.0},
            "ours": {"prefill_s": 0.5, "ms_a_token": 45.0, "ratio": 0.9}}  # fmt: skip
    about = {"date": "2026-11-29", "processor": "a processor", "threads": 1, "rounds": 3}
    lines = list(commands.speed_table(about | {"rows": rows}))
    assert lines[0] == "2026-11-29, a processor, 1 thread, medians of 3:"
    assert lines[-1] == "| ours | 0.50 | 45.0 | 0.90 |"


def test_the_real_flamingo_is_timed_where_the_parts_are(folder, monkeypatch):
    pytest.importorskip("transformers")
    from miniflamingo.kernels.tools import bench_real

    made = {"tokens": [1], "prefill_s": 1.0, "ms_a_token": 50.0}
    real = bench_real.measure
    monkeypatch.setattr(bench_real, "measure", lambda folder, threads: made)
    monkeypatch.setattr(bench_real.bench, "make", lambda name, folder: None)
    monkeypatch.setattr(bench_real.bench, "measure", lambda *arguments: dict(made))
    monkeypatch.setattr(bench_real.bench, "fresh", lambda work, *arguments: work(*arguments))
    rows = bench_real.run(folder, rounds=2)
    assert [row["ratio"] for row in rows.values()] == [1, 1, 1]
    monkeypatch.setattr(bench_real.models, "load_bridge", lambda f: bench_real.models.assemble(f))
    monkeypatch.setattr(bench_real, "NEW", 3)
    monkeypatch.setattr(bench_real.bench, "PROMPT", 8)
    vocabulary = len(bench_real.models.assemble(folder)[0].lm.embedding.weight)
    monkeypatch.setattr(bench_real, "IDS", (3, vocabulary))
    found = real(folder, 1)
    assert len(found["tokens"]) == 3 and found["ms_a_token"] > 0 and found["prefill_s"] > 0
