"""What kernels/results/ holds of costs is what the commands would say of it today."""

import json
from pathlib import Path

import pytest

from miniflamingo.cost import commands, devices, report, scaling
from miniflamingo.cost.counting import Sequence
from miniflamingo.cost.plan import Plan, Training
from miniflamingo.flamingo import PRESETS

RESULTS = Path(commands.__file__).parents[2] / "kernels" / "results"


def committed(name, made_by):
    """A document, which says who made it, when, where and with what."""
    document = json.loads((RESULTS / name).read_text("utf-8"))
    assert document["made_by"] == made_by
    assert {"date", "machine", "processor", "python", "versions"} <= document.keys()
    return document


def test_the_papers_run_is_planned_as_committed():
    document = committed("plan.json", commands.PLAN)
    chosen = commands.choices(commands.plan_parser().parse_args(["--paper"]))
    ((way, plan),) = commands.plans_of(chosen).items()
    assert list(document["plans"]) == [way]
    again = json.loads(json.dumps(commands.as_data(plan)))
    for part in ("parameters", "layout", "training", "flops", "fits", "assumptions"):
        assert document["plans"][way][part] == again[part], part
    for part in ("memory", "seconds"):
        assert document["plans"][way][part] == pytest.approx(again[part]), part
    check = report.paper_check(plan, commands.PAPER_DAYS)
    assert document["paper"]["needs"] == pytest.approx(check["needs"])
    for old, new in zip(document["paper"]["at"], check["at"], strict=True):
        assert old == pytest.approx(new)


def test_two_processes_held_what_is_planned_today():
    document = committed("fsdp2.json", commands.PLAN)
    for precision, rows in document["fsdp2"].items():
        training = Training((Sequence(12, 2),), 2, precision=precision, gradients="fp32",
                            eye=False, positions=False)  # fmt: skip
        plan = Plan(PRESETS["mini"], training, commands.FSDP2, devices.find("h200"))
        held = [{r["part"]: r["measured"][i] for r in rows} for i in range(2)]
        assert rows == report.measured_rows(plan, held)
        for row in rows:
            assert sum(row["measured"]) == 2 * row["planned"] and abs(row["off"]) < 1e-3


def test_the_exponents_are_those_of_the_measured_rows():
    document = committed("scaling.json", commands.SCALING)
    assert document["full"] and document["left_out"] == {}
    assert [case["case"] for case in document["cases"]] == list(scaling.CASES)
    for case in document["cases"]:
        again = scaling.summarise(scaling.CASES[case["case"]], case["rows"])
        assert case["fits"].keys() == again["fits"].keys()
        assert case["ratios"] == pytest.approx(again["ratios"])
        for side, fit in case["fits"].items():
            for key in ("exponent", "counted", "low", "high"):
                assert fit[key] == pytest.approx(again["fits"][side][key], abs=1e-9), side
        for row in case["rows"]:
            assert row["flops"] == scaling.CASES[case["case"]].flops(row["size"], row["side"])
