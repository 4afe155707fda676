"""The command line: what it prints, what it writes, and how it fails."""

import subprocess
import sys

import numpy as np
import pytest

from miniflamingo.__main__ import CONFIGS, configured, main, parser, short
from miniflamingo.flamingo import PRESETS, count_parameters
from miniflamingo.worlds import shapes


def test_sizes_counts_what_the_model_holds(capsys):
    assert main(["sizes", "3B", "9B"]) == 0
    printed = capsys.readouterr().out
    for part, count in count_parameters(PRESETS["3B"]).items():
        assert f"{part:<20} {short(count):>9}" in printed
    assert "9B row is not consistent" in printed and "8 inserted layers hold 1.44B" in printed


def test_demo_prints_what_it_found(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), "--steps", "1", "--samples", "4"]) == 0
    printed = capsys.readouterr().out
    assert "gates shut: logits beside the frozen LM's: equal, bit for bit" in printed
    assert "exactly those with phi = 3" in printed and "index.html" in printed


@pytest.fixture
def picture(tmp_path):
    """A file with a large red circle, which no training has seen."""
    rng = np.random.default_rng(5)
    drawn = shapes.draw_objects(*np.array([[0], [0], [1]]), rng, split="test")[0]
    shapes.save_picture(tmp_path / "red.png", drawn)
    return str(tmp_path / "red.png")


def test_generate_answers_in_the_order_of_the_prompt(picture, capsys):
    assert main(["generate", "--image", picture, "--text", "what color ?"]) == 0
    assert capsys.readouterr().out.split() == ["red"]
    assert main(["generate", "--image", picture, "--text", "what color ?", "--beam", "3"]) == 0
    assert capsys.readouterr().out.split()[0] == "red"


def test_generate_watches_a_clip(tmp_path, capsys):
    directions = np.arange(4)
    attributes = (np.zeros(4, int), np.zeros(4, int), np.ones(4, int), directions)
    clips = shapes.draw_clips(*attributes, np.random.default_rng(3), split="test")
    for clip, direction in zip(clips, shapes.DIRECTIONS):
        shapes.save_clip(tmp_path / "clip.gif", clip)
        assert main(["generate", "--video", str(tmp_path / "clip.gif")]) == 0
        assert capsys.readouterr().out.split() == ["moving", direction]


def test_generate_says_what_an_animation_and_a_cut_clip_are(tmp_path, capsys):
    attributes = (np.zeros(1, int), np.zeros(1, int), np.ones(1, int), np.zeros(1, int))
    clip = shapes.draw_clips(*attributes, np.random.default_rng(3), split="test")[0]
    path = tmp_path / "clip.gif"
    shapes.save_clip(path, clip)
    assert main(["generate", "--image", str(path), "--text", "what color ?"]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"miniflamingo: error: {path}: an animation of 8 frames, expected one picture;"
        " --video reads it\n"
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    assert main(["generate", "--video", str(path)]) == 0
    said = capsys.readouterr()
    assert said.out and said.err.startswith(f"miniflamingo: warning: {path}: cut off after ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("option", ["--image", "--video"])
@pytest.mark.parametrize("content", [b"", b"no picture", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"RIFF"])
def test_generate_refuses_what_it_cannot_read_in_one_line(option, content, tmp_path, capsys):
    (tmp_path / "x.png").write_bytes(content)
    assert main(["generate", option, str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"miniflamingo: error: {tmp_path}/x.png: ")


def test_generate_samples_from_a_seed(picture, capsys):
    prompt = ["generate", "--image", picture, "--max-new-tokens", "8"]
    for sampling in (
        ["--temperature", "3"],
        ["--top-k", "9", "--temperature", "3"],
        ["--top-p", ".99"],
    ):
        answers = []
        for seed in ("1", "1", "2", "3", "4"):
            assert main([*prompt, *sampling, "--seed", seed]) == 0
            answers.append(capsys.readouterr().out)
        assert answers[0] == answers[1]
        assert sampling[0] == "--top-p" or len(set(answers)) > 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "a prompt needs at least one --text, --image or --video"),
        (["--image", "nowhere.png"], "no image or video at nowhere.png"),
        (["--text", "a mauve circle"], "not in the vocabulary of .* words: ['mauve']"),
        (["--text", "a", "--top-p", "2"], "nucleus sampling needs 0 < p <= 1, got 2.0"),
        (["--text", "a", "--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (["--text", "a", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--text", "a", "--beam", "0"], "beam search needs width >= 1, got 0"),
    ],
)
def test_generate_refuses_in_one_line(arguments, message, capsys):
    assert main(["generate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(piece in error for piece in message.split(" .* ")), error


@pytest.mark.parametrize("option, skips", [([], True), (["--no-skip-without-image"], False)])
def test_text_alone_is_left_to_the_lm_unless_asked_otherwise(option, skips):
    arguments = parser().parse_args(["train", "flamingo", "--out", "x", *option])
    assert configured(CONFIGS["flamingo"].model, arguments).skip_without_image is skips


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
