"""Pages of text and images: the two shapes, what is left out, and the random run of tokens."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from miniflamingo.prompt import WordTokenizer, build_batch, split_words
from miniflamingo.worlds import interleaved
from miniflamingo.worlds.disk import Stream
from miniflamingo.worlds.interleaved import Picture, draw_run, read_documents
from miniflamingo.worlds.records import BadRecord, Line, Report

TOKENIZER = WordTokenizer([*"abcdefgh", "my", "pets", "cat", "dog", "."])


@pytest.fixture
def folder(tmp_path):
    for i in range(8):
        Image.new("RGB", (3, 2), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    return tmp_path


def read(folder, *pages, **options):
    lines = "".join(json.dumps(page) + "\n" for page in pages)
    (folder / "pages.jsonl").write_text(lines, "utf-8")
    return read_documents(folder, **options)


def mmc4(texts, *images):
    infos = [{"image_name": name, "matched_text_index": i} for name, i in images]
    return {"text_list": texts, "image_info": infos}


def obelics(*parts):
    """Names that end in .png are images, the rest is text."""
    images = [part if part.endswith(".png") else None for part in parts]
    texts = [None if image else part for image, part in zip(images, parts)]
    return {"images": images, "texts": texts, "metadata": "[]"}


def plain(prompt):
    """Images become their number, the red of their pixels / 10."""
    return [p if isinstance(p, str) else p.getpixel((0, 0))[0] // 10 for p in prompt]


# --- the two shapes -----------------------------------------------------------------------------


def test_both_shapes_make_the_papers_sequence(folder):
    pages = [
        mmc4(["My pets .", "a cat .", "a dog ."], ("2.png", 2), ("1.png", 1)),
        obelics("My pets .", "1.png", "a cat .", "2.png", "a dog ."),
    ]
    for prompt in read(folder, *pages):
        assert plain(prompt) == ["My pets .", 1, "a cat .", 2, "a dog ."]
        tokenizer = WordTokenizer.from_texts(pages[0]["text_list"])
        batch = build_batch([prompt], tokenizer, image_size=2)
        words = " ".join(tokenizer.words[i] for i in batch.tokens[0])
        assert words == "<BOS> My pets . <EOC> <image> a cat . <EOC> <image> a dog . <EOC>"
        assert batch.phi[0].tolist() == [0] * 5 + [1] * 5 + [2] * 5


def test_images_of_one_sentence_stand_in_front_of_it_in_their_order(folder):
    page = mmc4(["a", " ", "b"], ("2.png", 2), ("1.png", 2), ("0.png", 1))
    assert [plain(prompt) for prompt in read(folder, page)] == [["a", 0, 2, 1, "b"]]


GOOD = obelics("a", "0.png")
BAD_PAGES = {
    "no shape": ({"text_list": []}, "missing key", "(MMC4), or 'images' and 'texts' (OBELICS)"),
    "no list": ({"images": "1.png", "texts": []}, "bad field", "'images' must be a list"),
    "lengths": ({"images": [None], "texts": []}, "bad field", "equally long, got 1 and 0"),
    "both": ({"images": ["1.png"], "texts": ["a"]}, "bad field", "place 0 must hold"),
    "text": ({"images": ["1.png", None], "texts": [None, 5]}, "bad field", "a str, got 5"),
    "no image": (obelics("a", "b"), "no usable image", "page's 0 images"),
    "no text": (obelics("1.png", " "), "empty text", "1 images has no text"),
    "empty": (obelics(), "empty text", "0 images has no text"),
    "unknown": (obelics("a", "1.png", "a red dog"), "unknown words", "['red']"),
    "tag": (obelics("a <EOC>", "1.png"), "special token", "['<EOC>']"),
}


@pytest.mark.parametrize("name", BAD_PAGES)
def test_a_bad_page_is_counted_and_named_or_raised_when_strict(name, folder):
    page, reason, says = BAD_PAGES[name]
    data = read(folder, GOOD, page, GOOD, tokenizer=TOKENIZER)
    assert [plain(prompt) for prompt in data] == [["a", 0]] * 2
    assert (data.report.read, data.report.skipped) == (3, {reason: 1})
    (message,) = data.report.messages
    assert message.startswith(f"{folder}/pages.jsonl:2: ")
    assert says in message.replace('"', "'")
    with pytest.raises(ValueError, match=r"pages.jsonl:2: "):
        list(read(folder, GOOD, page, GOOD, tokenizer=TOKENIZER, strict=True))


BAD_IMAGES = {  # of a page with one more
    "number": ({"images": [None, 3, "1.png"], "texts": ["a", None, None]}, "bad field", "got 3"),
    "neither": ({"images": [None, None, "1.png"], "texts": ["a", None, None]}, "bad field", "None"),
    "info": ({"text_list": ["a"], "image_info": ["x"]}, "missing key", "got 'x'"),
    "no name": (mmc4(["a"], (None, 0)), "bad field", "a file name, got None"),
    "above": (mmc4(["a"], ("2.png", 1)), "bad field", "one of the 1 texts, from 0, got 1"),
    "below": (mmc4(["a"], ("2.png", -1)), "bad field", "got -1"),
    "none": (mmc4(["a"], ("2.png", None)), "bad field", "got None"),
    "true": (mmc4(["a", "b"], ("2.png", True)), "bad field", "got True"),
    "half": (mmc4(["a"], ("2.png", 0.5)), "bad field", "got 0.5"),
    "nan": (mmc4(["a"], ("2.png", float("nan"))), "bad field", "got nan"),
    "infinite": (mmc4(["a"], ("2.png", float("inf"))), "bad field", "got inf"),
    "text": (mmc4(["a"], ("2.png", "0")), "bad field", "got '0'"),
    "list": (mmc4(["a"], ("2.png", [0])), "bad field", "got [0]"),
    "huge": (mmc4(["a"], ("2.png", 10**4000)), "bad field", "got 1000"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_without_a_name_or_a_place_does_not_lose_its_page(name, folder):
    page, reason, says = BAD_IMAGES[name]
    if "image_info" in page:
        page = {**page, "image_info": page["image_info"] + mmc4([], ("1.png", 0))["image_info"]}
    data = read(folder, page, tokenizer=TOKENIZER)
    assert next(sorted(plain(prompt), key=str) for prompt in data)[:2] == [1, "a"]
    assert (data.report.skipped, data.report.dropped) == ({}, {reason: 1})
    assert says in data.report.messages[0]
    with pytest.raises(ValueError, match=r"pages.jsonl:1: "):
        list(read(folder, page, tokenizer=TOKENIZER, strict=True))


def test_a_page_whose_only_image_has_no_place_is_skipped(folder):
    data = read(folder, GOOD, mmc4(["a"], ("1.png", 1)))
    assert len(list(data)) == 1
    assert (data.report.skipped, data.report.dropped) == ({"no usable image": 1}, {"bad field": 1})


def test_whole_floats_are_places(folder):
    (prompt,) = read(folder, mmc4(["a", "b"], ("1.png", 1.0), ("2.png", 0.0)))
    assert plain(prompt) == [2, "a", 1, "b"]


def test_a_tokenizer_that_raises_anything_skips_a_page_not_the_stream(folder):
    class Fails:
        def encode(self, text):
            if text == "b":
                raise TypeError("no b")
            return text.split()

        def decode(self, ids):
            return " ".join(ids)

    data = read(folder, obelics("b", "1.png"), obelics("a", "1.png"), tokenizer=Fails())
    assert [plain(prompt) for prompt in data] == [["a", 1]]
    assert data.report.skipped == {"refused text": 1}
    assert "TypeError: no b" in data.report.messages[0]


def test_an_unusable_image_is_left_out_and_counted_the_page_stays(folder):
    page = obelics("a", "bad.png", "b", "1.png", "c", "../x.png", "http://x.png", "9.png")
    data = read(folder, page)
    assert [plain(prompt) for prompt in data] == [["a", "b", 1, "c"]]
    assert data.report.skipped == {}
    assert data.report.dropped == {
        "unreadable image": 1, "path outside the folder": 1, "missing image": 2,
    }  # fmt: skip
    assert str(data.report).startswith("1 read, 1 yielded, 0 skipped; 4 images dropped: 2 missing")
    assert "pages.jsonl:1: " in data.report.messages[0]
    with pytest.raises(ValueError, match=r"pages.jsonl:1: bad.png: "):
        list(read(folder, page, strict=True))


def test_a_page_without_any_usable_image_is_skipped(folder):
    data = read(folder, GOOD, obelics("bad.png", "a", "9.png", "bad.png"))
    assert len(list(data)) == 1
    assert data.report.skipped == {"no usable image": 1}
    assert sum(data.report.dropped.values()) == 2  # each file is tried once


def test_a_usable_image_is_found_however_far_it_is(folder):
    pages = [obelics(*["bad.png", "a b c d"] * 40, "3.png", "e", *["9.png", "f g"] * 40)] * 20
    data = read(folder, *pages, length=10)
    assert all(3 in plain(prompt) for prompt in data)
    assert data.report.yielded == 20


def test_files_are_jsonl_only_and_the_options_are_checked(folder):
    with pytest.raises(ValueError, match=r"expected files that end in \.jsonl"):
        read_documents(folder / "0.png")
    for options in ({"length": 4}, {"max_images": 0}):
        with pytest.raises(ValueError, match="expected length >= 5 and max_images >= 1, got"):
            read(folder, GOOD, **options)


# --- the run ------------------------------------------------------------------------------------


def flatten(parts):
    """Texts and images -> words, an image as the two tokens that it takes."""
    words = [split_words(part) if isinstance(part, str) else ["<EOC>", "<image>"] for part in parts]
    return [word for part in words for word in part]


def test_the_first_five_images_are_kept_and_all_of_the_text(folder):
    page = obelics(*(part for i in range(8) for part in (f"{i}.png", "abcdefgh"[i])))
    (prompt,) = read(folder, page)
    assert plain(prompt) == [0, "a", 1, "b", 2, "c", 3, "d", 4, "e", "f", "g", "h"]
    (prompt,) = read(folder, page, max_images=1)
    assert plain(prompt) == [0, *"abcdefgh"]


def test_an_unreadable_image_does_not_count_as_one_of_the_first(folder):
    page = obelics("0.png", "a", "bad.png", "b", "1.png", "c", "2.png")
    (prompt,) = read(folder, page, max_images=2)
    assert plain(prompt) == [0, "a", "b", 1, "c"]


words = st.lists(st.sampled_from(["a", "b", "c", "don't", "?"]), min_size=1, max_size=6)
pages = st.lists(words.map(" ".join) | st.integers(0, 7).map(lambda i: Picture(str(i))), max_size=9)


@given(pages, st.integers(2, 30), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_a_run_is_a_piece_of_the_page_of_that_length(parts, length, seed):
    parts = [*parts, Picture("0")]
    run = draw_run(parts, length, np.random.default_rng(seed))
    whole, got = flatten(parts), flatten(run)
    assert any(isinstance(part, Picture) for part in run)
    assert any(whole[i : i + len(got)] == got for i in range(len(whole)))
    # at either edge half an image may be lost
    assert min(len(whole), length) - 2 <= len(got) <= length
    if length >= len(whole):
        assert run == parts


def test_every_run_with_an_image_is_drawn_equally_often():
    parts = ["a b c d", Picture("0"), "e f g h"]  # 10 tokens, the image at 4 and 5
    draws = [flatten(draw_run(parts, 4, np.random.default_rng(i))) for i in range(3000)]
    counts = {" ".join(draw): draws.count(draw) for draw in draws}
    assert set(counts) == {"c d <EOC> <image>", "d <EOC> <image> e", "<EOC> <image> e f"}
    assert all(900 < count < 1100 for count in counts.values())


def test_a_tokenizer_of_its_own_counts_and_cuts():
    class Letters:
        def encode(self, text):
            return [ord(letter) for letter in text]

        def decode(self, ids):
            return "".join(map(chr, ids))

    runs = [
        draw_run(["abcdef", Picture("0")], 5, np.random.default_rng(i), Letters()) for i in range(9)
    ]
    assert runs == [["def", Picture("0")]] * 9


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    for i in range(7):  # and no 7.png
        Image.new("RGB", (2, 2)).save(path / f"{i}.png")
    return path


@given(pages, st.integers(5, 20), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_what_build_batch_makes_of_a_page_keeps_the_limits(images, parts, length, most, seed):
    names = [f"{p.name}.png" if isinstance(p, Picture) else p for p in [*parts, Picture("0"), "a"]]
    line = Line("here", images, json.dumps(obelics(*names)).encode())
    rng, report = np.random.default_rng(seed), Report()
    prompt = interleaved._document(line, rng, report, None, length, most)
    tokenizer = WordTokenizer(["a", "b", "c", "don't", "?"])
    batch = build_batch([prompt], tokenizer, image_size=2)
    assert batch.tokens.shape[1] <= length
    assert 1 <= batch.num_images[0] <= most
    assert report.dropped.total() <= 1  # 7.png, tried at most once


def test_each_epoch_draws_another_run_and_a_resumed_stream_the_same(folder):
    page = obelics("a b c d", "0.png", "e f g h", "1.png", "a b c d", "2.png", "e f g h")
    stream = Stream(read(folder, page, page, length=8))
    before = [plain(next(stream)) for _ in range(9)]
    assert len({str(prompt) for prompt in before}) > 3
    resumed = Stream(read(folder, page, page, length=8), state=stream.state)
    for _ in range(6):
        assert plain(next(resumed)) == plain(next(stream))


def test_a_bad_record_tells_its_reason():
    with pytest.raises(BadRecord, match="expected") as caught:
        interleaved.read_parts({})
    assert caught.value.reason == "missing key"
