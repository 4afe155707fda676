"""The attack: random damage of everything that a user can bring. `make fuzz`

    python -m tests.fuzz --minutes 5 --seed 123     all targets in turn; failing cases are kept
    python -m tests.fuzz again out/fuzz/shards-123-7            one of them once more
    python -m tests.fuzz kills --each 20            kill -9 at random moments, and go on
    python -m tests.fuzz table                      the tables of tests/README.md, from results.json

What must hold: bad input gives one line and exit code 2, or a counted skip; never a traceback, a
hang, or a loss. Exit code 1 when something else was found. --json FILE writes the tables' figures
(into a file that is there already, its own part of them). Needs Linux.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

from miniflamingo import outputs
from miniflamingo.command import Parser, real, run_command, whole
from tests.fuzz import commands, contracts, corpus, kills, media
from tests.fuzz.runner import OUTCOMES, Target, again, attack, judge_calls, judge_command, perform

RESULTS = Path(__file__).with_name("results.json")
README = Path(__file__).parents[1] / "README.md"
MARKERS = "<!-- fuzz: made by `python -m tests.fuzz table --write` -->\n", "<!-- end of fuzz -->"

COMMAND_LINE = "python -m tests.fuzz"
COMMAND = commands.act_command, judge_command
TARGETS = [
    Target("command lines", commands.draw_command, *COMMAND, short=8, patience=2.0),
    Target("pictures", media.draw_picture, media.act_picture, judge_calls, 40),
    Target("clips", media.draw_clip, media.act_clip, judge_calls, 25),
    Target("prompts of files", media.draw_prompt, *COMMAND, 8),
    Target("shards", media.draw_shard, media.act_shard, judge_calls, 40),
    Target("JSON lines", media.draw_lines, media.act_lines, judge_calls, 40),
    Target("checkpoints", commands.draw_checkpoint, commands.act_checkpoint, judge_calls, 30),
    Target("others' checkpoints", commands.draw_foreign, *COMMAND, 10),
    Target("runs", commands.draw_run, commands.act_run, judge_command, 10),
    Target("texts", contracts.draw_seed, contracts.act_text, judge_calls, 3),
]
if commands.HAS_TORCH:
    TARGETS += [
        Target("kernels and twins", contracts.draw_seed, contracts.act_kernel, judge_calls, 2),
        Target("what is unseen", contracts.draw_seed, contracts.act_unseen, judge_calls, 2),
        Target("padded frames", contracts.draw_seed, contracts.act_padding, judge_calls, 2),
        Target("wrong arguments", contracts.draw_seed, contracts.act_arguments, judge_calls, 2),
    ]


def build_corpus(folder):
    """Write the whole files that are then damaged; AssertionError when that fails."""
    Path(folder).mkdir(parents=True)
    builder = Target("corpus", None, lambda case: corpus.build(folder), None, 0, limit=100)
    done = perform(builder, {}, folder)
    assert done.code == 0, done.err
    return folder


def about():
    """Where and when figures were made."""
    packages = ("numpy", "Pillow", "av", "torch", "hypothesis")
    found = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    versions = {name: found.get(name.lower(), "none") for name in packages}
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return {"date": datetime.date.today().isoformat(), "machine": machine,
            "python": platform.python_version(), **versions}  # fmt: skip


def run_attack(arguments):
    """Attack for some minutes, print the table; 1 if anything was found."""
    if not (chosen := [t for t in TARGETS if arguments.only in t.name]):
        raise ValueError(f"--only: no target has {arguments.only!r} in its name")
    seconds = None if arguments.short else 60 * arguments.minutes
    much = "the short run" if arguments.short else f"{arguments.minutes:g} minutes"
    print(f"seed {arguments.seed}, {much}; failing cases in {arguments.keep}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        files = build_corpus(Path(place) / "corpus")
        results = attack(chosen, files, arguments.keep, arguments.seed, seconds)
    rows = [result.row() for result in results]
    print("\n" + "\n".join(attack_table(rows)))
    for result in results:
        for kind, count in result.failures.most_common():
            print(f"{count:5} x {result.target}: {kind}\n        {result.again[kind]}")
    setting = {"seed": arguments.seed, "minutes": arguments.minutes}
    record(arguments.json, {"attack": {**about(), **setting, "rows": rows}})
    return int(any(row["failures"] for row in rows))


def run_kills(arguments):
    """Kill and go on, print the table; 1 if anything was lost."""
    rows = list(kills.run(arguments.each, arguments.seed, arguments.only))
    print("\n" + "\n".join(kills_table(rows)))
    setting = {"seed": arguments.seed, "each": arguments.each}
    record(arguments.json, {"kills": {**about(), **setting, "rows": rows}})
    return int(any(row["equal"] < row["kills"] for row in rows))


def record(path, part):
    """Put a part of the figures into a JSON file, if there is one to be written."""
    if path:
        path = Path(path)
        before = json.loads(path.read_text("utf-8")) if path.exists() else {}
        text = json.dumps({"made_by": COMMAND_LINE} | before | part, indent=1) + "\n"
        outputs.write_file(path, text.encode(), COMMAND_LINE)


# --- tables ---------------------------------------------------------------------------------------


def attack_table(rows):
    """Yield the lines of a Markdown table."""
    names = ["target", "tried", *OUTCOMES, "failures", "seconds"]
    yield from _table(names, ([row[name] for name in names] for row in rows))


def kills_table(rows):
    """Yield the lines of a Markdown table."""
    names = ["training", "kills", "inside a save", "equal", "losses"]
    yield from _table(names, ([row[name] for name in names] for row in rows))


def _table(names, rows):
    yield f"| {' | '.join(names)} |"
    yield "|" + "---|" * len(names)
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def markdown(results):
    """The two tables of tests/README.md, from what results.json holds."""
    said = []
    for part, table in (("attack", attack_table), ("kills", kills_table)):
        if part in results:
            r = results[part]
            much = f"{r['minutes']} minutes" if part == "attack" else f"{r['each']} times each"
            where = f"{r['date']}, {r['machine']}, Python {r['python']}, torch {r['torch']}"
            title = f"{part.capitalize()}, {much}, seed {r['seed']} ({where}):"
            said += [title, "", *table(r["rows"]), ""]
    return "\n".join(said)


def run_table(arguments):
    """Print the tables; with --write, put them there."""
    text = markdown(json.loads(RESULTS.read_text("utf-8")))
    if not arguments.write:
        print(text)
        return 0
    outputs.put_between(README, MARKERS, text)
    return 0


def run_again(arguments):
    """A kept case once more; 1 if it still fails."""
    done, became = again(TARGETS, arguments.folder)
    print(f"{done.out[-2000:]}\n{done.err[-4000:]}\nexit code {done.code}: {became}")
    return int(not isinstance(became, dict))


def main(argv=None):
    """Run a command; returns the exit code."""
    return run_command("tests.fuzz", lambda: run(parser().parse_args(argv)))


def parser():
    """The command line's grammar."""
    top = Parser(prog="python -m tests.fuzz", description=__doc__)
    top.add_argument("command", nargs="?", default="attack", choices=COMMANDS)
    top.add_argument("folder", nargs="?", help="of a kept case, for `again`")
    top.add_argument("--minutes", type=real(0, 10**4, above=True), default=5)
    top.add_argument("--short", action="store_true", help="the test suite's part, a minute or so")
    top.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    top.add_argument("--only", default="", metavar="TEXT", help="targets with TEXT in their names")
    top.add_argument("--each", type=whole(1, 10**4), default=20, help="kills of each training")
    top.add_argument("--keep", default="out/fuzz", metavar="DIR", help="where failing cases go")
    top.add_argument("--json", metavar="FILE", help="also write the figures")
    top.add_argument("--write", action="store_true", help="put the tables into tests/README.md")
    return top


def run(arguments):
    """Run a parsed command; returns the exit code."""
    if not Path("/proc/self/statm").exists():
        raise ValueError("this needs Linux: processes are looked at through /proc")
    if (arguments.command == "again") != bool(arguments.folder):
        raise ValueError("`again` and it alone takes the folder of a kept case")
    outputs.check_file(arguments.json, COMMAND_LINE)
    return COMMANDS[arguments.command](arguments)


COMMANDS = {"attack": run_attack, "again": run_again, "kills": run_kills, "table": run_table}

if __name__ == "__main__":
    sys.exit(main())
