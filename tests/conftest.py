"""Hypothesis draws the same shapes in every run, so that a red test stays red."""

import pytest
from hypothesis import settings

from miniflamingo import kernels  # noqa: F401  (first: it decides on the interpreter before torch brings Triton)

# their assertions speak as the tests' own do, and hold under PYTHONOPTIMIZE, too
pytest.register_assert_rewrite("tests.gradients", "tests.models")

settings.register_profile("house", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("house")
