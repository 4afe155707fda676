"""`python -m miniflamingo real`: the parts, the bridge's training, its figures, the page.

Without a further word: the parts are fetched where they are missing, and the page is drawn with
the bridge that is shipped.
"""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from miniflamingo import outputs, training
from miniflamingo.command import Failed, Parser, a_path, real, require, whole
from miniflamingo.demo import read_alphas
from miniflamingo.real import card, features, measure, page, parts, stages
from miniflamingo.real import model as models
from miniflamingo.real.pictures import Concepts
from miniflamingo.real.reading import Reader

MEASURE = "python -m miniflamingo real measure"
MEMORY = {None: 1.5, "features": 1.5, "train": 3.5, "measure": 3.0}  # GB, by command
RESULTS = models.SHIPPED / "figures.json"
README = Path(__file__).parents[2] / "README.md"
MARKERS = (
    "<!-- real: made by `python -m miniflamingo real table --write` -->\n",
    "<!-- end of real -->",
)


def parser():
    """The command line's grammar."""
    top = Parser(prog="python -m miniflamingo real", description=__doc__)
    text = "folder of the parts; out/real/parts by default"
    top.add_argument("--parts", type=a_path, default=parts.FOLDER, help=text)
    top.add_argument("--out", type=a_path, default=Path("out") / "real", help="the page's folder")
    _add_bridge(top)
    commands = top.add_subparsers(dest="command")
    commands.add_parser("fetch", help="the parts, checked and unpacked")
    commands.add_parser("features", help="every picture, seen by the frozen eye")
    command = commands.add_parser("train", help="the warm start, then the bridge")
    command.add_argument("--run", type=a_path, required=True, help="folder of the run")
    command.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    for stage, config in (("warm", stages.WarmRun()), ("real", stages.RealRun())):
        steps, name = config.optimiser.steps, {"warm": "--warm-steps", "real": "--steps"}[stage]
        command.add_argument(name, type=whole(0, 10**6), default=steps)
    text = "of the branches at the start, in units of the residual stream; 0: as they are drawn"
    scale = stages.RealRun().scale
    command.add_argument("--scale", type=real(0, 10), default=scale, help=text)
    command.add_argument("--threads", type=whole(1, 256), default=2)
    command.add_argument("--numpy", action="store_true", help="gradients without torch, slower")
    command = commands.add_parser("measure", help="ask bridges everything")
    command.add_argument("runs", nargs="+", type=a_path, help="folders of `train`, one a seed")
    command.add_argument("--samples", type=whole(2, 2000), default=256)
    command.add_argument("--json", type=a_path, help="write the figures to this file")
    command = commands.add_parser("table", help="the committed figures")
    command.add_argument("--write", action="store_true", help="put them into the README, too")
    command = commands.add_parser("ship", help="what the package carries, from a finished run")
    command.add_argument("run", type=a_path, help="a folder of `train`")
    command.add_argument("figures", type=a_path, help="a file of `measure`, of this run and others")
    command.add_argument("--to", type=a_path, default=models.SHIPPED, help="the package's own")
    return top


def _add_bridge(command):
    text = "a bridge of `train`; the shipped one by default"
    command.add_argument("--bridge", type=a_path, default=models.BRIDGE_FILE, help=text)


def run(argv):
    """Parse and run a command; returns the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.command == "table":
        return table(arguments.write)
    if arguments.command == "ship":
        card.ship(arguments.run, arguments.figures, arguments.to)
        return 0
    require("gguf", "tokenizers")
    outputs.check_folder(arguments.out)
    parts.fetch(arguments.parts)
    check_memory(MEMORY.get(arguments.command, 0.5))
    if arguments.command is None:
        return show(arguments)
    if arguments.command != "fetch":
        encoder = features if getattr(arguments, "numpy", False) else _torch()
        features.compute(arguments.parts, work=encoder.encode_chunk)
    if arguments.command == "train":
        return 0 if train(arguments) else 130  # as after Ctrl-C
    if arguments.command == "measure":
        ask(arguments)
    return 0


def check_memory(gigabytes):
    """Failed where less than that is free, before any work; nothing where that is not known."""
    if (free := available_memory()) is not None and free < gigabytes:
        raise Failed(f"this needs {gigabytes:.1f} GB of memory, {free:.1f} GB are free")


def available_memory():
    """GB of memory that a process can get, None where the system does not say."""
    info = Path("/proc/meminfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) / 1e6 if found else None


def _torch():
    require("torch")
    return import_module("miniflamingo.kernels.model.real")


def show(arguments):
    """The page."""
    model, words = models.load_bridge(arguments.parts, arguments.bridge)
    page.exhibit(model, words, arguments.parts, arguments.out, gates_of(arguments.bridge))
    print(f"\nWhat there is to look at: {arguments.out / 'index.html'}")
    return 0


def gates_of(bridge):
    """How the gates of a bridge opened, as demo.read_alphas: from what lies beside its file."""
    folder = Path(bridge).parent
    if (folder / "log.jsonl").is_file():
        return read_alphas(folder / "log.jsonl")
    if (folder / "alphas.json").is_file():
        return json.loads((folder / "alphas.json").read_text("utf-8"))
    raise ValueError(f"{folder} has neither log.jsonl nor alphas.json, which say how gates opened")


def table(write=False):
    """Print the committed figures, and put them into the README where that is asked for."""
    lines = list(measure.table(json.loads(RESULTS.read_text("utf-8"))))
    print("\n".join(lines))
    if write:
        head, rest = README.read_text("utf-8").split(MARKERS[0])
        text = head + MARKERS[0] + "\n".join(lines) + "\n" + MARKERS[1] + rest.split(MARKERS[1])[1]
        README.write_text(text, "utf-8")
    return 0


# --- training -------------------------------------------------------------------------------------


def train(arguments):
    """The warm start and the bridge of one seed, into run/warm and run/bridge; each goes on where
    it was stopped. Returns whether the last step was reached."""
    seed, out = arguments.seed, Path(arguments.run)
    warm = out / "warm" / "model.safetensors"
    if arguments.warm_steps and not warm.is_file():
        config = _with_steps(stages.WarmRun(seed=seed), arguments.warm_steps)
        if not _train(stages.WarmStage(config, arguments.parts), out / "warm", arguments):
            return False
    config = _with_steps(stages.RealRun(scale=arguments.scale, seed=seed), arguments.steps)
    stage = stages.RealStage(config, arguments.parts, warm if arguments.warm_steps else None)
    if (out / "bridge" / "model.safetensors").is_file():
        raise ValueError(f"{out / 'bridge'} holds a finished run: choose another --run")
    return _train(stage, out / "bridge", arguments)


def _with_steps(config, steps):
    return replace(config, optimiser=replace(config.optimiser, steps=steps))


def _train(stage, out, arguments):
    stage = stage if arguments.numpy else _torch().in_torch(stage, arguments.threads)
    outputs.check_folder(out)
    return training.Run(stage, out, True, 100, arguments.threads).train()


# --- figures --------------------------------------------------------------------------------------


def ask(arguments):
    """Measure each bridge, print the table, write the JSON where that is asked for."""
    outputs.check_file(arguments.json, MEASURE)
    concepts, found = Concepts(Path(arguments.parts)), {}
    for run in arguments.runs:
        path = Path(run) / "bridge" / "model.safetensors"
        model, words = models.load_bridge(arguments.parts, path)
        reader = Reader(model, words, features.Features(arguments.parts, model.vision_encoder))
        asked = measure.Measure(reader, concepts, arguments.samples)
        found[Path(run).name] = measure.everything(asked)
    document = {
        "made_by": MEASURE, "samples": arguments.samples, **measure.about(),
        "training": trained(Path(arguments.runs[0]), concepts), "runs": found,
    }  # fmt: skip
    print("\n".join(measure.table(document)))
    if arguments.json:
        outputs.write_file(arguments.json, json.dumps(document, indent=1).encode(), MEASURE)


def trained(run, concepts):
    """How long the first run's stages were, and what it was not shown."""
    steps = {name: len((run / folder / "log.jsonl").read_text("utf-8").splitlines())
             for name, folder in (("warm", "warm"), ("steps", "bridge"))
             if (run / folder / "log.jsonl").is_file()}  # fmt: skip
    return {"warm": 0} | steps | {"held": len(concepts.held), "concepts": len(concepts)}
