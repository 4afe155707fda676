"""What two processes hold under FSDP2 is what the plan says."""

import pytest

pytest.importorskip("torch")

from miniflamingo.cost import devices, report
from miniflamingo.cost.commands import FSDP2
from miniflamingo.cost.counting import Sequence
from miniflamingo.cost.plan import Plan, Training
from miniflamingo.flamingo import PRESETS
from miniflamingo.kernels.model import resident


def test_two_processes_hold_what_is_planned():
    """Together to the byte; each within the rows that do not divide evenly."""
    config = PRESETS["mini"]
    training = Training((Sequence(12, 2),), 2, gradients="fp32", eye=False, positions=False)
    planned = Plan(config, training, FSDP2, devices.find("h200"))
    rows = report.measured_rows(planned, resident.measure(config, "bf16"))
    assert [row["part"] for row in rows] == [
        "frozen weights", "trained weights", "gradients", "moments"
    ]  # fmt: skip
    for row in rows:
        assert len(row["measured"]) == 2
        assert sum(row["measured"]) == 2 * row["planned"]
        assert abs(row["off"]) < 1e-3
