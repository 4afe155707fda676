"""A notebook opened alone: its first cell says what to install, or installs what is there."""

import importlib.util
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from miniflamingo.course import render


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the cell in an empty folder where nothing is installed -> the commands that it ran."""
    commands = []

    def started(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=monkeypatch.codes.pop(0))

    monkeypatch.codes = [0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", started)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.commands = commands
    return lambda: exec(render.ALONE, {})


def test_where_the_package_is_nothing_happens(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "miniflamingo")
    run()
    assert not monkeypatch.commands


def test_where_it_is_not_the_error_says_what_to_do(run, monkeypatch, tmp_path):
    (tmp_path / "miniflamingo-0.1.0-py3-none-any.whl").touch()
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '.\[course\]'") as error:
        run()
    assert sys.executable in str(error.value) and not monkeypatch.commands  # no Colab: asked first


def test_on_colab_it_installs_the_wheel_that_was_uploaded(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    with pytest.raises(ModuleNotFoundError, match="upload miniflamingo"):
        run()
    (tmp_path / "miniflamingo-0.1.0-py3-none-any.whl").touch()
    (tmp_path / "other-9.whl").touch()
    run()
    wheel = "miniflamingo-0.1.0-py3-none-any.whl"
    assert monkeypatch.commands == [[sys.executable, "-m", "pip", "install", "-q", wheel]]
    monkeypatch.codes[:] = [1]
    with pytest.raises(ModuleNotFoundError, match="upload miniflamingo"):
        run()


@pytest.mark.parametrize("kind", render.LEFT_OUT)
def test_every_notebook_begins_with_it(kind):
    for path in sorted((render.HERE / "source").glob("[0-9]*.py")):
        cell = render.cells_of(render.read_source(path), kind)[1]
        assert cell.source == render.ALONE and cell.source.endswith("installed()")
