"""`python -m miniflamingo ablate`: train the rows, ask them, and say what can be told.

Without --run: the committed figures, of the named rows beside their baselines. With it, a row that
is trained is not trained again, and one that was stopped goes on; figures come from all that is
there, of every row.
"""

import io
import json
import shlex
import time
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import numpy as np
from tqdm import tqdm

from miniflamingo import outputs, plots, training
from miniflamingo.ablations.rows import ALL, ROWS, STABILITY, STEPS, baseline_of, config
from miniflamingo.ablations.stage import CHANCE, TASKS, Ablation, Examiner, folder_of
from miniflamingo.command import Parser, a_path, exclude, in_processes, require, whole
from miniflamingo.module import write_atomically
from miniflamingo.runs import seconds as processor_seconds

COMMAND = "python -m miniflamingo ablate"
README = Path(__file__).with_name("README.md")
RESULTS = {False: Path(__file__).with_name("results.json"),
           True: Path(__file__).with_name("stability.json")}  # fmt: skip
QUOTED = {"rows": RESULTS[False], "longer": Path(__file__).with_name("longer.json"),
          "stability": RESULTS[True]}  # fmt: skip
DEFAULTS = {"seeds": 5, "steps": STEPS, "samples": 2000, "jobs": 2, "torch": False}
FIGURES = "figures.json"  # of one row and seed, beside its model


def parser():
    """The command line's grammar."""
    top = Parser(prog=COMMAND, description=__doc__)
    text = "all by default: " + ", ".join(ROWS)
    top.add_argument("rows", nargs="*", metavar="ROW", help=text)
    text = "with and without the gate, at several depths and rates, in the place of the rows"
    top.add_argument("--stability", action="store_true", help=text)
    top.add_argument("--run", type=a_path, help="folder of the trainings")
    for name, most, text in (
        ("seeds", 1000, "trainings of a row"), ("steps", 10**6, "of a training"),
        ("samples", 10**5, "questions of a kind"), ("jobs", 61, "processes, of a core each"),
    ):  # fmt: skip
        text += f", {DEFAULTS[name]} by default"
        top.add_argument(f"--{name}", type=whole(1, most), help=text)
    text = "gradients by torch, faster, for the rows that it has"
    top.add_argument("--torch", action="store_true", default=None, help=text)
    top.add_argument("--json", type=a_path, help="write the figures to this file")
    top.add_argument("--plot", type=a_path, help="draw every run of every row into this PNG file")
    text = "put the committed tables into miniflamingo/ablations/README.md, and train nothing"
    top.add_argument("--write", action="store_true", help=text)
    return top


def run(argv):
    """Parse and run the command; returns the exit code."""
    given = parser().parse_args(argv)
    family = STABILITY if given.stability else ROWS
    if unknown := [row for row in given.rows if row not in family]:
        raise ValueError(f"ROW must be one of {', '.join(family)}, got {unknown[0]!r}")
    exclude(given, *(("--write", other) for other in ("--run", "--json", "--plot")))
    for name in DEFAULTS if given.run is None else ():
        if getattr(given, name) is not None:
            raise ValueError(f"--{name}: expected a folder to train in, too, got no --run")
    for name, default in DEFAULTS.items():
        setattr(given, name, getattr(given, name) or default)
    if given.write:
        return write_readme()
    outputs.check_file(given.json, COMMAND)
    outputs.check_file(given.plot, COMMAND, "--plot")
    rows = given.rows or list(family)
    rows = sorted({*rows, *filter(None, map(baseline_of, rows))}, key=list(family).index)
    if given.run is None:
        document = committed(given.stability)
        for what in ("rows", "compared"):
            document[what] = {row: document[what][row] for row in rows if row in document[what]}
    else:
        require("scipy", *["torch"] * given.torch)
        if not all(prepare(given.run, {ALL[row].depth for row in rows}, given.torch)):
            return 130  # as after Ctrl-C
        measure(given, rows)
        document = collect(given, family)
    if given.json:
        outputs.write_file(given.json, json.dumps(document, indent=1).encode(), COMMAND)
    return report(document, given.stability, given.plot)


def committed(stability=False):
    """The committed figures, of the rows or of their stability; ValueError where there are none."""
    path = RESULTS[stability]
    if not path.is_file():
        raise ValueError(f"--run: expected a folder to train in: there is no {path.name} yet")
    return json.loads(path.read_text("utf-8"))


def lines_of(document, stability):
    """The lines of a document's table."""
    return "\n".join((stability_table if stability else table)(document))


def write_readme():
    """Put the tables of the committed figures into this folder's README; returns the exit code."""
    for name, path in QUOTED.items():
        if path.is_file():
            markers = (
                f"<!-- {name}: made by `{COMMAND} --write` -->\n", f"<!-- end of {name} -->\n"
            )  # fmt: skip
            text = lines_of(json.loads(path.read_text("utf-8")), name == "stability")
            outputs.put_between(README, markers, text + "\n")
    return 0


def report(document, stability, png):
    """Print the table and draw the picture; returns the exit code."""
    print(lines_of(document, stability))
    if png:
        data = io.BytesIO()
        draw(document).savefig(data, format="png", metadata={"made_by": COMMAND})
        outputs.write_file(png, data.getvalue(), COMMAND, "--plot")
    return 0


def draw(document):
    """Every run of every row, a panel for each of TASKS and the overall score."""
    panels = {task: {row: [one[task] for one in runs] for row, runs in document["rows"].items()}
              for task in (*TASKS, "overall")}  # fmt: skip
    marks = {task: {"chance": CHANCE[task]} for task in TASKS}
    marks["4-way, 16 shots"] = {"chance, copier": CHANCE["4-way, 16 shots"]}
    reference = "baseline" if "baseline" in document["rows"] else None
    return plots.plot_dots(panels, reference, xlabel="share right", limits=(0, 1), marks=marks)


# --- training -------------------------------------------------------------------------------------


def parts(run, depths):
    """{folder: what makes its Stage} of the frozen parts: the shipped recipe's language model of so
    many blocks, and an encoder that has seen clutter."""
    clutter = config("baseline", 0).clutter
    found = {run / "parts" / "vision": lambda: training.VisionStage(
        training.VisionRun(clutter=clutter))}  # fmt: skip
    for depth in sorted(depths):
        model = replace(training.MINI_LM, depth=depth)
        found[run / "parts" / f"lm{depth}"] = lambda model=model: training.LanguageStage(
            training.LanguageRun(model=model)
        )
    return found


def gradients(stage, torch):
    """The stage, with torch's gradients if they are wanted -> it, and whose gradients it has."""
    if not torch:
        return stage, "NumPy"
    return import_module("miniflamingo.kernels.model.small").in_torch(stage), "torch"


def prepare(run, depths, torch=False):
    """Train the frozen parts where they are missing; yields whether each was finished."""
    for folder, stage in parts(Path(run), depths).items():
        outputs.check_folder(folder)
        yield training.finish(gradients(stage(), torch)[0], folder) is not None


def one(run, row, seed, steps, samples, torch=False):
    """Train and ask a row of one seed, unless that is done; call it in a process of its own.
    ValueError where the folder has a training of other steps."""
    folder, start = folder_of(run, row, seed), time.process_time()
    wanted = {"steps": steps, "samples": samples}
    if (folder / FIGURES).is_file():
        found = json.loads((folder / FIGURES).read_text("utf-8"))
        if {name: found[name] for name in wanted} == wanted:
            return row, seed
    stage = Ablation(row, Path(run) / "parts", seed, steps)
    stage, whose = gradients(stage, torch and stage.has_twin)
    try:
        parts, broke = training.finish(stage, folder, progress=False), False
        if parts is None:
            return row, seed  # interrupted: nothing to ask yet
        stage.model.load_state_dict(training.load_tensors(folder / training.MODEL)[0])
        seconds = processor_seconds(parts)
    except FloatingPointError:  # that is a result, too
        broke, seconds = True, time.process_time() - start
    log = (folder / "log.jsonl").read_text("utf-8")
    losses = [json.loads(line)["loss"] for line in log.splitlines()]
    asked = dict.fromkeys([*CHANCE, "overall"], 0.0) if broke else Examiner(stage, samples).ask()
    found = asked | {
        "row": row, "seed": seed, **wanted, "seconds": round(seconds, 1),
        "gradients": whose,
        "learn": stage.model.num_parameters(trainable_only=True), "broke": broke,
        "spikes": spikes(losses), "losses": [round(loss, 4) for loss in losses[9::10]],
        "alphas": stage.model.alphas(),
    }  # fmt: skip
    write_atomically(folder / FIGURES, json.dumps(found).encode())
    return row, seed


def spikes(losses, window=20):
    """How many steps have a loss above twice the median of those before them, at most `window`."""
    before = [np.median(losses[max(0, i - window) : i]) for i in range(window, len(losses))]
    return int(np.sum(np.array(losses[window:]) > 2 * np.array(before)))


def measure(given, rows):
    """Train and ask what is asked for, `jobs` at a time."""
    tasks = [(str(given.run), row, seed, given.steps, given.samples, given.torch)
             for seed in range(given.seeds) for row in rows]  # fmt: skip
    for folder in {folder_of(*task[:3]) for task in tasks}:
        outputs.check_folder(folder)
    bar = tqdm(total=len(tasks), desc="rows")
    for row, seed in in_processes(given.jobs, one, *zip(*tasks), method="spawn"):
        bar.set_postfix_str(f"{row}, seed {seed}")
        bar.update()


# --- figures --------------------------------------------------------------------------------------


def collect(given, family):
    """All figures below the folder of the trainings that have these steps and samples."""
    wanted = {"steps": given.steps, "samples": given.samples}
    found = [json.loads(path.read_text("utf-8")) for path in given.run.glob(f"*/*/{FIGURES}")]
    found = [one for one in found if {k: one[k] for k in wanted} == wanted]
    rows = {row: sorted((one for one in found if one["row"] == row), key=lambda one: one["seed"])
            for row in family}  # fmt: skip
    words = [*given.rows, "--run", given.run.name, "--steps", str(given.steps)]
    words += ["--torch"] * given.torch + ["--stability"] * given.stability
    about = {
        "made_by": COMMAND, **outputs.about(), **wanted,
        "command": f"{COMMAND} {shlex.join(words)}",
        "config": asdict(config("baseline", 0, given.steps)),
    }  # fmt: skip
    document = {"about": about, "rows": {row: runs for row, runs in rows.items() if runs}}
    return document | {"compared": compared(document)}


def compared(document):
    """{row: statistics.compare of the overall score, with "adjusted", "paper", "verdict"}, of the
    rows that have two seeds; Holm's family is all of them."""
    from miniflamingo.ablations import statistics

    scores = {row: {one["seed"]: one["overall"] for one in runs}
              for row, runs in document["rows"].items()}  # fmt: skip
    found = {row: statistics.compare(scores[row], scores[base]) for row in scores
             if (base := baseline_of(row)) in scores
             and min(len(scores[row]), len(scores[base])) > 1}  # fmt: skip
    for (row, one), p in zip(found.items(), statistics.holm([one["p"] for one in found.values()])):
        paper = ALL[row].paper
        one |= {"adjusted": p, "paper": paper, "verdict": statistics.verdict(one, p, paper)}
    return found


def table(document):
    """Yield the lines of a Markdown table: means over seeds."""
    about, verdicts = document["about"], document["compared"]
    seeds = sorted({len(runs) for runs in document["rows"].values()})
    yield (f"{about['steps']} steps, {' or '.join(map(str, seeds))} seeds, {about['samples']} "
           f"questions of a kind, {about['date']}; the difference of the overall score to the "
           "baseline, its 95 % interval over seeds, and p after Holm:")  # fmt: skip
    yield ""
    names = [*TASKS, "text", "overall", "difference", "p", "paper, points", "verdict", "learned",
             "s a step"]  # fmt: skip
    yield f"| row | {' | '.join(names)} |"
    yield "|---" * (1 + len(names)) + "|"
    for row, runs in document["rows"].items():
        cells = [f"{np.mean([one[task] for one in runs]):.2f}" for task in (*TASKS, "text")]
        cells += [f"{np.mean([one['overall'] for one in runs]):.3f}", *_cells(verdicts.get(row))]
        second = np.median([one["seconds"] / one["steps"] for one in runs])
        whose = ", ".join(sorted({one["gradients"] for one in runs}))
        cells += [str(runs[0]["learn"]), f"{second:.2f}, {whose}"]
        yield f"| {row} | {' | '.join(cells)} |"
    chance = [f"{CHANCE[task]:.2f}" for task in (*TASKS, "text")]
    overall = np.mean([CHANCE[task] for task in TASKS])
    yield f"| chance | {' | '.join([*chance, f'{overall:.3f}', *[''] * 6])} |"


def _cells(found):
    """Of a row's comparison; a baseline has none."""
    if found is None:
        return [""] * 4
    paper = "" if found["paper"] is None else f"{found['paper']:+.1f}"
    span = f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
    return [span, f"{found['adjusted']:.3f}", paper, found["verdict"]]


def stability_table(document):
    """Yield the lines of a Markdown table: each depth and rate, with the gate and without."""
    about, verdicts = document["about"], document["compared"]
    yield (f"{about['steps']} steps, {about['samples']} questions of a kind, {about['date']}; in "
           "brackets the range over seeds; spikes: steps of twice the usual loss:")  # fmt: skip
    yield ""
    yield ("| blocks, rate | overall, gate | no gate | difference | p | spikes, gate | no gate | "
           "broke, gate | no gate |")  # fmt: skip
    yield "|---" * 9 + "|"
    for row in document["rows"]:
        if (base := baseline_of(row)) not in document["rows"]:
            continue
        pair = document["rows"][base], document["rows"][row]
        spread = [f"{np.mean(x):.2f} ({min(x):.2f} to {max(x):.2f})"
                  for x in ([one["overall"] for one in runs] for runs in pair)]  # fmt: skip
        counts = [f"{np.mean([one['spikes'] for one in runs]):.0f}" for runs in pair]
        broke = [f"{sum(one['broke'] for one in runs)} of {len(runs)}" for runs in pair]
        cells = [base.removesuffix(", gate"), *spread, *_cells(verdicts.get(row))[:2]]
        yield f"| {' | '.join([*cells, *counts, *broke])} |"
