"""The command line: what it prints, what it writes, and how it fails."""

import json
import subprocess
import sys

import pytest

from miniflamingo.__main__ import main, short
from miniflamingo.flamingo import PRESETS, count_parameters


def test_sizes_counts_what_the_model_holds(capsys):
    assert main(["sizes", "3B", "9B"]) == 0
    printed = capsys.readouterr().out
    for part, count in count_parameters(PRESETS["3B"]).items():
        assert f"{part:<20} {short(count):>9}" in printed
    assert "9B row is not consistent" in printed and "8 inserted layers hold 1.44B" in printed


@pytest.mark.parametrize(
    "preset, part, paper, within",
    [
        ("3B", "lm", 1.4e9, 0.1),
        ("3B", "vision_encoder", 435e6, 0.02),
        ("3B", "gated_xattn", 1.2e9, 0.05),
        ("3B", "resampler", 194e6, 0.01),
        ("80B", "lm", 70e9, 0.1),
    ],
)
def test_the_presets_have_the_paper_s_sizes(preset, part, paper, within):
    assert count_parameters(PRESETS[preset])[part] == pytest.approx(paper, rel=within)


def test_demo_shows_what_it_says(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out)]) == 0
    report = json.loads((out / "demo.json").read_text())
    assert report["gates_shut"] == {"equal_to_the_frozen_lm": True, "largest_difference": 0.0}
    assert not report["gates_open"]["equal_to_the_frozen_lm"]
    for image, tokens in report["tokens_reached_in_the_first_layer"].items():
        assert tokens == [i for i, phi in enumerate(report["phi"]) if phi == int(image)]
    assert max(report["phi"]) == 3
    assert {path.name for path in out.iterdir()} == {"demo.json", "phi.png", "mask.png"}
    assert "equal, bit for bit" in capsys.readouterr().out


def test_errors_are_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["sizes", "5B"]) == 2
    error = capsys.readouterr().err
    assert error == ("miniflamingo: error: unknown preset '5B': choose from mini, 3B, 9B, 80B\n")
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "miniflamingo", "sizes", "mini"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "total" in done.stdout, done.stderr
