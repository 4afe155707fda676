"""The settings of the model that names glyphs never seen: its stages, as they are trained."""

from dataclasses import replace

from miniflamingo.dialects import BlockConfig
from miniflamingo.fewshot.warm import WarmRun
from miniflamingo.training import MINI_LM, BridgeRun, LanguageRun, OptimiserConfig, VisionRun
from miniflamingo.worlds.glyph_texts import TOKENIZER

# two heads look back without regard to the distance: the shots may be far
LM = replace(MINI_LM, vocab_size=len(TOKENIZER), block=BlockConfig(head_dim=32),
             alibi_slopes=(1.0, 0.25, 0.0, 0.0))  # fmt: skip


def configs(seed, both=False):
    """{stage: its config}, of glyphs alone or, `both`, of shapes, questions and clips, too."""
    shapes = float(both)
    vision = OptimiserConfig(steps=2000, warmup=50, weight_decay=1e-3, beta2=0.999)
    bridge = BridgeRun(
        OptimiserConfig(steps=3000, rate=3e-3, alpha_rate=10.0), pictures=8, ways=(2, 4, 7, 7),
        glyph_weights=(1.0, 1.0), glyph_batches=(30, 64), seed=seed,
    )  # fmt: skip
    return {
        "lm": LanguageRun(
            OptimiserConfig(steps=1200), LM, weights=(shapes, 1.0), seed=seed, noise=0.3
        ),
        "vision": VisionRun(vision, weights=(shapes, 1.0), seed=seed),
        "warm": WarmRun(seed=seed),
        "flamingo": replace(bridge, weights=tuple(shapes * w for w in bridge.weights)),
    }
