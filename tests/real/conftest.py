"""The made-up parts, once for all tests of this folder."""

import pytest

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from tests.real.made import toy_features, toy_parts


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return toy_features(toy_parts(tmp_path_factory.mktemp("parts")))
