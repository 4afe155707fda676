"""`python -m miniflamingo plan` and `python -m miniflamingo scaling`: their options.

    python -m miniflamingo plan --model 80B --devices 16 --device h200
    python -m miniflamingo plan --paper       # the paper's own run, beside its 15 days
    python -m miniflamingo plan --fsdp2       # two processes, measured, beside the plan
    python -m miniflamingo scaling            # measured against length, images, frames, shots

All take --json FILE; kernels/results/ holds what the last three wrote.
"""

import json
import os
import platform
from dataclasses import asdict
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO

from miniflamingo import outputs, plots
from miniflamingo.command import Parser, a_path, exclude, real, require, some, whole
from miniflamingo.cost import devices, report, scaling
from miniflamingo.cost.counting import Sequence
from miniflamingo.cost.plan import MIXTURE, SHARDINGS, Layout, Plan, Training, quickest
from miniflamingo.flamingo import PRESETS, FlamingoConfig

PLAN = "python -m miniflamingo plan"
SCALING = "python -m miniflamingo scaling"
PEERS = ("flamingo-pytorch", "open-flamingo")
PAPER_DAYS = 15  # the paper, appendix: the 80B model, 1,536 TPUv4
DEFAULTS = {"model": "80B", "devices": 16, "device": "h200", "batch": 256, "mixture": False}
# one sequence of each data set a device is chosen, not the paper's: it states no batch sizes
PAPER = {"model": "80B", "devices": 1536, "device": "tpuv4", "tensor": 16, "sharding": "zero1",
         "batch": 1536, "mixture": True}  # fmt: skip
TRAINING = ("steps", "precision", "trained", "gradients", "utilisation", "overlap", "reserve")
SHAPE = ("tokens", "images", "frames")
FSDP2 = Layout(2, sharding="fsdp2")  # what kernels/model/resident.py measures


def plan_parser():
    """The grammar of `plan`."""
    top = Parser(prog=PLAN, description=__doc__)
    top.add_argument("--model", help=f"{', '.join(PRESETS)}; 80B by default")
    top.add_argument("--devices", type=whole(1, 10**6), help="16 by default")
    top.add_argument("--device", help=f"{', '.join(devices.DEVICES)}; h200 by default")
    text = "without these three: each way alone, over all devices, as columns"
    top.add_argument("--tensor", type=whole(1, 10**4), help=f"devices a matrix is cut over; {text}")
    top.add_argument("--pipeline", type=whole(1, 10**4), help="stages of consecutive blocks")
    top.add_argument("--sharding", choices=SHARDINGS, help="of data-parallel groups; zero1")
    _add_data(top)
    _add_choices(top)
    top.add_argument("--paper", action="store_true", help="1,536 TPUv4, 16-way tensor, ZeRO-1")
    text = "measure what two processes of the mini model hold, beside the plan"
    top.add_argument("--fsdp2", action="store_true", help=text)
    top.add_argument("--json", type=a_path, help="write the plan to this file")
    top.add_argument("--plot", type=a_path, help="draw the memory into this PNG file")
    return top


def _add_data(top):
    top.add_argument("--batch", type=whole(1, 10**7), help="sequences of each data set; 256")
    text = "sequences at a time in each group; by default the quickest of those that fit"
    top.add_argument("--micro-batch", type=whole(1, 10**7), help=text)
    for name, most in zip(SHAPE, (10**6, 10**4, 10**4)):
        default = getattr(Sequence(256, 5), name)
        top.add_argument(f"--{name}", type=whole(0 if name == "images" else 1, most),
                         help=f"of a sequence; {default} by default")  # fmt: skip
    text = "one batch each of pages, two kinds of pairs and videos, as in the paper"
    top.add_argument("--mixture", action="store_true", default=None, help=text)
    top.add_argument("--steps", type=whole(1, 10**9), help="500,000 by default")


def _add_choices(top):
    for name, what in (("precision", "products, activations, frozen numbers; bf16"),
                       ("trained", "how trained numbers are stored; fp32"),
                       ("gradients", "how gradients are stored; bf16")):  # fmt: skip
        top.add_argument(f"--{name}", choices=("bf16", "fp32"), help=what)
    top.add_argument("--no-recompute", dest="recompute", action="store_false",
                     help="keep all activations")  # fmt: skip
    top.add_argument("--plain-attention", dest="fused", action="store_false",
                     help="attention that keeps its weights")  # fmt: skip
    top.add_argument("--kept-features", dest="eye", action="store_false",
                     help="the frozen eye's features come from disk")  # fmt: skip
    top.add_argument("--no-positions", dest="positions", action="store_false",
                     help="no matrix for relative positions in the LM's blocks")  # fmt: skip
    share = real(0, 1, above=True)
    top.add_argument("--utilisation", type=share, help="of the peak; 0.5")
    top.add_argument("--overlap", type=real(0, 1), help="of computing that hides data-parallel "
                     "communication; 1")  # fmt: skip
    top.add_argument("--reserve", type=real(0, 0.99), help="of memory that is left free; 0.1")


def run_plan(argv):
    """Parse and run `plan`; returns the exit code."""
    arguments = plan_parser().parse_args(argv)
    for name in SHAPE:
        exclude(arguments, ("--mixture", f"--{name}"))
    exclude(arguments, ("--paper", "--fsdp2"), ("--fsdp2", "--plot"))
    outputs.check_file(arguments.json, PLAN)
    outputs.check_file(arguments.plot, PLAN, "--plot")
    document = measure_fsdp2() if arguments.fsdp2 else planned(arguments)
    if arguments.json:
        write(document, arguments.json, PLAN)
    return 0


def choices(arguments):
    """{option: value} with the defaults, the paper's or the command's own, filled in."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    if any(name in given for name in SHAPE):
        given["mixture"] = False
    return DEFAULTS | (PAPER if arguments.paper else {}) | given


def training_of(chosen, model):
    """The Training that chosen options describe."""
    sequences = tuple(MIXTURE.values())
    if not chosen["mixture"]:
        sequences = (Sequence(*(chosen.get(name, getattr(Sequence(256, 5), name))
                                for name in SHAPE)),)  # fmt: skip
    names = (*TRAINING, "micro_batch", "recompute", "fused", "eye", "batch")
    own = {name: chosen[name] for name in names if name in chosen}
    return Training(sequences, positions=chosen["positions"] and model != "mini", **own)


def layouts(chosen):
    """{name: Layout options}: the one that was asked for, or each way alone."""
    count, ways = chosen["devices"], ("tensor", "pipeline", "sharding")
    if given := {way: chosen[way] for way in ways if way in chosen}:
        sizes = [f"{way} {given[way]}" for way in ways[:2] if given.get(way, 1) > 1]
        return {" ".join([*sizes, given.get("sharding", "zero1")]): given}
    ways = {"ZeRO-1": {"sharding": "zero1"}, "FSDP2": {"sharding": "fsdp2"}}
    return ways | {f"tensor {count}": {"tensor": count}, f"pipeline {count}": {"pipeline": count}}


def plans_of(chosen):
    """{column: Plan, or why there is none}; ValueError where there is none at all."""
    config, device = FlamingoConfig.preset(chosen["model"]), devices.find(chosen["device"])
    training, plans = training_of(chosen, chosen["model"]), {}
    make = Plan if "micro_batch" in chosen else quickest
    for name, options in layouts(chosen).items():
        try:
            layout = Layout(chosen["devices"], **options)
            plans[name] = make(config, training, layout, device)
        except ValueError as error:
            plans[name] = str(error)
    if all(isinstance(plan, str) for plan in plans.values()):
        raise ValueError(next(iter(plans.values())))
    return plans


def planned(arguments):
    """Print the plan and draw it where that is asked for -> the JSON document's fields."""
    chosen = choices(arguments)
    plans = plans_of(chosen)
    print("\n".join(report.table(chosen["model"], chosen["device"], plans)))
    made = {name: plan for name, plan in plans.items() if not isinstance(plan, str)}
    document = {"model": chosen["model"], "device": chosen["device"],
                "plans": {name: as_data(plan) for name, plan in made.items()}}  # fmt: skip
    if arguments.paper:
        plan = next(iter(made.values()))
        document["paper"] = report.paper_check(plan, PAPER_DAYS)
        print("\n".join(report.paper_lines(plan, document["paper"])))
    if arguments.plot:
        draw(plots.plot_plan(document), arguments.plot, PLAN)
    return document


def draw(figure, file, command):
    """A figure into a PNG file that says who made it."""
    picture = BytesIO()
    figure.savefig(picture, format="png", metadata={"made_by": command})
    outputs.write_file(file, picture.getvalue(), command, "--plot")


def write(document, file, command):
    """A document into a JSON file that says who made it, where, when and with what."""
    text = json.dumps({"made_by": command, **about(), **document}, indent=1)
    outputs.write_file(file, text.encode(), command)


def as_data(plan):
    """A Plan as JSON values: what was chosen, and all figures, bytes, flops and seconds."""
    training = asdict(plan.training)
    return {
        "training": training, "layout": asdict(plan.layout), "device": asdict(plan.device),
        "parameters": plan.parameters(), "memory": plan.memory(), "room": plan.room(),
        "fits": plan.fits(), "activations": {
            "recomputed": plan.activations(True), "kept": plan.activations(False)},
        "flops": {part: count._asdict() for part, count in plan.flops().items()},
        "sent": {name: sent._asdict() for name, sent in plan.sent().items()},
        "seconds": plan.seconds(), "days": plan.days(),
        "model_utilisation": plan.model_utilisation(),
        "assumptions": list(report.assumptions(plan)),
    }  # fmt: skip


def measure_fsdp2():
    """Measure the mini model on two processes, and print it beside the plan -> the document."""
    require("torch")
    resident, rows = import_module("miniflamingo.kernels.model.resident"), {}
    config, sequences = PRESETS["mini"], (Sequence(12, 2),)
    for precision in ("fp32", "bf16"):
        training = Training(sequences, 2, precision=precision, gradients="fp32", eye=False,
                            positions=False)  # fmt: skip
        plan = Plan(config, training, FSDP2, devices.find("h200"))
        rows[precision] = report.measured_rows(plan, resident.measure(config, precision))
        print("\n".join(report.measured_lines(precision, rows[precision])), flush=True)
    return {"fsdp2": rows}


# --- scaling --------------------------------------------------------------------------------------


def scaling_parser():
    """The grammar of `scaling`."""
    top = Parser(prog=SCALING, description=scaling.__doc__)
    text = "larger sizes, and the memory of all sides: some minutes"
    top.add_argument("--full", action="store_true", help=text)
    top.add_argument("--repeats", type=whole(2, 1000), default=5, help="of each measurement")
    top.add_argument("--case", metavar="TEXT", default="", help="only cases with TEXT in them")
    top.add_argument("--json", type=a_path, help="write the figures to this file")
    top.add_argument("--plot", type=a_path, help="draw them into this PNG file")
    return top


def run_scaling(argv):
    """Parse and run `scaling`; returns the exit code."""
    arguments = scaling_parser().parse_args(argv)
    if not (names := [name for name in scaling.CASES if arguments.case in name]):
        known = some(scaling.CASES, "; ")
        raise ValueError(f"--case: expected part of one of: {known}; got {arguments.case!r}")
    outputs.check_file(arguments.json, SCALING)
    outputs.check_file(arguments.plot, SCALING, "--plot")
    document = measured(names, arguments.full, arguments.repeats)
    if arguments.json:
        write(document, arguments.json, SCALING)
    if arguments.plot:
        draw(plots.plot_scaling(document), arguments.plot, SCALING)
    return 0


def measured(names, full, repeats):
    """Measure cases by name, printing the table of each -> the JSON document's fields."""
    (more, missing), cases = scaling.others(), []
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # Windows has none
    for side, reason in missing.items():
        print(f"without {side}: {reason}")
    held = scaling.all_growth(names, full) if full else {}
    for name in names:
        rows = scaling.measure(scaling.CASES[name], full, repeats, more)
        growth = held.get(name, {})
        rows = [row | {"growth": growth.get((row["size"], row["side"]))} for row in rows]
        cases.append(scaling.summarise(scaling.CASES[name], rows))
        print("\n".join(report.scaling_lines(cases[-1])), flush=True)
    return {"full": full, "repeats": repeats, "load": load, "left_out": missing, "cases": cases}


# --- of both --------------------------------------------------------------------------------------


def about():
    """Where, when and with what a document was made."""
    return {
        "date": date.today().isoformat(), "machine": platform.machine(),
        "system": platform.system(), "processor": outputs.processor(),
        "python": platform.python_version(),
        "versions": {name: found for name in ("numpy", "torch", *PEERS)
                     if (found := installed(name))},
    }  # fmt: skip


def installed(package):
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
