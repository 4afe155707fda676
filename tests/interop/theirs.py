"""Small random models of transformers, saved as folders, with gates that stand open."""

import numpy as np

TEXT = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=6,
            num_attention_heads=4)  # fmt: skip


def save_idefics(folder, seed=0, vector=False):
    """A random IDEFICS with a gated layer before every second block -> its model."""
    import torch
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    eye = dict(embed_dim=24, image_size=28, patch_size=14, num_hidden_layers=2,
               num_attention_heads=3, intermediate_size=48)  # fmt: skip
    bridge = dict(use_resampler=True, resampler_n_latents=5, resampler_depth=2, resampler_n_heads=2,
                  resampler_head_dim=8)  # fmt: skip
    torch.manual_seed(seed)
    config = IdeficsConfig(
        **TEXT, additional_vocab_size=2, cross_layer_interval=2, vision_config=eye,
        perceiver_config=bridge, use_resampler=True, tie_word_embeddings=False,
        alpha_type="vector" if vector else "float", pad_token_id=0,
    )  # fmt: skip
    return _saved(IdeficsForVisionText2Text(config), folder, seed)


def save_mllama(folder, seed=0):
    """The text side of a random Llama 3.2 Vision, with its gated layers -> its model."""
    import torch
    from transformers import MllamaForCausalLM
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    torch.manual_seed(seed)
    config = MllamaTextConfig(**TEXT, num_key_value_heads=2, cross_attention_layers=[1, 4],
                              pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return _saved(MllamaForCausalLM(config), folder, seed)


def save_whole_mllama(folder, seed=0):
    """A random Llama 3.2 Vision with an eye of up to four tiles of 28 pixels -> its model."""
    import torch
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    eye = dict(hidden_size=24, num_hidden_layers=3, num_global_layers=2, attention_heads=3,
               intermediate_size=48, image_size=28, patch_size=14, max_num_tiles=4,
               intermediate_layers_indices=[0, 2], vision_output_dim=72)  # fmt: skip
    text = TEXT | dict(num_key_value_heads=2, cross_attention_layers=[1, 4], pad_token_id=0,
                       bos_token_id=1, eos_token_id=2)  # fmt: skip
    torch.manual_seed(seed)
    config = MllamaConfig(vision_config=eye, text_config=text, image_token_index=300)
    return _saved(MllamaForConditionalGeneration(config), folder, seed)


def _saved(model, folder, seed):
    """With every parameter moved from its start."""
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = rng.normal(0, 0.1, tuple(parameter.shape)).astype(np.float32)
            parameter += torch.from_numpy(noise)
        named = [p for n, p in model.named_parameters() if "alpha_" in n or n.endswith("_gate")]
        for i, parameter in enumerate(named):
            parameter += 0.2 * (i + 1)
    model.eval().save_pretrained(folder)
    return model
