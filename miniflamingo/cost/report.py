"""What `plan` prints, a table with a column for each way to spread the model, and the checks; and
what `scaling` prints."""

import textwrap
from dataclasses import replace

from miniflamingo.cost import counting
from miniflamingo.cost.plan import BYTES, TRAINED, batch_within

GB = 1e9
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)  # utilisations for which the paper's run is worked out
WIDTH = 15


def row(name, cells, indent=2):
    """A line of the table: a name, right-aligned cells."""
    return " " * indent + f"{name:<{34 - indent}}" + "".join(f"{cell:>{WIDTH}}" for cell in cells)


def number(x):
    """Three digits, without an exponent where it can be read."""
    if x and (abs(x) < 0.001 or abs(x) >= 1e6):
        return f"{x:.2e}"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def parameter_lines(plan):
    """Yield the model's numbers, part by part."""
    counts = plan.parameters()
    learns = sum(counts.get(part, 0) for part in TRAINED)
    for part, count in counts.items():
        yield row(part, [f"{count / 1e9:.3f}", "learns" if part in TRAINED else "frozen"])
    total = sum(counts.values())
    yield row("total", [f"{total / 1e9:.3f}", f"{learns / total:.1%} learn"])


def flops_lines(plan):
    """Yield a step's flops on all devices, part by part."""
    total = plan.flops()
    for part, count in total.items():
        yield row(part, [number(x / 1e12) for x in count])
    sums = [sum(column) for column in zip(*total.values())]
    yield row("sum", [number(x / 1e12) for x in sums])


def memory_lines(columns):
    """Yield bytes of the fullest device, a row a part, and whether it fits."""
    memory = [plan.memory() for plan in columns]
    for part in memory[0]:
        yield row(part, [number(m[part] / GB) for m in memory])
    yield row("sum", [number(sum(m.values()) / GB) for m in memory])
    yield row("fits", [f"{'yes' if p.fits() else 'NO'}, {number(p.room() / GB)}" for p in columns])
    for recompute, name in ((True, "with"), (False, "without")):
        cells = [number(plan.activations(recompute) / GB) for plan in columns]
        yield row(f"activations {name} recomputation", cells)


def sent_lines(columns):
    """Yield the bytes that a device sends in a step, a row a kind."""
    sent = [plan.sent() for plan in columns]
    for name in dict.fromkeys(name for one in sent for name in one):
        cells = [number(one[name].bytes / GB) if name in one else "-" for one in sent]
        yield row(name, cells)


def time_lines(columns):
    """Yield the seconds of a step, the days of all, the share of the peak that is the task's."""
    seconds = [plan.seconds() for plan in columns]
    for part in seconds[0]:
        yield row(part, [number(s[part]) for s in seconds])
    yield row("sum", [number(sum(s.values())) for s in seconds])
    steps = columns[0].training.steps
    yield row(f"{steps:,} steps, days", [number(plan.days()) for plan in columns], 0)
    cells = [f"{plan.model_utilisation():.1%}" for plan in columns]
    yield row("the task's flops, of the peak", cells, 0)


def answering_lines(plan):
    """Yield what answering one row keeps, in the training's precision."""
    longest = max(plan.training.sequences, key=lambda s: s.tokens)
    size = BYTES[plan.training.precision]
    for part, count in counting.cached(plan.config, longest).items():
        what = "keys and values of tokens, MB" if part == "lm" else "of visual tokens, MB"
        yield row(what, [number(count * size / 1e6)])


def table(name, device, plans):
    """Yield the report of {column's name: Plan, or why there is none}."""
    columns = {key: plan for key, plan in plans.items() if not isinstance(plan, str)}
    some, heads, first = list(columns.values()), list(columns), next(iter(columns.values()))
    count = f"{first.layout.devices:,} x {device}"
    yield f"Flamingo-{name} on {count}, {number(first.device.memory / GB)} GB and "\
          f"{number(first.peak() / 1e12)} TFLOP/s each"  # fmt: skip
    for key, reason in plans.items():
        if isinstance(reason, str):
            yield f"  left out: {key}: {reason}"
    yield "\n" + row("billions of parameters", [], 0)
    yield from parameter_lines(first)
    yield "\n" + row("TFLOP a step, all devices", ["forward", "backward", "forward again"], 0)
    yield from flops_lines(first)
    yield "\n" + row("GB of the fullest device", heads, 0)
    yield row("sequences at a time", [plan.training.micro_batch for plan in some])
    yield from memory_lines(some)
    yield "\n" + row("GB sent by a device a step", heads, 0)
    yield from sent_lines(some)
    yield "\n" + row("seconds a step", heads, 0)
    yield from time_lines(some)
    yield "\nanswering keeps of a row (training keeps no cache)"
    yield from answering_lines(first)
    yield "\nassumed:"
    yield from map(wrapped, assumptions(first))


def wrapped(text):
    """A long line as several, indented."""
    return textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="    ")


# --- what is assumed ------------------------------------------------------------------------------


def assumptions(plan):
    """Yield every assumption as a line, with the option that changes it."""
    t, n = plan.training, plan.layout
    sets = (f"{s.tokens} tokens and {s.images} x {s.frames} frames" for s in t.sequences)
    yield (
        f"batch: {t.batch:,} sequences of each data set a step: {'; '.join(sets)} (--batch, "
        "--tokens, --images, --frames, --mixture; the paper states no batch sizes)"
    )
    yield (
        f"at a time in each of {n.data:,} data-parallel groups: {t.micro_batch} (--micro-batch; "
        "without it the quickest of those that fit)"
    )
    yield from _numbers_assumed(t)
    yield from _time_assumed(t)
    yield f"device: {plan.device.sources}"


def _numbers_assumed(t):
    yield (
        f"products, activations and frozen numbers {t.precision}; trained numbers stored in "
        f"{t.trained}, their gradients in {t.gradients} (--precision, --trained, --gradients)"
    )
    yield (
        f"units recomputed: {yes(t.recompute)} (--no-recompute); fused attention: {yes(t.fused)} "
        f"(--plain-attention); the eye runs: {yes(t.eye)} (--kept-features), whole on every "
        "device, its frames spread over a group"
    )
    yield (
        f"relative positions: {yes(t.positions)} (--no-positions), in bytes; their flops are left "
        "out, under 0.3 % of the LM's for 256 tokens and a width of 8,192"
    )
    yield f"{t.reserve:.0%} of memory for the framework and for fragments (--reserve)"


def _time_assumed(t):
    yield (
        f"products reach {t.utilisation:.0%} of the peak (--utilisation; PaLM reached 57.8 % on "
        "TPUv4, with what is recomputed: Chowdhery et al., 2022)"
    )
    yield (
        f"data-parallel communication hides behind {t.overlap:.0%} of computing (--overlap), the "
        "other does not; rings, at the datasheet's rates, without latency"
    )
    yield f"{t.steps:,} steps (--steps)"


def yes(choice):
    """A choice in words."""
    return "yes" if choice else "no"


# --- the paper's run ------------------------------------------------------------------------------


def paper_check(plan, days):
    """{"at": [{utilisation, days, off, batch}], "needs": utilisation} for a run of `days`: by how
    much the plan is off at some utilisations, the batch that would take exactly so long, computing
    alone, and the utilisation at which the plan's batch would."""
    rows = []
    for share in SHARES:
        at = replace(plan, training=replace(plan.training, utilisation=share))
        off, batch = at.days() / days - 1, batch_within(at, days)
        rows.append({"utilisation": share, "days": at.days(), "off": off, "batch": batch})
    work = plan.seconds()["computing"] * plan.training.utilisation  # at the whole peak
    spare = days * 86_400 / plan.training.steps - plan.seconds()["waiting"]
    return {"paper_days": days, "at": rows, "needs": work / spare if spare > 0 else None}


def paper_lines(plan, check):
    """Yield the check in words."""
    days, total = check["paper_days"], sum(plan.memory().values())
    yield f"\nbeside the paper's run ({days} days; its batch sizes are not stated):"
    yield row("products reach, of the peak", [f"{r['utilisation']:.0%}" for r in check["at"]])
    yield row("days", [number(r["days"]) for r in check["at"]])
    yield row(f"off {days} days", [f"{r['off']:+.0%}" for r in check["at"]])
    name = f"batch of each that takes {days}"
    yield row(name, [f"{r['batch']:,.0f}" for r in check["at"]])
    if check["needs"]:
        share = f"{check['needs']:.1%} of the peak"
        yield f"  this batch takes {days} days where products reach {share}"
    fits = "fits" if plan.fits() else "does not fit"
    yield f"  {number(total / GB)} GB of {number(plan.device.memory / GB)}: {fits}"


# --- FSDP2, measured ------------------------------------------------------------------------------


def measured_rows(plan, measured):
    """[{part, planned, measured: [bytes, one a process], off}] of what stays from step to step."""
    planned = plan.state()
    return [
        {"part": part, "planned": planned[part], "measured": [one[part] for one in measured],
         "off": max(one[part] for one in measured) / planned[part] - 1}
        for part in measured[0]
    ]  # fmt: skip


def measured_lines(precision, rows):
    """Yield them as a table."""
    ranks = len(rows[0]["measured"])
    heads = ["planned", *(f"process {i}" for i in range(ranks)), "off"]
    yield row(f"bytes, {precision}", heads, 0)
    for r in rows:
        cells = [f"{r['planned']:,.0f}", *(f"{x:,}" for x in r["measured"]), f"{r['off']:+.3%}"]
        yield row(r["part"], cells)


# --- scaling --------------------------------------------------------------------------------------


def scaling_lines(case):
    """Yield the table of one case's document (scaling.summarise)."""
    sizes = list(dict.fromkeys(row["size"] for row in case["rows"]))
    yield f"\n{case['case']}: {case['grows']} from {sizes[0]} to {sizes[-1]}, {case['order']}"
    heads = "".join(f"{size:>8}" for size in sizes)
    columns = f"{'exponent':>10}{'90 %':>15}{'counted':>9}{'bytes':>7}{'ratio':>7}"
    yield f"  {'milliseconds':<20}{heads}{columns}"
    for side, fit in case["fits"].items():
        own = {row["size"]: row["median"] for row in case["rows"] if row["side"] == side}
        times = "".join(f"{number(1e3 * own[size]):>8}" for size in sizes)
        held = f"{fit['memory']:.2f}" if fit["memory"] is not None else "-"
        between = f"{fit['low']:.2f} to {fit['high']:.2f}"
        yield (f"  {side:<20}{times}{fit['exponent']:>10.2f}{between:>15}{fit['counted']:>9.2f}"
               f"{held:>7}{case['ratios'][side]:>7.2f}")  # fmt: skip
    yield from growth_lines(case, sizes)


def growth_lines(case, sizes):
    """Yield the memory of all sides, where a full run has measured it."""
    if any(row.get("growth") is not None for row in case["rows"]):
        yield "  MB held at most, the resident set's growth"
        for side in case["fits"]:
            own = {row["size"]: row["growth"] for row in case["rows"] if row["side"] == side}
            yield f"  {side:<20}" + "".join(f"{number(own[size] / 1e6):>8}" for size in sizes)
