"""The agreement table: ours beside other projects' own code, and what theirs get wrong.

    python -m tests.interop                      every case that tests/interop measures
    python -m tests.interop --json FILE          and its figures as JSON
    python -m tests.interop table --write        put what results.json says into its page, and
                                                 its faults where module 07 reads them

Worst differences of outputs, of the gradients of the inputs, and of those of all weights, in
float64: absolute for a part, for a whole model in units of the largest number of theirs. Through
the NumPy modules, their torch twins and the fused kernels. A peer is live, with its version, or,
where it is not installed, what it once computed (fixture); `make agreement` installs them beside.
Exit code 1 when something is above its tolerance. Needs torch and transformers.
"""

import datetime
import importlib.metadata
import json
import platform
import sys
from importlib import import_module
from pathlib import Path

from miniflamingo import kernels, outputs
from miniflamingo.command import Parser, a_path, require, run_command

RESULTS = Path(__file__).with_name("results.json")
ROOT = Path(__file__).parents[2]
README = ROOT / "miniflamingo" / "interop" / "README.md"
COURSE = ROOT / "notebooks" / "data" / "others_faults.json"  # module 07 prints it
MARKERS = (
    "<!-- interop: made by `python -m tests.interop table --write` -->\n",
    "<!-- end of interop -->",
)
COMMAND_LINE = "python -m tests.interop"
TESTS = ("bridges", "open_flamingo", "idefics", "mllama", "llama")  # whose cases() and faults()
WHAT = ("outputs", "inputs", "weights")
PACKAGES = ("flamingo_pytorch", "open_flamingo")  # the rest is transformers'
ROUTES = {"numpy": "NumPy", "torch": "torch", "fused": "fused"}


def collected(what):
    """Yield what the tests' functions of this name list."""
    for name in TESTS:
        yield from getattr(import_module(f"tests.interop.test_{name}"), what, list)()


def source(package, from_file):
    """ "fixture", or the package whose code runs, and its version."""
    if from_file:
        return "fixture"
    package = package if package in PACKAGES else "transformers"
    version = importlib.metadata.version(package)
    return f"live, {shown(package)} {version}"


def measured(case):
    """A Case as a row: {"through": {route: {what: error}}, ...}."""
    routes = [r for r in case.routes if r != "fused" or not kernels.unavailable()]
    through = {route: case.errors(route) for route in routes}
    tokens = None if case.same_tokens is None else bool(case.same_tokens())
    return {
        "package": case.package, "part": case.part, "case": case.name,
        "source": source(case.package, case.from_file), "tolerance": case.most,
        "through": through, "same_tokens": tokens, "ok": _ok(case, through, tokens),
    }  # fmt: skip


def _ok(case, through, tokens):
    errors = [error for found in through.values() for error in found.values()]
    return tokens is not False and all(error <= case.most for error in errors)


def faulty(fault):
    """A Fault as a row; ok is whether ours is free of it, and theirs has it."""
    found = fault.measure()
    ok = found["ours"] == fault.right and found["theirs"] > fault.right
    return {"package": fault.package, "fault": fault.name, **found, "ok": ok}


def about():
    """Where, when and with what it was measured."""
    found = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    names = ("numpy", "torch", "triton", "transformers", "flamingo-pytorch", "open-flamingo")
    return {
        "made_by": COMMAND_LINE, "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found.get(name, found.get(name.replace("-", "_"))) for name in names},
    }  # fmt: skip


# --- tables ---------------------------------------------------------------------------------------


def line(row):
    """A row of the agreement as a line for each route."""
    for route, errors in row["through"].items():
        numbers = " ".join(f"{errors[w]:>9.1e}" if w in errors else f"{'–':>9}" for w in WHAT)
        name = f"{row['package']}, {row['part']}, {row['case']}"
        tokens = {None: "", True: "equal", False: "DIFFER"}[row["same_tokens"]]
        mark = "" if row["ok"] else "  FAILED"
        yield (f"{name:<42} {route:<6} {numbers}  {row['tolerance']:>7.0e} {tokens:<7} "
               f"{row['source']}{mark}")  # fmt: skip


HEAD = f"{'':<42} {'':<6} {'outputs':>9} {'inputs':>9} {'weights':>9}  at most tokens"


def grouped(rows):
    """Yield (package, part, rows) of what can stand in one line."""
    keys = dict.fromkeys((r["package"], r["part"], r["tolerance"], r["source"]) for r in rows)
    for key in keys:
        yield [r for r in rows if (r["package"], r["part"], r["tolerance"], r["source"]) == key]


def markdown(results):
    """The two tables of interop/README.md, from what results.json holds."""
    v = results["versions"]
    lines = [f"{results['date']}, {results['machine']}, Python {results['python']}, torch "
             f"{v['torch']}, NumPy {v['numpy']}:", "",
             "| theirs | cases | outputs | gradients of inputs | of weights | at most | "
             "20 greedy tokens | through |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    lines += [_group(rows) for rows in grouped(results["rows"])]
    lines += ["", "| what theirs do | theirs | here |", "|---|---|---|"]
    lines += [f"| {shown(r['package'])}: {r['fault']} | {r['theirs']:.3g} | {r['ours']:g} |"
              for r in results["faults"]]  # fmt: skip
    return "\n".join(lines) + "\n"


def shown(package):
    """A project's name as it writes it."""
    return package.replace("_", "-")


def course(results):
    """The faults and their peers' versions, as the text of COURSE."""
    kept = {key: results[key] for key in ("made_by", "date", "versions", "faults")}
    return json.dumps(kept, indent=1) + "\n"


def _group(rows):
    first, cells = rows[0], []
    for what in WHAT:
        found = [e[what] for row in rows for e in row["through"].values() if what in e]
        cells.append(f"{max(found):.0e}" if found else "–")
    tokens = {None: "–", True: "equal", False: "differ"}[
        first["same_tokens"] and all(row["same_tokens"] for row in rows)
    ]
    routes = ", ".join(ROUTES[route] for route in first["through"])
    name = f"{shown(first['package'])}, {first['part']} ({first['source']})"
    cases = ", ".join(row["case"] for row in rows)
    cells = [name, cases, *cells, f"{first['tolerance']:.0e}", tokens, routes]
    return f"| {' | '.join(cells)} |"


# --- the command ----------------------------------------------------------------------------------


def run_all(arguments):
    """Measure everything, print a line for each case; 1 where something is not as it should be."""
    require("torch", "transformers")
    rows, faults = [], []
    print(HEAD, flush=True)
    for case in collected("cases"):
        rows.append(measured(case))
        print(*line(rows[-1]), sep="\n", flush=True)
    print()
    for fault in collected("faults"):
        faults.append(faulty(fault))
        f = faults[-1]
        mark = "" if f["ok"] else "  FAILED"
        print(f"{f['package']}: {f['fault']}: theirs {f['theirs']:.3g}, ours {f['ours']:g}{mark}")
    if arguments.json:
        document = about() | {"rows": rows, "faults": faults}
        data = (json.dumps(document, indent=1) + "\n").encode()
        outputs.write_file(arguments.json, data, COMMAND_LINE)
    return int(not all(row["ok"] for row in rows + faults))


def run_table(arguments):
    """Print the tables; with --write, put them there, and the faults into COURSE."""
    results = json.loads(RESULTS.read_text("utf-8"))
    text = markdown(results)
    if not arguments.write:
        print(text)
        return 0
    COURSE.write_text(course(results), "utf-8")
    outputs.put_between(README, MARKERS, text)
    return 0


COMMANDS = {"measure": run_all, "table": run_table}


def parser():
    """The command line's grammar."""
    top = Parser(prog=COMMAND_LINE, description=__doc__)
    top.add_argument("command", nargs="?", default="measure", choices=COMMANDS)
    top.add_argument("--json", type=a_path, metavar="FILE", help="also write the figures")
    top.add_argument("--write", action="store_true", help="put the tables into interop/README.md")
    return top


def run(arguments):
    """Run a parsed command; returns the exit code."""
    outputs.check_file(arguments.json, COMMAND_LINE)
    return COMMANDS[arguments.command](arguments)


def main(argv=None):
    """Run a command; returns the exit code."""
    return run_command("tests.interop", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
