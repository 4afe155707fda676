"""A command deletes and overwrites what it has made itself, and nothing else."""

import json
import os
from pathlib import Path

import pytest

from miniflamingo import outputs

NAMES = ("a.txt", "folder")


def make(out, text="made", names=NAMES):
    """What a command would make: a file, and a folder with one below it."""
    with outputs.staged(out, "demo", names) as new:
        (new / "a.txt").write_text(text, "utf-8")
        (new / "folder" / "deep").mkdir(parents=True)
        (new / "folder" / "deep" / "b.txt").write_text(text, "utf-8")


def content(folder):
    """{path: text} of all files, links as where they point to, without the list itself."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_symlink() or p.is_file()]
    read = {p: os.readlink(p) if p.is_symlink() else p.read_text("utf-8") for p in paths}
    return {p.relative_to(folder).as_posix(): text for p, text in read.items()
            if not p.name.startswith(".made-by")}  # fmt: skip


MADE = {"a.txt": "made", "folder/deep/b.txt": "made"}


def test_what_was_made_is_replaced_and_the_rest_stays(tmp_path):
    (tmp_path / "mine.txt").write_text("mine", "utf-8")
    make(tmp_path / "new" / "out")
    make(tmp_path)
    make(tmp_path, "again")
    again = dict.fromkeys(MADE, "again")
    assert content(tmp_path) == again | {"mine.txt": "mine"} | {
        f"new/out/{n}": "made" for n in MADE
    }
    assert not list(tmp_path.glob("*unfinished*")) and not list(tmp_path.glob(".*unfinished*"))


FOREIGN = {
    "a file of that name": lambda out: (out / "a.txt").write_text("mine", "utf-8"),
    "a file in a folder of that name": lambda out: put(out / "folder" / "mine.txt"),
    "a file where the folder goes": lambda out: put(out / "folder"),
    "a folder where the file goes": lambda out: put(out / "a.txt" / "mine.txt"),
    "a link of that name": lambda out: (out / "a.txt").symlink_to(out.parent / "mine.txt"),
    "a broken link": lambda out: (out / "a.txt").symlink_to("nowhere"),
    "a link to a folder": lambda out: (out / "folder").symlink_to(out.parent / "elsewhere"),
}


def put(path, text="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_in_the_way_is_named_before_the_work_and_stays(kind, tmp_path):
    put(tmp_path / "elsewhere" / "kept.txt")
    put(tmp_path / "mine.txt")
    out = tmp_path / "out"
    out.mkdir()
    FOREIGN[kind](out)
    before = content(tmp_path)
    with (
        pytest.raises(ValueError, match=r"^--out: .*(a\.txt|folder).*: in the way; `demo`"),
        outputs.staged(out, "demo", NAMES),
    ):
        raise AssertionError("the work has begun")
    assert content(tmp_path) == before


CHANGES = {
    "changed": lambda out: (out / "a.txt").write_text("mine", "utf-8"),
    "changed, deep": lambda out: (out / "folder" / "deep" / "b.txt").write_text("mine", "utf-8"),
    "added": lambda out: put(out / "folder" / "deep" / "mine.txt"),
    "a link to the same": lambda out: relink(out / "a.txt"),
}


def relink(path):
    path.rename(path.with_name("moved.txt"))
    path.symlink_to("moved.txt")


@pytest.mark.parametrize("kind", CHANGES)
def test_what_was_changed_since_stays(kind, tmp_path):
    make(tmp_path)
    CHANGES[kind](tmp_path)
    before = content(tmp_path)
    with pytest.raises(ValueError, match="or it was changed since"):
        make(tmp_path)
    assert content(tmp_path) == before


def test_what_another_command_made_stays(tmp_path):
    make(tmp_path)
    with (
        pytest.raises(ValueError, match="`bench` has not made it"),
        outputs.staged(tmp_path, "bench", ["a.txt"]),
    ):
        pass
    assert content(tmp_path) == MADE


def test_what_comes_while_a_command_works_stays(tmp_path):
    with (
        pytest.raises(ValueError, match="in the way"),
        outputs.staged(tmp_path, "demo", NAMES) as new,
    ):
        (new / "a.txt").write_text("made", "utf-8")
        (tmp_path / "a.txt").write_text("mine", "utf-8")
    assert content(tmp_path) == {"a.txt": "mine"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_command_that_fails_changes_nothing(error, tmp_path):
    make(tmp_path)
    with pytest.raises(error), outputs.staged(tmp_path, "demo", NAMES) as new:
        (new / "a.txt").write_text("half", "utf-8")
        raise error
    assert content(tmp_path) == MADE
    make(tmp_path, "again")


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_killed_while_it_puts_things_in_their_places(allowed, tmp_path, monkeypatch):
    """Whatever is there afterwards is whole, and the next run goes through."""
    make(tmp_path)
    left = iter(range(allowed))

    def moving(move):
        def moved(*args):
            if ".made-by" not in str(args[1]) and next(left, None) is None:
                raise SystemExit  # as if killed, apart from the folder aside being removed
            return move(*args)

        return moved

    monkeypatch.setattr(os, "rename", moving(os.rename))
    monkeypatch.setattr(os, "replace", moving(os.replace))
    with pytest.raises(SystemExit):
        make(tmp_path, "again")
    monkeypatch.undo()
    found = content(tmp_path)
    assert found.keys() == {"a.txt", f"folder{'.old' * (allowed == 2)}/deep/b.txt"}
    assert found["a.txt"] == ("again" if allowed else "made")
    make(tmp_path, "third")
    assert content(tmp_path) == dict.fromkeys(MADE, "third")


def test_a_name_that_a_later_run_leaves_out_stays_known(tmp_path):
    make(tmp_path)
    with outputs.staged(tmp_path, "demo", ["a.txt"]) as new:
        (new / "a.txt").write_text("alone", "utf-8")
    assert content(tmp_path) == MADE | {"a.txt": "alone"}
    make(tmp_path, "again")


def test_caches_of_python_are_in_nobodys_way(tmp_path):
    make(tmp_path)
    put(tmp_path / "folder" / "__pycache__" / "b.pyc")
    make(tmp_path)


# --- one file -------------------------------------------------------------------------------------

MAKER = "python -m miniflamingo evaluate"


def test_a_file_is_replaced_by_the_command_that_made_it(tmp_path):
    file = tmp_path / "m.json"
    for _ in range(2):
        outputs.check_file(file, MAKER)
        outputs.write_file(file, json.dumps({"made_by": MAKER}).encode(), MAKER)
    for key in ("meta", "about"):
        file.write_text(json.dumps({key: {"made_by": MAKER}}), "utf-8")
        outputs.check_file(file, MAKER)


@pytest.mark.parametrize(
    "text",
    ["", "mine", "{}", "[]", "null", '"made_by"', '{"made_by": 1}', '{"meta": [1]}', "[" * 100_000,
     '{"made_by": "python -m miniflamingo bench"}', json.dumps({"command": MAKER}),
     json.dumps({"made_by": f"{MAKER} and I"}), "\udcff"],
)  # fmt: skip
def test_any_other_file_stays(text, tmp_path):
    file = tmp_path / "m.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    before = file.read_bytes()
    with pytest.raises(ValueError, match="in the way"):
        outputs.check_file(file, MAKER)
    with pytest.raises(ValueError, match="in the way"):
        outputs.write_file(file, b"{}", MAKER)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "path, message",
    [
        ("", "expected a file, got ''"),
        ("no/such/x.json", "in a folder that exists"),
        ("folder", "expected a file, found a folder"),
        ("link", "expected a file, found a link"),
        ("/dev/null", "expected a file, found a device"),
        ("file/x.json", "in a folder that exists"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_line(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("mine", "utf-8")
    Path("link").symlink_to("file")
    with pytest.raises(ValueError, match=f"^--json: .*{message}"):
        outputs.check_file(path, MAKER)


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", " ", "file", "file/below", "a\0b"])
def test_a_folder_that_cannot_be_is_one_line(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine", "utf-8")
    with pytest.raises(ValueError, match=r"^--out: expected a folder"):
        outputs.check_folder(path)
