"""The command line:
`python -m miniflamingo demo | train | evaluate | generate | ship | sizes | plan | scaling |
inspect`,
and the kernels': `compare | compile | predict | step | bench | bench-generate | gpu | train-torch`.

Errors are one line and exit code 2; a training that broke down ends with exit code 1.
"""

import argparse
import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
from tqdm import tqdm

from miniflamingo import cards, decoding, limits, outputs, runs, training
from miniflamingo.command import Parser, a_path, exclude, real, run_command, whole
from miniflamingo.demo import demo, describe
from miniflamingo.evaluation import TEST_SEED, VALIDATION_SEED, Evaluation, table
from miniflamingo.flamingo import PRESETS, FlamingoConfig, count_parameters
from miniflamingo.interop import inspection
from miniflamingo.pictures import BadRecord, read_picture
from miniflamingo.prompt import EOC, PAD, build_batch
from miniflamingo.real import parts as real_parts
from miniflamingo.worlds import glyph_texts
from miniflamingo.worlds.glyph_texts import tokenizer_of
from miniflamingo.worlds.video import read_clip

# --- sizes --------------------------------------------------------------------------------------

# the paper's Table 5
PAPER_PARTS = ("lm", "vision_encoder", "gated_xattn", "resampler", "total")
PAPER_SIZES = {
    "3B": dict(zip(PAPER_PARTS, (1.4e9, 435e6, 1.2e9, 194e6, 3.2e9))),
    "9B": dict(zip(PAPER_PARTS, (7.1e9, 435e6, 1.6e9, 194e6, 9.3e9))),
    "80B": dict(zip(PAPER_PARTS, (70e9, 435e6, 10e9, 194e6, 80e9))),
}


def sizes(presets):
    """Count the presets' parameters from their configs and print them beside the paper's table."""
    for name in presets:
        config = FlamingoConfig.preset(name)
        counts, paper = count_parameters(config), PAPER_SIZES.get(name, {})
        if paper:  # the paper's LM has relative positions, with one projection D x D in each layer
            counts["relative positions"] = config.lm.depth * config.lm.dim**2
        counts["total"] = sum(counts.values())
        print(f"\n{name:<22} {'counted':>9} {'paper' * bool(paper):>9}".rstrip())
        for part, count in counts.items():
            quoted = short(paper[part]) if part in paper else ""
            print(f"  {part:<20} {short(count):>9} {quoted:>9}".rstrip())
    if any(name in PAPER_SIZES for name in presets):
        print(
            "\nrelative positions: one D x D projection in each layer of the paper's LM, Chinchilla"
            "\n(the LM here has ALiBi, which needs none); the total counts them."
        )
    if "9B" in presets:
        print("\n" + "\n".join(inconsistencies_of_9b()))
    if "80B" in presets:
        print("\n" + inconsistency_of_80b())


def short(count):
    """1273595904 -> '1.27B', 193631232 -> '194M', 2048 -> '2.05K'."""
    unit, factor = next((u, f) for u, f in (("B", 1e9), ("M", 1e6), ("K", 1e3)) if count >= f)
    return f"{count / factor:.3g}{unit}"


def inconsistencies_of_9b():
    """What does not fit in the paper's 9B row, recomputed."""
    config, layer = PRESETS["9B"], 4096**2
    yield "The paper's 9B row is not consistent with itself:"
    for depth in (40, 32):
        lm = replace(config.lm, depth=depth)
        count = count_parameters(replace(config, lm=lm))["lm"] + depth * layer
        yield f"  {depth} LM layers of width 4096 hold {short(count)}; the table says 7.1B"
    each = count_parameters(config)["gated_xattn"] / 10
    for inserted in (10, 9, 8):
        count = short(inserted * each)
        yield f"  {inserted} inserted layers hold {count}; the table says 1.6B"
    yield "  Its LM count fits 32 layers, and every 4th of 32 is 8 inserted layers, not 10."


def inconsistency_of_80b():
    """The inserted layers of the 80B row, recomputed."""
    count = count_parameters(PRESETS["80B"])["gated_xattn"]
    return f"The paper's 80B row: 12 inserted layers hold {short(count)}; the table says 10B."


# --- train --------------------------------------------------------------------------------------

CONFIGS = {
    "lm": training.LanguageRun(),
    "vision": training.VisionRun(),
    "flamingo": training.BridgeRun(),
}


# the fields of a run's config that options set, and those of its .optimiser and its .model; an
# option that names files (--lm) is none of them: a run is identified by what its files hold
RUN_FIELDS = ("seed", "batch", "weights", "strategy", "p_next", "caption_noise", "glyph_weights",
              "glyph_batch", "classes", "bursts")  # fmt: skip
OPTIMISER_FIELDS = ("steps", "rate", "warmup", "schedule", "weight_decay", "clip", "alpha_rate")
MODEL_FIELDS = ("resampler", "xattn_every", "skip_without_image")


def configured(config, arguments):
    """A run's config with the fields that the command line gives."""

    def given(fields):
        values = {name: getattr(arguments, name, None) for name in fields}
        return {name: value for name, value in values.items() if value is not None}

    optimiser = replace(config.optimiser, **given(OPTIMISER_FIELDS))
    model = replace(config.model, **given(MODEL_FIELDS))
    if arguments.stage == "lm" and arguments.weights and arguments.weights[1] > 0:
        model = replace(model, vocab_size=len(glyph_texts.TOKENIZER))
    return replace(config, optimiser=optimiser, model=model, **given(RUN_FIELDS))


def build_stage(arguments):
    """The stage of training that parsed options describe."""
    config = configured(CONFIGS[arguments.stage], arguments)
    if arguments.stage == "lm":
        return training.LanguageStage(config)
    if arguments.stage == "vision":
        return training.VisionStage(config)
    for option in ("lm", "vision"):
        folder = Path(getattr(arguments, option))
        if not (folder / "model.safetensors").is_file():
            raise ValueError(
                f"--{option}: expected a run's folder with its model.safetensors, got {folder}"
            )
    return training.BridgeStage(config, arguments.lm, arguments.vision, progress=True)


def train(arguments):
    """Train one of the three stages; returns whether it reached its last step."""
    out = outputs.check_folder(arguments.out)
    run = training.Run(build_stage(arguments), out, arguments.resume, arguments.checkpoint_every)
    if not run.train():
        return False
    if run.parts and not (out / "run.json").exists():  # unknown of the first edition's checkpoints
        cards.record_run(out, runs.seconds(run.parts), run.parts)
    return True


# --- evaluate -----------------------------------------------------------------------------------

EVALUATE = "python -m miniflamingo evaluate"


def checkpoint_file(path):
    """The file of a checkpoint: a file as it is, a run's folder by its model.safetensors."""
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"no checkpoint at {path}")
    return path


def load_speaker(path):
    """A Flamingo of the small world, perhaps of glyphs, too, and its tokenizer; ValueError unless
    it has exactly the words of either."""
    model = training.load_flamingo(path)
    try:
        return model, tokenizer_of(model.config.lm.vocab_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def evaluate(arguments):
    """Ask a checkpoint everything, print the table, write the JSON where that is asked for."""
    outputs.check_file(arguments.json, EVALUATE)
    checkpoint = checkpoint_file(arguments.checkpoint)
    model, _ = load_speaker(checkpoint)
    seed = VALIDATION_SEED if arguments.validation else TEST_SEED
    bar = lambda work: tqdm(work, desc="pictures")  # noqa: E731
    metrics = Evaluation(model, arguments.samples, seed, progress=bar).run()
    print("\n".join(table(metrics)))
    if arguments.json:
        made = {"made_by": EVALUATE, "checkpoint": runs.file_digest(checkpoint)}
        document = made | metrics
        outputs.write_file(arguments.json, json.dumps(document, indent=1).encode(), EVALUATE)


# --- generate -----------------------------------------------------------------------------------


class Part(argparse.Action):
    """Collects --text, --image and --video, as (option, value), in the order of the prompt."""

    def __call__(self, parser, namespace, value, option_string=None):
        namespace.parts = [*(namespace.parts or []), (option_string, value)]


def read_part(option, value, num_frames):
    """A text as it is; one picture; a video as a list of pictures, spread over its length."""
    if option == "--text":
        return value
    if not Path(value).exists():
        raise ValueError(f"no image or video at {value}")
    if option == "--video":
        return read_clip(value, num_frames)
    try:
        return read_picture(Path(value), still=True)
    except BadRecord as error:
        if error.reason == "animation":
            raise ValueError(f"{error}; --video reads it") from None
        raise


def measure_limits(arguments):
    """Ask a checkpoint where it is wrong, print the tables, write the JSON where asked for."""
    if arguments.table:
        print("\n".join(limits.table(json.loads(limits.RESULTS.read_text("utf-8")))))
        return
    outputs.check_file(arguments.json, limits.COMMAND)
    model, _ = load_speaker(checkpoint_file(arguments.checkpoint))
    bar = lambda work: tqdm(work, desc="pictures")  # noqa: E731
    document = limits.measure(model, arguments.samples, Path(arguments.checkpoint).name, bar)
    print("\n".join(limits.table(document)))
    if arguments.json:
        limits.write(document, arguments.json)


def generate(arguments):
    """Answer an interleaved prompt, printing token by token (beam search: all at the end)."""
    if not arguments.parts:
        raise ValueError("a prompt needs at least one --text, --image or --video")
    if arguments.weights is not None:
        return _generate_from_weights(arguments)
    if arguments.real is not None:
        return _generate_from_parts(arguments)
    for option in ("chat", "stream", "keep", "allow_pickle"):
        if getattr(arguments, option) not in (None, False):
            raise ValueError(f"--{option.replace('_', '-')} is for --weights")
    path = checkpoint_file(arguments.checkpoint or training.WEIGHTS / "flamingo")
    model, tokenizer = load_speaker(path)
    size, most = model.config.vision.image_size, arguments.max_new_tokens
    prompt = [read_part(*part, model.config.num_frames) for part in arguments.parts]
    batch = build_batch([prompt], tokenizer, size, close=False)
    if arguments.beam is not None:
        ids, score = decoding.beam_search(model, batch, most, arguments.beam)[0]
        print(f"{tokenizer.decode(ids)}   (log-likelihood {score:.2f})")
        return
    rng = np.random.default_rng(arguments.seed)
    for step in decoding.stream(model, batch, most, _chooser(arguments), rng=rng):
        if step[0] not in (EOC, PAD):
            print(tokenizer.words[step[0]], end=" ", flush=True)
    print()


def _generate_from_weights(arguments):
    """Answer from another project's checkpoint."""
    from miniflamingo.interop.generation import Request
    from miniflamingo.interop.generation import generate as answer

    if arguments.keep is not None and not arguments.stream:
        raise ValueError("--keep is for --stream")
    parts = tuple((option.removeprefix("--"), value) for option, value in arguments.parts)
    for kind, value in parts:
        if kind == "video":
            raise ValueError("--weights reads texts and images, no --video")
        if kind == "image" and not Path(value).exists():
            raise ValueError(f"no image at {value}")
    answer(arguments.weights, Request(
        parts, arguments.max_new_tokens, _chooser(arguments), arguments.seed, arguments.chat,
        arguments.stream, int(1e9 * (arguments.keep or 0)), arguments.allow_pickle,
    ))  # fmt: skip
    return None


def _generate_from_parts(arguments):
    """Answer by the Flamingo of real parts that lies in the folder --real."""
    from miniflamingo.real.asking import FRAMES, answer_aloud

    prompt = [read_part(*part, FRAMES) for part in arguments.parts]
    rng = np.random.default_rng(arguments.seed)
    most = arguments.max_new_tokens
    answer_aloud(arguments.real, arguments.checkpoint, prompt, most, _chooser(arguments), rng)


def _chooser(arguments):
    """How the next token is chosen, from --temperature, --top-k and --top-p."""
    t = 1.0 if arguments.temperature is None else arguments.temperature
    if arguments.top_k is not None:
        return decoding.top_k(arguments.top_k, t)
    if arguments.top_p is not None:
        return decoding.nucleus(arguments.top_p, t)
    return decoding.greedy if arguments.temperature is None else decoding.temperature(t)


# --- arguments ----------------------------------------------------------------------------------

STEPS, SAMPLES, SEEDS = whole(1, 10**7), whole(1, 10**4), whole(0, 2**32 - 1)


def parser():
    """The command line's grammar."""
    top = Parser(prog="python -m miniflamingo", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser("demo", help="train the bridge live, and look at the result")
    command.add_argument("--out", type=a_path, default="out", help="folder for all figures")
    command.add_argument("--steps", type=STEPS, help="of the live training; 300 by default")
    command.add_argument("--full", action="store_true", help="train all the way")
    command.add_argument("--samples", type=SAMPLES, default=300, help="episodes a figure")
    command = commands.add_parser("train", help="one of the three stages")
    stages = command.add_subparsers(dest="stage", required=True)
    for name in CONFIGS:
        add_training(stages.add_parser(name), name)
    command = commands.add_parser("evaluate", help="few-shot curves, captions, questions, motion")
    _add_checkpoint(command)
    command.add_argument("--samples", type=SAMPLES, default=1000, help="episodes a figure")
    command.add_argument("--validation", action="store_true", help="the seed to tune on")
    command.add_argument("--json", type=a_path, help="write the metrics to this file")
    command = commands.add_parser("limits", help="where it is wrong, and how sure it is then")
    _add_checkpoint(command, default=training.WEIGHTS / "flamingo")
    command.add_argument("--samples", type=SAMPLES, default=1000, help="questions a figure")
    command.add_argument("--json", type=a_path, help="write the figures to this file")
    command.add_argument("--table", action="store_true", help="the committed figures")
    _add_generate(commands.add_parser("generate", help="answer texts, images and videos"))
    _add_others(commands)
    for name, text in {**{name: text for name, (*_, text) in ROOMS.items()}, **KERNELS}.items():
        commands.add_parser(name, add_help=False, help=text)
    return top


def _add_others(commands):
    command = commands.add_parser("ship", help="what the package carries, from finished runs")
    command.add_argument("runs", nargs="+", type=a_path, help="folders with the three stages' runs")
    command.add_argument("--to", type=a_path, default=training.WEIGHTS, help="the package's own")
    _add_inspect(commands.add_parser("inspect", help="what a checkpoint is, anybody's"))
    command = commands.add_parser("sizes", help="parameters of the presets beside the paper's")
    command.add_argument("presets", nargs="*", help="mini, 3B, 9B, 80B; all by default")


def _add_generate(command):
    _add_checkpoint(command, default=None)
    text = "another project's checkpoint: a folder, or a safetensors or GGUF file"
    command.add_argument("--weights", type=a_path, help=text)
    text = "the Flamingo of real parts, fetched into this folder, out/real/parts by default"
    command.add_argument("--real", type=a_path, nargs="?", const=real_parts.FOLDER, help=text)
    command.add_argument("--chat", action="store_true", help="one --text, as the model's template")
    command.add_argument("--stream", action="store_true", help="read each layer when it works")
    text = "GB of layers that --stream may keep in memory; none by default"
    command.add_argument("--keep", type=real(0, 10**5), help=text)
    _add_pickle(command)
    for kind in ("--text", "--image", "--video"):
        command.add_argument(kind, action=Part, dest="parts", help="in the order of the prompt")
    command.add_argument("--max-new-tokens", type=whole(1, 10**4), default=20)
    command.add_argument("--beam", type=whole(1, 100), help="beam search of this width")
    temperature, p = real(0.01, 100), real(0, 1, above=True)
    command.add_argument("--temperature", type=temperature, help="sample; greedy by default")
    command.add_argument("--top-k", type=whole(1, 1000), help="sample among the k likeliest")
    command.add_argument("--top-p", type=p, help="nucleus sampling")
    command.add_argument("--seed", type=SEEDS, default=0, help="of the sampling")


def _add_inspect(command):
    command.add_argument("path", type=a_path, help="folder or file of any project that is known")
    command.add_argument("--plot", type=a_path, help="draw its gates into this PNG file")
    _add_pickle(command)


def _add_pickle(command):
    text = "read pickles, too (.bin, .pt, .pth), with torch's weights_only"
    command.add_argument("--allow-pickle", action="store_true", help=text)


def _add_checkpoint(command, default=training.WEIGHTS / "flamingo"):
    text = "file, or folder of a run; the shipped one by default"
    command.add_argument("--checkpoint", type=a_path, default=default, help=text)


def add_training(command, stage):
    """The options of a stage's training, which those of train-torch are, too."""
    command.add_argument("--out", type=a_path, required=True, help="folder of the run")
    resume = "go on with the run in --out; begin one where there is none"
    command.add_argument("--resume", action="store_true", help=resume)
    command.add_argument("--checkpoint-every", type=STEPS, default=100, help="steps")
    options = {"--steps": STEPS, "--rate": real(0, 1, above=True), "--warmup": whole(0, 10**7),
               "--seed": SEEDS, "--weight-decay": real(0, 1),
               "--clip": real(0, 1e6, above=True)}  # fmt: skip
    for option, kind in options.items():
        command.add_argument(option, type=kind)
    command.add_argument("--schedule", choices=("cosine", "constant"))
    if stage == "flamingo":
        _add_bridge(command)
    else:
        command.add_argument("--batch", type=whole(4, 4096))
        text = "how much shapes and glyphs count; 1 0 by default, 0 leaves out"
        command.add_argument("--weights", type=real(0, 1e6), nargs=2, metavar="LAMBDA", help=text)
    if stage == "vision":
        command.add_argument("--glyph-batch", type=whole(2, 4096), help="classes, twice each")
    if stage != "lm":
        text = "of glyphs, that are learned; all by default"
        command.add_argument("--classes", type=whole(2, 10**5), help=text)


def _add_bridge(command):
    for option, what in (("lm", "language model"), ("vision", "vision encoder")):
        text = f"folder of the {what}'s run; the shipped one by default"
        command.add_argument(f"--{option}", type=a_path, default=training.WEIGHTS / option,
                             help=text)  # fmt: skip
    names = ", ".join(training.Lambda._fields)
    command.add_argument("--weights", type=real(0, 1e6), nargs=4, metavar="LAMBDA", help=names)
    text = "the same of glyphs' documents and captions; 0 0 by default"
    command.add_argument("--glyph-weights", type=real(0, 1e6), nargs=2, metavar="LAMBDA", help=text)
    text = "share of the glyphs' documents that show a class again"
    command.add_argument("--bursts", type=real(0, 1), help=text)
    command.add_argument("--no-skip-without-image", dest="skip_without_image",
                         action="store_false", default=None,
                         help="gate text alone too, as in the paper")  # fmt: skip
    command.add_argument("--alpha-rate", type=real(0, 1000))
    command.add_argument("--p-next", type=real(0, 1))
    command.add_argument("--caption-noise", type=real(0, 1))
    command.add_argument("--xattn-every", type=whole(1, 100))
    command.add_argument("--strategy", choices=training.STRATEGIES)
    command.add_argument("--resampler", choices=("perceiver", "mlp", "transformer"))


# the commands of miniflamingo.kernels (its commands.py has their options), which need torch, and
# most of them Triton
KERNELS = {
    "compare": "every kernel beside its NumPy twin, as a table",
    "compile": "registers, spills, occupancy; needs no GPU",
    "predict": "microseconds on GPUs that are not here, and what binds",
    "step": "seconds a training step, NumPy beside torch",
    "bench": "time and memory beside every peer's; needs a GPU",
    "bench-generate": "the same models generate in transformers and here, on the CPU",
    "gpu": "test, then bench, what the minutes allow, on a GPU",
    "train-torch": "the three stages, or the bridge on many processes",
}
EXCLUSIVE = {
    "demo": [("--full", "--steps")],
    "generate": [("--beam", "--temperature"), ("--beam", "--top-k"), ("--beam", "--top-p"),
                 ("--top-k", "--top-p"), ("--weights", "--checkpoint"),
                 ("--weights", "--beam"), ("--weights", "--real"), ("--real", "--beam")],
}  # fmt: skip


def inspect(arguments):
    """Say what a checkpoint is."""
    inspection.inspect(arguments.path, arguments.plot, arguments.allow_pickle)


# commands with a grammar of their own: whose room, which function, and what they do
ROOMS = {
    "real": ("real", "run",
             "a Flamingo of real parts: fetch, features, train, measure, table, or a page of it"),
    "ablate": ("ablations", "run",
               "the paper's ablations at this size: train, ask, and what can be told"),
    "fewshot": ("fewshot", "run",
                "names of glyphs never seen: train, measure, experiment, table, plot"),
    "plan": ("cost", "run_plan",
             "what training takes on many devices: bytes, flops, communication, days"),
    "scaling": ("cost", "run_scaling",
                "time and memory against length, images, frames and shots, measured here"),
}  # fmt: skip
ALONE = {
    "evaluate": evaluate, "limits": measure_limits, "generate": generate, "inspect": inspect,
}  # fmt: skip


def main(argv=None):
    """Run a command; returns the exit code."""
    return run_command("miniflamingo", lambda: run(argv))


def run(argv):
    """Parse and run a command; returns the exit code."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if arguments.command in ROOMS:  # imported late, as few need them
        module, function, _ = ROOMS[arguments.command]
        return getattr(import_module(f"miniflamingo.{module}.commands"), function)(rest)
    if arguments.command in KERNELS:  # imported late: it brings torch
        return import_module("miniflamingo.kernels.commands").run([arguments.command, *rest])
    if rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    exclude(arguments, *EXCLUSIVE.get(arguments.command, ()))
    if arguments.command == "sizes":
        sizes(arguments.presets or list(PRESETS))
    elif arguments.command == "train":
        return 0 if train(arguments) else 130  # as after Ctrl-C
    elif arguments.command in ALONE:
        ALONE[arguments.command](arguments)
    elif arguments.command == "ship":
        cards.ship(arguments.runs, arguments.to)
    else:
        steps = training.BridgeRun().optimiser.steps if arguments.full else arguments.steps or 300
        report = demo(arguments.out, steps, arguments.samples)
        print("\n" + "\n".join(describe(report)))
        print(f"\nFigures and numbers: {Path(arguments.out) / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
