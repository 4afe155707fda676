"""The devices on which a kernel test runs."""

import pytest


@pytest.fixture(params=["interpreter", "gpu"])
def device(request):
    """ "cpu" under Triton's interpreter, "cuda" on a GPU; the one that is not at hand is skipped."""
    from kernels.runtime import INTERPRET

    if request.param == "gpu" and INTERPRET.value:
        pytest.skip("no GPU that torch can use (or TRITON_INTERPRET is set)")
    if request.param == "interpreter" and not INTERPRET.value:
        pytest.skip("the kernels are compiled for the GPU here, not interpreted")
    return "cuda" if request.param == "gpu" else "cpu"
