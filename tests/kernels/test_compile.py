"""Every kernel compiles for GPUs that are not here, and the committed table says what comes out."""

import ast
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from miniflamingo import kernels

if kernels.unavailable():
    pytest.skip(kernels.unavailable(), allow_module_level=True)

from miniflamingo.__main__ import main
from miniflamingo.kernels.tools import compile as kernel_compile

ROOT = Path(kernels.__file__).parent
REFRESH = "renew the file: " + kernel_compile.RENEW


@pytest.fixture(scope="module")
def committed():
    """The committed table: (meta, records)."""
    assert kernel_compile.COMMITTED.exists(), REFRESH
    return kernel_compile.read_json(kernel_compile.COMMITTED)


@pytest.fixture(scope="module")
def records(committed):
    """Its records."""
    return committed[1]


@pytest.fixture(scope="module")
def compiler():
    """Skips where kernels cannot be compiled."""
    code = "from miniflamingo.kernels.tools import compile; print(compile.missing() or '')"
    reason = run_python(code).stdout.strip()
    if reason:
        pytest.skip(reason)


def run_python(code):
    """Run a program in a process that compiles kernels instead of interpreting them."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT.parent)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8"
    )


def launched_kernels(calls=None):
    """The @triton.jit functions of kernels/ that are launched: those that no other one calls.

    calls: only those in which this function is called, by themselves or by what they call.
    """
    functions = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            decorators = getattr(node, "decorator_list", [])
            if any(ast.unparse(d) == "triton.jit" for d in decorators):
                found = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
                functions[node.name] = {n.id for n in found if isinstance(n, ast.Name)}
    launched = functions.keys() - set().union(*functions.values())
    return {n for n in launched if calls is None or calls in reached(n, functions)}


def reached(name, functions):
    """All that a function calls, directly or not."""
    found, new = set(), {name}
    while new:
        found |= new
        new = set().union(*(functions.get(n, set()) for n in new)) - found
    return found


# --- the committed table ------------------------------------------------------------------------


def test_the_committed_table_is_of_these_sources(committed):
    assert kernel_compile.stale(committed[0]) is None


def test_compiling_again_gives_the_committed_table(compiler):
    command = [sys.executable, "-m", "miniflamingo", "compile", "--check"]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    if "compilers are others" in done.stdout:
        pytest.skip(done.stdout.splitlines()[-1])
    assert "compiled again: the file's figures" in done.stdout


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_the_table_has_every_kernel_and_every_size(records, dtype, target):
    mine = [r for r in records if (r["dtype"], r["target"]) == (dtype, target)]
    assert {r["kernel"] for r in mine} == launched_kernels(), REFRESH
    found = {(r["kernel"], r["K"], r["R"]) for r in mine}
    sizes = {R for _, _, R in found}
    assert sizes >= ({64, 256} if dtype == "fp16" else {1, 32, 64, 100, 256})
    for K, R in product((32, 64, 80, 96, 128), sizes - {8}):  # R = 8 is with a narrow head alone
        for kernel, _, _ in kernel_compile.record_launches(dtype, K, R):
            assert (kernel.__name__, K, R) in found, REFRESH


def test_nothing_in_the_table_spills_or_is_repeated(records):
    limits = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
    for record in records:
        assert (record["spilled"], record["repeated"]) == (0, 0), record
        assert record["shared"] <= limits[record["target"]], record
        assert record["programs"] >= 1, record


def test_tensor_cores_are_used_where_there_is_a_product(records):
    """In float32 by gfx942 alone, whose matrix instructions take float32 as it is."""
    products, types = launched_kernels(calls="dot"), {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
    assert {"_forward", "_backward"} <= products and "_sum_partials" not in products
    for record in records:
        amd = record["target"] == "gfx942"
        expected = record["kernel"] in products and (amd or record["dtype"] != "fp32")
        names = {f"v_mfma_{types[record['dtype']]}"} if amd else {"HMMA", "HGMMA"}
        assert bool(record["tensor"]) == expected and set(record["tensor"]) <= names, record
        assert record["target"] != "sm_80" or "HGMMA" not in record["tensor"], record


def test_loads_are_128_bits_wide_where_a_tile_has_as_much_for_every_thread(records):
    """Where K is no multiple of 16, Triton does not know that rows are aligned."""
    for record in (r for r in records if r["K"] in kernel_compile.WIDTHS):
        options = dict(record["options"])
        warp = 64 if record["target"] == "gfx942" else 32
        threads = options.pop("num_warps") * warp
        columns = options.pop("BLOCK_K", 0) or options.pop("BLOCK_I", 1)
        rows = max(size for name, size in options.items() if name.startswith("BLOCK"))
        # what these two read is float32
        partials = record["kernel"] in ("_sum_partials", "_resample_merge")
        itemsize = 4 if partials or record["dtype"] == "fp32" else 2
        wide = rows * columns * itemsize >= 16 * threads
        assert (record["loads128"] > 0) == wide, record


def test_the_readme_quotes_the_table(records):
    rows = [row.split(" | ") for row in (ROOT / "README.md").read_text("utf-8").splitlines()]
    rows = [row for row in rows if row[0].startswith("| `_")]
    found = {r["kernel"]: r for r in records if picked(r)}
    assert {row[0][3:-1] for row in rows} == {name for name, r in found.items() if r["tensor"]}
    for name, _, registers, shared, warps, tensor in rows:
        record = found[name[3:-1]]
        assert [int(registers), int(warps)] == [record["registers"], record["warps"]]
        assert int(shared) == round(record["shared"] / 1024)
        assert tensor == " ".join(f"{n} {code}" for code, n in record["tensor"].items()) + " |"


def picked(record):
    """Whether the README's table has it: the paper's R, or the largest for the kernels of such."""
    R = 256 if record["kernel"] == "_backward_dq" else 64
    case = ("bf16", 128, R, "sm_90")
    return tuple(record[k] for k in ("dtype", "K", "R", "target")) == case


# --- the digest ---------------------------------------------------------------------------------


def test_the_digest_is_of_the_files_with_kernels(tmp_path):
    kernel, other = tmp_path / "kernel.py", tmp_path / "layers.py"
    kernel.write_text("x = 1\n@triton.jit\ndef _kernel(): pass\n", "utf-8")
    first = kernel_compile.digest(tmp_path)
    other.write_text("x = 1\n", "utf-8")
    assert kernel_compile.digest(tmp_path) == first
    kernel.write_text("x = 2\n@triton.jit\ndef _kernel(): pass\n", "utf-8")
    assert kernel_compile.digest(tmp_path) != first


@pytest.fixture
def replace_committed(committed, monkeypatch, tmp_path):
    """Let a file stand in for the committed one, with other entries in its meta."""

    def replace(**changes):
        document = json.loads(kernel_compile.COMMITTED.read_text("utf-8"))
        document["meta"] |= changes
        (tmp_path / "compiled.json").write_text(json.dumps(document), "utf-8")
        monkeypatch.setattr(kernel_compile, "COMMITTED", tmp_path / "compiled.json")

    return replace


def test_a_stale_table_names_the_command(replace_committed, capsys):
    replace_committed(digest="0")
    assert kernel_compile.check_committed(full=False) == 1
    assert kernel_compile.RENEW in capsys.readouterr().out


def test_other_compilers_are_not_compared(replace_committed, capsys):
    replace_committed(triton="0.0", digest=kernel_compile.digest())
    assert kernel_compile.check_committed(full=False) == 0
    assert "not compiled again" in capsys.readouterr().out


def test_a_table_that_differs_is_seen():
    result = example()
    same = result.record()
    assert list(kernel_compile.differences([same], [result])) == []
    [changed] = kernel_compile.differences([same | {"registers": 33}], [result])
    assert changed == "k bf16 64 64 sm_90 num_warps=4: registers is 32, in the file 33"
    assert len([*kernel_compile.differences([], [result])]) == len(same)


# --- occupancy ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "registers", "shared", "num_warps", "expected"),
    [
        # 512 / 80 = 6 warps of a scheduler, one of each program
        ("sm_90", 80, 24576, 4, (6, "registers")),
        ("sm_90", 73, 24576, 4, (6, "registers")),  # 73 become 80
        ("sm_90", 72, 24576, 4, (7, "registers")),
        ("sm_90", 255, 0, 8, (1, "registers")),  # two warps of a scheduler, of one program
        ("sm_90", 255, 0, 4, (2, "registers")),
        ("sm_90", 32, 0, 4, (16, "warps")),
        ("sm_90", 32, 0, 8, (8, "warps")),
        ("sm_90", 32, 0, 1, (32, "programs")),
        ("sm_90", 64, 48 * 1024, 4, (4, "shared")),  # 228 / 49 = 4.65
        ("sm_80", 64, 48 * 1024, 4, (3, "shared")),  # 164 / 49 = 3.3
        ("sm_80", 64, 40 * 1024, 4, (4, "shared")),  # 164 / 41 = 4
        ("sm_80", 64, 40 * 1024 + 1, 4, (3, "shared")),
        ("sm_80", 168, 16, 4, (3, "registers")),
        ("gfx942", 194, 8192, 4, (2, "registers")),
        ("gfx942", 512, 0, 4, (1, "registers")),
        ("gfx942", 64, 0, 4, (8, "warps")),
        ("gfx942", 64, 16 * 1024 + 1, 4, (3, "shared")),
        ("gfx942", 64, 64 * 1024, 4, (1, "shared")),
        ("gfx942", 16, 0, 2, (16, "warps")),
        ("gfx942", 128, 0, 8, (2, "registers")),
    ],
)
def test_occupancy(target, registers, shared, num_warps, expected):
    assert kernel_compile.resident(target, registers, shared, num_warps) == expected


def example(num_warps=4, **fields):
    base = dict(kernel="k", dtype="bf16", K=64, R=64, target="sm_90")
    base |= dict(repeated=0, registers=32, spilled=0, shared=0, loads=3, loads128=2, tensor={})
    base["options"] = dict(num_warps=num_warps)
    return kernel_compile.Compiled(**{**base, **fields})


def test_warps_are_of_an_sm_and_waves_of_a_simd():
    record = example(registers=128, num_warps=8).record()
    assert (record["programs"], record["warps"], record["most_warps"]) == (2, 16, 64)
    record = example(registers=128, num_warps=8, target="gfx942").record()
    assert (record["programs"], record["warps"], record["most_warps"]) == (2, 4, 8)


def test_the_products_use_tensor_cores():
    reason = run_python(
        "from miniflamingo.kernels.tools import compile; print(compile.missing() or '')"
    ).stdout.strip()
    if reason:
        pytest.skip(reason)
    code = """
from miniflamingo.kernels import image_causal_attention
from miniflamingo.kernels.tools import compile as c
c.EXAMPLES, driver = (image_causal_attention.launch_examples,), c._Driver()
c.triton.runtime.driver.set_active(driver)
for dtype, target, found in (("bf16", "sm_80", "mma.sync"), ("fp16", "sm_90", "wgmma.mma_async")):
    driver.device = target
    for kernel, args, options in c.record_launches(dtype, 128, 64):
        own = c.options_for_target(options, target)
        ptx = kernel.warmup(*args, grid=(1,), **own).asm["ptx"]
        print(kernel.__name__, found in ptx)
"""
    done = run_python(code)
    lines = done.stdout.splitlines()
    for line in ("_forward True", "_backward True", "_sum_partials False"):
        assert lines.count(line) == 2, done.stdout + done.stderr


def test_shared_memory_must_fit():
    assert example(target="gfx942", shared=64 * 1024).ok
    assert not example(target="gfx942", shared=64 * 1024 + 1).ok
    assert example(target="sm_90", shared=64 * 1024 + 1).ok
    assert not example(spilled=8).ok and " NO " in str(example(spilled=8))
    assert not example(repeated=1).ok


def test_registers_and_waves_are_those_that_llvm_reports(compiler):
    code = r"""
import re
from miniflamingo.kernels.tools import compile as c
for name, options, target, binary in c.binaries(
    ("bf16", 64, 64), {"_decode", "_forward", "_resample_merge"}, ("gfx942",)
):
    text, read = binary.asm["amdgcn"], c._read_amd(binary)
    find = lambda field: int(re.search(rf"; {field}: (\d+)", text).group(1))
    # the assembler does not know the shared memory, which is given at launch
    waves, _ = c.resident("gfx942", read["registers"], 0, 4)
    print(name, find("TotalNumVgprs") == read["registers"], find("Occupancy") == waves)
"""
    done = run_python(code)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {line[0] for line in lines} == {"_decode", "_forward", "_resample_merge"}, done.stderr
    assert all(line[1:] == ["True", "True"] for line in lines), done.stdout


# --- the command --------------------------------------------------------------------------------


def test_a_spill_is_seen(compiler):
    code = """
from miniflamingo.kernels import image_causal_attention as ica
from miniflamingo.kernels.tools import compile as c
ica.OWN.clear()
ica.OPTIONS["_backward", False, True, False] = (64, 4, 64, 1)
[result] = c.compile_one(("bf16", 128, 64), {"_backward"}, ("sm_90",))
print(result.ok, result.repeated, result.spilled > 0)
"""
    done = run_python(code)
    assert done.stdout.strip() == "False 0 True", done.stdout + done.stderr


def test_a_repeated_tile_is_seen(compiler):
    """Eight warps have 16 rows each of a product: of one with 64 rows, half of them too many."""
    code = """
from miniflamingo.kernels.tools import compile as c
from miniflamingo.kernels import image_causal_attention as ica
ica.OPTIONS["_forward", False, False, False] = (64, 8, 64, 1)
[result] = c.compile_one(("bf16", 64, 64), {"_forward"}, ("sm_90",))
print(result.ok, result.repeated, result.spilled)
"""
    done = run_python(code)
    assert done.stdout.strip() == "False 1 0", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kind", "warps", "rest", "shape", "expected"),
    [
        ("nvidia_mma", "4, 1", "instrShape = [16, 32, 16]", "64x32", 0),
        ("nvidia_mma", "8, 1", "instrShape = [16, 32, 16]", "64x32", 1),
        ("nvidia_mma", "1, 8", "instrShape = [16, 8]", "64x32", 1),
        ("nvidia_mma", "2, 4", "instrShape = [16, 8]", "64x32", 0),
        ("amd_mfma", "4, 1", "instrShape = [32, 32, 8]", "64x64", 1),
        ("amd_mfma", "4, 1", "instrShape = [16, 16, 16]", "64x64", 0),
        ("blocked", "4, 1", "sizePerThread = [4, 4], threadsPerWarp = [2, 16]", "32x64", 0),
        ("blocked", "8, 1", "sizePerThread = [4, 4], threadsPerWarp = [2, 16]", "32x64", 1),
    ],
)
def test_a_layout_that_repeats_a_tile(kind, warps, rest, shape, expected):
    ttgir = f"""#mma = #ttg.{kind}<{{version = 3, warpsPerCTA = [{warps}], {rest}}}>
    %p = tt.dot %q, %k, %zero : tensor<1x1xbf16> * tensor<1x1xbf16> -> tensor<{shape}xf32, #mma>
    %x = tt.trans %p : tensor<{shape}xf32, #mma> -> tensor<1x1xf32, #mma>
"""
    assert kernel_compile.repeated_tiles(ttgir) == expected


def test_every_kernel_is_usual_and_sampled_for_one_target():
    samples = kernel_compile.samples(kernel_compile.USUAL)
    assert sorted(name for _, [name], _ in samples) == sorted(launched_kernels())
    assert {target for _, _, [target] in samples} == set(kernel_compile.TARGETS)


def test_the_table_can_be_written_and_read(tmp_path, committed):
    results = [example(), example(tensor={"HMMA": 4})]
    kernel_compile.write_json(tmp_path / "t.json", results)
    meta, records = kernel_compile.read_json(tmp_path / "t.json")
    assert records == [result.record() for result in results]
    assert meta.keys() == committed[0].keys()
    assert kernel_compile.stale(meta) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check", "--json", "t.json"], "--check and --json exclude each other"),
        (["--json", "no/such/folder/t.json"], "expected a file in a folder that exists"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys):
    assert main(["compile", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_interpreter_cannot_compile():
    if not kernel_compile.INTERPRET.value:
        pytest.skip("the kernels are compiled in this process")
    assert "TRITON_INTERPRET=0" in kernel_compile.missing()
