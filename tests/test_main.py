"""The command line: what it prints, what it writes, and how it fails."""

import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from miniflamingo import __main__ as main_module
from miniflamingo import training
from miniflamingo.__main__ import CONFIGS, build_stage, configured, main, parser, short
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
        (["--text", "a", "--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (["--text", "a", "--beam", "2", "--top-k", "3"], "--beam and --top-k exclude each other"),
        (["--beam", "2", "--temperature", "1"], "--beam and --temperature exclude each other"),
        (["--beam", "2", "--top-p", "0.5"], "--beam and --top-p exclude each other"),
        (["--top-k", "2", "--top-p", "0.5"], "--top-k and --top-p exclude each other"),
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
    assert configured(CONFIGS["flamingo"], arguments).model.skip_without_image is skips


ABSURD = {
    "train lm --out x": {
        "--steps": "0 -1 10000000000000 1.5 nan x", "--rate": "0 -1 nan inf 1e300",
        "--warmup": "-1 1e3", "--schedule": "foo", "--weight-decay": "-1 nan",
        "--clip": "0 nan inf", "--seed": f"-1 {10**30} x", "--batch": "0 -1 1000000000",
        "--checkpoint-every": "0 -1",
    },
    "train vision --out x": {"--batch": "0 1"},
    "train flamingo --out x": {
        "--xattn-every": "0 -1", "--alpha-rate": "-1 nan inf", "--p-next": "2 -0.1 nan",
        "--caption-noise": "-1 nan", "--weights": "nan -1 inf", "--strategy": "foo",
        "--resampler": "foo", "--checkpoint-every": "0",
    },
    "generate --text a": {
        "--beam": "0 -1 1000000", "--temperature": "1e300 nan inf 0 -1 1e-300", "--top-k": "0 -3",
        "--top-p": "nan 0 2 -1", "--seed": f"-1 {10**30}", "--max-new-tokens": f"0 -1 {10**9}",
    },
    "evaluate": {"--samples": f"0 -1 {10**9} 2.5"},
    "demo": {"--samples": f"0 {10**9}", "--steps": f"0 -1 {10**12}"},
}  # fmt: skip
REFUSED = [(command, option, value) for command, options in ABSURD.items()
           for option, values in options.items() for value in values.split()]  # fmt: skip


@pytest.mark.parametrize("command, option, value", REFUSED)
def test_an_absurd_value_names_the_option_and_what_was_expected(command, option, value, capsys):
    values = [value] * (4 if option == "--weights" else 1)
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), option, *values])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"miniflamingo: error: argument {option}: ") and error.count("\n") == 1
    assert re.search("expected .* got|invalid choice: .*choose from|expected one arg", error), error


@pytest.mark.parametrize(
    "arguments",
    ["demo --out", "evaluate --json", "evaluate --checkpoint", "ship runs --to", "ship",
     "train lm --out", "train flamingo --out x --lm", "train flamingo --out x --vision"],
)  # fmt: skip
def test_an_empty_path_names_the_option(arguments, capsys):
    with pytest.raises(SystemExit):
        main([*arguments.split(), ""])
    assert "expected a path, got ''" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["demo --sample 3", "train lm --ou x", "evaluate --valid"])
def test_options_are_not_abbreviated(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments.split())
    assert capsys.readouterr().err.count("\n") == 1


def test_demo_takes_all_steps_or_some(capsys):
    assert main(["demo", "--full", "--steps", "3"]) == 2
    assert "--full and --steps exclude each other" in capsys.readouterr().err


# --- what a run is --------------------------------------------------------------------------------


def small_pool(monkeypatch):
    draw = training.datasets.Pool.draw

    def few(encoder, seed, split, *sizes, **others):
        return draw(encoder, seed, split, 2, 8, 4, sizes[3], 1, **others)

    monkeypatch.setattr(training.datasets.Pool, "draw", few)


@pytest.mark.parametrize("command", ["train", "train-torch"])
def test_a_run_is_what_its_files_hold_wherever_they_lie(command, tmp_path, monkeypatch, capsys):
    """The frozen parts by default, as copies elsewhere, as a link, relative; then others."""
    if command == "train-torch":
        pytest.importorskip("triton")
    small_pool(monkeypatch)
    monkeypatch.chdir(tmp_path)
    train = [command, "flamingo", "--out", "run", "--steps", "2"]
    assert main(train) == 0
    shutil.copytree(training.WEIGHTS / "lm", "copy")
    Path("link").symlink_to(training.WEIGHTS / "vision")
    assert main([*train, "--resume", "--lm", "copy", "--vision", "link"]) == 0
    assert main([*train, "--resume", "--lm", str(tmp_path / "copy")]) == 0
    capsys.readouterr()
    training.LanguageStage(training.LanguageRun(seed=3)).save(Path("copy", "model.safetensors"))
    assert main([*train, "--resume", "--lm", "copy"]) == 2
    assert "frozen.lm" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [str, Path])
def test_the_paths_of_the_frozen_parts_are_in_no_config(kind):
    arguments = parser().parse_args(["train", "flamingo", "--out", "x"])
    arguments.lm, arguments.vision = (kind(training.WEIGHTS / part) for part in ("lm", "vision"))
    stage = build_stage(arguments)
    assert stage.config == CONFIGS["flamingo"]
    assert str(training.WEIGHTS) not in json.dumps(stage.identity())


@pytest.mark.parametrize("stage", ["lm", "vision", "flamingo"])
def test_every_option_of_a_training_sets_a_field_or_is_known_not_to(stage):
    top = argparse.ArgumentParser()
    main_module.add_training(top, stage)
    elsewhere = {"help", "out", "resume", "checkpoint_every", "lm", "vision"}
    options = {action.dest for action in top._actions} - elsewhere
    config = CONFIGS[stage]
    for fields, owner in (
        (main_module.RUN_FIELDS, config),
        (main_module.OPTIMISER_FIELDS, config.optimiser),
        (main_module.MODEL_FIELDS, config.model),
    ):
        assert all(hasattr(owner, name) for name in options & set(fields))
        options -= set(fields)
    assert not options


@pytest.mark.parametrize("option", ["--lm", "--vision"])
def test_a_folder_without_a_model_names_the_option(option, tmp_path, capsys):
    assert main(["train", "flamingo", "--out", str(tmp_path / "run"), option, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"miniflamingo: error: {option}: expected a run's folder")
    assert not (tmp_path / "run").exists()


def test_evaluate_replaces_its_own_file_alone(tmp_path, capsys, monkeypatch):
    small = functools.partial(main_module.Evaluation, per_class=20)
    monkeypatch.setattr(main_module, "Evaluation", small)
    file = tmp_path / "metrics.json"
    ask = ["evaluate", "--samples", "4", "--json", str(file)]
    assert main(ask) == main(ask) == 0
    assert json.loads(file.read_text("utf-8"))["made_by"] == "python -m miniflamingo evaluate"
    file.write_text("mine", "utf-8")
    monkeypatch.setattr(main_module, "Evaluation", None)  # it is refused before the work
    assert main(ask) == 2
    assert file.read_text("utf-8") == "mine" and f"{file}: in the way" in capsys.readouterr().err


def test_errors_are_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["sizes", "5B"]) == 2
    error = capsys.readouterr().err
    assert error == ("miniflamingo: error: unknown preset '5B': choose from mini, 3B, 9B, 80B\n")
    (tmp_path / "file").write_text("", "utf-8")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "miniflamingo", "sizes", "mini"],
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0 and "total" in done.stdout, done.stderr
