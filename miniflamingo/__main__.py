"""The command line: `python -m miniflamingo demo | sizes | train | evaluate`.

Errors are one line and exit code 2; an interrupted training run exits with 130.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib import cbook
from PIL import Image
from tqdm import tqdm

from miniflamingo import evaluation, plots, training
from miniflamingo.flamingo import PRESETS, Flamingo, FlamingoConfig, count_parameters
from miniflamingo.language import LanguageConfig
from miniflamingo.module import write_atomically
from miniflamingo.prompt import WordTokenizer, build_batch

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


# --- demo ---------------------------------------------------------------------------------------

DEMO_TEXTS = (
    "One photograph, seen three times.",
    "An officer.",
    "Her face.",
    "The flag behind her",
)


def demo(out):
    """A real photograph and two details of it, in one prompt, through the mini Flamingo."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    steps = tqdm(total=5, bar_format="{desc:<44}|{bar:20}| {n}/{total} {elapsed}")
    steps.set_description("prompt: text and three images")
    tokenizer = WordTokenizer.from_texts(DEMO_TEXTS)
    images = photographs()
    parts = [part for pair in zip(DEMO_TEXTS, [*images, None]) for part in pair if part is not None]
    lm = LanguageConfig(len(tokenizer), alibi_slopes=PRESETS["mini"].lm.alibi_slopes)
    model = Flamingo(FlamingoConfig.preset("mini", lm=lm), rng=np.random.default_rng(0))
    batch = build_batch([parts], tokenizer, model.config.vision.image_size)
    words = [tokenizer.words[i] for i in batch.tokens[0]]

    steps.update()
    steps.set_description("forward pass, gates shut (alpha = 0)")
    logits, lm_logits = model(**batch.inputs()), model.lm(batch.tokens)
    steps.update()
    steps.set_description("forward pass, gates open (alpha = 1)")
    for layer in model.gated_xattn:
        layer.alpha_xattn.data, layer.alpha_dense.data = np.ones((2, 1), np.float32).reshape(2)
    opened = model(**batch.inputs())
    steps.update()
    steps.set_description("which tokens does each image reach?")
    reached = {j + 1: tokens_reached(model, batch, j) for j in range(len(images))}
    steps.update()
    steps.set_description("figures")
    R = model.config.num_latents
    figures = {
        "phi.png": plots.plot_phi(words, batch.phi[0], images=batch.pixels[0, :, 0]),
        "mask.png": plots.plot_image_causal_mask(words, batch.phi[0], len(images), R),
    }
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=150)
    steps.update()
    steps.close()
    report = {
        "words": words,
        "phi": batch.phi[0].tolist(),
        "shapes": {
            "pixels": batch.pixels.shape,
            "tokens": batch.tokens.shape,
            "logits": logits.shape,
        },
        "gates_shut": compare_logits(logits, lm_logits),
        "gates_open": compare_logits(opened, lm_logits),
        "tokens_reached_in_the_first_layer": reached,
    }
    write_atomically(out / "demo.json", json.dumps(report, indent=1).encode())
    return report


def photographs():
    """The portrait of Grace Hopper that Matplotlib bundles (public domain), and two details."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as photo:
        photo = photo.convert("RGB")
    width, height = photo.size
    boxes = ((0, 0.1, 1, 0.95), (0.28, 0.1, 0.72, 0.47), (0, 0, 0.35, 0.3))
    return [
        photo.crop((int(a * width), int(b * height), int(c * width), int(d * height)))
        for a, b, c, d in boxes
    ]


def tokens_reached(model, batch, j):
    """Paint image j grey: the positions whose output of the first inserted layer changes."""
    layer, embedded = model.gated_xattn[0], model.lm.embed(batch.tokens, np.zeros((1, 1), int))
    outputs = []
    for pixels in (batch.pixels, batch.pixels.copy()):
        if outputs:
            pixels[:, j] = 0.5
        media = model.resampler(model.encode(pixels), batch.num_frames)
        outputs.append(layer(embedded, media, batch.phi))
    return np.flatnonzero((outputs[0] != outputs[1]).any(axis=(0, 2))).tolist()


def compare_logits(logits, lm_logits):
    """How far the model's logits are from those of its frozen LM."""
    equal = bool(np.array_equal(logits, lm_logits))
    return {
        "equal_to_the_frozen_lm": equal,
        "largest_difference": float(abs(logits - lm_logits).max()),
    }


def print_demo(report, out):
    """What the demo found, in words."""
    print(f"\nThe prompt and phi, the image that each token looks at ({out}/phi.png, mask.png):\n")
    for phi in sorted(set(report["phi"])):
        text = " ".join(w for w, p in zip(report["words"], report["phi"]) if p == phi)
        print(f"  phi = {phi}   {text}")
    print("\nThe model's logits beside those of its frozen language model:")
    for gates in ("gates_shut", "gates_open"):
        values = report[gates]
        verdict = "equal, bit for bit" if values["equal_to_the_frozen_lm"] else "different"
        difference = values["largest_difference"]
        print(f"  {gates.replace('_', ' '):<11} {verdict}; largest difference {difference:.3g}")
    print("\nPaint one image grey: which tokens' outputs of the first inserted layer change?")
    for j, tokens in report["tokens_reached_in_the_first_layer"].items():
        expected = [i for i, phi in enumerate(report["phi"]) if phi == j]
        verdict = "exactly those with phi" if tokens == expected else "NOT those with phi"
        print(f"  image {j}: tokens {tokens[0]} to {tokens[-1]}, {verdict} = {j}")
    print("\nThe weights are random: this model has read nothing and seen nothing yet.")
    print(f"All numbers: {out}/demo.json")


# --- train and evaluate ---------------------------------------------------------------------------


def train(arguments):
    """Train one stage from the command line's arguments; returns the exit code."""
    stage_class, run = {
        "lm": (training.LanguageStage, training.LanguageRun),
        "vision": (training.VisionStage, training.VisionRun),
        "flamingo": (training.BridgeStage, training.BridgeRun),
    }[arguments.stage]
    config = run(seed=arguments.seed)
    if arguments.steps is not None:
        config = replace(config, optimiser=replace(config.optimiser, steps=arguments.steps))
    options = {}
    if arguments.stage == "flamingo":
        config = replace(config, strategy=arguments.strategy, p_next=arguments.p_next)
        options = {"lm": arguments.lm, "vision": arguments.vision, "progress": True}
    stage = stage_class(config, **options)
    finished = training.train_stage(stage, arguments.out, arguments.resume, arguments.threads)
    return 0 if finished else 130


def evaluate(arguments):
    """Print the few-shot table of a trained model and write metrics.json beside it."""
    folder = Path(arguments.run)
    with training.threadpool_limits(arguments.threads):
        examination = evaluation.Evaluation(
            training.load_flamingo(folder / "model.safetensors"), arguments.samples,
            progress=lambda work: tqdm(work, desc="pictures"),
        )  # fmt: skip
        metrics = examination.run(progress=lambda work: tqdm(work, desc="questions"))
    print("\n".join(evaluation.table(metrics)))
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1).encode())


# --- arguments ----------------------------------------------------------------------------------


def main(argv=None):
    """Run a command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m miniflamingo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("demo", help="one prompt through the mini model, with figures")
    command.add_argument("--out", default="out", help="folder for the figures and demo.json")
    command = commands.add_parser("sizes", help="parameters of the presets beside the paper's")
    command.add_argument("presets", nargs="*", help="mini, 3B, 9B, 80B; all by default")
    add_training(commands)
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "train":
            return train(arguments)
        if arguments.command == "evaluate":
            evaluate(arguments)
        elif arguments.command == "sizes":
            sizes(arguments.presets or list(PRESETS))
        else:
            print_demo(demo(arguments.out), arguments.out)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"miniflamingo: error: {error}", file=sys.stderr)
        return 2
    return 0


def add_training(commands):
    """The arguments of `train lm | vision | flamingo` and `evaluate`."""
    cores = min(2, os.cpu_count() or 1)
    stages = commands.add_parser("train", help="train one of the three stages on the small world")
    stages = stages.add_subparsers(dest="stage", required=True)
    for name, text in (("lm", "the language model, on text"),
                       ("vision", "the vision encoder, contrastively"),
                       ("flamingo", "the bridge between the two, frozen")):  # fmt: skip
        command = stages.add_parser(name, help=text)
        command.add_argument("--out", default=f"out/{name}", help="folder of the run")
        command.add_argument("--steps", type=int, help="updates, if not the recipe's")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--threads", type=int, default=cores, help="BLAS threads")
        command.add_argument("--resume", action="store_true", help="go on with the run in --out")
    command.add_argument("--lm", default="out/lm", help="folder of the trained language model")
    command.add_argument("--vision", default="out/vision", help="folder of the trained encoder")
    command.add_argument("--strategy", default="accumulate", choices=training.STRATEGIES)
    command.add_argument("--p-next", type=float, default=0.0, help="share of text-first documents")
    command = commands.add_parser("evaluate", help="few-shot figures of a trained model")
    command.add_argument("run", nargs="?", default="out/flamingo", help="folder of the run")
    command.add_argument("--samples", type=int, default=1000, help="episodes a figure")
    command.add_argument("--threads", type=int, default=cores, help="BLAS threads")


if __name__ == "__main__":
    sys.exit(main())
