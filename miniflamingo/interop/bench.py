"""The same random models generate in transformers and here, in one run: seconds and memory.

    python -m miniflamingo bench-generate [--json FILE]

Each side works in a process of its own, fresh for every round, with the same weights from the same
files; the sides take turns, so that whatever else the machine does disturbs both. Both must write
the same tokens. Needs torch and transformers.
"""

import json
import platform
import resource
import statistics
import tempfile
import time
from datetime import date
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from miniflamingo import outputs
from miniflamingo.command import Failed, in_processes, require
from miniflamingo.interop.files import open_checkpoint
from miniflamingo.interop.generation import Clock, Speaker, speak
from miniflamingo.interop.streaming import load

COMMAND = "python -m miniflamingo bench-generate"
IMAGES, PROMPT = 4, 64
SIDES = ("transformers", "numpy")


def idefics(dim, layers):
    """The arguments of an IdeficsConfig of this width: a gated layer before every block."""
    heads = dim // 64
    return dict(
        vocab_size=8000, additional_vocab_size=2, hidden_size=dim, intermediate_size=dim * 43 // 16,
        num_hidden_layers=layers, num_attention_heads=heads, cross_layer_interval=1,
        use_resampler=True, alpha_initializer="ones", tie_word_embeddings=False, pad_token_id=0,
        vision_config=dict(
            embed_dim=512, image_size=224, patch_size=16, intermediate_size=2048,
            num_hidden_layers=6, num_attention_heads=8,
        ),
        perceiver_config=dict(
            use_resampler=True, resampler_n_latents=64, resampler_depth=2, resampler_n_heads=8,
            resampler_head_dim=64,
        ),
    )  # fmt: skip


SMOLLM2 = dict(  # the 135M parameters of SmolLM2-135M
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-5, tie_word_embeddings=True,
    pad_token_id=0,
)  # fmt: skip
MODELS = {
    "IDEFICS, 512 wide": ("Idefics", "IdeficsForVisionText2Text", idefics(512, 8)),
    "IDEFICS, 1024 wide": ("Idefics", "IdeficsForVisionText2Text", idefics(1024, 16)),
    "Llama, SmolLM2-135M": ("Llama", "LlamaForCausalLM", SMOLLM2),
}
SMALL = ("IDEFICS, 512 wide", "Llama, SmolLM2-135M")


# --- in a process of its own ----------------------------------------------------------------------


def make(name, folder):
    """Write a random model of MODELS as a folder; its matrices keep the size of what they take."""
    torch, transformers = import_module("torch"), _transformers_alone()
    kind, builder, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, builder)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                scale = 1 if "embed_tokens" in name else parameter.shape[1] ** -0.5
                parameter.normal_(0, scale)
    model.save_pretrained(folder)


def inputs(name):
    """ids int[L], phi int[L], pixels [N, 224, 224, 3] in [0, 1], the same for both sides."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, MODELS[name][2]["vocab_size"], PROMPT)
    if MODELS[name][0] != "Idefics":
        return ids, np.zeros(PROMPT, int), np.zeros((0, 224, 224, 3), np.float32)
    phi = np.arange(PROMPT) * IMAGES // PROMPT + 1
    return ids, phi, rng.random((IMAGES, 224, 224, 3), np.float32)


def measure(side, name, folder, threads, new):
    """One side's {"tokens", "prefill_s", "ms_a_token", "peak_mb"}; call it in a fresh process."""
    with threadpool_limits(threads):
        found = {"numpy": _numpy, "transformers": _transformers}[side](name, folder, threads, new)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return found | {"peak_mb": peak}


def _numpy(name, folder, threads, new):
    model = load(open_checkpoint(Path(folder)))
    ids, phi, pixels = inputs(name)
    for most in (2, new):  # once to warm up
        clock = Clock()
        speaker = Speaker(model, PROMPT + most, pixels, clock)
        tokens = list(speak(speaker, ids, phi, most, clock=clock))
    prefill = clock.spent.get("eye", 0) + clock.spent["prefill"]
    return _result(tokens, prefill, clock.spent["tokens"], new)


def _transformers(name, folder, threads, new):
    torch, transformers = import_module("torch"), _transformers_alone()
    torch.set_num_threads(threads)
    model = getattr(transformers, MODELS[name][1]).from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    arguments, seconds = _arguments(torch, name), {}
    for most in (2, 1, new):
        start = time.perf_counter()
        with torch.inference_mode():
            tokens = model.generate(**arguments, max_new_tokens=most, do_sample=False)
        seconds[most] = time.perf_counter() - start
    return _result(tokens[0, PROMPT:].tolist(), seconds[1], seconds[new] - seconds[1], new)


def _transformers_alone():
    """The package, without its messages and progress bars."""
    transformers = import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _arguments(torch, name):
    """What generate() is given: ids, and for IDEFICS normalised pixels and its own mask."""
    ids, phi, pixels = inputs(name)
    given = {"input_ids": torch.from_numpy(ids[None])}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    if len(pixels):
        vit = import_module("miniflamingo.vit")
        pixels = (pixels - np.float32(vit.CLIP_MEAN)) / np.float32(vit.CLIP_STD)
        seen = phi[None, :, None] == np.arange(1, IMAGES + 1)
        given["pixel_values"] = torch.from_numpy(pixels.transpose(0, 3, 1, 2)[None].copy())
        given["image_attention_mask"] = torch.from_numpy(seen.astype(np.int64))
    return given


def _result(tokens, prefill, rest, new):
    each = 1e3 * rest / (new - 1)
    return {"tokens": list(map(int, tokens)), "prefill_s": prefill, "ms_a_token": each}


# --- the command ----------------------------------------------------------------------------------


def fresh(work, *arguments):
    """work(*arguments) in a process of its own."""
    (result,) = in_processes(1, work, *([argument] for argument in arguments), method="spawn")
    return result


def compare(name, threads, rounds, new, folder):
    """{side: medians, "ratio": numpy / transformers} of a model that lies in `folder`.

    Failed when the two do not write the same tokens.
    """
    found = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            found[side].append(fresh(measure, side, name, str(folder), threads, new))
    tokens = {json.dumps(one["tokens"]) for side in SIDES for one in found[side]}
    if len(tokens) > 1:
        raise Failed(f"{name}: transformers and NumPy write different tokens")
    keys = ("prefill_s", "ms_a_token", "peak_mb")
    row = {s: {k: statistics.median(one[k] for one in found[s]) for k in keys} for s in SIDES}
    ratio = {key: row["numpy"][key] / row["transformers"][key] for key in keys}
    return {"model": name, "threads": threads, **row, "ratio": ratio}


def bench(threads=(1, 2), rounds=3, new=32, larger=False, file=None):
    """Compare all models, print a line for each, write JSON where that is asked for."""
    require("torch", "transformers")
    outputs.check_file(file, COMMAND)
    rows = []
    print(f"{'':<22} threads   {'prefill s':^21} {'ms a token':^21} {'peak MB':^21}")
    print(f"{'':<32}" + f" {'theirs':>6} {'ours':>6} {'ratio':>6} " * 3)
    for name in MODELS if larger else SMALL:
        with tempfile.TemporaryDirectory() as folder:
            fresh(make, name, folder)
            for count in threads:
                rows.append(compare(name, count, rounds, new, folder))
                print(line(rows[-1]), flush=True)
    if file is not None:
        document = {"made_by": COMMAND} | about(rounds, new) | {"rows": rows}
        outputs.write_file(file, json.dumps(document, indent=1).encode(), COMMAND)


def line(row):
    """A comparison as text."""
    cells = ""
    for key, form in (("prefill_s", ".2f"), ("ms_a_token", ".1f"), ("peak_mb", ".0f")):
        theirs, ours = (format(row[side][key], form) for side in SIDES)
        cells += f" {theirs:>6} {ours:>6} {row['ratio'][key]:>6.2f} "
    return f"{row['model']:<22} {row['threads']:>7}  {cells}"


def about(rounds, new):
    """Where, when and with what it was measured."""
    packages = ("numpy", "torch", "transformers")
    return {
        "date": date.today().isoformat(), "machine": platform.machine(),
        "processor": _processor(), "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "rounds": rounds, "new_tokens": new, "prompt": PROMPT, "images": IMAGES,
    }  # fmt: skip


def _processor():
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
