"""Module 11's experiment: six small bridges that differ in one choice each.

    python -m miniflamingo.course.ablations      all rows, three seeds -> data/ablations.json
    python -m miniflamingo.course.ablations --seeds 1 --steps 100 --out runs/ablations.json

A bridge of one resampler layer is trained on documents of three captioned pictures and, with a
small weight, on binding documents of five. (With a larger weight neither is learned in this time.)
Every row starts from the same frozen parts, reads the same pictures, and is asked the same.
"""

import json
import platform
import sys
import tempfile
import time
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from miniflamingo import outputs
from miniflamingo.command import Parser, a_path, in_processes, run_command, whole
from miniflamingo.flamingo import PRESETS
from miniflamingo.language import LanguageModel
from miniflamingo.prompt import IMAGE
from miniflamingo.training import WEIGHTS, BridgeRun, BridgeStage, OptimiserConfig, Run
from miniflamingo.worlds import datasets, grammar
from miniflamingo.worlds.datasets import SEEN, Pool
from miniflamingo.worlds.grammar import GEOMETRIC
from miniflamingo.xattn import compute_phi

DATA = Path(__file__).with_name("data") / "ablations.json"
CLASSES = SEEN & GEOMETRIC
SHOTS = (1, 4, 16)

# --- the rows: what is changed in the config, and in the model ------------------------------------

CONFIGS = {
    "baseline": {},
    "no gate": {},
    "MLP resampler": {"resampler": "mlp"},
    "one layer": {},
    "all previous images": {"only_last": False},
    "LM from scratch": {},
}


def change(model, row, seed):
    """Make a new bridge into the one of a row; returns the model."""
    layers = model.gated_xattn
    if row == "no gate":  # tanh(20) = 1, and never trained
        for alpha in (a for layer in layers for a in (layer.alpha_xattn, layer.alpha_dense)):
            alpha.data, alpha.requires_grad = np.full((), 20, np.float32), False
    if row == "one layer":  # the others stay shut: a layer with alpha = 0 is the identity
        for i, layer in enumerate(layers):
            if i != len(layers) // 2:
                layer.freeze()
    if row == "LM from scratch":  # and it learns
        model.lm = LanguageModel(model.config.lm, rng=np.random.default_rng([seed, 3]))
    return model


class Ablation(BridgeStage):
    """The stage that trains one row; weights are those of (binding, captions)."""

    def __init__(self, row, seed=0, steps=300, weights=(0.1, 1.0), pool=None):
        """`pool`, where given, spares drawing the pictures again. ValueError for an unknown row."""
        if row not in CONFIGS:
            raise ValueError(f"row must be one of {', '.join(CONFIGS)}, got {row!r}")
        config = BridgeRun(
            OptimiserConfig(steps=steps, warmup=20, rate=4e-3, alpha_rate=10.0),
            model=replace(PRESETS["mini"], resampler_depth=1, **CONFIGS[row]),
            weights=(*weights, 0, 0),
            batches=(6, 12, 1, 1),
            wordless=0.0, pool_per_class=20, pool_per_turned=0, pool_pairs=1, pool_clips=1,
            seed=seed,
        )  # fmt: skip
        super().__init__(config, WEIGHTS / "lm", WEIGHTS / "vision")
        change(self.model, row, seed)
        if pool is not None:
            self.pool = pool

    def draw(self, dataset, rng):
        B = self.batches[dataset]
        if dataset == "captions":
            return datasets.caption_documents(self.pool, B, 3, rng, CLASSES)
        parts = [
            datasets.binding_documents(self.pool, B // 3, 5, ways, rng, CLASSES)[0]
            for ways in (2, 3, 4)
        ]
        return datasets.together(parts)


def train(stage):
    """Run a stage to its end; returns the captions' loss of every step."""
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        run = Run(stage, folder)
        steps = range(stage.config.optimiser.steps)
        return [run.step()["losses"]["captions"] for _ in steps]


# --- what is asked --------------------------------------------------------------------------------


def fresh_pool(stage):
    """Pictures of the test split, which no row has seen."""
    return Pool.draw(stage.model.vision_encoder, [7, 7], "test", max(SHOTS) + 1, 1, 1)


def examine(model, pool, samples=200):
    """{question: accuracy} on fresh pictures.

    "caption": the four words behind the last of three captioned pictures, all right; "colour" and
    "shape": that word alone; "4-way, k shots": binding; "text": binding in text alone, 8 shots.
    """
    media = model.resampler(pool.images[:, None])[:, 0]  # [pictures, R, D_m]
    rng, result = np.random.default_rng(3), {}

    def says(documents):  # the likeliest next word at each place
        phi = compute_phi(documents.tokens, IMAGE)
        return model.read(documents.tokens, media[documents.pictures], phi).argmax(axis=-1)

    asked = datasets.caption_documents(pool, samples, 3, rng, CLASSES)
    right = says(asked)[:, -6:-2] == asked.tokens[:, -5:-1]  # a small red circle
    result |= {"caption": right.all(axis=1), "colour": right[:, 2], "shape": right[:, 3]}
    asked, episode = datasets.binding_documents(
        pool, samples, max(SHOTS) + 1, 4, rng, CLASSES, "pair"
    )
    right = says(asked)[:, 2::4] == episode.name
    result |= {f"4-way, {k} shots": right[:, k] for k in SHOTS}
    episode = grammar.draw_episode(samples, 9, 4, rng, GEOMETRIC, "pair")
    tokens = grammar.binding(episode)[:, :-2]
    nothing = np.zeros_like(media, shape=(samples, 1, *media.shape[1:]))
    said = model.read(tokens, nothing, compute_phi(tokens, IMAGE))[:, -1].argmax(axis=-1)
    result["text"] = said == episode.name[:, -1]
    return {name: float(np.mean(r)) for name, r in result.items()}


# --- the larger run -------------------------------------------------------------------------------


def run_one(seed, row, steps, samples):
    """Train and examine one row with one seed; the result, a dict that JSON takes."""
    start, stage = time.process_time(), Ablation(row, seed, steps)
    losses = train(stage)
    seconds = round(time.process_time() - start, 1)
    return {
        "seed": seed, "learn": stage.model.num_parameters(trainable_only=True),
        **examine(stage.model, fresh_pool(stage), samples),
        "losses": [round(x, 4) for x in losses[9::10]], "processor_seconds": seconds,
    }  # fmt: skip


def measure(seeds, steps, samples=400, jobs=1):
    """Every row with every seed, `jobs` at a time -> {row: [result of each seed]}."""
    tasks = [(seed, row, steps, samples) for seed in range(seeds) for row in CONFIGS]
    rows = {row: [] for row in CONFIGS}
    columns = zip(*tasks)
    results = map(run_one, *columns) if jobs == 1 else in_processes(jobs, run_one, *columns)
    for (seed, row, *_), result in zip(tasks, results):
        rows[row].append(result)
        print(f"seed {seed}  {row:<20} caption {result['caption']:.2f}, 4-way after 16 shots "
              f"{result['4-way, 16 shots']:.2f}", flush=True)  # fmt: skip
    return rows


COMMAND = "python -m miniflamingo.course.ablations"


def parser():
    """The command line's grammar."""
    top = Parser(prog=COMMAND, description=__doc__)
    runs = "runs of each row, seeds 0, 1, ..."
    top.add_argument("--seeds", type=whole(1, 1000), default=3, help=runs)
    top.add_argument("--steps", type=whole(1, 10**6), default=300)
    samples = "questions of each kind"
    top.add_argument("--samples", type=whole(1, 10**4), default=400, help=samples)
    top.add_argument("--jobs", type=whole(1, 61), default=1, help="processes")
    top.add_argument("--out", type=a_path, default=DATA, help="a file, in a folder that exists")
    return top


def main(argv=None):
    """Run the command; returns the exit code."""
    return run_command("miniflamingo.course.ablations", lambda: run(parser().parse_args(argv)))


def run(given):
    """Run the parsed command; returns the exit code."""
    given.out.parent.mkdir(parents=True, exist_ok=True)
    outputs.check_file(given.out, COMMAND, "--out")
    rows = measure(given.seeds, given.steps, given.samples, given.jobs)
    config = asdict(Ablation("baseline", steps=given.steps).config)
    about = {
        "made_by": COMMAND,
        "command": f"{COMMAND} --seeds {given.seeds} --steps {given.steps} "
                   f"--samples {given.samples}",
        "date": date.today().isoformat(), "samples": given.samples, "steps": given.steps,
        "python": platform.python_version(), "numpy": np.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "config": {k: config[k] for k in ("optimiser", "weights", "batches", "pool_per_class")},
    }  # fmt: skip
    text = json.dumps({"about": about, "rows": rows}, indent=1)
    outputs.write_file(given.out, text.encode(), COMMAND, "--out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
