"""Flamingo (Alayrac et al., 2022, arXiv 2204.14198) from scratch in NumPy.

Start reading at `xattn.py`; `flamingo.py` is the whole model on a page.
"""

import sys

from miniflamingo import command, rooms

command.starting()
sys.meta_path.insert(0, rooms.Beside)

from miniflamingo.flamingo import Flamingo, FlamingoConfig
from miniflamingo.prompt import WordTokenizer, build_batch
from miniflamingo.xattn import GatedCrossAttentionDense, image_causal_attention

__all__ = [
    "Flamingo",
    "FlamingoConfig",
    "GatedCrossAttentionDense",
    "WordTokenizer",
    "build_batch",
    "image_causal_attention",
]
