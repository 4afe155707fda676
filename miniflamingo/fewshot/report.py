"""The figures of `fewshot` as tables and curves; each beside its ceiling and its baselines.

A cell's value is the median of the training seeds; the two intervals are Wilson's over episodes
(95 %, of the median seed's) and the range of the seeds.
"""

import json
from pathlib import Path

import numpy as np

from miniflamingo import outputs
from miniflamingo.fewshot.measure import AIMS

RESULTS = Path(__file__).with_name("figures.json")
README = Path(__file__).with_name("README.md")
MARKERS = ("<!-- fewshot: made by `python -m miniflamingo fewshot table --write` -->\n",
           "<!-- end of fewshot -->")  # fmt: skip
BESIDE = {
    "given_shown": "given that it was shown",
    "ceiling": "ceiling",
    "chance": "chance",
    "blind": "blind",
    "nearest_tokens": "nearest mean of the visual tokens",
    "nearest_eye": "nearest mean of the eye",
}


def read(path):
    """A file of `measure` or `experiment` -> dict; ValueError for any other."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no figures at {path}")
    try:
        document = json.loads(path.read_text("utf-8"))
        known = "runs" in document or "cells" in document
    except (ValueError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{path}: expected a file of fewshot measure or experiment")
    return document


def median(figures):
    """Figures of one question from several seeds -> the median seed's, with their "range"."""
    ordered = sorted(figures, key=lambda f: f["accuracy"])
    each = [f["accuracy"] for f in ordered]
    middle = ordered[(len(ordered) - 1) // 2]
    beside = {name: float(np.median([f[name] for f in figures])) for name in BESIDE}
    return middle | beside | {"accuracy": float(np.median(each)), "range": (each[0], each[-1])}


def rows_of(document):
    """{row: [{group: figures} of each seed]}: the groups of `measure`, the settings of an
    experiment and group."""
    rows = {}
    if "cells" not in document:
        for run in document["runs"].values():
            for group, tasks in run["groups"].items():
                rows.setdefault(group, []).append(tasks)
        return rows
    for cell in document["cells"]:
        for group, tasks in cell["figures"].items():
            rows.setdefault(f"{cell['setting']}: {group}", []).append(tasks)
    return rows


def table(document, asked=None):
    """Yield the lines of a Markdown table: a row for each group, setting and question; asked: only
    these (task, shots), such as measure.AIMS."""
    rows = rows_of(document)
    seeds = max(map(len, rows.values()), default=0)
    split = document.get("split", "validation")
    head = [f"{split}, seeds: {seeds}", "question", "shots", "accuracy", *BESIDE.values()]
    yield "| " + " | ".join([*head, "of the tokens'"]) + " |"
    yield "|---" * (5 + len(BESIDE)) + "|"
    for row, each in rows.items():
        for task, shots in each[0].items():
            for k in shots:
                if asked and (task, k) not in asked:
                    continue
                yield _line(row, task, k, median([tasks[task][k] for tasks in each]))


def write_readme(document):
    """Put what is quoted first of the committed figures into this folder's README."""
    outputs.put_between(README, MARKERS, "\n".join(table(document, AIMS)) + "\n")


def _line(row, task, k, f):
    low, high = f["interval"]
    least, most = f["range"]
    value = f"{f['accuracy']:.3f} ({low:.3f} to {high:.3f}; seeds {least:.3f} to {most:.3f})"
    beside = "".join(f"| {f[name]:.3f} " for name in BESIDE)
    share = f["accuracy"] / max(f["nearest_tokens"], 1e-9)
    return f"| {row} | {task} | {k} | {value} {beside}| {share:.2f} |"


def by_shots(document, groups=("letters", "symbols")):
    """What plots.plot_never_seen draws of a measurement: {task: {group: {shots: figure}}}, of tasks
    with several numbers of shots; ValueError for a file of another kind."""
    if "runs" not in document:
        raise ValueError("expected a file of fewshot measure, got one of experiment")
    rows = rows_of(document)
    groups = [group for group in groups if group in rows] or list(rows)
    tasks = [task for task, shots in rows[groups[0]][0].items() if len(shots) > 1]
    return {task: {group: {k: median([run[task][k] for run in rows[group]])
                           for k in rows[group][0][task]} for group in groups}
            for task in tasks}  # fmt: skip


def curves(document, groups=("letters", "symbols", "seen")):
    """What plots.fewshot.plot_settings draws of an experiment: {question: {group: {setting:
    figure}}}; ValueError for a file of another kind."""
    if "cells" not in document:
        raise ValueError("expected a file of fewshot experiment, got one of measure")
    found = {}
    for task, k in AIMS:
        for cell in document["cells"]:
            for group in groups:
                place = found.setdefault(f"{task}, {k} shots", {}).setdefault(group, {})
                place.setdefault(cell["setting"], []).append(cell["figures"][group][task][k])
    return {task: {group: {setting: median(each) for setting, each in of.items()}
                   for group, of in groups.items()} for task, groups in found.items()}  # fmt: skip
