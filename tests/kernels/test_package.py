"""Importing `miniflamingo.kernels`: with and without Triton, before and after it, as processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from miniflamingo import kernels

ROOT = Path(__file__).parent.parent.parent
needs_triton = pytest.mark.skipif(
    kernels.unavailable() is not None, reason=str(kernels.unavailable())
)

WITHOUT_TRITON = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find_spec(name, *a)
sys.modules["triton"] = None  # makes `import triton` fail
"""


def run_python(code, **environment):
    """(exit code, stdout, last line of stderr) of a program."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = {**clean, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8"
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip().splitlines()[-1:]


def test_imports_without_triton():
    code = WITHOUT_TRITON + "from miniflamingo import kernels; print(kernels.unavailable())"
    assert "need triton, not installed" in run_python(code)[1]


@pytest.mark.parametrize(
    "module",
    [
        "image_causal_attention",
        "resampler_attention",
        "decode_attention",
        "tools.compare",
        "tools.compile",
    ],
)
def test_a_kernel_without_triton_is_one_clear_error(module):
    status, _, error = run_python(WITHOUT_TRITON + f"import miniflamingo.kernels.{module}")
    assert status == 1 and error[0].startswith("ImportError: the kernels need triton")


def test_a_command_without_triton_is_one_line():
    code = WITHOUT_TRITON + "import sys, miniflamingo.__main__ as m; sys.exit(m.main(['compare']))"
    status, _, error = run_python(code)
    assert status == 2 and error[0].startswith("miniflamingo: error: the kernels need triton")


@needs_triton
def test_the_interpreter_is_chosen_only_without_a_gpu():
    code = "import miniflamingo.kernels, os, torch\nprint(os.environ.get('TRITON_INTERPRET'), "
    code += "torch.cuda.is_available())"
    assert run_python(code)[1] in ("1 False", "None True")


@needs_triton
def test_the_users_choice_stands():
    code = "import miniflamingo.kernels, os; print(os.environ['TRITON_INTERPRET'])"
    assert run_python(code, TRITON_INTERPRET="0")[1] == "0"


@needs_triton
def test_triton_must_not_come_first():
    code = "import triton, torch\nif torch.cuda.is_available(): print('gpu')\n"
    code += "import miniflamingo.kernels.common.runtime"
    status, out, error = run_python(code)
    if out == "gpu":
        pytest.skip("with a GPU the order does not matter")
    assert status == 1 and "import that first" in error[0]
