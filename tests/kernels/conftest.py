"""The devices on which a kernel test runs."""

import pytest


@pytest.fixture(params=["interpreter", "gpu"])
def device(request):
    """The torch device: the CPU under Triton's interpreter, or a GPU; skips what is not here."""
    from miniflamingo.kernels.common.runtime import INTERPRET

    if request.param == "gpu" and INTERPRET.value:
        pytest.skip("no GPU that torch can use (or TRITON_INTERPRET is set)")
    if request.param == "interpreter" and not INTERPRET.value:
        pytest.skip("the kernels are compiled for the GPU here, not interpreted")
    return "cuda" if request.param == "gpu" else "cpu"


def pytest_runtest_setup(item):
    """torch's inductor writes C++ that does not compile where ATen has no vector instructions."""
    if "inductor" in item.name:
        import torch

        if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
            pytest.skip("inductor needs vector instructions, ATen's capability is DEFAULT here")
