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
from miniflamingo.real import card, examples, features, front, measure, page, parts, stages, without
from miniflamingo.real import model as models
from miniflamingo.real.pictures import Concepts
from miniflamingo.real.reading import Reader

MEASURE = "python -m miniflamingo real measure"
# GB, by command
MEMORY = {None: 1.5, "front": 1.5, "features": 1.5, "train": 3.5, "measure": 3.0, "without": 3.5,
          "speed": 2.5, "examples": 2.0}  # fmt: skip
FIGURES = models.SHIPPED / "figures.json"
RESULTS = Path(__file__).with_name("results")  # what is measured of no shipped bridge
README = Path(__file__).with_name("README.md")
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
    command = commands.add_parser("front", help="the two pictures of the project's README")
    command.add_argument("--to", type=a_path, default=front.FOLDER, help="the package's own")
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
    _add_json(command)
    command = commands.add_parser("without", help="short trainings that leave one thing out each")
    command.add_argument("--run", type=a_path, required=True, help="folder of the trainings")
    command.add_argument("--seeds", type=whole(1, 100), default=1)
    command.add_argument("--steps", type=whole(2, 10**6), default=without.STEPS)
    command.add_argument("--samples", type=whole(2, 2000), default=without.SAMPLES)
    command.add_argument("--threads", type=whole(1, 256), default=2)
    _add_json(command)
    command = commands.add_parser("speed", help="milliseconds a token, beside transformers'")
    command.add_argument("--threads", type=whole(1, 256), default=1)
    command.add_argument("--rounds", type=whole(1, 100), default=3)
    _add_json(command)
    command = commands.add_parser("examples", help="answers to keep, with their probabilities")
    _add_json(command)
    command = commands.add_parser("table", help="the committed figures")
    command.add_argument("--write", action="store_true", help="put them into real/README.md, too")
    command = commands.add_parser("ship", help="what the package carries, from a finished run")
    command.add_argument("run", type=a_path, help="a folder of `train`")
    command.add_argument("figures", type=a_path, help="a file of `measure`, of this run and others")
    command.add_argument("--to", type=a_path, default=models.SHIPPED, help="the package's own")
    return top


def _add_json(command):
    command.add_argument("--json", type=a_path, help="write the figures to this file")


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
    outputs.check_folder(arguments.to if arguments.command == "front" else arguments.out)
    parts.fetch(arguments.parts)
    check_memory(MEMORY.get(arguments.command, 0.5))
    if arguments.command in (None, "front"):
        return show(arguments)
    if arguments.command not in ("fetch", "speed", "examples"):
        encoder = features if getattr(arguments, "numpy", False) else _torch()
        features.compute(arguments.parts, work=encoder.encode_chunk)
    if arguments.command == "train":
        return 0 if train(arguments) else 130  # as after Ctrl-C
    if arguments.command in DOCUMENTS:
        return write(arguments)
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
    """The page, or the README's pictures."""
    model, words = models.load_bridge(arguments.parts, arguments.bridge)
    gates = gates_of(arguments.bridge)
    if arguments.command == "front":
        front.draw(model, words, arguments.parts, arguments.to, gates)
        print(*(arguments.to / name for name in front.MADE), sep="\n")
        return 0
    page.exhibit(model, words, arguments.parts, arguments.out, gates)
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
    """Print the committed figures, and put them into README.md where that is asked for."""
    lines = [*measure.table(json.loads(FIGURES.read_text("utf-8")))]
    for name, kind in (("without", without.table), ("speed", speed_table)):
        path = RESULTS / f"{name}.json"
        if path.is_file():
            lines += ["", *kind(json.loads(path.read_text("utf-8")))]
    print("\n".join(lines))
    if write:
        outputs.put_between(README, MARKERS, "\n".join(lines) + "\n")
    return 0


# --- training -------------------------------------------------------------------------------------


def train(arguments):
    """The warm start and the bridge of one seed, into run/warm and run/bridge; each goes on where
    it was stopped. Returns whether the last step was reached."""
    seed, out = arguments.seed, Path(arguments.run)
    warm = out / "warm" / "model.safetensors"
    if arguments.warm_steps and not warm_up(arguments, seed, warm, arguments.warm_steps):
        return False
    config = _with_steps(stages.RealRun(scale=arguments.scale, seed=seed), arguments.steps)
    stage = stages.RealStage(config, arguments.parts, warm if arguments.warm_steps else None)
    if (out / "bridge" / "model.safetensors").is_file():
        raise ValueError(f"{out / 'bridge'} holds a finished run: choose another --run")
    return _train(stage, out / "bridge", arguments)


def warm_up(arguments, seed, file, steps):
    """The warm start, unless it is there. Returns whether the last step was reached."""
    config = _with_steps(stages.WarmRun(seed=seed), steps)
    return _train(stages.WarmStage(config, arguments.parts), file.parent, arguments)


def _with_steps(config, steps):
    return replace(config, optimiser=replace(config.optimiser, steps=steps))


def _train(stage, out, arguments):
    if not getattr(arguments, "numpy", False):
        stage = _torch().in_torch(stage, arguments.threads)
    outputs.check_folder(out)
    return training.finish(stage, out, threads=arguments.threads) is not None


# --- figures --------------------------------------------------------------------------------------


def write(arguments):
    """Measure, print the table, write the JSON where that is asked for; returns the exit code."""
    work, table, made_by = DOCUMENTS[arguments.command]
    outputs.check_file(arguments.json, made_by)
    if (found := work(arguments)) is None:
        return 130  # as after Ctrl-C
    document = {"made_by": made_by} | outputs.about() | found
    print("\n".join(table(document)))
    if arguments.json:
        indent = None if arguments.command == "examples" else 1  # tables of likelihoods are long
        outputs.write_file(arguments.json, json.dumps(document, indent=indent).encode(), made_by)
    return 0


def ask(arguments):
    """The figures of each bridge."""
    found = {Path(run).name: measure.everything(_measure(run / "bridge", arguments))
             for run in map(Path, arguments.runs)}  # fmt: skip
    training = trained(Path(arguments.runs[0]), Concepts(Path(arguments.parts)))
    return {"samples": arguments.samples, "training": training, "runs": found}


def _measure(bridge, arguments):
    """A Measure of the bridge in a folder."""
    model, words = models.load_bridge(arguments.parts, bridge / "model.safetensors")
    reader = Reader(model, words, features.Features(arguments.parts, model.vision_encoder))
    return measure.Measure(reader, Concepts(Path(arguments.parts)), arguments.samples)


def leave_out(arguments):
    """Train each variant of `without` for each seed and ask it; what is trained stays. None where
    it was stopped."""
    found = {variant: [] for variant in without.VARIANTS}
    for seed in range(arguments.seeds):
        folder = Path(arguments.run) / str(seed)
        file = folder / "warm" / "model.safetensors"
        if not warm_up(arguments, seed, file, stages.WARM.steps):
            return None
        for variant in found:
            config, warm = without.config(variant, arguments.steps, seed)
            out = folder / variant.replace(" ", "-").replace("'", "")
            stage = stages.RealStage(config, arguments.parts, file if warm else None)
            if not _train(stage, out, arguments):
                return None
            alphas = read_alphas(out / "log.jsonl")
            found[variant].append(without.ask(_measure(out, arguments), alphas))
    about = {name: getattr(arguments, name) for name in ("steps", "seeds", "samples")}
    return about | {"runs": found}


def speed(arguments):
    """The figures of kernels/tools/bench_real.py."""
    require("torch", "transformers")
    bench = import_module("miniflamingo.kernels.tools.bench_real")
    rows = bench.run(arguments.parts, arguments.threads, arguments.rounds)
    about = import_module("miniflamingo.kernels.tools.bench_generate").machine()
    return about | {"threads": arguments.threads, "rounds": arguments.rounds, "rows": rows}


def speed_table(document):
    """Yield the lines of a Markdown table."""
    threads, rounds = document["threads"], document["rounds"]
    yield (f"{document['date']}, {document['processor']}, {threads} thread{'s' * (threads > 1)}, "
           f"medians of {rounds}:")  # fmt: skip
    yield ""
    yield "| | before the first token, s | ms a token | ratio |"
    yield "|---|---|---|---|"
    for side, row in document["rows"].items():
        yield f"| {side} | {row['prefill_s']:.2f} | {row['ms_a_token']:.1f} | {row['ratio']:.2f} |"


DOCUMENTS = {  # command -> what measures, how it is shown, what the file names as its maker
    "measure": (ask, measure.table, MEASURE),
    "without": (leave_out, without.table, without.COMMAND),
    "speed": (speed, speed_table, "python -m miniflamingo real speed"),
    "examples": (examples.ask, examples.lines, examples.COMMAND),
}


def trained(run, concepts):
    """How long the first run's stages were, and what it was not shown."""
    steps = {name: len((run / folder / "log.jsonl").read_text("utf-8").splitlines())
             for name, folder in (("warm", "warm"), ("steps", "bridge"))
             if (run / folder / "log.jsonl").is_file()}  # fmt: skip
    return {"warm": 0} | steps | {"held": len(concepts.held), "concepts": len(concepts)}
