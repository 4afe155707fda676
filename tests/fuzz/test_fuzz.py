"""A short, always equal part of the attack, and that the attack would notice."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.fuzz import __main__ as fuzz
from tests.fuzz import commands, damage, kills, runner

if not os.path.exists("/proc/self/statm"):
    pytest.skip("the attack needs Linux", allow_module_level=True)


def python(*words):
    """A process of its own: what forks must not have threads, which torch has left behind here."""
    command, root = [sys.executable, *map(str, words)], fuzz.README.parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", timeout=1200)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The whole files."""
    folder = tmp_path_factory.mktemp("fuzz") / "corpus"
    build = f"from tests.fuzz.__main__ import build_corpus; build_corpus({str(folder)!r})"
    code, said = python("-c", build)
    assert code == 0, said
    return folder


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """({target: row}, what was said) of the short run."""
    folder = tmp_path_factory.mktemp("short")
    options = "--short", "--keep", folder, "--json", folder / "results.json"
    said = python("-m", "tests.fuzz", *options)[1]
    found = "\n".join(path.read_text("utf-8") for path in folder.rglob("found.txt"))
    assert (folder / "results.json").exists(), said
    rows = json.loads((folder / "results.json").read_text("utf-8"))["attack"]["rows"]
    return {row["target"]: row for row in rows}, f"{said}\n{found}"


@pytest.mark.parametrize("target", fuzz.TARGETS, ids=lambda target: target.name)
def test_short_run(target, short_run):
    rows, said = short_run
    assert rows[target.name]["tried"] == target.short
    assert rows[target.name]["failures"] == 0, said


def case(act, judge=runner.judge_command, draw=lambda rng, corpus: {}, **options):
    """What becomes of an act that a test makes up, as a Result of one case."""
    return runner.Target("made up", draw, act, judge, 1, **options)


def ends(code, text):
    """An act that prints text to stderr, and ends."""

    def act(case):
        os.write(2, text.encode())
        return code

    return act


def hangs(case):
    import time

    time.sleep(60)


def leaves_a_process(case):
    if os.fork() == 0:
        hangs(case)


def loses(case):
    with open("theirs.txt", "w", encoding="utf-8") as file:
        file.write("ours")


def takes_all_memory(case):
    return bool(np.ones(10**12, np.uint8).any())


@pytest.mark.parametrize(
    "act, kind",
    [
        (hangs, "hang"),
        (lambda case: 1 // 0, "ZeroDivisionError"),
        (lambda case: os.kill(os.getpid(), 9), "died of SIGKILL"),
        (takes_all_memory, "MemoryError"),
        (leaves_a_process, "left running"),
        (loses, "lost (exit code #): [#]"),
        (ends(3, ""), "exit code #"),
        (ends(2, "miniflamingo: error: a\nb\n"), "exit code # with # lines"),
        (ends(2, ""), "exit code # with # lines"),
        (ends(2, "something\n"), "exit code # with # lines"),
        (ends(130, "a\nb\n"), "stopped with # lines"),
    ],
)
def test_what_must_not_happen_is_noticed_and_kept(act, kind, tmp_path):
    def draw(rng, corpus):
        with open("theirs.txt", "w", encoding="utf-8") as file:
            file.write("theirs")
        return {}

    target = case(act, draw=draw, limit=0.3 if act is hangs else 20)
    (result,) = runner.attack([target], None, tmp_path, say=lambda line: None)
    assert [*result.failures] and kind in next(iter(result.failures))
    (folder,) = result.again.values()
    assert (folder / "files" / "theirs.txt").read_text("utf-8") == "theirs"
    assert isinstance(runner.again([target], folder)[1], runner.Failure)


@pytest.mark.parametrize(
    "code, text, outcome",
    [
        (0, "", "accepted"),
        (2, "usage: a\n  b\na: error: c\n", "refused"),
        (2, "lm:  50%|##  | 1/2 [00:00<00:00, 9it/s]\rminiflamingo: error: x\n", "refused"),
        (1, "miniflamingo: error: step 3: the loss is nan\n", "refused"),
        (130, "interrupted\n", "stopped"),
    ],
)
def test_what_may_happen_is_counted(code, text, outcome, tmp_path):
    (result,) = runner.attack([case(ends(code, text))], None, tmp_path)
    assert result.row()[outcome] == 1 and not result.failures


def test_ctrl_c_is_pressed_once_it_takes_too_long(tmp_path):
    target = case(hangs, patience=0.1)
    (result,) = runner.attack([target], None, tmp_path, say=lambda line: None)
    assert [*result.failures] == ["KeyboardInterrupt"]


def test_a_case_is_the_same_again(corpus, tmp_path):
    for target in fuzz.TARGETS:
        made = [
            (runner.make(target, 5, 3, corpus, folder), runner.snapshot(folder))
            for folder in (tmp_path / f"{target.name}-{i}" for i in range(2))
        ]
        assert json.dumps(made[0]) == json.dumps(made[1]), target.name


@pytest.mark.parametrize("text", ['{"step": 2}', "7a1c" * 16, "c0de", ""])
def test_any_text_can_be_mutated(text):
    made = {damage.mutate_text(np.random.default_rng(seed), text) for seed in range(100)}
    assert len(made) > 10


def test_damage_changes_bytes_behind_the_first(corpus):
    rng = np.random.default_rng(0)
    data = bytes(range(256)) * 8
    damaged = [damage.damage(rng, data, data, 700) for _ in range(100)]
    assert all(x[:700] == data[:700] for x in damaged)
    assert sum(x != data for x in damaged) > 90


def test_kills_notice_a_run_that_differs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"same")
        (tmp_path / name / "log.jsonl").write_text("1\n", "utf-8")
    assert kills.differences(tmp_path / "a", tmp_path / "b") is None
    (tmp_path / "b" / "log.jsonl").write_text("1\n1\n", "utf-8")
    assert "log.jsonl" in kills.differences(tmp_path / "a", tmp_path / "b")


def test_options_are_those_of_the_help():
    assert commands.options("miniflamingo", "generate")["--temperature"] is True
    assert commands.options("miniflamingo", "train", "lm")["--resume"] is False


def test_the_readme_shows_the_committed_figures():
    readme, start = fuzz.README.read_text("utf-8"), fuzz.MARKERS[0]
    shown = readme.split(start)[1].split(fuzz.MARKERS[1])[0]
    assert shown == fuzz.markdown(json.loads(fuzz.RESULTS.read_text("utf-8")))
