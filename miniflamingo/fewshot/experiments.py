"""What makes names of new classes learnable, trained and measured cell by cell.

    classes      the bridge learns of 7, 30, ... classes, LM and eye being the same
    burstiness   a share of its documents shows a class again; the others show each class once,
                 under a name that it always has (Chan et al., 2022)
    shots        the language model has read no episode of more than 5 shots

A cell is one setting from one seed. Its runs lie in OUT/SEED/..., are resumed where they were
stopped, and its figures, once measured, are not measured again.
"""

import json
from dataclasses import replace
from pathlib import Path

from miniflamingo import cards, outputs, runs, training
from miniflamingo.fewshot import warm
from miniflamingo.fewshot.measure import Measure
from miniflamingo.fewshot.recipe import configs
from miniflamingo.worlds import glyphs

MADE_BY = "python -m miniflamingo fewshot experiment"
GROUPS = ("letters", "symbols", "seen")  # what is asked: single scripts are not
SHORT = {"long_share": 0.0, "length": 21}  # 5 shots of 4 words behind <BOS>


def cells(experiment):
    """{setting: {stage: what is another than in the recipe}} of an experiment."""
    numbers = (7, 30, 100, 300, glyphs.upright())
    few = {str(n): {"warm": {"classes": n}, "flamingo": {"classes": n}} for n in numbers}
    less = {f"{b:.2f}": {"flamingo": {"bursts": b}} for b in (0, 0.25, 0.5, 0.75)}
    return {
        "classes": few | {str(len(glyphs.classes())): {}},
        "burstiness": less | {"1.00": {}},
        "shots": {"up to 33": {}, "up to 5": {"lm": SHORT}},
    }[experiment]


def run(experiment, out, path, seeds, steps, samples, in_torch=None):
    """Train and measure all cells that the file at `path` lacks; each is written when it is done.
    Returns whether none was interrupted."""
    outputs.check_file(path, MADE_BY)
    document = begin(path, experiment, steps, samples)
    for seed in seeds:
        for setting, changes in cells(experiment).items():
            if any(c["seed"] == seed and c["setting"] == setting for c in document["cells"]):
                continue
            folders = train(Path(out) / str(seed), experiment, setting, changes, seed, steps,
                            in_torch)  # fmt: skip
            if folders is None:
                return False
            model = training.load_flamingo(folders["flamingo"] / "model.safetensors")
            figures = {}
            for split in ("validation", "train"):
                figures |= Measure(model, split, samples).run(only=GROUPS)
            document["cells"].append({"setting": setting, "seed": seed, "figures": figures})
            outputs.write_file(path, json.dumps(document, indent=1).encode(), MADE_BY)
    return True


def begin(path, experiment, steps, samples):
    """The file's document, or a new one; ValueError where it is of another experiment."""
    wanted = {"experiment": experiment, "steps": steps, "samples": samples}
    if path is None or not Path(path).is_file():
        return {"made_by": MADE_BY, **outputs.about(), **wanted, "cells": []}
    document = json.loads(Path(path).read_text("utf-8"))
    for name, value in wanted.items():
        if document.get(name) != value:
            raise ValueError(f"{path}: expected {name} {value!r}, got {document.get(name)!r}")
    return document


def train(out, experiment, setting, changes, seed, steps, in_torch=None):
    """{stage: folder} of a cell's runs; a stage that is the recipe's, but for the bridge's steps,
    is trained once for all. None when a training was interrupted."""
    folders, found = {}, configs(seed)
    found["flamingo"] = replace(
        found["flamingo"], optimiser=replace(found["flamingo"].optimiser, steps=steps)
    )
    for stage, config in found.items():
        own = changes.get(stage, {})
        name = stage
        if changes and (own or stage == "flamingo"):  # the bridge hangs on what is before it
            name = f"{experiment} {setting} {stage}"
        elif stage == "flamingo":
            name = "experiments flamingo"
        folders[stage] = out / name.replace(" ", "-")
        if not finished(build(stage, replace(config, **own), folders), folders[stage], in_torch):
            return None
    return folders


def build(stage, config, folders):
    """The Stage of a config; `folders` has those before it."""
    if stage == "lm":
        return training.LanguageStage(config)
    if stage == "vision":
        return training.VisionStage(config)
    if stage == "warm":
        return warm.WarmStage(config, folders["vision"])
    bridge = training.BridgeStage(config, folders["lm"], folders["vision"], progress=True)
    start = folders["warm"] / "model.safetensors"
    warm.begin_with(bridge.model, start)
    bridge.frozen["warm"] = runs.file_digest(start)  # another start is another run
    return bridge


def finished(stage, folder, in_torch=None):
    """Train a stage into its folder, or go on there; returns whether it is at its end. ValueError
    where the folder has a run of another config."""
    stage = stage if in_torch is None else in_torch(stage)
    parts = training.finish(stage, outputs.check_folder(folder))
    if parts and not (folder / "run.json").exists():
        cards.record_run(folder, runs.seconds(parts), parts)
    return parts is not None
