"""What a checkpoint is, from its names, its shapes and its gates alone; no model is built.

    python -m miniflamingo inspect CHECKPOINT [--plot FILE.png]

Which project's, its config and dialect, its parts and their parameters, how open every gate is,
and whether every name was understood.
"""

import io
import re
from collections import Counter
from dataclasses import asdict

import numpy as np

from miniflamingo import outputs
from miniflamingo.checkpoints import STAGES, check_size
from miniflamingo.checks import config_from_json
from miniflamingo.command import one_line, some
from miniflamingo.dialects import DIALECTS
from miniflamingo.flamingo import ShapesOnly
from miniflamingo.interop import PROJECTS, config_of, project_of
from miniflamingo.interop.files import open_checkpoint
from miniflamingo.tensorfile import misfits, shown

COMMAND = "python -m miniflamingo inspect"
# the gates of all projects: each is tanh of one number, or of one for each of D, a layer
GATES = {
    "attention": r"alpha_xattn|alpha_cross_attn|attn_gate|cross_attn_attn_gate",
    "dense": r"alpha_dense|ff_gate|cross_attn_mlp_gate",
}
ANY_GATE = "|".join(GATES.values())
MOST_FIELDS = 60  # of a config that are shown
BAR = 40  # letters of a gate that is wide open
LM, GATED, RESAMPLER, EYE = "language model", "gated layers", "resampler", "vision encoder"


OURS = "miniflamingo"
TITLES = {
    OURS: "this project", "idefics": "IDEFICS (Hugging Face)", "open_flamingo": "OpenFlamingo",
    "mllama": "Llama 3.2 Vision (mllama)", "flamingo_pytorch": "flamingo-pytorch",
    "llama": "a Llama", "mpt": "an MPT", "opt": "an OPT", "clip": "CLIP's Vision Transformer",
    "efficientnet": "EfficientNet-Lite0",
}  # fmt: skip
# part -> a pattern of the names of its tensors, in any project, but for what belongs to a gated
# layer (it lies beside a gate); the first that matches
PARTS = {
    RESAMPLER: r"(model\.)?(perceiver_resampler|perceiver|resampler)\..*",
    EYE: r"(model\.)?(vision_model|vision_encoder|visual_projection)\..*",
    "projection": r"(model\.)?multi_modal_projector\..*",
    "<EOC>": r"eoc_(embedding|head)",
}
ALL_OF = {"clip": EYE, "efficientnet": EYE, "flamingo_pytorch": RESAMPLER}  # else the LM


def name_of(checkpoint):
    """The project of a Checkpoint: "miniflamingo", or a key of interop.PROJECTS.

    ValueError that shows its names if it is of none. A file of this project says its stage in its
    metadata.
    """
    if checkpoint.metadata.keys() & STAGES.keys():
        return OURS
    try:
        return project_of(checkpoint.config, checkpoint.shapes)
    except ValueError as error:
        config = "" if checkpoint.config else "it has no config.json; "
        names = some(map(shown, checkpoint))
        raise ValueError(f"{checkpoint.path}: {error}; {config}its names are {names}") from None


def parts_of(checkpoint, project):
    """{part: names}; whatever lies beside a gate belongs to its gated layer."""
    gated = tuple(name[: -len(re.search(rf"({ANY_GATE})$", name)[0])] for name in checkpoint
                  if re.fullmatch(rf"(.*\.)?({ANY_GATE})", name))  # fmt: skip
    found, rest = {}, ALL_OF.get(project, LM)
    rest = EYE if "vision" in checkpoint.metadata else rest
    for name in checkpoint:
        fitting = (part for part, pattern in PARTS.items() if re.fullmatch(pattern, name))
        part = GATED if name.startswith(gated) else next(fitting, rest)
        found.setdefault(part, []).append(name)
    return found


def misunderstood(checkpoint, project):
    """What of its names, shapes and config is not understood, as one line, or "" for all is."""
    try:
        if project == OURS:
            stage, config = _own_config(checkpoint)
            check_size(config, checkpoint)
            faults = misfits(_shapes(STAGES[stage][2](config, rng=ShapesOnly())), checkpoint.shapes)
            return some(faults, "; ")
        config = config_of(project, checkpoint.config, checkpoint.shapes)
        PROJECTS[project].state_of(checkpoint, config)
    except (ValueError, TypeError) as error:
        return one_line(error)
    return ""


def _own_config(checkpoint):
    """(stage, config) of a checkpoint of this project."""
    stage = next(stage for stage in STAGES if stage in checkpoint.metadata)
    where = f"{checkpoint.path}: config of stage {stage}"
    return stage, config_from_json(STAGES[stage][1], checkpoint.metadata[stage], where)


def _shapes(model):
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def dialect_of(checkpoint, project):
    """{option: value} in which a checkpoint's gated layers and resampler are not the paper's."""
    try:
        if project == OURS:
            config = _own_config(checkpoint)[1]
        else:
            config = config_of(project, checkpoint.config, checkpoint.shapes)
    except (ValueError, TypeError):
        return {}
    own, paper = asdict(getattr(config, "dialect", DIALECTS["paper"])), asdict(DIALECTS["paper"])
    return {name: value for name, value in own.items() if value != paper[name]}


def gates_of(checkpoint):
    """{"attention": {layer: |tanh(alpha)|, [1] or [D]}, "dense": ...}; reads the alphas alone."""
    found = {kind: {} for kind in GATES}
    for name in checkpoint:
        for kind, pattern in GATES.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", name) and 0 < checkpoint.size([name]) < 10**6:
                numbers = re.findall(r"\.(\d+)\.", name.replace(".", ".."))
                alpha = checkpoint[name].astype(float).ravel()
                found[kind][int(numbers[-1]) if numbers else 0] = abs(np.tanh(alpha))
    return {kind: dict(sorted(layers.items())) for kind, layers in found.items()}


# --- as text --------------------------------------------------------------------------------------


def report(checkpoint, project, gates):
    """Yield the lines that `inspect` prints."""
    kinds = Counter(checkpoint.dtypes.values())
    stored = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common())
    parts = parts_of(checkpoint, project)
    yield f"{checkpoint.path}: {TITLES[project]}; {len(checkpoint)} tensors: {stored}"
    yield from _config_lines(checkpoint, project)
    if dialect := dialect_of(checkpoint, project):
        said = ", ".join(f"{name} {value}" for name, value in dialect.items())
        yield f"\n  unlike the paper's: {said}"
    yield f"\n  {'part':<24} {'tensors':>8} {'parameters':>12}"
    for part, names in parts.items():
        yield f"  {part:<24} {len(names):>8} {short(checkpoint.size(names)):>12}"
    yield f"  {'total':<24} {len(checkpoint):>8} {short(checkpoint.size()):>12}"
    yield from _gate_lines(gates)
    lost = misunderstood(checkpoint, project)
    yield f"\nnot understood: {lost}" if lost else "\nevery name is understood"


def short(count):
    """1273595904 -> 1.27B, 12 -> 12."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g}{unit}"
    return str(count)


def _config_lines(checkpoint, project):
    """The config as it is: of ours from the metadata, of others from config.json."""
    config = checkpoint.config
    if project == OURS:
        config = asdict(_own_config(checkpoint)[1])
    simple = [pair for pair in _flat(config).items() if not isinstance(pair[1], (list, dict))]
    for name, value in simple[:MOST_FIELDS]:
        yield f"  {shown(name):<40} {shown(value, 50)}"
    if len(simple) > MOST_FIELDS:
        yield f"  ... and {len(simple) - MOST_FIELDS} more fields"
    if not config:
        yield "  no config.json: sizes are those of the tensors"


def _flat(config, prefix=""):
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found = {}
    for name, value in config.items():
        inner = isinstance(value, dict) and value and prefix.count(".") < 3
        found |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def _gate_lines(gates):
    layers = sorted({layer for values in gates.values() for layer in values})
    if not layers:
        yield "\nno gates"
        return
    yield f"\n|tanh(alpha)| of {len(layers)} layers; # is 1/{BAR}"
    for layer in layers:
        for kind, values in gates.items():
            if layer in values:
                yield f"  {layer:>3} {kind:<10} {_bar(values[layer])}"


def _bar(opening):
    if np.isnan(opening).any():
        return f"{'':<{BAR}} not a number"
    mean = float(opening.mean())
    about = f"  ({opening.min():.3f} to {opening.max():.3f})" if opening.size > 1 else ""
    return f"{'#' * round(BAR * mean):<{BAR}} {mean:.3f}{about}"


# --- the command ----------------------------------------------------------------------------------


def inspect(path, plot=None, allow_pickle=False):
    """Print what a checkpoint is; plot: write its gates as a PNG to this file. ValueError as
    open_checkpoint's, for an unknown project, and for a figure of no gates."""
    if plot is not None and plot.suffix.lower() != ".png":
        raise ValueError(f"--plot: expected a file that ends in .png, got {plot}")
    outputs.check_file(plot, COMMAND, "--plot")
    path = path / "model.safetensors" if _is_run(path) else path
    checkpoint = open_checkpoint(path, allow_pickle)
    project = name_of(checkpoint)
    gates = gates_of(checkpoint)
    print("\n".join(report(checkpoint, project, gates)))
    if plot is not None:
        _draw(checkpoint, project, gates, plot)


def _is_run(path):
    """A folder of a training of ours, in which other tensors lie, too."""
    return (path / "log.jsonl").is_file() and (path / "model.safetensors").is_file()


def _draw(checkpoint, project, gates, plot):
    from miniflamingo.plots import plot_openings  # matplotlib takes its time

    if not any(gates.values()):
        raise ValueError(f"--plot: {checkpoint.path} has no gates to draw")
    for kind, layers in gates.items():
        if wrong := [layer for layer, opening in layers.items() if np.isnan(opening).any()]:
            raise ValueError(f"--plot: {checkpoint.path}: the {kind} gate of layer {wrong[0]} is "
                             "not a number")  # fmt: skip
    title = f"{TITLES[project]}: how open the gates are"
    file, about = io.BytesIO(), {"made_by": COMMAND, "Software": None}
    plot_openings(gates, title).savefig(file, format="png", dpi=150, metadata=about)
    outputs.write_file(plot, file.getvalue(), COMMAND, "--plot")
    print(f"figure: {plot}")
