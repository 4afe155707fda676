"""Fused Triton kernels for what is Flamingo's own, each checked against its NumPy twin.

Without a GPU the kernels run in Triton's interpreter, on CPU tensors and from the same source: that
is decided here, because TRITON_INTERPRET counts only if it is set before Triton is first imported.
This package imports everywhere; its kernels need torch and Triton, and the first import of one of
them says what is missing.
"""

import importlib.util
import os
import sys

from miniflamingo import command, rooms

command.starting()


def unavailable():
    """Why the kernels cannot be used here, in one sentence; None where they can."""
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"the kernels need {' and '.join(missing)}, not installed here ({sys.platform}; "
            'Triton exists for Linux): pip install "miniflamingo[kernels]"'
        )
    return None


def _choose_interpreter():
    """Set TRITON_INTERPRET=1 where torch sees no GPU, unless the user has decided."""
    if "TRITON_INTERPRET" in os.environ or unavailable():
        return
    import torch

    if not torch.cuda.is_available():  # true for AMD's GPUs too
        os.environ["TRITON_INTERPRET"] = "1"


if __name__ == "kernels":  # seen from the repository's root; that name is another package's
    rooms.give_way(__name__)
else:
    _choose_interpreter()
