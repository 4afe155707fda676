"""A Llama from a GGUF, under the names and with the config of Hugging Face's LlamaForCausalLM.

llama.cpp turns neighbouring pairs of a head's numbers by the position, Llama its two halves: the
converter of llama.cpp has therefore permuted the rows of the query and key projections, and here
they are put back.
"""

import re

from miniflamingo.tensorfile import shown

NAMES = (
    (r"token_embd\.weight", "model.embed_tokens.weight"),
    (r"output_norm\.weight", "model.norm.weight"),
    (r"output\.weight", "lm_head.weight"),
    (r"blk\.(\d+)\.attn_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"blk\.(\d+)\.ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"blk\.(\d+)\.attn_([qkv])\.(weight|bias)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"blk\.(\d+)\.attn_output\.(weight|bias)", r"model.layers.\1.self_attn.o_proj.\2"),
    (r"blk\.(\d+)\.ffn_(gate|up|down)\.(weight|bias)", r"model.layers.\1.mlp.\2_proj.\3"),
)
# field of a Llama's config.json -> key of the metadata, behind "llama."
FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
OPTIONAL = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
}
IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id"}


class LlamaOfGGUF:
    """A GGUFFile's tensors as Hugging Face's Llama has them, and `config`, its config.json.

    ValueError for another architecture, a missing size, a name that no rule knows, or positions
    that are scaled.
    """

    def __init__(self, file):
        self.file, self.path, self.metadata = file, file.path, file.metadata
        self.config = config_of(file)
        theirs = {name: their_name(name, file.path) for name in file.shapes}
        self._own = {new: name for name, new in theirs.items()}
        self.shapes = {theirs[name]: shape for name, shape in file.shapes.items()}
        self.dtypes = {theirs[name]: kind for name, kind in file.dtypes.items()}

    def array(self, name, mapped=False):
        """One tensor as float32, its rows in Llama's order."""
        array = self.file.array(self._own[name], mapped)
        kind = re.search(r"\.([qk])_proj\.", name)
        if kind is None:
            return array
        heads = self.config["num_attention_heads" if kind[1] == "q" else "num_key_value_heads"]
        if len(array) % (2 * heads):
            raise ValueError(f"{self.path}: {name} {list(array.shape)} is not of {heads} heads")
        pairs = array.reshape(heads, len(array) // heads // 2, 2, -1)
        return pairs.swapaxes(1, 2).reshape(array.shape)


def their_name(name, path):
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight; ValueError if unknown."""
    for pattern, replacement in NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise ValueError(f"{path}: {shown(name)} is no tensor of a Llama that is read here")


def config_of(file):
    """The config.json (a dict) of the Llama in a GGUFFile; ValueError as LlamaOfGGUF's."""
    about, path = file.metadata, file.path
    if (kind := about.get("general.architecture")) != "llama":
        raise ValueError(f"{path}: general.architecture is {shown(kind)}: of GGUF files, only "
                         "those of a llama are read")  # fmt: skip
    scaling = about.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.shapes:
        raise ValueError(f"{path}: scaled positions (rope) of a GGUF file are not read")
    config = {"model_type": "llama", "hidden_act": "silu"}
    for field, key in (FIELDS | OPTIONAL).items():
        key = f"llama.{key}"
        if key in about:
            config[field] = about[key]
        elif field in FIELDS:
            raise ValueError(f"{path}: its metadata lack {key}")
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    for name in ("num_attention_heads", "num_key_value_heads"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(f"{path}: {name} is {shown(config[name])}")
    config |= {k: about[f"tokenizer.ggml.{k}"] for k in IDS if f"tokenizer.ggml.{k}" in about}
    config["vocab_size"] = next(iter(file.shapes.get("token_embd.weight", ())), 0)
    return config | {"tie_word_embeddings": "output.weight" not in file.shapes}
