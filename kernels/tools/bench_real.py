"""The real Flamingo writes beside a SmolLM2 in transformers, in one run.

    python -m miniflamingo real speed --json speed.json

Three sides, each in a process of its own, in turns: a random model of SmolLM2-135M's sizes in
transformers, the same in NumPy, which must write the same tokens (`bench-generate`), and the NumPy
Flamingo of real parts with pictures in its prompt. Needs torch, transformers and the parts.
"""

import json
import statistics
import tempfile

import numpy as np
from threadpoolctl import threadpool_limits

from miniflamingo.command import Failed
from miniflamingo.interop.generation import Clock, Speaker, speak
from miniflamingo.real import model as models
from miniflamingo.real.documents import BOS
from miniflamingo.real.pictures import SIZE

from . import bench_generate as bench

LM = "Llama, SmolLM2-135M"  # of bench.MODELS
SIDES = ("SmolLM2, transformers", "SmolLM2, NumPy", "the real Flamingo, NumPy")
NEW, IDS = 32, (100, 40000)  # tokens written, and of what the prompt is made


def measure(folder, threads):
    """bench.result of the real Flamingo; call it in a fresh process."""
    with threadpool_limits(threads):
        model, rng = models.load_bridge(folder)[0], np.random.default_rng(0)
        ids = np.array([BOS, *rng.integers(*IDS, bench.PROMPT - 1)])
        phi = np.arange(len(ids)) * bench.IMAGES // len(ids) + 1
        pixels = rng.random((bench.IMAGES, SIZE, SIZE, 3), np.float32)
        for most in (2, NEW):  # once to warm up
            clock = Clock()
            speaker = Speaker(model, len(ids) + most, pixels, clock)
            tokens = list(speak(speaker, ids, phi, most, clock=clock))
    prefill = clock.spent["eye"] + clock.spent["prefill"]
    return bench.result(tokens, prefill, clock.spent["tokens"], NEW)


def run(parts, threads=1, rounds=3):
    """-> {side: medians, with the milliseconds a token over transformers' as "ratio"}; Failed where
    the two that read the same text write something else."""
    found = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        bench.fresh(bench.make, LM, folder)
        for _ in range(rounds):
            for side, kind in zip(SIDES, ("transformers", "numpy")):
                found[side].append(bench.fresh(bench.measure, kind, LM, folder, threads, NEW))
            found[SIDES[2]].append(bench.fresh(measure, str(parts), threads))
    if len({json.dumps(one["tokens"]) for side in SIDES[:2] for one in found[side]}) > 1:
        raise Failed("transformers and NumPy write different tokens")
    keys = ("prefill_s", "ms_a_token")
    rows = {side: {k: statistics.median(one[k] for one in found[side]) for k in keys}
            for side in SIDES}  # fmt: skip
    theirs = rows[SIDES[0]]["ms_a_token"]
    return {side: row | {"ratio": row["ms_a_token"] / theirs} for side, row in rows.items()}
