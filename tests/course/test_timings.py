"""The table of modules says what the sources say, and headers what was measured. No time is tested.

Measuring itself is tried on a tiny module, whose numbers are not looked at.
"""

import inspect
import json
import re

import pytest

from miniflamingo.course import timings as t
from miniflamingo.flamingo import Flamingo

SOURCES = t.sources()
ids = [path.stem[:2] for path in SOURCES]
TINY = """# %% [markdown]
# # 99 A tiny module
#
# **The question: is a|b
# one thing?**
#
# After this module you can
#
# - tell one;
# - tell another
#   thing.
#
# **You need:** module 01, modules 02 and 04 to 06; module 99 comes next.
#
# **Time:** about 35 minutes for the core path, and 10 for what is
# marked optional. Computing takes about 9
# seconds of one core.
# See `miniflamingo/vision.py`, not `miniflamingo/nowhere.py`.

# %%
from miniflamingo.kernels.tools import twins
from miniflamingo import Flamingo, xattn
from miniflamingo.course import check, source

source(xattn.compute_phi)
source(Flamingo.read)
source(check)

# %% tags=["solution"]
1 / 0
"""


@pytest.fixture
def tiny(tmp_path):
    """A module's source whose solution fails."""
    path = tmp_path / "99_tiny.py"
    path.write_text(TINY, encoding="utf-8")
    return path


def test_the_table_agrees_with_the_sources_and_the_measurements():
    readme = t.README.read_text(encoding="utf-8")
    assert t.with_table(readme) == readme, "run `python -m miniflamingo.course.timings --table`"


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_the_header_says_what_was_measured(path):
    measured = t.read().get(path.stem.split("_")[0])
    claim = t.claim_in(path.read_text(encoding="utf-8"))
    if measured:  # a module that was not measured yet says what its author measured
        seconds = measured["student"]["processor_seconds"]
        assert t.agrees(claim, seconds), f"{claim} s claimed, {seconds} s in {t.FILE.name}"


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_a_module_names_files_that_exist_and_earlier_modules_alone(path):
    module = t.describe(path)
    assert all((t.ROOT / name).is_file() for name in module.files)
    assert all(number < module.number for number in module.needs)


def test_the_file_of_timings_says_where_they_come_from():
    for number, record in t.read().items():
        assert t.sources([number]), f"{number} was measured, and is no module"
        assert {"date", "processor", "cores", "system", "versions"} <= set(record["machine"])
        assert record["machine"]["versions"]["numpy"]


def test_a_header_is_read(tiny):
    module = t.describe(tiny)
    assert (module.title, module.minutes, module.more) == ("99 A tiny module", 35, 10)
    assert module.question == "is a|b one thing?"
    assert module.objectives == "tell one; tell another thing."
    assert module.needs == ("01", "02", "04", "05", "06")
    # named in the text; shown; shown by way of the package's re-export; never the course's own
    expected = ("vision", "xattn", "flamingo")
    assert module.files == tuple(f"miniflamingo/{name}.py" for name in expected)


PARTS = """# %% [markdown]
# ## Core
#
# one two three

# %%
guess("99.a", x=...)

# %% tags=["notes"]
1

# %% [markdown]
# ### Exercise 99.1: a (optional)
#
# ★☆☆ · 7 minutes · 1 line. four

# %% tags=["exercise"]
def f(): ...


# %% tags=["solution"]
def f():
    return 1


# %% [markdown]
# ### Core again
#
# #### Of a level below

# %%
show(f, alt="")

x = 1

# %% [markdown]
# ## Depth (optional)
#
# ### Below it

# %%
from miniflamingo.course import source
from miniflamingo.flamingo import Flamingo

source(Flamingo.read)
"""


def test_what_a_module_asks_of_its_reader_is_counted(tmp_path):
    path = tmp_path / "99_parts.py"
    path.write_text(PARTS, encoding="utf-8")
    core, more = t.amounts(path).values()
    own = len(inspect.getsource(Flamingo.read).splitlines())
    assert +core == {"words": 13, "guesses": 1, "figures": 1, "code": 2}
    assert +more == {"words": 19, "exercises": 7, "library": own}
    rates = {"words": 200, "code": 10, "library": 20, "figures": 2, "guesses": 1}
    assert t.RATES == rates and t.minutes(more) == pytest.approx(7 + 19 / 200 + own / 20)


def test_the_header_says_what_is_counted(tiny):
    text = t.with_minutes(tiny)
    assert (
        "# **Time:** about 0 minutes. Computing takes about 9 seconds of one core.\n# See" in text
    )
    tiny.write_text(TINY.replace("**Time:**", "**When:**"), encoding="utf-8")
    with pytest.raises(ValueError, match="its header has no"):
        t.with_minutes(tiny)


def test_the_plans_add_up():
    """Every session of a plan holds the core paths that it names, and the twelve weeks all."""
    minutes = {module.number: module.minutes for module in map(t.describe, SOURCES)}
    plans = re.findall(r"^\| (.+ of (\d+) minutes.*?) \| (1: .+?) \|$",
                       t.README.read_text("utf-8"), re.MULTILINE)  # fmt: skip
    assert len(plans) == 3
    for title, most, plan in plans:
        parts = [part.split(": ")[1] for part in plan.split(".")[0].split(" - ")]
        sessions = [re.findall(r"\d\d", part) for part in parts]
        assert all(sum(minutes[n] for n in session) <= int(most) for session in sessions), title
        named = [number for session in sessions for number in session]
        assert named == sorted(set(named))
    assert named == sorted(minutes)


def test_a_row_of_the_table(tiny):
    module = t.describe(tiny)
    assert r"| is a\|b one thing? | 01, 02, 04, 05, 06 | not measured | 35 | 10 |" in t.row(
        module, {}
    )
    assert "| 9 s | 35 | 10 |" in t.row(module, {"99": {}} | {"99": {"student": 8.8}})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("**Time:**", "no time"),
        ("**The question", "no question"),
        ("**You need:**", "no prerequisites"),
        ("After this module you can", "no objectives"),
    ],
)
def test_a_header_without_one_of_its_parts_is_refused(tiny, part, message):
    tiny.write_text(TINY.replace(part, "**Nothing"), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        t.describe(tiny)


def test_the_sentence_follows_the_measurement_and_is_stable():
    assert t.with_claim(TINY, 8.8) == TINY == t.with_claim(TINY, 10.9)
    assert "Computing takes about 20\n# seconds of one core." in t.with_claim(TINY, 21.7)
    assert "Computing takes about 1\n# second of one core." in t.with_claim(TINY, 0.3)
    for measured in (0.1, 1.9, 6, 13, 22, 49, 130):
        assert t.agrees(t.rounded(measured), measured)
        assert t.rounded(measured * 1.05, t.rounded(measured)) == t.rounded(measured)
    with pytest.raises(ValueError, match="no sentence"):
        t.with_claim("# Computing is free.", 1)


def test_the_table_needs_its_markers():
    start, end = t.MARKERS
    assert t.with_table(f"a\n{start}old\n{end}b").startswith(f"a\n{start}| module | asks")
    for text in ("nothing", f"{end}{start}", start * 2 + end):
        with pytest.raises(ValueError, match="the table stands between"):
            t.with_table(text)


def test_measuring_runs_the_cells_of_one_rendering(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(t, "FILE", tmp_path / "timings.json")
    assert set(t.measure(tiny, "student")) == {"processor_seconds", "wall_seconds"}
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        t.measure(tiny, "teacher")
    tiny.write_text(TINY.replace("1 / 0", "answer = 1"), encoding="utf-8")
    line = t.update(tiny, {})
    assert line.startswith("99_tiny: student ")
    assert set(json.loads(t.FILE.read_text("utf-8"))["99"]) == {"student", "teacher", "machine"}
    assert t.agrees(
        t.claim_in(tiny.read_text("utf-8")), t.read()["99"]["student"]["processor_seconds"]
    )


def test_an_unknown_module_is_an_error_of_the_command_line(capsys):
    assert t.main(["97"]) == 2
    assert "no module is called 97" in capsys.readouterr().err
