"""The rows of the table (paper, table 3): what each changes, and what the paper found.

A row differs from its baseline in one choice. What the paper found is the change of its overall
score, in points: the row's minus that of the row without the change.
"""

from dataclasses import dataclass, field, replace

from miniflamingo.dialects import Dialect
from miniflamingo.training import MINI_BRIDGE, BridgeRun, OptimiserConfig

PLAIN, DEEP = 3, 6  # blocks of the language model; of 6, "every second layer" means something
# of documents, captions, captions and questions of two, clips
WEIGHTS, BATCHES = (1.0, 0.2, 0.4, 0.5), (16, 8, 8, 8)
STEPS = 900


@dataclass(frozen=True)
class Row:
    """What differs: fields of BridgeRun, of its model and of its optimiser; kind names what no
    config says (see stage.CHANGES); depth: the language model's blocks, each depth with a baseline
    of its own; paper: points, None where it has none."""

    run: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    optimiser: dict = field(default_factory=dict)
    kind: str = ""
    depth: int = PLAIN
    paper: float | None = None


def _without(dataset):
    return Row({"weights": tuple(0.0 if i in dataset else w for i, w in enumerate(WEIGHTS))})


ROWS = {
    "baseline": Row(),
    "no interleaved documents": replace(_without((0,)), paper=53.4 - 70.7),
    "no captions": replace(_without((1, 2)), paper=60.9 - 70.7),
    "no clips": replace(_without((3,)), paper=67.3 - 70.7),
    "round robin": Row({"strategy": "round_robin"}, paper=62.9 - 70.7),
    "merged": Row({"strategy": "merge"}),
    "no gate": Row(kind="no gate", paper=66.5 - 70.7),
    "gates at everybody's rate": Row(optimiser={"alpha_rate": 1.0}),
    "text alone is gated, too": Row(model={"skip_without_image": False}),
    "vanilla xattn": Row(kind="vanilla", paper=66.9 - 70.7),
    "grafting": Row(kind="grafting", paper=63.1 - 70.7),
    "MLP resampler": Row(model={"resampler": "mlp"}, paper=66.6 - 70.7),
    "Transformer resampler": Row(model={"resampler": "transformer"}, paper=66.7 - 70.7),
    "small resampler": Row(model={"num_latents": 2, "resampler_depth": 1}),
    "large resampler": Row(model={"num_latents": 16, "resampler_depth": 4}),
    "LM tuned": Row(kind="LM tuned", paper=62.7 - 70.7),
    "LM from scratch": Row(kind="LM from scratch", paper=57.8 - 70.7),
    "encoder random": Row(kind="encoder random"),
    "encoder tuned": Row(kind="encoder tuned"),
    "all previous images": Row(model={"only_last": False}, paper=63.5 - 70.7),
    "p_next 1/2": Row({"p_next": 0.5}, paper=70.7 - 69.6),
    "p_next 1": Row({"p_next": 1.0}, paper=70.4 - 69.6),
    "no time embeddings": Row(kind="no time embeddings"),
    "6 blocks": Row(depth=DEEP),
    "6 blocks, xattn every 2nd": Row(model={"xattn_every": 2}, depth=DEEP, paper=68.2 - 70.7),
    "6 blocks, xattn once": Row(
        model={"xattn_every": DEEP, "dialect": Dialect(offset=DEEP // 2)}, depth=DEEP,
        paper=59.8 - 70.7,
    ),
}  # fmt: skip


# with and without the gate, the deeper the language model and the larger the rate
RATES, DEPTHS = (1e-3, 3e-3, 1e-2, 3e-2), (PLAIN, DEEP, 12)
STABILITY = {
    f"{depth} blocks, rate {rate:g}, {gate}": Row(
        optimiser={"rate": rate}, kind="" if gate == "gate" else gate, depth=depth
    )
    for depth in DEPTHS for rate in RATES for gate in ("gate", "no gate")
}  # fmt: skip
ALL = ROWS | STABILITY


def baseline_of(name):
    """The row that a row is compared with; None for a baseline."""
    if name in STABILITY:
        return name.replace("no gate", "gate") if name.endswith("no gate") else None
    base = "6 blocks" if ROWS[name].depth == DEEP else "baseline"
    return None if name == base else base


def config(name, seed, steps=STEPS, clutter=4):
    """The BridgeRun of a row."""
    row = ALL[name]
    optimiser = dict(steps=steps, rate=3e-3, warmup=50, alpha_rate=10.0) | row.optimiser
    model = replace(MINI_BRIDGE, **row.model)
    run = {"weights": WEIGHTS, "batches": BATCHES} | row.run
    return BridgeRun(OptimiserConfig(**optimiser), model, **run, pool_per_class=60,
                     pool_per_turned=20, pool_pairs=3000, pool_clips=800, clutter=clutter,
                     seed=seed)  # fmt: skip
