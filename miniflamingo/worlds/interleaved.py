"""Pages of text and images from disk, the paper's M3W: JSONL -> prompts for `prompt.build_batch`.

Two shapes of a line are read, those of the public data sets:
    MMC4:     {"text_list": ["My pets.", "A cat."],
               "image_info": [{"image_name": "cat.png", "matched_text_index": 1}]}
              an image is put in front of the sentence that it is matched to
    OBELICS:  {"images": [null, "cat.png", null], "texts": ["My pets.", null, "A cat."]}
Both become ["My pets.", cat, "A cat."]. Images are files in the JSONL's own folder, or in `root`:
the data sets list addresses, and are to be downloaded first.

As in the paper, a random run of 256 tokens of a page is taken, and its first 5 images; the text
around further images stays. The 256 count everything that build_batch puts in, and build_batch
pads a batch to its longest row and its largest number of images. Choices where the paper is silent:
every run opens with `<BOS>`, and it is drawn among those that hold an image.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from miniflamingo.prompt import split_words
from miniflamingo.worlds.disk import LINES, Dataset
from miniflamingo.worlds.records import (
    BadRecord,
    check_text,
    encode,
    find_inside,
    load_image,
    quote,
)

TAG = 2  # an image's tokens: <EOC><image>


class Picture(NamedTuple):
    """An image of a page, not loaded yet."""

    name: str


def read_documents(source, root=None, tokenizer=None, length=256, max_images=5, strict=False):
    """A Dataset of prompts [text, image, text, ...] of at most `length` tokens and max_images.

    source: a JSONL file, a folder or glob of them, or a list. An image that cannot be used is left
    out and counted in report.dropped; a page without any usable one is skipped. Tokens are the
    tokenizer's, or words without one. ValueError for no such file, length < 5 or max_images < 1.
    """
    if length < 5 or max_images < 1:
        raise ValueError(f"expected length >= 5 and max_images >= 1, got {length}, {max_images}")
    decode = partial(_document, tokenizer=tokenizer, length=length, max_images=max_images)
    return Dataset(source, decode, root, strict, suffixes=LINES)


def _document(record, rng, report, tokenizer, length, max_images):
    parts = read_parts(record.fields(), partial(report.drop, record.where))
    parts = [p if isinstance(p, Picture) else check_text(p, tokenizer) for p in parts]
    pictures = [part for part in parts if isinstance(part, Picture)]
    if len(pictures) == len(parts):
        raise BadRecord("empty text", f"a page of {len(pictures)} images has no text")
    bad = set()
    while not bad.issuperset(pictures):
        usable = [part for part in parts if part not in bad]
        run = draw_run(usable, length - 2, rng, tokenizer)  # <BOS> and the last <EOC>
        prompt = _load(run, record, report, max_images, bad)
        if any(not isinstance(part, str) for part in prompt):
            return prompt
    raise BadRecord("no usable image", f"none of the page's {len(pictures)} images can be used")


def _load(run, record, report, max_images, bad):
    """Put the first images in the place of their names; those that cannot be read go to `bad`."""
    prompt, images = [], 0
    for part in run:
        if isinstance(part, str):
            prompt.append(part)
        elif images < max_images and part not in bad:
            try:
                prompt.append(load_image(part.name, find_inside(record.root, part.name)))
                images += 1
            except BadRecord as error:
                bad.add(part)
                report.drop(record.where, error)
    return prompt


# --- the two shapes of a page -------------------------------------------------------------------


def read_parts(fields, drop=None):
    """A page's fields -> its texts (str, none of them blank) and Pictures in order; BadRecord.

    drop(BadRecord) is told of each image that has no name or no place; without it, that is raised.
    """
    drop = drop or _refuse
    if {"text_list", "image_info"} <= fields.keys():
        parts = _mmc4(*(_list_of(fields, key) for key in ("text_list", "image_info")), drop)
    elif {"images", "texts"} <= fields.keys():
        parts = _obelics(*(_list_of(fields, key) for key in ("images", "texts")), drop)
    else:
        shapes = '"text_list" and "image_info" (MMC4), or "images" and "texts" (OBELICS)'
        raise BadRecord("missing key", f"expected {shapes}, got {quote([*fields])}")
    return [part for part in parts if not isinstance(part, str) or part.strip()]


def _refuse(error):
    raise error


def _list_of(fields, key):
    if not isinstance(fields[key], list):
        raise BadRecord("bad field", f'"{key}" must be a list, got {quote(fields[key])}')
    return fields[key]


def _mmc4(texts, infos, drop):
    before = [[] for _ in texts]
    for info in infos:
        try:
            index, picture = _placed(info, len(texts))
            before[index].append(picture)
        except BadRecord as error:
            drop(error)
    return [part for pictures, text in zip(before, texts) for part in (*pictures, text)]


def _placed(info, count):
    """An image's info -> the text that it stands in front of, and its Picture; BadRecord."""
    if not isinstance(info, dict) or not {"image_name", "matched_text_index"} <= info.keys():
        wanted = '"image_name" and "matched_text_index"'
        raise BadRecord("missing key", f"an image's info needs {wanted}, got {quote(info)}")
    index = info["matched_text_index"]
    whole = type(index) is int or (type(index) is float and index.is_integer())
    if not whole or not 0 <= index < count:
        expected = f"matched_text_index must be one of the {count} texts, from 0"
        raise BadRecord("bad field", f"{expected}, got {quote(index)}")
    return int(index), _picture(info["image_name"])


def _obelics(images, texts, drop):
    if len(images) != len(texts):
        lengths = f"{len(images)} and {len(texts)}"
        raise BadRecord("bad field", f"images and texts must be equally long, got {lengths}")
    parts = []
    for i, (image, text) in enumerate(zip(images, texts)):
        if image is not None and text is not None:
            got = f"{quote(image)} and {quote(text)}"
            raise BadRecord("bad field", f"place {i} must hold an image or a text, got {got}")
        try:
            parts.append(_picture(image) if text is None else text)
        except BadRecord as error:
            drop(error)
    return parts


def _picture(name):
    if not isinstance(name, str):
        raise BadRecord("bad field", f"the image must be a file name, got {quote(name)}")
    return Picture(name)


# --- the run of tokens --------------------------------------------------------------------------


def draw_run(parts, length, rng, tokenizer=None):
    """Cut a random run of `length` tokens out of texts and Pictures, with a Picture in it.

    A Picture counts as two tokens and is not cut; a text at an edge is. Every run that holds a
    Picture is equally likely. Needs a Picture and length >= 2.
    """
    split, join = (split_words, " ".join)
    if tokenizer is not None:
        split, join = partial(encode, tokenizer=tokenizer), tokenizer.decode
    tokens = [[None] * TAG if isinstance(part, Picture) else split(part) for part in parts]
    begins = np.cumsum([0, *map(len, tokens)]).tolist()
    start = _draw_start(parts, begins, length, rng)
    run = []
    for part, own, begin in zip(parts, tokens, begins):
        cut = own[max(0, start - begin) : max(0, start + length - begin)]
        if len(cut) == len(own):
            run.append(part)
        elif cut and not isinstance(part, Picture):
            run.append(join(cut))
    return run


def _draw_start(parts, begins, length, rng):
    holds_one = np.zeros(max(0, begins[-1] - length) + 1, bool)
    for part, begin in zip(parts, begins):
        if isinstance(part, Picture):
            holds_one[max(0, begin + TAG - length) : begin + 1] = True
    return int(rng.choice(np.flatnonzero(holds_one)))
