"""`python -m miniflamingo fewshot`: names of glyphs never seen, from a few shots.

    python -m miniflamingo fewshot train runs/glyphs/0 --seed 0
    python -m miniflamingo fewshot measure runs/glyphs/0 --json runs/glyphs/figures.json
    python -m miniflamingo fewshot experiment classes --out runs/glyphs --json classes.json
    python -m miniflamingo fewshot table classes
    python -m miniflamingo fewshot plot classes classes.png

Settings are chosen by --split validation, the default; --split test is for the end.
"""

import json
from importlib import import_module
from io import BytesIO
from pathlib import Path

from tqdm import tqdm

from miniflamingo import outputs, runs, training
from miniflamingo.command import Parser, a_path, require, some, whole
from miniflamingo.evaluation import TEST_SEED, VALIDATION_SEED, Evaluation
from miniflamingo.fewshot import experiments, recipe, report
from miniflamingo.fewshot.measure import Measure
from miniflamingo.worlds.glyph_texts import TOKENIZER

MEASURE = "python -m miniflamingo fewshot measure"
PLOT = "python -m miniflamingo fewshot plot"
SEEDS = whole(0, 2**32 - 1)


def parser():
    """The command line's grammar."""
    top = Parser(prog="python -m miniflamingo fewshot", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="all stages of one seed")
    command.add_argument("run", type=a_path, help="folder of the runs lm, vision, warm, flamingo")
    command.add_argument("--seed", type=SEEDS, default=0)
    text = "shapes, questions and clips are learned, too"
    command.add_argument("--both", action="store_true", help=text)
    _add_torch(command)
    command = commands.add_parser("measure", help="ask trained models")
    command.add_argument("runs", nargs="+", type=a_path, help="folders of `train`, one a seed")
    command.add_argument("--split", choices=("validation", "test", "train"), default="validation")
    command.add_argument("--samples", type=whole(2, 10**5), default=2000, help="episodes a figure")
    text = "ask of shapes, questions and clips, too, as `evaluate` does"
    command.add_argument("--shapes", action="store_true", help=text)
    command.add_argument("--json", type=a_path, help="write the figures to this file")
    _add_experiment(commands.add_parser("experiment", help="what makes it work"))
    command = commands.add_parser("table", help="the figures of a file; the committed ones")
    of = f"a file of `measure` or `experiment`, or what is committed: {', '.join(report.COMMITTED)}"
    command.add_argument("json", type=a_file, nargs="?", help=of)
    text = "put what is quoted of the committed figures into miniflamingo/fewshot/README.md"
    command.add_argument("--write", action="store_true", help=text)
    command = commands.add_parser("plot", help="the figure of a file")
    command.add_argument("json", type=a_file, help=of)
    command.add_argument("png", type=a_path, help="the file to draw")
    return top


def _add_experiment(command):
    command.add_argument("experiment", choices=list(report.LABELS))
    command.add_argument("--out", type=a_path, required=True, help="folder of the runs")
    command.add_argument("--json", type=a_path, required=True, help="file of the figures")
    command.add_argument("--seeds", type=SEEDS, nargs="+", default=[0])
    command.add_argument("--steps", type=whole(1, 10**6), default=500, help="of each bridge")
    command.add_argument("--samples", type=whole(2, 10**5), default=1000, help="episodes a figure")
    _add_torch(command)


def _add_torch(command):
    command.add_argument("--torch", action="store_true", help="gradients by torch, faster")


def run(argv):
    """Parse and run a command; returns the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.command == "train":
        return 0 if train(arguments) else 130  # as after Ctrl-C
    if arguments.command == "experiment":
        done = experiments.run(
            arguments.experiment, arguments.out, arguments.json, arguments.seeds, arguments.steps,
            arguments.samples, _torch(arguments),
        )  # fmt: skip
        return 0 if done else 130
    if arguments.command == "measure":
        measure(arguments)
    elif arguments.command == "table":
        table(arguments)
    else:
        plot(arguments)
    return 0


def a_file(text):
    """The path that a word stands for: what is committed under that name, or a file."""
    return report.COMMITTED.get(text) or a_path(text)


def table(arguments):
    """Print a file's figures, or write the committed ones into the README."""
    if not arguments.write:
        print("\n".join(report.lines(report.read(arguments.json or report.RESULTS))))
    elif arguments.json:
        raise ValueError(f"--write: expected no file, got {arguments.json}")
    else:
        report.write_readme()


def plot(arguments):
    """Draw a measurement or an experiment into a PNG file."""
    from miniflamingo.plots import plot_never_seen, plot_settings  # matplotlib takes its time

    if arguments.png.suffix.lower() != ".png":
        raise ValueError(f"expected a file that ends in .png, got {arguments.png}")
    outputs.check_file(arguments.png, PLOT, "png")
    document = report.read(arguments.json)
    if "experiment" in document:
        figure = plot_settings(report.curves(document), report.LABELS[document["experiment"]])
    else:
        figure = plot_never_seen(report.by_shots(document))
    file, made = BytesIO(), {"made_by": PLOT, "Software": None}
    figure.savefig(file, format="png", dpi=150, metadata=made)
    outputs.write_file(arguments.png, file.getvalue(), PLOT, "png")


def _torch(arguments):
    """What puts torch's gradients into a stage, where they are asked for."""
    if not arguments.torch:
        return None
    require("torch")
    return import_module("miniflamingo.kernels.model.small").in_torch


def train(arguments):
    """All stages, each going on where it was stopped; returns whether all are finished."""
    folders = {}
    for stage, config in recipe.configs(arguments.seed, arguments.both).items():
        folders[stage] = Path(arguments.run) / stage
        made = experiments.build(stage, config, folders)
        if not experiments.finished(made, folders[stage], _torch(arguments)):
            return False
    return True


def measure(arguments):
    """Ask each model, print the table, write the JSON where that is asked for."""
    outputs.check_file(arguments.json, MEASURE)
    folders = {Path(folder).resolve().name: Path(folder) for folder in arguments.runs}
    if len(folders) < len(arguments.runs):
        raise ValueError(f"expected folders of different names, got {some(arguments.runs)}")
    if arguments.shapes and arguments.split == "train":
        raise ValueError("--shapes: expected --split validation or test, got train")
    seed, found = TEST_SEED if arguments.split == "test" else VALIDATION_SEED, {}
    paths = {name: folder / "flamingo" / "model.safetensors" for name, folder in folders.items()}
    models = {name: training.load_flamingo(path) for name, path in paths.items()}
    for name, model in models.items():
        if (words := model.config.lm.vocab_size) != len(TOKENIZER):
            expected = f"expected a model of {len(TOKENIZER)} words, got {words}"
            raise ValueError(f"{paths[name]}: {expected}")
    for name, model in models.items():
        asked = Measure(model, arguments.split, arguments.samples, seed)
        bar = lambda work: tqdm(work, desc=name)  # noqa: B023, E731
        one = {"checkpoint": runs.file_digest(paths[name]), "groups": asked.run(bar)}
        if arguments.shapes:
            one["shapes"] = Evaluation(model, arguments.samples, seed, progress=bar).run()
        found[name] = one
    document = {"made_by": MEASURE, **outputs.about(), "split": arguments.split, "seed": seed,
                "samples": arguments.samples, "runs": found}  # fmt: skip
    if arguments.json:
        outputs.write_file(arguments.json, json.dumps(document, indent=1).encode(), MEASURE)
    print("\n".join(report.lines(document)))
