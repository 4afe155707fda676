"""The demo: train the bridge while you watch, and put the result beside the fully trained model.

1. A real photograph and two details of it in one prompt: phi, the image-causal mask, shut gates.
2. The frozen parts that come with the package, a new bridge between them, and its gates opening.
3. The same questions to the live model and to the shipped one, on pictures that none has seen.

Everything lands in one folder: the figures, their numbers as JSON, and index.html, which shows all.
"""

import base64
import contextlib
import html
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib import cbook
from tqdm import tqdm

from miniflamingo import outputs, plots
from miniflamingo.decoding import beam_search
from miniflamingo.evaluation import TASKS, TEST_SEED, Evaluation, coverage
from miniflamingo.flamingo import PRESETS, Flamingo, FlamingoConfig
from miniflamingo.language import LanguageConfig
from miniflamingo.pictures import read_picture
from miniflamingo.prompt import WordTokenizer, build_batch
from miniflamingo.training import WEIGHTS, BridgeRun, BridgeStage, Run, load_flamingo
from miniflamingo.worlds import grammar, shapes

# --- a photograph, untrained ----------------------------------------------------------------------

TEXTS = (
    "One photograph, seen three times.",
    "An officer.",
    "Her face.",
    "The flag behind her",
)


def photographs():
    """The portrait of Grace Hopper that Matplotlib bundles (public domain), and two details."""
    photo = read_picture(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    width, height = photo.size
    boxes = ((0, 0.1, 1, 0.95), (0.28, 0.1, 0.72, 0.47), (0, 0, 0.35, 0.3))
    return [
        photo.crop((int(a * width), int(b * height), int(c * width), int(d * height)))
        for a, b, c, d in boxes
    ]


def show_photograph(out):
    """A prompt of three images through a mini Flamingo with random weights; figures and a report.

    Writes phi.png and mask.png into `out`. The report says whether shut gates leave the frozen LM's
    logits as they are, bit for bit, and which tokens each image reaches in the first layer.
    """
    images, tokenizer = photographs(), WordTokenizer.from_texts(TEXTS)
    parts = [TEXTS[0]] + [part for pair in zip(images, TEXTS[1:]) for part in pair]
    lm = LanguageConfig(len(tokenizer), alibi_slopes=PRESETS["mini"].lm.alibi_slopes)
    model = Flamingo(FlamingoConfig.preset("mini", lm=lm), rng=np.random.default_rng(0))
    batch = build_batch([parts], tokenizer, model.config.vision.image_size)
    words = [tokenizer.words[i] for i in batch.tokens[0]]
    lm_logits = model.lm(batch.tokens)
    shut = compare_logits(model(**batch.inputs()), lm_logits)
    for layer in model.gated_xattn:
        layer.alpha_xattn.data, layer.alpha_dense.data = np.ones((2, 1), np.float32).reshape(2)
    opened = compare_logits(model(**batch.inputs()), lm_logits)
    reached = {j + 1: tokens_reached(model, batch, j) for j in range(len(images))}
    phi, thumbnails = batch.phi[0], batch.pixels[0, :, 0]
    mask = plots.plot_image_causal_mask(words, phi, len(images), model.config.num_latents)
    plots.plot_phi(words, phi, images=thumbnails).savefig(out / "phi.png", dpi=150)
    mask.savefig(out / "mask.png", dpi=150)
    return {
        "words": words,
        "phi": phi.tolist(),
        "gates_shut": shut,
        "gates_open": opened,
        "tokens_reached_in_the_first_layer": reached,
    }


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


def describe_photograph(report):
    """Yield what show_photograph found, in words."""
    for phi in sorted(set(report["phi"])):
        text = " ".join(w for w, p in zip(report["words"], report["phi"]) if p == phi)
        yield f"phi = {phi}   {text}"
    for gates in ("gates_shut", "gates_open"):
        values = report[gates]
        verdict = "equal, bit for bit" if values["equal_to_the_frozen_lm"] else "different"
        difference = f"largest difference {values['largest_difference']:.3g}"
        yield f"{gates.replace('_', ' ')}: logits beside the frozen LM's: {verdict}; {difference}"
    for j, tokens in report["tokens_reached_in_the_first_layer"].items():
        expected = [i for i, phi in enumerate(report["phi"]) if phi == j]
        verdict = "exactly those" if tokens == expected else "NOT those"
        reach = f"changes tokens {tokens[0]} to {tokens[-1]}" if tokens else "changes no token"
        yield f"image {j}, painted grey, {reach} of the first layer: {verdict} with phi = {j}"


# --- a small world, trained -----------------------------------------------------------------------


def train_live(folder, steps, progress=True):
    """Train a new bridge between the shipped frozen parts -> the Flamingo.

    KeyboardInterrupt when it was asked to stop.
    """
    config = BridgeRun()
    config = replace(config, optimiser=replace(config.optimiser, steps=steps))
    stage = BridgeStage(config, WEIGHTS / "lm", WEIGHTS / "vision", progress)
    with contextlib.redirect_stdout(io.StringIO()):  # the folder cannot be resumed: it goes away
        if not Run(stage, folder).train(progress):
            raise KeyboardInterrupt
    return stage.model


def read_alphas(log, most=200):
    """{"steps", "alpha_xattn", "alpha_dense"} of a training log, at most about `most` lines."""
    records = [json.loads(line) for line in Path(log).read_text("utf-8").splitlines()]
    if not records:
        raise ValueError(f"{log} holds no step")
    kept = records[:: -(-len(records) // most)]
    kept += records[-1:] if kept[-1] is not records[-1] else []
    alphas = {name: [r[name] for r in kept] for name in ("alpha_xattn", "alpha_dense")}
    return {"steps": [r["step"] for r in kept], **alphas}


CURVES = {"binding_8way": "8-way", "binding_8way_held_out": "8-way, new combinations",
          "shape_4way": "4-way, by shape alone"}  # fmt: skip


def examine(model, alphas, out, samples):
    """Ask a trained model everything that the demo shows; figures into `out`; returns numbers."""
    out.mkdir(exist_ok=True)
    evaluation = Evaluation(model, samples)
    details = {name: evaluation.binding(name) for name in CURVES}
    few_shot = {n: {k: v["accuracy"] for k, v in curve.items()} for n, curve in details.items()}
    ceilings = {
        CURVES[n]: {k: coverage(TASKS[n].ways, int(k)) for k in few_shot[n]} for n in few_shot
    }
    named = {CURVES[name]: curve for name, curve in few_shot.items()}
    blind = {CURVES[name]: 1 / TASKS[name].ways for name in few_shot}
    plots.plot_few_shot(named, ceilings, blind).savefig(out / "few_shot.png", dpi=150)
    figure = plots.plot_alphas(alphas["steps"], alphas["alpha_xattn"], alphas["alpha_dense"])
    figure.savefig(out / "alphas.png", dpi=150)
    correct = {}
    for name, (media, questions, truths, columns) in exhibits().items():
        answers = ask(model, media, questions)
        right = [answer == truth for answer, truth in zip(answers, truths)]
        texts = [f"{q} {a}".strip() for q, a in zip(questions, answers)]
        sheet = plots.plot_answers(media, texts, right, columns)
        sheet.savefig(out / f"{name}.png", dpi=150)
        correct[name] = {"right": sum(right), "of": len(right)}
    picture = exhibits()["captions"][0][0]
    plots.plot_latents(picture, latent_maps(model, picture)).savefig(out / "latents.png", dpi=150)
    return {"few_shot": few_shot, "few_shot_details": details, "samples": samples,
            "alpha": alphas, "sheets": correct}  # fmt: skip


def exhibits(seed=TEST_SEED + 1):
    """{sheet: (media, questions, true answers, columns)}, of combinations held out of the bridge
    where there is one object, and of pictures that no training has seen throughout."""
    rng = np.random.default_rng(seed)
    words = grammar.TOKENIZER.decode
    one = grammar.draw_attributes((12,), grammar.HELD_OUT_SHAPES, rng)
    two = grammar.draw_pair_attributes((6,), grammar.ANY, rng)
    moving = *grammar.draw_attributes((4,), grammar.GEOMETRIC, rng), np.arange(4)
    captions = [words(row) for row in grammar.caption(*one)]
    asked = grammar.pair_question(*two[:2], rng.integers(0, 2, 6))
    directions = [words(row) for row in grammar.motion(moving[3])]
    return {
        "captions": (shapes.draw_objects(*one, rng, split="test"), [""] * 12, captions, 6),
        "questions": (
            shapes.draw_pairs(*two, rng, split="test"),
            [words(row[:5]) for row in asked],
            [words(row[5:6]) for row in asked],
            6,
        ),
        "clips": (shapes.draw_clips(*moving, rng, split="test"), [""] * 4, directions, 2),
    }


def ask(model, media, questions):
    """Beam search of width 3 on one image or clip and a question each -> answers, n strings."""
    prompts = [[item, question] for item, question in zip(media, questions)]
    size = model.config.vision.image_size
    batch = build_batch(prompts, grammar.TOKENIZER, size, close=False)
    return [grammar.TOKENIZER.decode(ids) for ids, _ in beam_search(model, batch, 10)]


def latent_maps(model, picture):
    """How much each latent looks at each place in the last layer, mean over heads: [R, h, w]."""
    features = model.encode(picture[None, None, None])
    S = features.shape[3]
    maps = model.resampler.attention_maps(features)[-1, 0, 0].mean(axis=0)[:, :S]
    return maps.reshape(len(maps), round(S**0.5), -1)


# --- all of it ------------------------------------------------------------------------------------


MADE = ("phi.png", "mask.png", "live", "shipped", "metrics.json", "index.html")


def demo(out, steps=300, samples=300, progress=True):
    """Run all parts; returns the report. What an earlier demo put into `out` is replaced at the
    end, and nothing else (see outputs.staged).

    ValueError when the folder cannot be written to or holds something else under these names, or
    steps or samples are not above 0. KeyboardInterrupt when the training was asked to stop.
    """
    if samples < 1:
        raise ValueError(f"samples must be above 0, got {samples}")
    with outputs.staged(out, "demo", MADE) as new:
        report = {"photograph": show_photograph(new)}
        live = train_live(new / "live", steps, progress)
        shipped = load_flamingo(WEIGHTS / "flamingo" / "model.safetensors")
        models = {
            "live": (live, read_alphas(new / "live" / "log.jsonl")),
            "shipped": (
                shipped,
                json.loads((WEIGHTS / "flamingo" / "alphas.json").read_text("utf-8")),
            ),
        }
        for name, (model, alphas) in tqdm(models.items(), desc="questions", disable=not progress):
            report[name] = examine(model, alphas, new / name, samples)
        # the shipped model's curves come first: they are the project's figures
        metrics = report["shipped"] | {"live": report["live"], "photograph": report["photograph"]}
        (new / "metrics.json").write_text(json.dumps(metrics, indent=1), "utf-8")
        (new / "index.html").write_text(page(new, report), encoding="utf-8")
    return report


def describe(report):
    """Yield the demo's findings, line by line."""
    yield from describe_photograph(report["photograph"])
    shots = list(report["live"]["few_shot"]["binding_8way"])
    yield ""
    yield f"{'accuracy after k shots':<36}" + "".join(f"{k:>6}" for k in shots)
    for name in ("live", "shipped"):
        for task, curve in report[name]["few_shot"].items():
            yield f"{name + ': ' + CURVES[task]:<36}" + "".join(f"{curve[k]:6.2f}" for k in shots)
    yield f"{'ceiling, 8-way: the class was shown':<36}" + "".join(
        f"{coverage(8, int(k)):6.2f}" for k in shots
    )
    for name in ("live", "shipped"):
        steps = report[name]["alpha"]["steps"][-1]
        right = ", ".join(f"{s} {c['right']}/{c['of']}" for s, c in report[name]["sheets"].items())
        yield (
            f"{name}, {steps} steps: {right}; gates |tanh(alpha)|, layer by layer: "
            + ", ".join(f"{abs(np.tanh(a)):.2f}" for a in report[name]["alpha"]["alpha_xattn"][-1])
            + " (attention), "
            + ", ".join(f"{abs(np.tanh(a)):.2f}" for a in report[name]["alpha"]["alpha_dense"][-1])
            + " (feed-forward)"
        )


SECTIONS = {
    "alphas": "How the gates open: |tanh(alpha)| of every layer. At step 0 the model is its frozen "
    "language model.",
    "few_shot": "Few-shot learning: an invented name is bound to a class by examples. Training saw "
    "at most 5 images in a document; the curve goes to 32. The ceiling is how often the class was "
    "shown at all.",
    "captions": "Captions of combinations of colour and shape that the bridge never saw.",
    "questions": "Questions about one of two objects.",
    "clips": "The direction in which an object moves, from eight frames (four are shown).",
    "latents": "Where the resampler's latents look, in its last layer.",
}


def page(out, report):
    """One HTML page with every figure in it, which needs no other file."""
    parts = ["<h1>miniflamingo</h1><h2>A photograph, untrained</h2>"]
    parts += [as_figure(out / name, text) for name, text in (
        ("phi.png", "phi: which image each token looks at"),
        ("mask.png", "the image-causal mask that phi stands for"))]  # fmt: skip
    parts.append("<pre>" + html.escape("\n".join(describe(report))) + "</pre>")
    for name, title in (("live", "The bridge trained just now"), ("shipped", "The shipped model")):
        steps = report[name]["alpha"]["steps"][-1]
        parts.append(f"<h2>{title}, {steps} steps</h2>")
        parts += [as_figure(out / name / f"{s}.png", text) for s, text in SECTIONS.items()]
    return as_page(parts)


def as_page(parts):
    """Pieces of HTML as a whole page."""
    style = "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    style += "img{max-width:100%}figure{margin:1.5rem 0}pre{overflow-x:auto;background:#f4f4f4}"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>miniflamingo</title><style>{style}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'


def as_figure(path, text):
    """A PNG file with its caption, as HTML that needs no other file."""
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(text, quote=True)
    image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"
