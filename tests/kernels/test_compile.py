"""Every kernel compiles for GPUs that are not here, without spilling a register."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

if kernels.unavailable():
    pytest.skip(kernels.unavailable(), allow_module_level=True)

from kernels import compile as kernel_compile

ROOT = Path(kernels.__file__).parent


def run_python(code):
    """Run a program in a process that compiles kernels instead of interpreting them."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT.parent)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def test_no_kernel_spills():
    reason = run_python(
        "from kernels import compile; print(compile.missing() or '')"
    ).stdout.strip()
    if reason:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-m", "kernels", "compile"],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:-1]]
    assert {row[0] for row in rows} == launched_kernels()
    assert {row[4] for row in rows} == set(kernel_compile.TARGETS)
    assert all(row[6] == "0" and row[-1] == "ok" for row in rows)


def launched_kernels():
    """The @triton.jit functions of kernels/ that are launched: those whose name begins with _."""
    names = set()
    for path in ROOT.glob("*.py"):
        if path.name != "runtime.py":  # helpers only
            for node in ast.parse(path.read_text()).body:
                decorators = getattr(node, "decorator_list", [])
                if any(ast.unparse(d) == "triton.jit" for d in decorators):
                    names |= {node.name} if node.name.startswith("_") else set()
    return names


def test_a_spill_is_seen():
    code = """
from kernels import compile as c, image_causal_attention as ica
ica.OPTIONS["_backward", True, False] = (64, 16)
results = c.compile_one(("bf16", 128, 64), ("sm_90",))
print([r.kernel for r in results if not r.ok])
"""
    done = run_python(code)
    assert done.stdout.strip() == "['_backward']", done.stdout + done.stderr


def test_the_products_use_tensor_cores():
    reason = run_python(
        "from kernels import compile; print(compile.missing() or '')"
    ).stdout.strip()
    if reason:
        pytest.skip(reason)
    code = """
from kernels import compile as c, gated_linear
c.EXAMPLES, driver = (gated_linear.launch_examples,), c._Driver()
c.triton.runtime.driver.set_active(driver)
for dtype, target, found in (("bf16", "sm_80", "mma.sync"), ("fp16", "sm_90", "wgmma.mma_async")):
    driver.device = target
    for kernel, args, options in c.record_launches(dtype, 128, 64):
        ptx = kernel.warmup(*args, grid=(1,), **options).asm["ptx"]
        print(kernel.__name__, found in ptx)
"""
    done = run_python(code)
    products = "_gated_linear True\n_gated_linear_dweight True\n_gate_dweight False\n"
    assert done.stdout == 2 * products, done.stdout + done.stderr


def test_shared_memory_must_fit():
    fits = dict(kernel="k", dtype="bf16", K=64, R=64, registers=32, spilled=0, options="")
    assert kernel_compile.Compiled(**fits, target="gfx942", shared=64 * 1024).ok
    assert not kernel_compile.Compiled(**fits, target="gfx942", shared=64 * 1024 + 1).ok
    assert kernel_compile.Compiled(**fits, target="sm_90", shared=64 * 1024 + 1).ok


def test_the_interpreter_cannot_compile():
    if not kernel_compile.INTERPRET.value:
        pytest.skip("the kernels are compiled in this process")
    assert "TRITON_INTERPRET=0" in kernel_compile.missing()
