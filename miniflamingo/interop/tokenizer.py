"""Other projects' tokenizers: a folder's tokenizer.json, or the tables of a GGUF, and plain chats.

    words = tokenizer_of(checkpoint)
    words.start + words.encode("The capital of France is")     # ids
    words.chat("Why is the sky blue?")                         # as an instruct model has read it

What a user writes is text, all of it: `<|im_end|>` in it is spelled out, not obeyed. The package
`tokenizers` (the extra `interop`) does the work.
"""

import re
from importlib import import_module

import numpy as np

from miniflamingo.command import require
from miniflamingo.interop.files import read_config
from miniflamingo.tensorfile import shown

LARGEST = 2**27  # bytes of a tokenizer.json; the largest known ones have 35 MB
CONTROL, USERS = 3, 4  # kinds of a GGUF's tokens that are matched as a whole
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# how a GGUF's tokenizer.ggml.pre cuts a text before its pieces are merged (llama.cpp, llama-vocab)
CUTS = {"gpt-2": [GPT2], "smollm": [r"\p{N}", GPT2], "llama-bpe": [LLAMA3]}
# ChatML as SmolLM2, Qwen and others write it, with or without a system prompt of its own
CHATML = (
    r"<\|im_start\|>' ?\+ ?message\['role'\] ?\+ ?'\\n' ?\+ ?message\['content'\] ?\+ ?"
    r"'<\|im_end\|>"
)
SYSTEM = r"<\|im_start\|>system\\n([^<>{}']*)<\|im_end\|>\\n"


class ForeignTokenizer:
    """Text <-> ids of one model. start: the ids before a prompt; ends: the set of ids after it.

    name says where it comes from, in errors.
    """

    def __init__(self, tokenizer, name, start=(), ends=(), template=None):
        self.tokenizer, self.name, self.template = tokenizer, name, template
        self.start, self.ends = list(start), set(ends)
        tokenizer.encode_special_tokens = True
        words = tokenizer.get_vocab(with_added_tokens=True)
        self.most = max(words.values(), default=-1) + 1

    def __len__(self):
        return self.most

    def encode(self, text):
        """str -> list of ids, without anything before or behind it; ValueError for half a letter,
        which is what bytes that are no UTF-8 become."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"a text must be UTF-8, got {shown(ascii(text))}") from None
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """ids -> str, without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def id_of(self, token):
        """The id of a special token; ValueError that names it if there is none."""
        if (found := self.tokenizer.token_to_id(token)) is None:
            raise ValueError(f"{self.name} has no token {token}")
        return found

    def check(self, rows):
        """ValueError unless each id is a row of a model's embedding."""
        if wrong := [i for i in self.start if not 0 <= i < rows]:
            raise ValueError(f"{self.name}: a text begins with the id {wrong[0]}, the model has "
                             f"{rows} rows of embeddings")  # fmt: skip
        if self.most > rows:
            raise ValueError(f"{self.name}: a tokenizer of {self.most} ids does not belong to a "
                             f"model with {rows} rows of embeddings")  # fmt: skip

    def chat(self, text):
        """One question -> ids, ending where the answer begins. ValueError unless the checkpoint's
        chat template is ChatML, the one form that is rendered here."""
        template = (self.template or "").replace("\n", "\\n").replace('"', "'")
        if not re.search(CHATML, template):
            why = "is of a form that is not rendered here" if self.template else "is missing"
            raise ValueError(f"{self.name}: its chat template {why}: give a plain --text")
        begin, end, line = self.id_of("<|im_start|>"), self.id_of("<|im_end|>"), self.encode("\n")
        ids = []
        if system := re.search(SYSTEM, template):
            ids += [begin, *self.encode(f"system\n{system[1]}"), end, *line]
        ids += [begin, *self.encode(f"user\n{text}"), end, *line]
        return [*ids, begin, *self.encode("assistant\n")]

    def stream(self, steps):
        """ids one by one -> pieces of text, each as soon as its letters are whole."""
        ids, shown_to, sent = (
            [],
            0,
            0,
        )  # text up to ids[sent:] is out; ids[shown_to:sent] is context
        for token in steps:
            ids.append(int(token))
            before, now = self.decode(ids[shown_to:sent]), self.decode(ids[shown_to:])
            if len(now) > len(before) and not now.endswith("\ufffd"):
                yield now[len(before) :]
                shown_to, sent = sent, len(ids)
        before, now = self.decode(ids[shown_to:sent]), self.decode(ids[shown_to:])
        if len(now) > len(before):
            yield now[len(before) :]


def tokenizer_of(checkpoint):
    """The ForeignTokenizer that a Checkpoint brings: in its metadata (GGUF), or in its folder.

    ValueError in one line if there is none, or it is damaged or of a kind that is not read;
    ModuleNotFoundError without the package `tokenizers`.
    """
    require("tokenizers")
    if "tokenizer.ggml.model" in checkpoint.metadata:
        return _from_tables(checkpoint)
    folder = checkpoint.folder
    tokenizer = _from_file(folder / "tokenizer.json")
    about, generation = (_beside(folder, f"{n}_config.json") for n in ("tokenizer", "generation"))
    of, where = checkpoint.config, folder / "config.json"
    if "eos_token_id" in generation:
        of, where = generation, folder / "generation_config.json"
    ends = _ids(of.get("eos_token_id"), f"{where}: eos_token_id")
    ends |= _ids(tokenizer.token_to_id(_token(about.get("eos_token"))), "")
    name, template = str(folder / "tokenizer.json"), about.get("chat_template")
    jinja = folder / "chat_template.jinja"
    if jinja.is_file() and jinja.stat().st_size < 10**6:
        template = jinja.read_text("utf-8", errors="replace")
    template = template if isinstance(template, str) else None
    return ForeignTokenizer(tokenizer, name, _start(tokenizer), ends, template)


def _from_file(path):
    """The package's Tokenizer of a tokenizer.json, which neither cuts nor pads."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no tokenizer.json")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {LARGEST}")
    try:
        tokenizer = import_module("tokenizers").Tokenizer.from_file(str(path))
    except Exception as error:  # what the package raises is a plain Exception
        raise ValueError(f"{path} is no tokenizer: {shown(error, 200)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _beside(folder, name):
    path = folder / name
    return read_config(path) if path.is_file() else {}


def _token(value):
    """A special token of tokenizer_config.json: text, or an object with its text."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _ids(value, where):
    """The ids of a config: one, several or none -> a set; ValueError that names `where`."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(x, int) and not isinstance(x, bool) for x in values):
        raise ValueError(f"{where} must be an id or a list of ids, got {shown(repr(value))}")
    return set(values)


def _start(tokenizer):
    """The ids that the tokenizer itself puts before a text, such as <s>."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[:at]
    return []


# --- a GGUF's tables ------------------------------------------------------------------------------


def _from_tables(checkpoint):
    about, name = checkpoint.metadata, f"{checkpoint.path}: tokenizer.ggml"
    tokens, kinds = (about.get(f"tokenizer.ggml.{k}") for k in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        raise ValueError(f"{name}.tokens must be a list of texts, got {shown(tokens)}")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != len(tokens)):
        raise ValueError(f"{name}.token_type must have a kind for each of {len(tokens)} tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(t for i, t in enumerate(tokens) if vocabulary[t] != i)
        raise ValueError(f"{name}.tokens: {shown(twice)} stands twice")
    kind = about["tokenizer.ggml.model"]
    if not isinstance(kind, str) or kind not in BUILD:
        raise ValueError(f"{name}.model is {shown(kind)}: read are {', '.join(BUILD)}")
    tokenizer = BUILD[kind](vocabulary, about, name)
    added = import_module("tokenizers").AddedToken
    for token, what in zip(tokens, kinds or ()):
        if what in (CONTROL, USERS) and token:
            add = tokenizer.add_special_tokens if what == CONTROL else tokenizer.add_tokens
            add([added(token, normalized=False, special=what == CONTROL)])
    ids = {n: _ids(about.get(f"tokenizer.ggml.{n}_token_id"), f"{name}.{n}_token_id")
           for n in ("bos", "eos", "eot")}  # fmt: skip
    start = ids["bos"] if about.get("tokenizer.ggml.add_bos_token", kind == "llama") else ()
    template = about.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    ends = ids["eos"] | ids["eot"]
    return ForeignTokenizer(tokenizer, name, start, ends, template)


def _bytes_merged(vocabulary, about, name):
    """The tokenizer of GPT-2's kind: bytes as letters, merged pair by pair."""
    package = import_module("tokenizers")
    cut, merges = about.get("tokenizer.ggml.pre"), about.get("tokenizer.ggml.merges")
    if not isinstance(cut, str) or cut not in CUTS:
        raise ValueError(f"{name}.pre is {shown(cut)}: read are {', '.join(CUTS)}")
    pairs = [tuple(str(m).split(" ")) for m in merges] if isinstance(merges, list) else [()]
    if not all(len(pair) == 2 for pair in pairs):
        raise ValueError(f"{name}.merges must be a list of pairs of texts, got {shown(merges)}")
    parts = package.pre_tokenizers
    cuts = [parts.Split(package.Regex(pattern), "isolated") for pattern in CUTS[cut]]
    last = parts.ByteLevel(add_prefix_space=False, use_regex=False)
    try:
        model = package.models.BPE(vocabulary, pairs, ignore_merges=cut == "llama-bpe")
    except Exception as error:
        raise ValueError(f"{name}.merges do not fit its tokens: {shown(error, 200)}") from None
    tokenizer = package.Tokenizer(model)
    tokenizer.pre_tokenizer = parts.Sequence([*cuts, last])
    tokenizer.decoder = package.decoders.ByteLevel()
    return tokenizer


def _pieces_scored(vocabulary, about, name):
    """The tokenizer of Llama 1 and 2 (SentencePiece): the pieces' scores say what merges first."""
    package, scores = import_module("tokenizers"), about.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary):
        raise ValueError(f"{name}.scores must have one for each of {len(vocabulary)} tokens")
    if not np.isfinite(np.array(scores, float)).all():
        raise ValueError(f"{name}.scores are not finite")
    unknown = next((t for t in ("<unk>",) if t in vocabulary), None)
    merges = sorted(_merges(vocabulary, scores), key=lambda m: m[0], reverse=True)
    pairs = [pair for _, pair in merges]
    model = package.models.BPE(
        vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = package.Tokenizer(model)
    steps = [package.normalizers.Replace(" ", "▁")]
    if about.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, package.normalizers.Prepend("▁"))
    tokenizer.normalizer = package.normalizers.Sequence(steps)
    decoders = package.decoders
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
    ])  # fmt: skip
    return tokenizer


def _merges(vocabulary, scores):
    """Yield (score, (left, right)) for each way to cut a piece into two other pieces."""
    for piece, i in vocabulary.items():
        for at in range(1, min(len(piece), 64)):
            left, right = piece[:at], piece[at:]
            if left in vocabulary and right in vocabulary:
                yield scores[i], (left, right)


BUILD = {"gpt2": _bytes_merged, "llama": _pieces_scored}
