"""Real data from disk, read as a stream: files -> records -> prompts for `prompt.build_batch`.

    data = read_pairs("photos")           # a folder, a file, a glob ("shards/*.tar") or a list
    for prompt in data: ...               # once through, in the files' order
    print(data.report)                    # 1000 read, 997 yielded, 3 skipped: 2 missing image, ...
    stream = Stream(data, seed=0, shuffle=1000)     # for training: without end, resumable
    batch = build_batch([next(stream) for _ in range(8)], tokenizer, image_size)

Image and caption pairs, `read_pairs`, prompt [image, caption]:
    x.jsonl     one object a line, file names relative to the file's own folder (or to `root`):
                    {"image": "cats/1.png", "caption": "a cat"}          ("text" is read too)
    x.tar       a shard as WebDataset writes them, compressed or not: the files of a sample stand
                one after another and share their name up to the first dot:
                    0001.jpg  0001.txt  0002.png  0002.json               {"caption": "a cat"}
Interleaved documents: `interleaved.read_documents`. Videos: `video.read_videos`.

Pictures come in as `pictures` says; of an animation, the first frame. JSON and texts are UTF-8,
with a byte-order mark or without. What an operating system added is passed over: names that begin
with a dot (the "._0001.jpg" of macOS), __MACOSX/, Thumbs.db, desktop.ini. Shards that were joined
(`cat`) are read to the end of the last.

A record that cannot be used is skipped and counted in `report.skipped` under one of these reasons:
    invalid JSON, missing key, bad field, missing image (video, text), unreadable image (video),
    image too large (more than 89 million pixels), path outside the folder, empty text,
    unknown words, refused text (by the tokenizer), special token, no usable image, no frames,
    line too long (32 MiB), sample too large (512 MiB), damaged file (the rest of a shard is lost)
so that read = yielded + skipped. What was used all the same is counted in `report.remarks`:
    clip cut off, joined archives, zeros at the end
With strict=True the first of them is a ValueError instead. Data that yields nothing is always one.
"""

import glob
from functools import partial
from pathlib import Path

import numpy as np

from miniflamingo.worlds.records import (
    BadRecord,
    Damaged,
    Remark,
    Report,
    check_text,
    is_of_the_system,
    load_image,
    read_lines,
    read_samples,
)

LINES, SHARDS = (".jsonl",), (".tar", ".tar.gz", ".tgz")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")

# --- a data set ---------------------------------------------------------------------------------


def find_files(source, suffixes):
    """A file, folder, glob, or a list of them -> Paths, sorted by name; ValueError if none.

    Of a folder, every file with one of the suffixes is taken, in capitals too; of a folder and a
    glob, none that an operating system added ("._x.tar").
    """
    if isinstance(source, (list, tuple)):
        found = [path for item in source for path in find_files(item, suffixes)]
    elif Path(source).is_dir():
        found = [path for path in Path(source).iterdir() if _ends(path, suffixes)]
        found = sorted(path for path in found if not is_of_the_system(path.name))
    elif Path(source).is_file():
        found = [Path(source)]
    else:
        found = map(Path, glob.glob(str(source), recursive=True))
        found = sorted(path for path in found if not is_of_the_system(path.name))
    other = [str(path) for path in found if not _ends(path, suffixes)]
    if other or not found:
        wanted = f"expected files that end in {' or '.join(suffixes)}"
        raise ValueError(f"{wanted}, got {other[:5]}" if other else f"{wanted}, found no {source}")
    return found


def _ends(path, suffixes):
    return path.name.lower().endswith(suffixes)


class Dataset:
    """Prompts from files, one pass each time it is iterated; `report` counts the latest pass.

    decode(record, rng, report) makes a prompt of a Line or a Sample, or raises BadRecord.
    """

    def __init__(self, source, decode, root=None, strict=False, suffixes=LINES + SHARDS):
        if root is not None and not Path(root).is_dir():
            raise ValueError(f"root must be a folder, got {root}")
        self.files, self.decode, self.root = find_files(source, suffixes), decode, root
        self.strict, self.report = strict, Report(strict)

    def __iter__(self):
        self.report = Report(self.strict)
        return (prompt for _, prompt in self.epoch(self.report))

    def epoch(self, report, seed=0, epoch=0, shuffle=0, start=0):
        """Yield (records consumed so far, prompt), from record `start` of an epoch on.

        Everything random depends on seed, epoch and the place in the order alone. ValueError when
        a whole epoch yields nothing, or ends before `start`.
        """
        consumed, before = 0, report.yielded
        for consumed, record in enumerate(self._records(seed, epoch, shuffle), 1):
            prompt = None
            if consumed > start:
                rng = np.random.default_rng((seed, epoch, consumed))
                prompt = self._prompt(record, rng, report)
            if prompt is not None:
                yield consumed, prompt
        if consumed < start:
            raise ValueError(f"cannot go on after record {start}: there are only {consumed}")
        if start == 0 and report.yielded == before:
            raise ValueError(f"no usable record in {[str(path) for path in self.files]}: {report}")

    def _records(self, seed, epoch, shuffle):
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(self.files)) if shuffle else range(len(self.files))
        return shuffle_records((r for i in order for r in self._read(self.files[i])), shuffle, rng)

    def _read(self, path):
        if not _ends(path, LINES):
            yield from read_samples(path)
            return
        try:
            yield from read_lines(path, self.root)
        except BadRecord as error:
            yield Damaged(str(path), error)
        except OSError as error:
            yield Damaged(str(path), BadRecord("damaged file", str(error)))

    def _prompt(self, record, rng, report):
        if isinstance(record, Remark):
            return report.remark(*record)
        report.read += 1
        try:
            if isinstance(record, Damaged):
                raise record.error
            prompt = self.decode(record, rng, report)
        except BadRecord as error:
            return report.skip(record.where, error)
        report.yielded += 1
        return prompt


def shuffle_records(records, size, rng):
    """A shuffle buffer: each record waits among `size` others (0: none) until it is drawn."""
    buffer = []

    def draw():
        i = rng.integers(len(buffer))
        buffer[i], buffer[-1] = buffer[-1], buffer[i]
        return buffer.pop()

    for record in records:
        buffer.append(record)
        if len(buffer) > size:
            yield draw()
    while buffer:
        yield draw()


class Stream:
    """A Dataset without end, for training: epoch after epoch, each in an order of its own.

    With `shuffle` the files are taken in random order, through a buffer of that many records (for
    shards, their bytes). `state` is (epoch, records consumed): put it in a checkpoint, and a Stream
    made with it, the same files, seed and shuffle goes on with the prompt that would have come
    next. Going on reads the epoch's records again up to there, but decodes no image.
    `report` counts what this object read. ValueError for a state that does not fit.
    """

    def __init__(self, data, seed=0, shuffle=0, state=(0, 0)):
        if len(state) != 2 or any(int(i) != i or i < 0 for i in state):
            raise ValueError(f"state must be (epoch, records consumed), got {state!r}")
        if shuffle < 0:
            raise ValueError(f"shuffle must be the size of a buffer, 0 or more, got {shuffle}")
        self.data, self.seed, self.shuffle = data, seed, shuffle
        self.state, self.report = tuple(int(i) for i in state), Report(data.strict)
        self._prompts = self._run(*self.state)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._prompts)

    def _run(self, epoch, start):
        while True:
            rest = self.data.epoch(self.report, self.seed, epoch, self.shuffle, start)
            for consumed, prompt in rest:
                self.state = (epoch, consumed)
                yield prompt
            epoch, start = epoch + 1, 0


# --- image and caption pairs --------------------------------------------------------------------


def read_pairs(source, root=None, tokenizer=None, strict=False):
    """A Dataset of prompts [image, caption], the image in RGB: the paper's ALIGN and LTIP.

    source: a JSONL file, a tar shard, a folder or glob of them, or a list. root: where the file
    names in a JSONL start, by default its own folder. With a tokenizer, a caption with words that
    it does not know is skipped. ValueError when there is no such file.
    """
    return Dataset(source, partial(_pair, tokenizer=tokenizer), root, strict)


def _pair(record, rng, report, tokenizer):
    caption = check_text(record.text(), tokenizer)
    return [load_image(*record.media("image", IMAGE_SUFFIXES)), caption]
