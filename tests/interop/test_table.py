"""The agreement's command: what it measures, what fails, and what the README quotes of it."""

import json

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.interop import __main__ as table
from tests.interop.agreement import Case, Fault, worst
from tests.interop.test_bridges import CASES

ERRORS = {"outputs": 1e-15, "weights": 2e-13}


def made_up(monkeypatch, *rows):
    """The command with these cases and faults alone."""
    kinds = {"cases": Case, "faults": Fault}
    monkeypatch.setattr(
        table, "collected", lambda what: [row for row in rows if isinstance(row, kinds[what])]
    )


def case(errors=ERRORS, same=None):
    tokens = None if same is None else lambda: same
    return Case("idefics", "part", "x", 1e-12, lambda route: errors, tokens)


def fault(theirs, ours):
    return Fault("mllama", "a leak", lambda: {"theirs": theirs, "ours": ours})


@pytest.mark.parametrize(
    "rows, code",
    [
        ([case(), case(same=True), fault(0.5, 0.0)], 0),
        ([case(ERRORS | {"weights": 2e-12})], 1),
        ([case(ERRORS | {"outputs": np.nan})], 1),
        ([case(same=False)], 1),
        ([fault(0.5, 1e-9)], 1),
        ([fault(0.0, 0.0)], 1),  # their fault is gone: the table is out of date
    ],
)
def test_what_is_above_its_tolerance_fails(rows, code, monkeypatch, tmp_path, capsys):
    made_up(monkeypatch, *rows)
    file = tmp_path / "results.json"
    assert table.main(["--json", str(file)]) == code
    document = json.loads(file.read_text("utf-8"))
    assert len(document["rows"] + document["faults"]) == len(rows)
    assert ("FAILED" in capsys.readouterr().out) == bool(code)


def test_one_case_live_from_the_list_that_the_tests_share():
    (found,) = (c for c in table.collected("cases") if c.package == "mllama" and "one" in c.name)
    row = table.measured(found)
    assert row["ok"] and row["source"].startswith("live, transformers ")
    assert set(row["through"]["numpy"]) == {"outputs", "inputs", "weights"}


def test_results_hold_every_case_and_fault():
    results = json.loads(table.RESULTS.read_text("utf-8"))
    rows = {(r["package"], r["part"], r["case"]) for r in results["rows"]}
    assert rows >= {(c.package, c.part, c.name) for c in table.collected("cases")}
    assert len([r for r in rows if r[1] in ("resampler", "gated layer")]) == len(CASES)
    assert all(r["ok"] for r in results["rows"] + results["faults"])
    named = {(r["package"], r["fault"]) for r in results["faults"]}
    assert named == {(f.package, f.name) for f in table.collected("faults")}


def test_the_readme_and_the_course_show_the_committed_figures():
    results = json.loads(table.RESULTS.read_text("utf-8"))
    start, end = table.MARKERS
    shown = table.README.read_text("utf-8").split(start)[1].split(end)[0]
    assert shown == table.markdown(results)
    assert table.COURSE.read_text("utf-8") == table.course(results)


def test_a_gradient_that_does_not_come_counts_as_zero():
    assert worst([(None, np.array([0.5, -2.0])), (np.ones(1), np.ones(1))]) == 2
