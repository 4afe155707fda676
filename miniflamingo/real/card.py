"""The shipped bridge and its card: its data, their licences, and what it reached."""

import json
import os
import shutil
from math import prod, tanh
from pathlib import Path

from miniflamingo import outputs
from miniflamingo.checks import from_json
from miniflamingo.demo import read_alphas
from miniflamingo.real import measure, parts
from miniflamingo.tensorfile import TensorFile

NAME = "real-ship"
HEAD = """# The bridge between SmolLM2-135M-Instruct and EfficientNet-Lite0

Trained here: a Perceiver Resampler of {latents} latents and {layers} GATED XATTN-DENSE layers,
{parameters:.2f} million numbers in float16. The language model and the eye are frozen, are not in
this folder and are fetched as the packages that their makers publish. `python -m miniflamingo real`

## Data and licences

{sources}

Trained on the pictures of Noto and Fluent alone. {held} of {concepts} concepts, a tenth of each
kind, are in no training. Names and keywords are Unicode's (CLDR). Recipes were compared with an eye
on Twemoji's pictures and on the concepts never seen, those of the warm start with an eye on
OpenMoji's, too: none of these is a test that nobody has looked at.

## Training

A contrastive warm start of the resampler, {warm} steps, then the bridge, {steps} steps of {rows}
interleaved documents of at most 5 pictures: captions, questions, kinds, invented names, clips.
Seed {seed}. Gates at the end, |tanh(alpha)|: attention {xattn}; feed-forward {dense}.

## Figures

Medians over seeds, in brackets the widest 95 % interval over pictures.

{table}

## Limits

It names drawings in the manner of emoji, and was never trained on a photograph: see the page for
what it says of some. Its names are a list: it describes no scene, counts nothing, and answers with
a likely name where it does not know the thing. "Is this a ...?" it answers no better than a coin.
Of things never seen it often knows the kind and seldom the name. The eye alone, which takes the
nearest picture's answer (the last two rows), does better on things that were shown, and about as
well or a little worse on kinds of things that were not. The nearest example's name, without any
bridge, is right more often than its own answer for invented names.
"""


def ship(run, figures, to):
    """Copy a finished run of `train` into the folder `to`, with its gates, figures and card.

    What an earlier call put there is replaced. ValueError where the run is not finished, or the
    figures are none of `measure`.
    """
    run, to = Path(run), Path(os.path.abspath(to))
    bridge = run / "bridge" / "model.safetensors"
    for path in (bridge, run / "bridge" / "log.jsonl", Path(figures)):
        if not path.is_file():
            raise ValueError(f"{path} is missing: is the run finished?")
    found = from_json(Path(figures).read_text("utf-8"), figures)
    if not isinstance(found, dict) or "runs" not in found:
        raise ValueError(f"{figures} holds no figures of `real measure`")
    alphas = read_alphas(run / "bridge" / "log.jsonl")
    with outputs.staged(to.parent, NAME, [to.name], "--to") as new:
        folder = new / to.name
        folder.mkdir()
        shutil.copyfile(bridge, folder / bridge.name)
        (folder / "alphas.json").write_text(json.dumps(alphas), "utf-8")
        (folder / "figures.json").write_text(json.dumps(found, indent=1), "utf-8")
        (folder / "card.md").write_text(card(bridge, alphas, found), "utf-8")


def card(bridge, alphas, figures):
    """The card's text."""
    file = TensorFile(bridge)
    about = from_json(file.metadata["about"], bridge)
    sizes = from_json(file.metadata["bridge"], bridge)
    gates = {kind: ", ".join(f"{abs(g):.2f}" for g in map(tanh, alphas[f"alpha_{kind}"][-1]))
             for kind in ("xattn", "dense")}  # fmt: skip
    return HEAD.format(
        latents=sizes["num_latents"], layers=len(alphas["alpha_xattn"][-1]),
        parameters=sum(prod(shape) for shape in file.shapes.values()) / 1e6,
        sources="\n".join(f"- {p.name} {p.version}: {p.what}. {p.licence}." for p in parts.PARTS),
        warm=figures["training"]["warm"], steps=about["optimiser"]["steps"],
        rows=sum(about["rows"]), seed=about["seed"], held=figures["training"]["held"],
        concepts=figures["training"]["concepts"], table="\n".join(measure.table(figures)), **gates,
    )  # fmt: skip
