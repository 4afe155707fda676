"""What a checkpoint is, from its names, its shapes and its gates alone; no model is built.

    python -m miniflamingo inspect CHECKPOINT [--plot FILE.png]

Which project's, its config and dialect, its parts and their parameters, how open every gate is,
and whether every name was understood.
"""

import io
import re
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np

from miniflamingo import outputs
from miniflamingo.checkpoints import STAGES
from miniflamingo.checks import config_from_json
from miniflamingo.command import some
from miniflamingo.interop.files import open_checkpoint
from miniflamingo.tensorfile import shown

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


@dataclass(frozen=True)
class Project:
    """A project as its checkpoints show it: the names of its parts, first match first."""

    title: str
    parts: dict  # part -> a pattern of its names


PROJECTS = {
    "miniflamingo": Project("this project", {
        RESAMPLER: r"resampler\..*", EYE: r"vision_encoder\..*",
        LM: r"lm\..*", "<EOC>": r"eoc_(embedding|head)",
    }),
    "idefics": Project("IDEFICS (Hugging Face)", {
        EYE: r"model\.vision_model\..*", RESAMPLER: r"model\.perceiver_resampler\..*",
        LM: r"(model\.(embed_tokens|layers|norm)|lm_head)\..*",
    }),
    "mllama": Project("Llama 3.2 Vision (mllama)", {
        EYE: r"(model\.)?vision_model\..*", "projection": r"(model\.)?multi_modal_projector\..*",
        LM: r"((model\.)?(language_model|embed_tokens|layers|norm)|lm_head)\..*",
    }),
    "open_flamingo": Project("OpenFlamingo", {
        RESAMPLER: r"perceiver\..*",
        EYE: r"vision_encoder\..*", LM: r"lang_encoder\..*",
    }),
    "flamingo_pytorch": Project("flamingo-pytorch", {
        RESAMPLER: r"(.*\.)?(latents|media_pos_emb|layers\.\d+\.[01]\..*|norm\..*)",
    }),
    "llama": Project("a Llama", {LM: r"(model\.(embed_tokens|layers|norm)|lm_head)\..*"}),
    "clip": Project("CLIP's Vision Transformer", {EYE: r"(vision_model\.|visual_projection\.).*"}),
}  # fmt: skip
EVIDENCE = {  # a name that only this project has
    "idefics": r"model\.gated_cross_attn_layers\.\d+\.alpha_cross_attn",
    "mllama": r".*layers\.\d+\.cross_attn_attn_gate",
    "open_flamingo": r"lang_encoder\..*gated_cross_attn_layers?\.(\d+\.)?attn_gate",
    "flamingo_pytorch": r"(.*\.)?(attn_gate|media_pos_emb)",
    "llama": r"model\.layers\.\d+\.self_attn\.q_proj\.weight",
    "clip": r"vision_model\.embeddings\.patch_embedding\.weight",
}


def project_of(checkpoint):
    """The key in PROJECTS of a Checkpoint; ValueError that shows its names if it is none of them.

    A file of this project says its stage in its metadata.
    """
    if checkpoint.metadata.keys() & STAGES.keys():
        return "miniflamingo"
    for project, pattern in EVIDENCE.items():
        if any(re.fullmatch(pattern, name) for name in checkpoint):
            return project
    raise ValueError(f"{checkpoint.path}: no project that is known here has such names: "
                     f"{some(map(shown, checkpoint))}")  # fmt: skip


def parts_of(checkpoint, project):
    """{part: names}, and under None the names that belong to none; whatever lies beside a gate
    belongs to its gated layer."""
    patterns, found = PROJECTS[project].parts, {}
    gated = tuple(name[: -len(re.search(rf"({ANY_GATE})$", name)[0])] for name in checkpoint
                  if re.fullmatch(rf"(.*\.)?({ANY_GATE})", name))  # fmt: skip
    if project == "miniflamingo" and "flamingo" not in checkpoint.metadata:
        patterns = {LM if "lm" in checkpoint.metadata else EYE: ".*"}
    for name in checkpoint:
        fitting = (part for part, pattern in patterns.items() if re.fullmatch(pattern, name))
        part = GATED if name.startswith(gated) else next(fitting, None)
        found.setdefault(part, []).append(name)
    return found


def gates_of(checkpoint):
    """{"attention": {layer: |tanh(alpha)|, [1] or [D]}, "dense": ...}; reads the alphas alone."""
    found = {kind: {} for kind in GATES}
    for name in checkpoint:
        for kind, pattern in GATES.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", name) and checkpoint.size([name]) < 10**6:
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
    yield f"{checkpoint.path}: {PROJECTS[project].title}; {len(checkpoint)} tensors: {stored}"
    yield from _config_lines(checkpoint, project)
    yield f"\n  {'part':<24} {'tensors':>8} {'parameters':>12}"
    for part, names in parts.items():
        yield f"  {part or '(unknown)':<24} {len(names):>8} {short(checkpoint.size(names)):>12}"
    yield f"  {'total':<24} {len(checkpoint):>8} {short(checkpoint.size()):>12}"
    yield from _gate_lines(gates)
    lost = parts.get(None, [])
    yield f"\nnot understood: {some(map(shown, lost))}" if lost else "\nevery name is understood"


def short(count):
    """1273595904 -> 1.27B, 12 -> 12."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g}{unit}"
    return str(count)


def _config_lines(checkpoint, project):
    """The config as it is: of ours from the metadata, of others from config.json."""
    config = checkpoint.config
    if project == "miniflamingo":
        stage = next(stage for stage in STAGES if stage in checkpoint.metadata)
        where = f"{checkpoint.path}: config of stage {stage}"
        config = asdict(config_from_json(STAGES[stage][1], checkpoint.metadata[stage], where))
    simple = {
        k: v for k, v in _flat(config).items() if v is None or not isinstance(v, (list, dict))
    }
    for name, value in list(simple.items())[:MOST_FIELDS]:
        yield f"  {shown(name):<40} {shown(value, 50)}"
    if left := len(simple) - MOST_FIELDS if len(simple) > MOST_FIELDS else 0:
        yield f"  ... and {left} more fields"
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
    project = project_of(checkpoint)
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
    title = f"{PROJECTS[project].title}: how open the gates are"
    file, about = io.BytesIO(), {"made_by": COMMAND, "Software": None}
    plot_openings(gates, title).savefig(file, format="png", dpi=150, metadata=about)
    outputs.write_file(plot, file.getvalue(), COMMAND, "--plot")
    print(f"figure: {plot}")
