"""Hypothesis draws the same shapes in every run, so that a red test stays red."""

from pathlib import Path

import pytest
from hypothesis import settings

from miniflamingo import kernels  # noqa: F401  (first: it decides on the interpreter before torch brings Triton)

HERE = Path(__file__).parent
HELPERS = [
    "tests." + ".".join(file.relative_to(HERE).with_suffix("").parts)
    for file in sorted(HERE.rglob("*.py"))
    if not file.stem.startswith(("test_", "conftest", "__"))
]
# their assertions speak as the tests' own do, and hold under PYTHONOPTIMIZE, too
pytest.register_assert_rewrite(*HELPERS)

settings.register_profile("house", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("house")
