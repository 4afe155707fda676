"""The figures of `fewshot` as tables and curves; each beside its ceiling and its baselines.

A cell's value is the median of the training seeds; the two intervals are Wilson's over episodes
(95 %, of the median seed, or from the lowest to the highest of the two in the middle) and the range
of the seeds. Committed data:

    figures                       never-seen classes, split "test"
    classes, burstiness, shots    what makes them learnable, split "validation": one cell a setting
    both                          one model of glyphs, shapes, questions and clips, split "test"
"""

import json
from pathlib import Path

import numpy as np

from miniflamingo import outputs
from miniflamingo.fewshot.measure import AIMS

COMMITTED = {name: Path(__file__).with_name(f"{name}.json")
             for name in ("figures", "classes", "burstiness", "shots", "both")}  # fmt: skip
RESULTS = COMMITTED["figures"]
SHIPPED = Path(__file__).parents[1] / "weights" / "flamingo" / "metrics.json"
README = Path(__file__).with_name("README.md")
LABELS = {
    "classes": "classes that the bridge learns of",
    "burstiness": "share of documents that show a class again",
    "shots": "shots of the language model's episodes",
}
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
        raise ValueError(f"no figures at {path}: not a file, nor one of {', '.join(COMMITTED)}")
    try:
        document = json.loads(path.read_text("utf-8"))
    except ValueError:
        document = None
    if not _is_known(document):
        raise ValueError(f"{path}: expected a file of fewshot measure or experiment")
    return document


def _is_known(document):
    """Whether this is of `measure` or `experiment`, and holds something."""
    if not isinstance(document, dict):
        return False
    if "cells" in document:
        return document.get("experiment") in LABELS and bool(document["cells"])
    runs = document.get("runs")
    return "split" in document and isinstance(runs, dict) and bool(runs)


def median(figures):
    """Figures of one question from several seeds -> the median's, with their "range" and how many
    "seeds" they are."""
    ordered = sorted(figures, key=lambda f: f["accuracy"])
    each = [f["accuracy"] for f in ordered]
    lower, upper = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    known = [name for name in BESIDE if name in lower]  # the small world has fewer
    beside = {name: float(np.median([f[name] for f in figures])) for name in known}
    return lower | beside | {
        "accuracy": float(np.median(each)), "range": (each[0], each[-1]), "seeds": len(each),
        "interval": (lower["interval"][0], upper["interval"][1]),
    }  # fmt: skip


def lines(document, quoted=False):
    """The lines of a document's Markdown table; quoted: of `measure` what is quoted first alone."""
    if "cells" in document:
        return list(settings_table(document))
    if not all("shapes" in run for run in document["runs"].values()):
        return list(table(document, AIMS if quoted else None))
    beside = both_table(document, read(RESULTS), json.loads(SHIPPED.read_text("utf-8")))
    return list(beside) if quoted else [*table(document), "", *beside]


def rows_of(document):
    """{group: [{task: {shots: figures}} of each seed]} of `measure`."""
    rows = {}
    for run in document["runs"].values():
        for group, tasks in run["groups"].items():
            rows.setdefault(group, []).append(tasks)
    return rows


def table(document, asked=None):
    """Yield the lines of a Markdown table of `measure`: a row for each group and question; asked:
    only these (task, shots), such as measure.AIMS."""
    rows = rows_of(document)
    seeds = max(map(len, rows.values()), default=0)
    head = [f"{document['split']}, seeds: {seeds}", "question", "shots", "accuracy"]
    yield "| " + " | ".join([*head, *BESIDE.values(), "of the tokens'"]) + " |"
    yield "|---" * (5 + len(BESIDE)) + "|"
    for row, each in rows.items():
        for task, shots in each[0].items():
            for k in shots:
                if asked and (task, k) not in asked:
                    continue
                yield _line(row, task, k, median([tasks[task][k] for tasks in each]))


def settings_table(document):
    """Yield the lines of a Markdown table of `experiment`: a row for each setting and group; in
    brackets the range of the seeds, or of one seed Wilson's interval over episodes."""
    found = curves(document)
    head = [LABELS[document["experiment"]], "seeds", "asked of", *found]
    rules = [f"nearest mean of the visual tokens: {question}" for question in found]
    yield "| " + " | ".join([*head, *rules]) + " |"
    yield "|---" * (3 + 2 * len(found)) + "|"
    panels = list(found.values())
    for setting in panels[0]["letters"]:
        for group in panels[0]:
            each = [panel[group][setting] for panel in panels]
            cells = [_spread(f) for f in each]
            cells += [f"{f['nearest_tokens']:.3f}" for f in each]
            yield f"| {setting} | {each[0]['seeds']} | {group} | {' | '.join(cells)} |"
    for name in ("ceiling", "chance", "blind"):  # the same episodes are asked in every setting
        each = [next(iter(panel["letters"].values()))[name] for panel in panels]
        yield f"| {name} | | letters | {' | '.join(f'{x:.3f}' for x in each)} |{' |' * len(each)}"


def _spread(figure):
    low, high = figure["range" if figure["seeds"] > 1 else "interval"]
    return f"{figure['accuracy']:.3f} ({low:.3f} to {high:.3f})"


# what is quoted of the small world's own examination, and where it stands in its metrics
SHAPES = {
    "8-way binding, 16 shots": ("few_shot_details", "binding_8way", "16"),
    "4-way binding, 8 shots": ("few_shot_details", "binding_4way", "8"),
    "3-way, unseen handwritten digits, 8 shots": ("few_shot_details", "digits_3way_unseen", "8"),
    "3-way, unseen handwritten digits, 32 shots": ("few_shot_details", "digits_3way_unseen", "32"),
    "captions": ("captions", "seen"),
    "captions, colour and shape never seen together": ("captions", "held_out"),
    "captions of two objects": ("captions", "two_objects"),
    "question: what color?": ("questions", "color"),
    "question: what color, never seen with this shape?": ("questions", "color_held_out"),
    "question about one of two objects": ("questions", "two_objects"),
    "question about one of two, never seen so": ("questions", "two_objects_held_out"),
    "motion": ("motion", "direction"),
}


def both_table(document, alone, shipped):
    """Yield the lines of a Markdown table: models that have learned of both worlds beside those of
    one each; in brackets the range of the seeds, or of one seed Wilson's interval over questions.

    alone: the document of `measure`, shipped: the metrics of `evaluate`.
    """
    runs, own = document["runs"].values(), alone["runs"].values()
    own_split = alone["split"]
    yield f"| {document['split']} | of both | seeds | of one world alone, {own_split} | seeds |"
    yield "|---" * 5 + "|"
    for group in ("letters", "symbols"):
        for task, k in AIMS:
            pair = [[run["groups"][group][task][k] for run in each] for each in (runs, own)]
            yield _beside(f"{group}, {task}, {k} shots", *pair)
    for question, path in SHAPES.items():
        yield _beside(f"shapes: {question}", [_at(run["shapes"], path) for run in runs],
                      [_at(shipped, path)])  # fmt: skip


def _beside(question, both, alone):
    cells = (f"{_spread(median(figures))} | {len(figures)}" for figures in (both, alone))
    return f"| {question} | {' | '.join(cells)} |"


def _at(metrics, path):
    for name in path:
        metrics = metrics[name]
    return metrics


def write_readme():
    """Put what is quoted of the committed figures into this folder's README."""
    for name, path in COMMITTED.items():
        markers = (f"<!-- {name}: made by `python -m miniflamingo fewshot table --write` -->\n",
                   f"<!-- end of {name} -->\n")  # fmt: skip
        outputs.put_between(README, markers, "\n".join(lines(read(path), quoted=True)) + "\n")


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
