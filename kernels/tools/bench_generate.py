"""The same random models generate in transformers and here, in one run: seconds and memory.

    python -m miniflamingo bench-generate [--json FILE] [--larger]
    python -m miniflamingo bench-generate --table    results/generate.json into the table

Three sides: transformers, the NumPy model, and its torch twin. Each works in a process of its own,
fresh for every round, with the same weights from the same files; the sides take turns, so that
whatever else the machine does disturbs all. All must write the same tokens. Needs torch and
transformers; on the CPU.
"""

import json
import os
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
RESULTS = Path(__file__).parents[1] / "results" / "generate.json"
README = Path(__file__).parents[2] / "miniflamingo" / "interop" / "README.md"
MARKERS = (
    "<!-- generate: made by `python -m miniflamingo bench-generate --table` -->\n",
    "<!-- end of generate -->",
)
IMAGES, PROMPT = 4, 64
SIDES = ("transformers", "numpy", "torch")
OURS = SIDES[1:]
KEYS = {"prefill_s": ".2f", "ms_a_token": ".1f", "peak_mb": ".0f"}


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
        work = {"numpy": _numpy, "transformers": _transformers, "torch": _torch}[side]
        found = work(name, folder, threads, new)
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
    return result(tokens, prefill, clock.spent["tokens"], new)


def _torch(name, folder, threads, new):
    torch = import_module("torch")
    torch.set_num_threads(threads)
    layers = import_module("miniflamingo.kernels.model.layers")
    model = load(open_checkpoint(Path(folder)))
    twin = getattr(layers, type(model).__name__)
    twin = twin.from_numpy(model) if hasattr(twin, "from_numpy") else _twin(torch, twin, model)
    del model
    with torch.inference_mode():
        for most in (2, new):
            seconds, tokens = _write(torch, layers, twin, name, most)
    return result(tokens, seconds[0], seconds[1] - seconds[0], new)


def _twin(torch, kind, model):
    """The twin of a LanguageModel, with its weights."""
    twin = kind(model.config)
    twin.load_state_dict({n: torch.from_numpy(x) for n, x in model.state_dict().items()})
    return twin


def _write(torch, layers, twin, name, most):
    """-> seconds until the first token and until the last, and the tokens."""
    start, seconds, tokens = time.perf_counter(), [], []
    ids, phi, pixels = (torch.from_numpy(x)[None] for x in inputs(name))
    length, media, sees = PROMPT + most, None, hasattr(twin, "read")
    if sees:
        media = twin.resampler(twin.encode(pixels[:, :, None]))
        cache = layers.Cache.of(twin, media, length)
    else:
        cache = layers.KeyValueCache.of(twin, 1, length)
    while len(tokens) < most:
        logits = (twin.read(ids, media, phi, cache=cache, last=True) if sees
                  else twin(ids, cache, last=True))  # fmt: skip
        ids, phi = logits.argmax(-1), phi[:, -1:]
        tokens.append(int(ids))
        seconds.append(time.perf_counter() - start)
    return (seconds[0], seconds[-1]), tokens


def _transformers(name, folder, threads, new):
    torch, transformers = import_module("torch"), _transformers_alone()
    torch.set_num_threads(threads)
    model = getattr(transformers, MODELS[name][1]).from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    arguments = _arguments(torch, name)
    for most in (2, new):
        written = Written()
        with torch.inference_mode():
            model.generate(**arguments, max_new_tokens=most, do_sample=False, streamer=written)
    first, last = written.seconds[0], written.seconds[-1]
    return result(written.tokens, first, last - first, new)


class Written:
    """A streamer for generate(): every token, and the seconds since the start when it came."""

    def __init__(self):
        self.start, self.seconds, self.tokens = time.perf_counter(), [], None

    def put(self, ids):
        """The prompt at first, then a token at a time."""
        if self.tokens is None:
            self.tokens = []
            return
        self.seconds.append(time.perf_counter() - self.start)
        self.tokens += ids.tolist()

    def end(self):
        """No token follows."""


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


def result(tokens, prefill, rest, new):
    """What all sides answer; the seconds of `rest` are for all but the first of `new` tokens."""
    each = 1e3 * rest / (new - 1)
    return {"tokens": list(map(int, tokens)), "prefill_s": prefill, "ms_a_token": each}


# --- the command ----------------------------------------------------------------------------------


def fresh(work, *arguments):
    """work(*arguments) in a process of its own."""
    (result,) = in_processes(1, work, *([argument] for argument in arguments), method="spawn")
    return result


def compare(name, threads, rounds, new, folder):
    """{side: medians, "ratio": {side of ours: ours / transformers}} of a model in `folder`.

    Failed when they do not write the same tokens.
    """
    found = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            found[side].append(fresh(measure, side, name, str(folder), threads, new))
    tokens = {json.dumps(one["tokens"]) for side in SIDES for one in found[side]}
    if len(tokens) > 1:
        raise Failed(f"{name}: transformers, NumPy and torch write different tokens")
    row = {s: {k: statistics.median(one[k] for one in found[s]) for k in KEYS} for s in SIDES}
    ratio = {s: {k: row[s][k] / row["transformers"][k] for k in KEYS} for s in OURS}
    return {"model": name, "threads": threads, **row, "ratio": ratio}


def run(threads, rounds, new_tokens, larger, file=None, table=False):
    """The command: compare all models, print the table, write JSON where that is asked for."""
    if table:
        return write_table()
    require("torch", "transformers")
    outputs.check_file(file, COMMAND)
    busy = os.getloadavg()[0]
    rows = list(bench(threads, rounds, new_tokens, larger))
    if file is not None:
        document = {"made_by": COMMAND} | about(rounds, new_tokens, busy) | {"rows": rows}
        outputs.write_file(file, json.dumps(document, indent=1).encode(), COMMAND)
    return 0


def bench(threads, rounds, new, larger):
    """Yield a row for each model and number of threads, and print its lines."""
    print(*HEAD, sep="\n", flush=True)
    for name in MODELS if larger else SMALL:
        with tempfile.TemporaryDirectory() as folder:
            fresh(make, name, folder)
            for count in threads:
                yield (row := compare(name, count, rounds, new, folder))
                print(line(row), flush=True)


HEAD = (
    "| model | threads | side | prefill s | ratio | ms a token | ratio | peak MB | ratio |",
    "|---|---|---|---|---|---|---|---|---|",
)


def line(row):
    """A comparison as lines of a Markdown table: one for each side."""
    lines = []
    for side in SIDES:
        cells = [row["model"], row["threads"], side]
        for key, form in KEYS.items():
            ratio = f"{row['ratio'][side][key]:.2f}" if side in OURS else "1"
            cells += [format(row[side][key], form), ratio]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def markdown(results):
    """The table of interop/README.md, from what results/generate.json holds."""
    v, much = results["versions"], "round" if results["rounds"] == 1 else "rounds"
    where = (f"{results['date']}, {results['processor']}, load before it {results['load']:.1f}, "
             f"Python {results['python']}, NumPy {v['numpy']}, torch {v['torch']}, transformers "
             f"{v['transformers']}, {results['rounds']} {much}:")  # fmt: skip
    return "\n".join([where, "", *HEAD, *map(line, results["rows"])]) + "\n"


def write_table():
    """Put the table into interop/README.md; returns the exit code."""
    text = markdown(json.loads(RESULTS.read_text("utf-8")))
    outputs.put_between(README, MARKERS, text)
    return 0


def about(rounds, new, load):
    """Where, when, how and with what it was measured."""
    how = {"rounds": rounds, "new_tokens": new, "prompt": PROMPT, "images": IMAGES, "load": load}
    return machine() | how


def machine():
    """Where, when and with what something is measured."""
    packages = ("numpy", "torch", "transformers")
    return {
        "date": date.today().isoformat(), "machine": platform.machine(),
        "processor": outputs.processor(), "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }  # fmt: skip
