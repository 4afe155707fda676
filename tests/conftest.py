"""Hypothesis draws the same shapes in every run, so that a red test stays red."""

from hypothesis import settings

settings.register_profile("house", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("house")
