"""What had to differ from the paper, with it and without: a short training of the bridge each.

    python -m miniflamingo real without --run runs/real/without --json without.json

All variants of a seed see the same documents in the same order, and are asked the same.
"""

from dataclasses import replace
from math import tanh

import numpy as np

from miniflamingo.real.stages import REAL, RealRun

COMMAND = "python -m miniflamingo real without"
STEPS, SAMPLES = 150, 127
SPLITS = ("artist never seen", "concepts never seen")
# variant -> what differs of RealRun, and of its optimiser; warm: whether the resampler starts warm
VARIANTS = {
    "the recipe": {},
    "no warm start": {"warm": False},
    "branches as they are drawn": {"scale": 0.0},
    "neither of the two": {"warm": False, "scale": 0.0},
    "gates at everybody's rate": {"alpha_rate": 1.0},
}


def config(variant, steps, seed):
    """-> the RealRun of a variant, and whether its resampler starts warm."""
    changes = dict(VARIANTS[variant])
    warm, of_optimiser = changes.pop("warm", True), {"steps": steps}
    if "alpha_rate" in changes:
        of_optimiser["alpha_rate"] = changes.pop("alpha_rate")
    return RealRun(replace(REAL, **of_optimiser), seed=seed, **changes), warm


def ask(measure, alphas):
    """The figures of one variant: a Measure of its bridge, and its gates at the end."""
    asked = {name: {split: getattr(measure, name)(split) for split in SPLITS}
             for name in ("nats", "ranked")}  # fmt: skip
    return asked | {"gates": [abs(tanh(alpha)) for alpha in alphas["alpha_xattn"][-1]]}


def table(document):
    """Yield the lines of a Markdown table: medians over the seeds."""
    seeds = document["seeds"]
    yield (f"The same {document['steps']} steps with and without, "
           f"{seeds} seed{'s' * (seeds > 1)}, n = {document['samples']}:")  # fmt: skip
    yield ""
    yield "| | " + " | ".join(f"nats, {s} | among 10" for s in SPLITS) + " | gates at the end |"
    yield "|---" * (2 + 2 * len(SPLITS)) + "|"
    for variant, runs in document["runs"].items():
        cells = [_median([run[name][split]["value"] for run in runs])
                 for split in SPLITS for name in ("nats", "ranked")]  # fmt: skip
        gates = np.median([run["gates"] for run in runs], axis=0)
        yield f"| {variant} | {' | '.join(cells)} | {' '.join(f'{g:.2f}' for g in gates)} |"


def _median(values):
    """Of the seeds, and where there are several their range."""
    span = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{np.median(values):.2f}{span}"
