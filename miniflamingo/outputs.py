"""Where a command may write: it deletes and overwrites only what it has made itself.

What it makes in a folder is written aside first, into `.COMMAND-....unfinished`, and then put in
its place by renaming (`staged`). The folder keeps a list of it with checksums, `.made-by-COMMAND`;
the next run replaces the files on that list which nobody has changed since, and refuses to begin
where anything else is in the way. A single file says by whom it was made (`check_file`).
"""

import contextlib
import json
import os
import platform
import shutil
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
from PIL import Image

from miniflamingo.command import some
from miniflamingo.module import write_atomically
from miniflamingo.runs import file_digest

NOBODYS = ("__pycache__", ".DS_Store")  # left by Python and macOS
LARGEST = 2**28  # bytes of a file that is asked who made it
DAY = 86400

# --- a folder -------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged(folder, command, names, option="--out"):
    """An empty folder to fill, for the time of a `with` block; what is in it then goes to `folder`.

    names: the files and folders that may come. ValueError, also before the block is entered, when
    one of them is already there and is not, file by file, what `command` put there. A block that
    is left by an exception changes nothing. Killed between two renamings, a folder NAME may stand
    as NAME.old: the next call puts it back.
    """
    folder = check_folder(folder, option)
    _refuse(folder, command, names, option)
    _put_back(folder, command, names)
    _check_writable(folder, option)
    for left in folder.glob(f".{command}-*.unfinished"):
        if time.time() - left.stat().st_mtime > DAY and not left.is_symlink():
            shutil.rmtree(left)
    new = Path(tempfile.mkdtemp(".unfinished", f".{command}-", folder))
    try:
        yield new
        _refuse(folder, command, names, option)  # the work has taken its time
        _put(folder, command, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def in_the_way(folder, command, names):
    """Yield the paths under these names that are not what `command` put there."""
    made = read_list(folder, command)
    for name in names:
        target = folder / name
        yield from _foreign(target, name, made)
        if target.is_dir():  # it will be moved there for a moment
            yield from _foreign(_old(target), name, made)


def _foreign(base, name, made):
    """Yield what is at `base` or below it, and is not what the list has under `name`."""
    for path in _tree(base):
        if _checksum(path) not in made.get((Path(name) / path.relative_to(base)).as_posix(), ()):
            yield path


def _old(target):
    return target.with_name(f"{target.name}.old")


def record(folder, command, names):
    """List what stands under these names as made by `command`."""
    _write_list(folder, command, _listed(folder, names))


def read_list(folder, command):
    """{path: [checksum]} of what a command has made in a folder."""
    with contextlib.suppress(OSError, ValueError):
        made = json.loads(_list_file(folder, command).read_bytes())
        return made if isinstance(made, dict) else {}
    return {}


def _list_file(folder, command):
    return Path(folder) / f".made-by-{command}.json"


def _write_list(folder, command, made):
    data = json.dumps(dict(sorted(made.items())), indent=0).encode()
    write_atomically(_list_file(folder, command), data)


def _listed(folder, names):
    return {path.relative_to(folder).as_posix(): [_checksum(path)]
            for name in names for path in _tree(folder / name)}  # fmt: skip


def _tree(base):
    """A file, or every file below a folder; links are not followed."""
    if base.is_dir() and not base.is_symlink():
        for path in sorted(base.iterdir()):
            if path.name not in NOBODYS:
                yield from _tree(path)
    elif os.path.lexists(base):
        yield base


def _checksum(path):
    if path.is_symlink() or not path.is_file():
        return None
    return file_digest(path)


def _refuse(folder, command, names, option):
    if found := list(in_the_way(folder, command, names)):
        raise ValueError(
            f"{option}: {some(found)}: in the way; `{command}` has not made it, or it was changed "
            "since, and is not overwritten: move it, or choose another folder"
        )


def _put(folder, command, new):
    """Move everything from `new` into the folder, in the place of what was there."""
    names = sorted(path.name for path in new.iterdir())
    before, fresh = read_list(folder, command), _listed(new, names)
    both = {p: before.get(p, []) + fresh.get(p, []) for p in before.keys() | fresh.keys()}
    _write_list(folder, command, both)  # either may stand there until all are in their places
    for name in names:
        target = folder / name
        if target.is_dir():
            os.rename(target, _old(target))
            os.rename(new / name, target)
            shutil.rmtree(_old(target))
        else:
            os.replace(new / name, target)
    kept = {p: h for p, h in before.items() if p.split("/")[0] not in names}
    _write_list(folder, command, kept | fresh)


def _put_back(folder, command, names):
    """Finish what a kill between two renamings has left."""
    made = read_list(folder, command)
    for name in names:
        target, old = folder / name, _old(folder / name)
        if old.is_dir() and not any(_foreign(old, name, made)):
            if target.exists():
                shutil.rmtree(old)
            else:
                os.rename(old, target)


# --- checks before the work -----------------------------------------------------------------------


def check_folder(folder, option="--out"):
    """A folder's Path, there or not yet. ValueError that names the option for anything else."""
    if not str(folder).strip() or "\0" in str(folder):
        raise ValueError(f"{option}: expected a folder, got {str(folder)!r}")
    folder = Path(folder)
    for path in (folder, *folder.parents):
        if os.path.lexists(path):
            if not path.is_dir():
                raise ValueError(f"{option}: expected a folder, found a file: {path}")
            break
    return folder


def _check_writable(folder, option):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{option}: cannot write to {folder}: {error.strerror}") from None


def check_file(file, command, option="--json"):
    """Refuse, in one line and before the work, a file that `command` cannot or may not write.

    It may replace a JSON file or a PNG that says "made_by": command, or nothing. None passes.
    """
    if file is None:
        return
    if not str(file).strip() or "\0" in str(file):
        raise ValueError(f"{option}: expected a file, got {str(file)!r}")
    file = Path(file)
    if not file.parent.is_dir():
        raise ValueError(f"{option}: expected a file in a folder that exists, got {file}")
    if file.is_symlink() or (file.exists() and not file.is_file()):
        kind = "link" if file.is_symlink() else "folder" if file.is_dir() else "device"
        raise ValueError(f"{option}: expected a file, found a {kind}: {file}")
    if file.exists() and _made_by(file) != command:
        raise ValueError(
            f"{option}: {file}: in the way; `{command}` has not made it, and does not overwrite "
            "it: move it, or choose another name"
        )
    _check_writable(file.parent, option)


def write_file(file, data, command, option="--json"):
    """Write bytes to a file that has passed `check_file`, and still does."""
    check_file(file, command, option)
    write_atomically(file, data)


def put_between(page, markers, text):
    """Replace what stands in a page between two markers, a line each."""
    start, end = markers
    head, rest = page.read_text("utf-8").split(start)
    page.write_text(head + start + text + end + rest.split(end)[1], "utf-8")


def about():
    """When, where and with what something is measured, for its data file."""
    return {
        "date": date.today().isoformat(), "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(), "numpy": np.__version__,
    }  # fmt: skip


def processor():
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _made_by(file):
    """The command that a JSON file, or a text in a PNG, names as its maker, "" for none."""
    # on damaged bytes Pillow raises almost anything
    with contextlib.suppress(Exception), Image.open(file, formats=["PNG"]) as image:
        return str(image.info.get("made_by", ""))
    with contextlib.suppress(OSError, ValueError, RecursionError):
        document = json.loads(file.read_bytes()) if file.stat().st_size < LARGEST else None
        if isinstance(document, dict):
            for part in (document, document.get("meta"), document.get("about")):
                if isinstance(part, dict) and "made_by" in part:
                    return str(part["made_by"])
    return ""
