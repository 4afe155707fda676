"""Tokenizers of others: the same ids from a folder as from a GGUF's tables, and plain chats."""

import json

import pytest

from miniflamingo.interop.files import open_checkpoint
from miniflamingo.interop.tokenizer import tokenizer_of
from tests.interop import made

pytest.importorskip("tokenizers")
TEXT = "The capital  of France, naïve café 日本!\n\n 2024 <|im_end|> x"


@pytest.fixture(scope="module")
def trained():
    return made.trained()


@pytest.fixture
def folder(tmp_path, trained):
    made.save_folder(tmp_path / "m", made.LLAMA, {"a": made.llama_state()["model.norm.weight"]})
    made.save_tokenizer(tmp_path / "m", trained)
    return tmp_path / "m"


@pytest.fixture
def gguf(tmp_path, trained):
    pytest.importorskip("gguf")
    about, tensors = made.gguf_llama()
    return made.save_gguf(tmp_path / "m.gguf", about | made.tables(trained), tensors)


def words_of(path):
    return tokenizer_of(open_checkpoint(path))


@pytest.mark.parametrize("where", ["folder", "gguf"])
def test_ids_are_the_tokenizer_s_and_texts_are_only_texts(where, request, trained):
    words = words_of(request.getfixturevalue(where))
    trained.encode_special_tokens = True
    expected = trained.encode(TEXT, add_special_tokens=False).ids
    assert words.encode(TEXT) == expected and words.id_of("<|im_end|>") not in expected
    assert words.decode(expected) == TEXT and words.decode([1, *expected, 2]) == TEXT
    assert words.start == [1] and words.ends == {2} and len(words) == 300


@pytest.mark.parametrize("where", ["folder", "gguf"])
def test_a_stream_gives_whole_letters(where, request):
    words = words_of(request.getfixturevalue(where))
    pieces = list(words.stream(words.encode(TEXT)))
    assert "".join(pieces) == TEXT and "\ufffd" not in "".join(pieces) and len(pieces) > 10
    cut = words.encode("日")[:-1]
    assert "".join(words.stream(cut)) == "\ufffd"


@pytest.mark.parametrize("where", ["folder", "gguf"])
def test_a_chat_is_what_the_template_renders(where, request, trained):
    jinja2 = pytest.importorskip("jinja2")
    words = words_of(request.getfixturevalue(where))
    message = {"role": "user", "content": "Why ?"}
    rendered = jinja2.Template(made.CHATML, keep_trailing_newline=True).render(
        messages=[message], add_generation_prompt=True
    )
    trained.encode_special_tokens = False
    assert words.chat("Why ?") == trained.encode(rendered, add_special_tokens=False).ids
    sly = words.chat("<|im_end|>")
    assert sly.count(words.id_of("<|im_end|>")) == 2  # of the system's and of the user's turn


@pytest.mark.parametrize(
    "template", [None, 7, "{{ bos }}[INST] {{ content }} [/INST]", "{% evil %}"]
)
def test_another_template_is_refused(folder, trained, template):
    made.save_tokenizer(folder, trained, chat_template=template)
    with pytest.raises(ValueError, match=r"its chat template is .*: give a plain --text"):
        words_of(folder).chat("a")


def test_a_tokenizer_that_does_not_belong(folder):
    words = words_of(folder)
    words.check(300)
    words.check(512)
    with pytest.raises(ValueError, match="of 300 ids does not belong to a model with 299 rows"):
        words.check(299)


def test_several_ends_are_known(folder):
    path = folder / "generation_config.json"
    path.write_text('{"eos_token_id": [2, 4]}', "utf-8")
    assert words_of(folder).ends == {2, 4}
    path.write_text('{"eos_token_id": null}', "utf-8")
    assert words_of(folder).ends == {2}  # that of tokenizer_config.json
    for value in ([2, None], "2", 2.0, True, {"id": 2}, [[2]]):
        path.write_text(json.dumps({"eos_token_id": value}), "utf-8")
        with pytest.raises(ValueError, match=r"n_config\.json: eos_token_id must be an id"):
            words_of(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"version": "1.0", "model": 1}'])
def test_a_damaged_tokenizer_is_one_line(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer: ") as error:
        words_of(folder)
    assert "\n" not in str(error.value)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        words_of(folder)


WRONG = {
    "tokens": ["a", ["a", "a"]],
    "token_type": [[1, 2], "x"],
    "pre": ["unheard-of", "qwen2"],
    "merges": [["nobody knows"], ["single"]],
    "model": ["bert", "llama"],  # the second lacks its scores
}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in WRONG.items() for v in values])
def test_tables_that_do_not_fit_are_named(tmp_path, trained, field, value):
    pytest.importorskip("gguf")
    about, tensors = made.gguf_llama()
    about |= made.tables(trained) | {f"tokenizer.ggml.{field}": value}
    path = made.save_gguf(tmp_path / "m.gguf", about, tensors)
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.|tokenizer.ggml") as error:
        words_of(path)
    assert ("scores" if value == "llama" else field) in str(error.value)
    assert "\n" not in str(error.value)


def test_scored_pieces_give_sentencepiece_s_ids(tmp_path):
    pytest.importorskip("gguf")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "t", "h", "e",
              "c", "a", "th", "▁the", "ca", "at", "▁t", "▁c", "he", "▁cat"]  # fmt: skip
    scores = [0.0] * 259 + [-20.0] * 6 + [float(-i) for i in range(len(pieces) - 265)]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259)
    about, tensors = made.gguf_llama()
    tables = {"model": "llama", "tokens": pieces, "scores": scores, "token_type": kinds,
              "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    about |= {f"tokenizer.ggml.{k}": v for k, v in tables.items()}
    words = words_of(made.save_gguf(tmp_path / "m.gguf", about, tensors))
    assert words.start == [1]
    spelled = [pieces[i] for i in words.encode("the cat é")]
    assert spelled == ["▁", "th", "e", "▁", "ca", "t", "▁", "<0xC3>", "<0xA9>"]
    assert words.decode(words.encode("the cat é")).lstrip() == "the cat é"
