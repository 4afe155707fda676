"""Model cards: what a trained model is, from which command, and what it reached.

`ship` turns the folders of the three training runs into what the package carries: for each stage
its weights and a card.md, and for the bridged model also the history of its gates and its figures.
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
    """Copy the models of runs/lm, runs/vision and runs/flamingo to the folder `to`, with cards.

    ValueError when a run is not finished, or the bridged model has not been evaluated.
    """
    runs, to = Path(runs), Path(to)
    needed = {stage: ["model.safetensors", "run.json", "log.jsonl"] for stage in ABOUT}
    needed["flamingo"].append("metrics.json")
    paths = [runs / stage / name for stage, names in needed.items() for name in names]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise ValueError(f"these files of the runs are missing: {', '.join(missing)}")
    metrics = json.loads((runs / "flamingo" / "metrics.json").read_text())
    model = load_flamingo(runs / "flamingo" / "model.safetensors")
    figures = {
        "lm": [_text_only(metrics, "lm")],
        "vision": _probed(probe(model.vision_encoder)),
        "flamingo": [*table(metrics), _gates(metrics["alpha"])],
    }
    for stage in ABOUT:
        (to / stage).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(runs / stage / "model.safetensors", to / stage / "model.safetensors")
        write_atomically(to / stage / "card.md", card(stage, runs / stage, figures[stage]).encode())
    alphas = json.dumps(read_alphas(runs / "flamingo" / "log.jsonl"))
    write_atomically(to / "flamingo" / "alphas.json", alphas.encode())
    shutil.copyfile(runs / "flamingo" / "metrics.json", to / "flamingo" / "metrics.json")


def card(stage, run, figures):
    """The model card of a finished run, as Markdown; figures: lines of text."""
    title, data = ABOUT[stage]
    about = json.loads((run / "run.json").read_text())
    tensors, metadata = load_tensors(run / "model.safetensors")
    last = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()[-50:]]
    loss = np.mean([record["loss"] for record in last])
    rows = {
        "command": f"`{about['command']}`",
        "data": data,
        "parameters": f"{sum(x.size for x in tensors.values()):,}, float32",
        "steps": last[-1]["step"],
        "seed": metadata.get("seed", "0"),
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
