"""The command for a day with a GPU, played through without one: a clock and a device of our own."""

import dataclasses
import importlib.util
import json
import sys
import time

import pytest

from miniflamingo import kernels  # noqa: F401  (first: it decides on the interpreter)

if importlib.util.find_spec("torch") is None:
    pytest.skip("the benchmark needs torch, not installed here", allow_module_level=True)

from miniflamingo import __main__ as command_line
from miniflamingo.kernels.tools import bench, gpu

META = {"gpu": "a made-up GPU", "cpu": None, "torch": "2", "triton": "3", "code": "c",
        "quick": False, "backend": "cuda", "repeats": 50, "date": "now",
        "kernels_timed": True}  # fmt: skip
LIMITS = {"copy_bytes_per_second": 1e12, "flops_per_second": 1e14, "product_side": 8}


class Day:
    """A GPU on which every step takes its seconds, and nothing else does."""

    def __init__(self, monkeypatch, seconds=5.0, kill_at=None):
        self.time, self.ran, self.rows, self.seconds, self.kill_at = 0.0, [], [], seconds, kill_at
        self.codes = {}
        for owner, name, stand_in in (
            (bench, "choose_device", lambda device: "cuda"),
            (bench, "meta", lambda *args: META),
            (bench, "measure_limits", lambda *args: LIMITS),
            (bench, "measure_case", self.measure),
            (bench, "add_prediction", lambda *args: None),
            (gpu, "run_for", self.run_for),
            (gpu, "tests", lambda: {"first": ["first"], "second": ["second"]}),
            (gpu, "sanitized", lambda: {"memcheck": ["memcheck"]}),
        ):
            monkeypatch.setattr(owner, name, stand_in)

    def run_for(self, command, seconds):
        self.time += self.seconds
        self.ran.append(command[0])
        return self.codes.get(command[0], 0), "done"

    def measure(self, entry, shape, device, limits, repeats, wanted):
        for choice in entry.implementations(shape)[:1] + entry.implementations(shape)[-1:]:
            fields = entry.name, shape, "bfloat16", "forward", device, choice.name, choice.is_kernel
            record = bench.Record(*fields, 1, 1, 1.0, "bytes")
            if wanted(record, choice):
                if len(self.rows) == self.kill_at:
                    raise KeyboardInterrupt
                self.time += self.seconds
                times = dict(microseconds=2.0, host_microseconds=1.0, spread=0.0, error=0.0)
                record = dataclasses.replace(record, percent_of_floor=50.0, **times)
                self.rows.append((bench.key(dataclasses.asdict(record)), choice.slow))
                yield record

    def go(self, minutes, out):
        return gpu.run(minutes, out, gpu.Clock(minutes, lambda: self.time))


def keys(path):
    return [bench.key(r) for r in json.loads(path.read_text("utf-8"))["records"]]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "bench-gpu.json"


def test_tests_come_first_then_important_cases_and_slow_peers_last(monkeypatch, out):
    day = Day(monkeypatch)
    assert day.go(1000, out) == 0
    assert day.ran == ["first", "second", "memcheck"]
    assert keys(out) == [key for key, _ in day.rows]
    slow = [slow for _, slow in day.rows]
    assert any(slow) and slow == sorted(slow)
    entries = list(dict.fromkeys(key[0] for key, slow in day.rows if not slow))
    assert entries[:3] == ["image_causal_attention", "decode_attention", "resampler_attention"]
    assert "'H': 16" in day.rows[0][0][1] and "even" in day.rows[0][0][1]
    assert len(set(keys(out))) == len(keys(out))


def test_the_minutes_are_kept_and_a_second_call_goes_on(monkeypatch, out):
    first = Day(monkeypatch)
    assert first.go(2, out) == 0
    assert 60 < first.time <= 120
    had = keys(out)
    second = Day(monkeypatch)
    assert second.go(1000, out) == 0
    assert second.ran == []  # all had passed
    assert keys(out)[: len(had)] == had and len(keys(out)) == len(had) + len(second.rows)
    assert len(set(keys(out))) == len(keys(out))
    third = Day(monkeypatch)
    assert third.go(1000, out) == 0 and third.rows == []


@pytest.mark.parametrize("kill_at", [0, 1, 7])
def test_a_kill_keeps_every_finished_row(monkeypatch, out, kill_at):
    day = Day(monkeypatch, kill_at=kill_at)
    with pytest.raises(KeyboardInterrupt):
        day.go(1000, out)
    assert len(keys(out)) == kill_at
    again = Day(monkeypatch)
    assert again.go(1000, out) == 0
    whole = keys(out)
    assert len(whole) == len(set(whole)) == kill_at + len(again.rows)


def test_tests_that_fail_or_take_too_long_stop_nothing_and_run_again(monkeypatch, out, capsys):
    day = Day(monkeypatch)
    day.codes = {"first": 1, "second": None}
    assert day.go(10, out) == 1
    assert "NO  first" in capsys.readouterr().out and day.rows
    again = Day(monkeypatch)
    assert again.go(1000, out) == 0
    assert again.ran == ["first", "second"]


def test_tests_have_a_share_of_the_minutes(monkeypatch, out, capsys):
    day = Day(monkeypatch, seconds=30)
    assert day.go(1, out) == 0
    assert day.ran == ["first", "memcheck"] and "no time left for second" in capsys.readouterr().out


def test_a_file_of_another_gpu_is_left_alone(monkeypatch, out):
    Day(monkeypatch).go(1, out)
    before = out.read_bytes()
    monkeypatch.setattr(bench, "meta", lambda *args: {**META, "gpu": "another GPU"})
    with pytest.raises(ValueError, match="expected times of the same gpu, another GPU, got a made"):
        gpu.run(1, out)
    out.write_text("mine", "utf-8")
    with pytest.raises(ValueError, match=r"--out: .*in the way"):
        gpu.run(1, out)
    assert out.read_text("utf-8") == "mine" and b"a made-up GPU" in before


def test_a_command_is_stopped_and_its_last_line_kept():
    assert gpu.run_for([sys.executable, "-c", "print('a'); print('b')"], 60) == (0, "b")
    assert gpu.run_for([sys.executable, "-c", "raise SystemExit(3)"], 60) == (3, "")
    code, text = gpu.run_for([sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert code is None and text == "stopped after 1 s"


def test_a_row_that_does_not_end_is_left(capsys):
    def never():
        while True:
            try:
                time.sleep(60)
            except Exception:  # as bench.attempt does
                continue

    start = time.monotonic()
    with gpu.ended_after(0.05):
        never()
    assert time.monotonic() - start < 30 and "the time is up" in capsys.readouterr().out
    with gpu.ended_after(3600):
        pass


def test_what_is_not_here_is_said(monkeypatch, capsys):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.tests() == {} and "pytest and hypothesis missing" in capsys.readouterr().out
    if not gpu.Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        assert gpu.sanitized() == {} and "no compute-sanitizer" in capsys.readouterr().out


def test_the_tests_named_are_there():
    assert len(gpu.tests()) == len(gpu.TESTS)


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command_line.main(["gpu", "--out", str(tmp_path / "x.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected a GPU that torch can use" in error
    assert not list(tmp_path.iterdir())
