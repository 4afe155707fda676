"""The command that tries other machines: what it covers, and that it never passes wrongly."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from tests import machines as m

PLAIN = {"features": ["SSE2", "SSE41", "AVX2", "AVX512F"], "blas": "haswell", "numpy": "X86_V3"}


def setting(name):
    return next(setting for setting in m.SETTINGS if setting.name == name)


def job(code, job=m.JOBS["compare"]):
    """A job that runs a line of Python in the place of its command."""
    return replace(job, command=("-c", code))


# --- what it covers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variable, value, jobs",
    [
        *(
            ("OPENBLAS_CORETYPE", core, {"rooms", "notebooks"})
            for core in ("Nehalem", "Haswell", "SkylakeX")
        ),
        ("NPY_DISABLE_CPU_FEATURES", None, {"rooms", "notebooks"}),
        ("GLIBC_TUNABLES", None, {"rooms", "notebooks"}),
        ("ATEN_CPU_CAPABILITY", "default", {"kernels", "compare", "torch's notebooks"}),
        ("ATEN_CPU_CAPABILITY", "avx2", {"kernels", "compare", "torch's notebooks"}),
        ("ONEDNN_MAX_CPU_ISA", "SSE41", {"kernels", "compare", "torch's notebooks"}),
        ("ONEDNN_MAX_CPU_ISA", "AVX2", {"kernels", "compare", "torch's notebooks"}),
        ("LC_ALL", "C", {"rooms", "commands"}),
    ],
)
def test_every_processor_has_a_setting_that_runs_all_that_concerns_it(variable, value, jobs):
    of_it = [s for s in m.SETTINGS if s.environment.get(variable, "") in (value or NotEmpty(),)]
    assert of_it and all(jobs <= set(s.jobs) for s in of_it)


def test_what_is_left_out_exists():
    """pytest ignores what is not there, and would run a file that got another name."""
    names = {*m.SYSTEM, *(f"kernels/{name}" for name in m.KERNELS_SYSTEM)}
    assert all((m.ROOT / "tests" / name).exists() for name in names)


class NotEmpty:
    """Equal to every text that is not empty."""

    def __eq__(self, other):
        return bool(other)


@pytest.mark.parametrize("job", [job for job in m.JOBS if job != "commands"])
def test_every_job_runs_on_one_thread_and_on_two(job):
    assert {s.threads for s in m.SETTINGS if job in s.jobs} == {1, 2}


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_the_turns_together_are_all_of_it(turns):
    parts = [m.SETTINGS[which - 1 :: turns] for which in range(1, turns + 1)]
    assert sorted(s.name for part in parts for s in part) == sorted(s.name for s in m.SETTINGS)


def test_the_turn_goes_on_with_every_commit_and_needs_no_history_and_no_git():
    def answers(count, shallow="false", commit=""):
        said = {"--count": count, "--is-shallow-repository": shallow, "HEAD": commit}
        return lambda command, *options: said[options[0]]

    assert [m.turn_of_commit(4, answers(str(n))) for n in (7, 8, 9, 10, 11)] == [4, 1, 2, 3, 4]
    drawn = {m.turn_of_commit(4, answers("1", "true", f"{n:040x}")) for n in range(8)}
    assert drawn == {1, 2, 3, 4}
    assert m.turn_of_commit(4, lambda *_: "") == 1
    assert m.turn("3/4") == (3, 4) and m.turn("commit/4")[1] == 4


def test_a_turn_that_this_processor_cannot_run_goes_to_the_next(monkeypatch, capsys):
    ran = []

    def rows(setting, plain):
        ran.append(setting.name)
        if setting.needs == "AVX512F":
            return []
        return [(setting.name, "rooms", m.Result((1, 0, 0), 1.0, "", ""))]

    monkeypatch.setattr(m, "rows", rows)
    monkeypatch.setattr(m, "ask", lambda variables: (PLAIN, None))
    assert m.main(["--turn", "1/9"]) == 0 and ran == ["skylakex", "nehalem"]
    assert m.main(["--turn", "3/9"]) == 0 and ran[2:] == ["haswell"]
    assert m.main(["skylakex"]) == 1 and ran[3:] == ["skylakex"]
    assert "0 jobs ran" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "a/4", "commit/0", "-1/4"])
def test_a_turn_that_does_not_exist_is_refused(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        m.main([f"--turn={text}"])
    assert stopped.value.code == 2 and repr(text) in capsys.readouterr().err


def test_an_unknown_setting_is_refused_and_a_list_runs_nothing(capsys):
    with pytest.raises(SystemExit):
        m.main(["nehalim"])
    assert "no setting is called nehalim: choose from skylakex, nehalem" in capsys.readouterr().err
    assert m.main(["--list"]) == 0
    assert "OPENBLAS_CORETYPE=SkylakeX" in capsys.readouterr().out


# --- settings that would test nothing -------------------------------------------------------------


def test_a_setting_that_the_processor_cannot_run_is_left_out_and_what_needs_nothing_is_not():
    plain = {**PLAIN, "features": ["SSE2", "AVX2"]}
    assert "has no AVX512F" in m.reason_to_leave_out(setting("skylakex"), plain, ask=None)
    arm = {**PLAIN, "features": ["NEON"]}
    listens = ({"threads": "1"}, None)
    assert m.reason_to_leave_out(setting("strange"), arm, lambda variables: listens) is None


@pytest.mark.parametrize(
    "name, shown, reason",
    [
        ("nehalem", {"blas": "nehalem"}, None),
        ("nehalem", {"blas": "haswell"}, "no effect: blas is haswell, not nehalem"),
        ("nehalem", {"blas": "not OpenBLAS"}, "no effect: blas is not OpenBLAS, not nehalem"),
        ("nehalem", {"blas": "nehalem", "threads": "4"}, "no effect: threads is 4, not 1"),
        ("torch-default-1", {"torch": "default", "onednn": "Intel SSE4.1"}, None),
        ("torch-default-1", {"torch": "default", "onednn": "Intel AVX2"}, "onednn is Intel AVX2"),
        ("torch-default-1", {}, "torch is missing, not default"),
    ],
)
def test_a_setting_that_nothing_listens_to_is_reported(name, shown, reason):
    said = m.reason_to_leave_out(
        setting(name), PLAIN, lambda variables: ({"threads": "1", **shown}, None)
    )
    assert said == reason or reason in said


def test_a_setting_that_kills_the_program_is_left_out():
    said = m.reason_to_leave_out(setting("nehalem"), PLAIN, lambda _: (None, "SIGILL"))
    assert said == "SIGILL"
    assert m.ending(-signal.SIGILL) == "SIGILL" and m.ending(3) == "exit code 3"


def test_this_machine_is_asked_and_listens():
    found, reason = m.ask({"OPENBLAS_NUM_THREADS": "1"})
    assert reason is None and found["threads"] in ("1", "unknown") and found["features"]
    found, reason = m.ask({"PYTHONHOME": "/nonexistent"})
    assert found is None and reason.startswith("asking ended with exit code 1")


# --- what ran -------------------------------------------------------------------------------------

PYTEST = """..F.s
FAILED tests/test_a.py::test_b - assert 1 == 2
ERROR tests/test_c.py::test_d
1 failed, 3 passed, 1 skipped, 2 warnings, 1 error in 0.12s
"""
RENDER = """00_start_here: ok, 8 s
01_attention: differs, 9 s
  teacher: cell 01-004: stdout: committed '0.1', now '0.2'
03_the_perceiver: differs, 1 s
  a second
"""
COMPARE = """  one image    bf16  backward   nan  1.6e-03    nan  FAILED
405 comparisons, 6 failed (bound: ratio <= 2)
"""


@pytest.mark.parametrize(
    "name, output, counts, failure",
    [
        ("rooms", PYTEST, (3, 2, 1), "tests/test_a.py::test_b - assert 1 == 2"),
        ("notebooks", RENDER, (1, 2, 0), "01_attention: differs, 9 s teacher: cell 01-004"),
        ("compare", COMPARE, (399, 6, 0), "one image bf16 backward nan"),
        ("rooms", "Traceback\nMemoryError", (0, 0, 0), "SIGILL: MemoryError"),
    ],
)
def test_a_failed_job_is_counted_and_its_first_failure_named(name, output, counts, failure):
    result = m.judge(m.JOBS[name], -signal.SIGILL, output, 1.0)
    assert result.counts == counts and result.failure.startswith(failure)


def test_the_exit_code_decides_and_a_job_that_ran_nothing_has_failed():
    fine = "3 passed in 1s"
    assert m.judge(m.JOBS["rooms"], 0, fine, 1.0).failure == ""
    assert m.judge(m.JOBS["rooms"], 1, fine, 1.0).failure == "exit code 1: 3 passed in 1s"
    assert m.judge(m.JOBS["rooms"], 0, "no tests ran in 1s", 1.0).failure


@pytest.fixture
def small(monkeypatch):
    """main, on a machine that listens to everything, with one line of Python in all jobs' place."""

    def run(code, *arguments):
        monkeypatch.setattr(m, "JOBS", {name: job(code) for name in m.JOBS})
        monkeypatch.setattr(m, "ask", lambda variables: (PLAIN, None))
        monkeypatch.setattr(m, "reason_to_leave_out", lambda setting, plain: None)
        return m.main([*arguments])

    yield run
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_the_command_fails_when_one_job_does(small, capfd):
    code = """import os; print('3 comparisons, 1 failed')
os._exit(os.environ['OPENBLAS_CORETYPE'] == 'Haswell')"""
    assert small(code, "nehalem") == 0
    assert "2 jobs ran, 0 failed" in capfd.readouterr().out
    assert small(code, "nehalem", "haswell") == 1
    printed = capfd.readouterr().out
    assert "4 jobs ran, 2 failed" in printed and "--- haswell, rooms" in printed


def test_nothing_that_ran_is_not_a_success(small, monkeypatch, capsys):
    monkeypatch.setattr(m, "rows", lambda setting, plain: [])
    assert small("pass", "nehalem") == 1


def test_the_strange_setting_runs_in_a_copy_with_an_odd_name(small, capfd):
    code = "import os; print(ascii(os.getcwd()), oct(os.umask(0))); os._exit(1)"
    assert small(code, "strange") == 1
    printed = capfd.readouterr().out
    assert "mingo, mit Leerzeichen" in printed and "0o77" in printed


def test_stopped_it_leaves_nothing_running(tmp_path):
    pids = str(tmp_path / "pid")
    code = f"import os, time; open({pids!r}, 'ab').write(b'%d ' % os.getpid()); time.sleep(99)"
    program = (
        "from tests import test_machines as t; import sys; m = t.m;"
        f"m.JOBS = {{name: t.job({code!r}) for name in m.JOBS}};"
        "m.ask = lambda _: (t.PLAIN, None); m.reason_to_leave_out = lambda *_: None;"
        "sys.exit(m.main(['nehalem']))"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=m.ROOT, stderr=subprocess.PIPE, encoding="utf-8") as process:
        while not (tmp_path / "pid").exists() or len((tmp_path / "pid").read_bytes().split()) < 2:
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
        assert process.stderr.read() == "test-machines: stopped\n"
    for pid in (tmp_path / "pid").read_text("utf-8").split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
