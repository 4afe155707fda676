"""Small checkpoints as other projects write them, by hand: for tests, and for their damage."""

import json
import struct

import numpy as np

from miniflamingo.module import save_tensors

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300,
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip


def llama_shapes(config=LLAMA):
    """{name: shape} of Hugging Face's LlamaForCausalLM."""
    c = config
    D, F, K = c["hidden_size"], c["intermediate_size"], c["num_key_value_heads"]
    K *= D // c["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], D), "model.norm.weight": (D,)}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}input_layernorm.weight": (D,),
            f"{at}post_attention_layernorm.weight": (D,),
        }
        shapes |= {f"{at}self_attn.{n}_proj.weight": (m, D) for n, m in zip("qkv", (D, K, K))}
        shapes |= {f"{at}self_attn.o_proj.weight": (D, D), f"{at}mlp.down_proj.weight": (D, F)}
        shapes |= {f"{at}mlp.{n}_proj.weight": (F, D) for n in ("gate", "up")}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], D)
    return shapes


def llama_state(config=LLAMA, seed=0):
    """{name: float32 array} of the same, of random numbers."""
    rng, shapes = np.random.default_rng(seed), llama_shapes(config)
    return {n: (len(s) == 1) + rng.normal(0, 0.2, s).astype(np.float32) for n, s in shapes.items()}


def save_folder(folder, config, state, shards=1):
    """Write config.json and model.safetensors, or shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    if shards == 1:
        save_tensors(folder / "model.safetensors", state, {"format": "pt"})
        return folder
    names, places = sorted(state), {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_tensors(folder / shard, {name: state[name] for name in names[i::shards]})
        places |= dict.fromkeys(names[i::shards], shard)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


# --- GGUF -----------------------------------------------------------------------------------------

KINDS = {bool: 7, int: 4, float: 6, str: 8}  # of metadata: bool, uint32, float32, text
TYPES = {"F32": 0, "F16": 1, "Q8_0": 8}


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(x):
    """A value of the metadata with its kind."""
    if isinstance(x, list):
        inner = KINDS[type(x[0])]
        items = b"".join(value(item)[4:] for item in x)
        return struct.pack("<IIQ", 9, inner, len(x)) + items
    kind = KINDS[type(x)]
    packed = text(x) if kind == 8 else struct.pack("<" + {7: "?", 4: "I", 6: "f"}[kind], x)
    return struct.pack("<I", kind) + packed


def q8(array):
    """Q8_0: blocks of a float16 scale and 32 signed bytes."""
    blocks = array.reshape(-1, 32)
    scale = (abs(blocks).max(1, keepdims=True) / 127).astype("<f2")
    whole = np.rint(blocks / np.maximum(scale.astype("f4"), 1e-9)).clip(-127, 127).astype("i1")
    return b"".join(s.tobytes() + w.tobytes() for s, w in zip(scale, whole))


PACK = {"F32": lambda x: x.astype("<f4").tobytes(), "F16": lambda x: x.astype("<f2").tobytes(),
        "Q8_0": q8}  # fmt: skip


def save_gguf(path, metadata, tensors):
    """Write a GGUF file: metadata {key: value}, tensors {name: (kind, array)}."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(key) + value(x) for key, x in metadata.items())
    data = b""
    for name, (kind, array) in tensors.items():
        head += text(name) + struct.pack(f"<I{array.ndim}Q", array.ndim, *array.shape[::-1])
        head += struct.pack("<IQ", TYPES.get(kind, kind), len(data))
        packed = PACK[kind](array) if kind in PACK else bytes(array.size)
        data += packed + bytes(-len(packed) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def gguf_llama(config=LLAMA, seed=0, kind="F32"):
    """-> metadata and tensors of the GGUF that llama.cpp's converter makes of a Llama."""
    c, state = config, llama_state(config, seed)
    about = {"embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
             "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
             "attention.head_count_kv": "num_key_value_heads", "rope.freq_base": "rope_theta",
             "attention.layer_norm_rms_epsilon": "rms_norm_eps"}  # fmt: skip
    metadata = {"general.architecture": "llama", "general.name": "made up"}
    metadata |= {f"llama.{key}": c[field] for key, field in about.items()}
    words = {
        "self_attn.o_proj": "attn_output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    words |= {f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"}
    words |= {f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}
    tensors = {}
    for name, array in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = c["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            halves = array.reshape(heads, 2, len(array) // heads // 2, -1)
            array = halves.swapaxes(1, 2).reshape(array.shape)
        for theirs, own in sorted(words.items(), key=lambda pair: -len(pair[0])):
            name = name.replace(theirs, own)
        tensors[name] = ("F32" if array.ndim == 1 else kind, array)
    return metadata, tensors


# --- tokenizers -----------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are made up.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["The capital of France is Paris.", "what color is it ? naïve café 日本", "red green blue"]


def trained(size=300):
    """A byte-level BPE tokenizer of `size` ids, the special ones first, that puts <s> in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=alphabet)  # fmt: skip
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def tables(tokenizer):
    """The same as the tables of a GGUF."""
    about = json.loads(tokenizer.to_str())
    words = tokenizer.get_vocab()
    tokens = sorted(words, key=words.get)
    merges = [" ".join(pair) for pair in about["model"]["merges"]]
    kinds = [3 if token in SPECIAL else 1 for token in tokens]
    found = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": kinds,
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": True,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in found.items()} | {
        "tokenizer.chat_template": CHATML}  # fmt: skip


def save_tokenizer(folder, tokenizer, **about):
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "bos_token": {"content": "<s>"}, "chat_template": CHATML} | about
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


# --- OpenFlamingo ---------------------------------------------------------------------------------

OPEN_FLAMINGO = {
    "cross_attn_every_n_layers": 2, "dim_head": 8, "media_token_id": 301, "eoc_token_id": 300,
    "lang_config": LLAMA | {"vocab_size": 302, "num_hidden_layers": 4,
                            "tie_word_embeddings": False},
    "vision_config": {"width": 24, "layers": 2, "patch_size": 14, "image_size": 28,
                      "head_width": 8},
}  # fmt: skip


def _attention(norms, D, context, inner):
    shapes = {f"{norm}.{kind}": (width,) for norm, width in norms.items()
              for kind in ("weight", "bias")}  # fmt: skip
    return shapes | {"to_q.weight": (inner, D), "to_kv.weight": (2 * inner, context),
                     "to_out.weight": (D, inner)}  # fmt: skip


def _feed_forward(D):
    return {"0.weight": (D,), "0.bias": (D,), "1.weight": (4 * D, D), "3.weight": (D, 4 * D)}


def _open_clip(W, side, layers):
    shapes = {"class_embedding": (W,), "conv1.weight": (W, 3, 14, 14), "proj": (W, 16),
              "positional_embedding": (1 + side * side, W)}  # fmt: skip
    shapes |= {f"ln_{n}.{kind}": (W,) for n in ("pre", "post") for kind in ("weight", "bias")}
    for i in range(layers):
        at = f"transformer.resblocks.{i}."
        shapes |= {f"{at}ln_{n}.{kind}": (W,) for n in "12" for kind in ("weight", "bias")}
        shapes |= {f"{at}attn.in_proj_weight": (3 * W, W), f"{at}attn.in_proj_bias": (3 * W,)}
        for name, (o, j) in {"attn.out_proj": (W, W), "mlp.c_fc": (4 * W, W),
                             "mlp.c_proj": (W, 4 * W)}.items():  # fmt: skip
            shapes |= {f"{at}{name}.weight": (o, j), f"{at}{name}.bias": (o,)}
    return shapes


def open_flamingo_state(seed=0):
    """{name: array} of a whole OpenFlamingo with a Llama, as its state_dict names them."""
    D, M, inner, rng = LLAMA["hidden_size"], 24, 64, np.random.default_rng(seed)
    shapes = {f"lang_encoder.{n}".replace(".self_attn", ".decoder_layer.self_attn"): s
              for n, s in llama_shapes(OPEN_FLAMINGO["lang_config"]).items()}  # fmt: skip
    for i in (1, 3):
        at = f"lang_encoder.gated_cross_attn_layers.{i}."
        shapes |= {f"{at}attn.{n}": s for n, s in _attention({"norm": D}, D, M, inner).items()}
        shapes |= {f"{at}ff.{n}": s for n, s in _feed_forward(D).items()}
        shapes |= {f"{at}attn_gate": (1,), f"{at}ff_gate": (1,)}
    norms = {"norm_media": M, "norm_latents": M}
    for i in range(2):
        at = f"perceiver.layers.{i}."
        shapes |= {f"{at}0.{n}": s for n, s in _attention(norms, M, M, inner).items()}
        shapes |= {f"{at}1.{n}": s for n, s in _feed_forward(M).items()}
    shapes |= {
        "perceiver.latents": (5, M),
        "perceiver.norm.weight": (M,),
        "perceiver.norm.bias": (M,),
    }
    shapes |= {f"vision_encoder.{n}": s for n, s in _open_clip(M, 2, 2).items()}
    return {n: (len(s) == 1) + rng.normal(0, 0.2, s).astype(np.float32) for n, s in shapes.items()}
