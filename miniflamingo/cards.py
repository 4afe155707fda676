"""Model cards: what a trained model is, from which command, and what it reached.

`ship` turns the folders of the three training runs into what the package carries: for each stage
its weights and a card.md, and for the bridged model also the history of its gates, its figures, and
those of the same training from other seeds.
"""

import json
import os
import platform
import shlex
import shutil
import sys
from datetime import date
from pathlib import Path

import numpy as np

from miniflamingo import outputs
from miniflamingo.command import some
from miniflamingo.demo import read_alphas
from miniflamingo.evaluation import TEST_SEED, probe, table
from miniflamingo.module import load_tensors, write_atomically
from miniflamingo.runs import differences, file_digest
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


def record_run(out, seconds, parts=()):
    """Write run.json beside a finished run: command, processor time, versions, machine, date.

    seconds is the processor time of all parts of a run that was resumed (see runs.Costs), and the
    command that of the first.
    """
    command = shlex.join(["python", "-m", "miniflamingo", *sys.argv[1:]])
    about = {
        "command": parts[0]["command"] if parts else command,
        "parts": list(parts),
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
    the last one with the metrics.json of its evaluation. The set in `to` is replaced as a whole,
    see outputs.staged. ValueError when a run is not finished or damaged, does not belong to the
    others, or has the metrics of another checkpoint; or when `to` holds anything that `ship` has
    not put there.
    """
    runs, to = [Path(run) for run in runs], Path(os.path.abspath(to))
    check_names(runs)
    metrics = [check_run(run) for run in runs]
    check_together(runs, metrics)
    with outputs.staged(to.parent, "ship", [to.name], "--to") as new:
        try:
            write_set(runs, metrics, new / to.name)
        except KeyError as error:
            raise ValueError(f"{runs[0]}: a file of the runs lacks {error}") from None


def write_set(runs, metrics, folder):
    """Write what `ship` ships into a new folder, and read its model once."""
    for stage in ABOUT:
        (folder / stage).mkdir(parents=True)
        shutil.copyfile(runs[0] / stage / MODEL, folder / stage / MODEL)
    model = load_flamingo(folder / "flamingo" / MODEL)
    figures = {
        "lm": [_text_only(metrics[0], "lm")],
        "vision": _probed(probe(model.vision_encoder)),
        "flamingo": [*table(metrics[0]), _gates(metrics[0]["alpha"])],
    }
    for stage, lines in figures.items():
        text = card(stage, runs[0] / stage, lines)
        (folder / stage / "card.md").write_text(text, encoding="utf-8")
    history = {
        "alphas.json": read_alphas(runs[0] / "flamingo" / "log.jsonl"),
        "metrics.json": metrics[0],
        "seeds.json": {run.name: headlines(m) for run, m in zip(runs, metrics)},
    }
    for name, values in history.items():
        (folder / "flamingo" / name).write_text(json.dumps(values), "utf-8")


# --- what may be shipped --------------------------------------------------------------------------

MODEL = "model.safetensors"


def check_names(runs):
    """ValueError when a file is missing, or two folders have one name."""
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"expected runs in folders of different names, got twice: {some(twice)}")
    needed = [Path(stage) / name for stage in ABOUT for name in
              (MODEL, "checkpoint.safetensors", "run.json", "log.jsonl")]  # fmt: skip
    needed.append(Path("flamingo") / "metrics.json")
    paths = [run / path for run in runs for path in needed]
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(f"these files of the runs are missing: {some(missing)}")


def check_run(run):
    """Look through one folder of runs -> the metrics of its bridged model; ValueError, see ship."""
    for stage in ABOUT:
        check_finished(stage, run / stage)
    frozen = read_config(run / "flamingo").get("frozen", {})
    for part, checksum in frozen.items():
        if checksum != file_digest(run / part / MODEL):
            raise ValueError(f"{run}: the bridge was not trained on the {part} beside it")
    model, path = load_flamingo(run / "flamingo" / MODEL), run / "flamingo" / "metrics.json"
    metrics = read_json(path.read_text("utf-8"), path)
    try:
        headlines(metrics)
        own = metrics["alpha"] == model.alphas()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected what evaluate writes, got no {error}") from None
    checksum = file_digest(run / "flamingo" / MODEL)
    if not own or metrics.get("checkpoint", checksum) != checksum:
        raise ValueError(f"{path} is of another checkpoint: evaluate this one again")
    return metrics


def check_finished(stage, run):
    """ValueError unless the folder holds a finished run of this stage, undamaged."""
    config, path = read_config(run), run / "log.jsonl"
    if config.get("stage") != stage:
        raise ValueError(f"{run}: expected a run of the stage {stage}, got {config.get('stage')}")
    read_json((run / "run.json").read_text("utf-8"), run / "run.json")
    state, about = load_tensors(run / "checkpoint.safetensors")
    last = read_json((path.read_text("utf-8").splitlines() or ["null"])[-1], path).get("step")
    for step in (int(about["step"]), last):
        if step != config["optimiser"]["steps"]:
            raise ValueError(
                f"{run}: the run is not finished: step {step} of {config['optimiser']['steps']}"
            )
    for name, tensor in load_tensors(run / MODEL)[0].items():
        inside = "vision_encoder." * (stage == "vision") + name
        if inside not in state or not np.array_equal(state[inside], tensor):
            raise ValueError(f"{run / MODEL} is not of the checkpoint beside it: {name} differs")


def check_together(runs, metrics):
    """ValueError unless the runs differ in their seeds alone, and were asked the same."""
    for stage in ABOUT:
        configs = [read_config(run / stage) for run in runs]
        for config in configs:
            config.pop("frozen", None)
        seeds = [config.pop("seed") for config in configs]
        for run, config in zip(runs, configs):
            if different := list(differences(config, configs[0])):
                raise ValueError(
                    f"{run / stage} has another config than {runs[0] / stage}: "
                    + some(different, "; ")
                )
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"expected {stage} runs of different seeds, got the seeds {seeds}")
    for run, own in zip(runs, metrics):
        for name in ("samples", "seed"):
            if own.get(name) != metrics[0].get(name):
                raise ValueError(f"{run}: its evaluation has another {name} than the first run's")


def read_config(run):
    """The config in a run's checkpoint, a dict."""
    path = run / "checkpoint.safetensors"
    config = read_json(load_tensors(path)[1].get("config", "null"), path)
    if missing := {"stage", "seed", "optimiser"} - config.keys():
        raise ValueError(f"{path}: its config lacks {some(sorted(missing))}")
    return config


def read_json(text, path):
    """A JSON object -> dict; ValueError that names the file."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {text[:40]!r}")
    return values


# --- a card ---------------------------------------------------------------------------------------


def card(stage, run, figures):
    """The model card of a finished run, as Markdown; figures: lines of text."""
    title, data = ABOUT[stage]
    about = json.loads((run / "run.json").read_text("utf-8"))
    tensors = load_tensors(run / "model.safetensors")[0]
    config = json.loads(load_tensors(run / "checkpoint.safetensors")[1]["config"])
    last = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()[-50:]]
    loss = np.mean([record["loss"] for record in last])
    parts = len(about.get("parts", ()))
    rows = {
        "command": f"`{about['command']}`",
        "data": data,
        "parameters": f"{sum(x.size for x in tensors.values()):,}, float32",
        "steps": last[-1]["step"],
        "seed": config["seed"],
        "last loss": f"{loss:.4f}, mean of {len(last)} steps",
        "processor time": f"{about['processor_seconds']} s" + f", in {parts} parts" * (parts > 1),
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
