"""Model cards: what a trained model is, from which command, and what it reached.

`ship` turns the folders of the three training runs into what the package carries: for each stage
its weights and a card.md, and for the bridged model also the history of its gates, its figures, and
those of the same training from other seeds.
"""

import json
import os
import platform
import shutil
import sys
from datetime import date
from pathlib import Path

import numpy as np

from miniflamingo.demo import read_alphas
from miniflamingo.evaluation import TEST_SEED, probe, table
from miniflamingo.module import load_tensors, write_atomically
from miniflamingo.training import load_flamingo

ABOUT = {
    "lm": (
        "Language model",
        "Text of a small world: captions, questions, and binding episodes with invented names, "
        "drawn anew for every batch (miniflamingo/worlds/grammar.py).",
    ),
    "vision": (
        "Vision encoder",
        "Pictures of coloured shapes and handwritten digits with captions, drawn anew for every "
        "batch (miniflamingo/worlds/shapes.py). Digits: Alpaydin and Kaynak, Optical Recognition "
        "of Handwritten Digits, UCI Machine Learning Repository, 1998, CC BY 4.0.",
    ),
    "flamingo": (
        "Bridged model",
        "Interleaved documents of 5 pictures, captions, captions of two objects, and clips "
        "(miniflamingo/worlds/datasets.py). A quarter of the combinations of colour and shape, and "
        "the digits 7, 8 and 9, are never shown. The language model and the vision encoder are "
        "frozen.",
    ),
}

# what is quoted first: where it stands in the metrics
HEADLINES = {
    "8-way at 32 shots": ("few_shot", "binding_8way", "32"),
    "8-way at 32 shots, combinations held out": ("few_shot", "binding_8way_held_out", "32"),
    "4-way at 32 shots, by shape alone": ("few_shot", "shape_4way", "32"),
    "3-way at 8 shots, digits never seen": ("few_shot", "digits_3way_unseen", "8"),
    "captions": ("captions", "seen", "accuracy"),
    "captions, combinations held out": ("captions", "held_out", "accuracy"),
    "questions about colour": ("questions", "color", "accuracy"),
    "questions about shape": ("questions", "shape", "accuracy"),
    "questions about size": ("questions", "size", "accuracy"),
    "questions about one of two objects": ("questions", "two_objects", "accuracy"),
    "direction of motion": ("motion", "direction", "accuracy"),
    "skill of the language model that is left": ("text_only", "binding_8way_32", "kept"),
}


def headlines(metrics):
    """{name: float} of the figures that are quoted first."""
    return {name: metrics[a][b][c] for name, (a, b, c) in HEADLINES.items()}


def summary(seeds):
    """Yield the rows of a Markdown table from {seed: headlines}: median, lowest and highest."""
    for name in HEADLINES:
        values = sorted(figures[name] for figures in seeds.values())
        yield f"| {name} | {np.median(values):.3f} | {values[0]:.3f} to {values[-1]:.3f} |"


def record_run(out, seconds):
    """Write run.json beside a finished run: command, processor time, versions, machine, date."""
    words = ["python", "-m", "miniflamingo", *sys.argv[1:]]
    about = {
        "command": " ".join(words),
        "processor_seconds": round(seconds, 1),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
    }
    write_atomically(Path(out) / "run.json", json.dumps(about, indent=1).encode())


def ship(runs, to):
    """Copy the models of the first folder of `runs` to the folder `to`, with their cards.

    runs: folders of one training from several seeds, each with the runs lm, vision and flamingo,
    the last one with the metrics.json of its evaluation. ValueError when one is not finished.
    """
    runs, to = [Path(run) for run in runs], Path(to)
    needed = [Path(stage) / name for stage in ABOUT for name in
              ("model.safetensors", "checkpoint.safetensors", "run.json", "log.jsonl")]  # fmt: skip
    needed.append(Path("flamingo") / "metrics.json")
    paths = [run / path for run in runs for path in needed]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise ValueError(f"these files of the runs are missing: {', '.join(missing)}")
    metrics = [json.loads((run / "flamingo" / "metrics.json").read_text("utf-8")) for run in runs]
    model = load_flamingo(runs[0] / "flamingo" / "model.safetensors")
    figures = {
        "lm": [_text_only(metrics[0], "lm")],
        "vision": _probed(probe(model.vision_encoder)),
        "flamingo": [*table(metrics[0]), _gates(metrics[0]["alpha"])],
    }
    for stage in ABOUT:
        own = to / stage
        own.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(runs[0] / stage / "model.safetensors", own / "model.safetensors")
        write_atomically(own / "card.md", card(stage, runs[0] / stage, figures[stage]).encode())
    history = {
        "alphas.json": read_alphas(runs[0] / "flamingo" / "log.jsonl"),
        "metrics.json": metrics[0],
        "seeds.json": {run.name: headlines(m) for run, m in zip(runs, metrics)},
    }
    for name, values in history.items():
        write_atomically(to / "flamingo" / name, json.dumps(values).encode())


def card(stage, run, figures):
    """The model card of a finished run, as Markdown; figures: lines of text."""
    title, data = ABOUT[stage]
    about = json.loads((run / "run.json").read_text("utf-8"))
    tensors = load_tensors(run / "model.safetensors")[0]
    config = json.loads(load_tensors(run / "checkpoint.safetensors")[1]["config"])
    last = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()[-50:]]
    loss = np.mean([record["loss"] for record in last])
    rows = {
        "command": f"`{about['command']}`",
        "data": data,
        "parameters": f"{sum(x.size for x in tensors.values()):,}, float32",
        "steps": last[-1]["step"],
        "seed": config["seed"],
        "last loss": f"{loss:.4f}, mean of {len(last)} steps",
        "processor time": f"{about['processor_seconds']} s",
        "made with": f"Python {about['python']}, NumPy {about['numpy']}; {about['machine']}; "
        f"{about['date']}",
    }
    body = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"# {title}\n\n| | |\n|---|---|\n{body}\n\n```\n" + "\n".join(figures) + "\n```\n"


def _text_only(metrics, side):
    parts = [f"{name.replace('_', ' ')} shots: {values[side]['accuracy']:.3f}"
             for name, values in metrics["text_only"].items()]  # fmt: skip
    return f"text alone, fresh episodes (seed {metrics['seed']}): " + ", ".join(parts)


def _probed(figures):
    yield f"read off the mean features by a linear map, fresh pictures (seed {TEST_SEED}):"
    for kind, values in figures.items():
        low, high = values["interval"]
        yield f"{kind:<6} {values['accuracy']:.3f}  ({low:.3f} to {high:.3f})"


def _gates(alphas):
    parts = [f"{n.removeprefix('alpha_')} " + " ".join(f"{abs(np.tanh(a)):.3f}" for a in values)
             for n, values in alphas.items()]  # fmt: skip
    return "gates |tanh(alpha)|, layer by layer: " + "; ".join(parts)
