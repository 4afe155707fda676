"""The layers inside decoders of Hugging Face's transformers, tiny and random."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from miniflamingo.kernels.model.adapter import insert_into  # noqa: E402
from miniflamingo.kernels.model.layers import MISSING  # noqa: E402

SIZES = {"dim": 16, "media_dim": 12, "heads": 2, "head_dim": 8}
PROMPT = torch.tensor([[5, 3, 7, 8, 3, 9], [5, 6, 7, 3, 8, 9]])  # 3 is <image>
PHI = (PROMPT == 3).cumsum(1)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=32, n_embd=16, n_layer=4, n_head=2, bos_token_id=1,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    return model, model.transformer.h


def llama():
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    return model, model.model.layers


both = pytest.mark.parametrize("build", [gpt2, llama])


def with_layers(build, every=2, gates=None, **options):
    """A frozen decoder with layers, their gates open by default, and media for PROMPT."""
    torch.manual_seed(0)
    model, blocks = build()
    model.eval().requires_grad_(False)
    gated = insert_into(blocks, every, **SIZES, **options)
    with torch.no_grad():
        for layer in gated:
            layer.alpha_xattn.fill_(1.5 if gates is None else gates)
            layer.alpha_dense.fill_(-0.7 if gates is None else gates)
            layer.attention.out_proj.weight.mul_(5)
    return model, gated, torch.randn(2, 2, 3, 12)


@both
def test_with_shut_gates_the_logits_are_the_decoders_bit_for_bit(build):
    model, gated, media = with_layers(build, gates=0)
    names = set(model.state_dict())
    with gated.reading(media, PHI):
        inside = model(PROMPT).logits
    assert inside.requires_grad  # the layers were run
    gated.remove()
    assert torch.equal(model(PROMPT).logits, inside)
    assert set(model.state_dict()) == names and len(gated) == 2


@both
def test_open_gates_show_an_image_to_its_own_tokens_and_what_follows(build):
    model, gated, media = with_layers(build, every=1)
    alone = model(PROMPT).logits
    changed = media.clone()
    changed[:, 1] += 1  # the second image
    with gated.reading(media, PHI):
        before = model(PROMPT).logits
    with gated.reading(changed, PHI):
        after = model(PROMPT).logits
    assert torch.equal(model(PROMPT).logits, alone)  # outside, the original again
    assert not torch.allclose(before, alone)
    moved = (before != after).any(dim=-1)
    assert torch.equal(moved, PHI == 2)


@both
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_layers_get_gradients(build, checkpointing):
    model, gated, media = with_layers(build, gates=0, checkpointing=checkpointing)
    media.requires_grad_()
    with gated.reading(media, PHI):
        loss = model(PROMPT, labels=PROMPT).loss
    loss.backward()
    assert all(p.grad is None for p in model.parameters())
    for layer in gated:
        assert layer.alpha_xattn.grad != 0 and layer.alpha_dense.grad != 0
    model, gated, media = with_layers(build, checkpointing=checkpointing)
    with gated.reading(media, PHI):
        loss = model(PROMPT, labels=PROMPT).loss
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in gated.parameters())


def test_the_decoders_own_checkpointing_works_too():
    grads = []
    for on in (False, True):
        model, gated, media = with_layers(llama)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with gated.reading(media, PHI):
            model(PROMPT, labels=PROMPT).loss.backward()
        grads.append([p.grad for p in gated.parameters()])
    torch.testing.assert_close(*grads)


def generate(model, prompt, **options):
    return model.generate(prompt, max_new_tokens=8, do_sample=False, **options)


@both
def test_media_given_once_serve_a_cached_generation(build, monkeypatch):
    model, gated, media = with_layers(build)
    projected = []
    for layer in gated:
        project = layer.project_media
        monkeypatch.setattr(
            layer, "project_media", lambda m, p=project: projected.append(0) or p(m)
        )
    with gated.reading(media, PHI):
        cached = generate(model, PROMPT)
    assert len(projected) == len(gated)  # once a layer, not once a token
    with gated.reading(media, PHI):
        assert torch.equal(generate(model, PROMPT, use_cache=False), cached)
    with gated.reading(media.flip(0), PHI):
        assert not torch.equal(generate(model, PROMPT), cached)
    assert not torch.equal(generate(model, PROMPT), cached)


@both
def test_cached_logits_equal_those_of_one_pass(build):
    model, gated, media = with_layers(build)
    with torch.no_grad(), gated.reading(media, PHI):
        whole, cache, steps = model(PROMPT).logits, None, []
        for piece in PROMPT.split([4, 1, 1], dim=1):  # a prompt in two parts: phi goes on
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_beams_need_their_rows_of_media():
    model, gated, media = with_layers(llama)
    wide = media.repeat_interleave(3, 0), PHI.repeat_interleave(3, 0)
    with gated.reading(*wide):
        assert generate(model, PROMPT, num_beams=3).shape == (2, 14)
    with (
        gated.reading(media, PHI),
        pytest.raises(ValueError, match="6 rows and was given media for 2"),
    ):
        generate(model, PROMPT, num_beams=3)


def test_padding_on_the_left_changes_nothing():
    model, gated, media = with_layers(llama)
    with gated.reading(media[:1], PHI[:1]):
        expected = generate(model, PROMPT[:1])[:, 6:]
    padded = torch.nn.functional.pad(PROMPT[:1], (3, 0))
    phi = torch.nn.functional.pad(PHI[:1], (3, 0))
    with gated.reading(media[:1], phi):
        ours = generate(model, padded, attention_mask=(padded != 0).long())
    assert torch.equal(ours[:, 9:], expected)


@both
def test_float32_layers_serve_a_bfloat16_decoder(build):
    model, gated, media = with_layers(build)
    with torch.no_grad(), gated.reading(media, PHI):
        expected = model(PROMPT).logits
    model.bfloat16()
    with gated.reading(media, PHI):
        out = model(PROMPT, labels=PROMPT)
        out.loss.backward()
        generate(model, PROMPT)
    assert out.logits.dtype == torch.bfloat16
    assert {p.grad.dtype for p in gated.parameters()} == {torch.float32}
    torch.testing.assert_close(out.logits.float(), expected, rtol=0.1, atol=0.05)


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_the_kernel_gives_the_same_logits():
    logits = []
    for backend in ("torch", "fused"):
        model, gated, media = with_layers(llama, backend=backend)
        with gated.reading(media, PHI):
            logits.append(model(PROMPT).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_with_a_cache_the_kernel_for_one_token_writes():
    from miniflamingo.kernels.common import runtime

    written, launches = [], []
    for backend in ("torch", "fused"):
        model, gated, media = with_layers(llama, backend=backend)
        names = []

        def note(kernel, programs, *args, names=names, **options):
            names.append(kernel.__name__)
            kernel[(programs,)](*args, **options)

        with runtime.replaced(launch=note), gated.reading(media, PHI):
            written.append(generate(model, PROMPT))
        launches.append(names)
    assert torch.equal(*written)
    layers = len(gated)
    steps = ["_decode"] * layers * 7  # the prompt's pass writes the first of eight tokens
    assert launches == [[], ["_list_work"] + ["_forward"] * layers + steps]


def test_the_whole_decoder_compiles_without_a_graph_break():
    model, gated, media = with_layers(llama)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with gated.reading(media, PHI):
        torch.testing.assert_close(compiled(PROMPT).logits, model(PROMPT).logits)


def test_a_copied_model_has_its_own_layers():
    model, gated, media = with_layers(llama)
    model.gated_xattn = gated
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.gated_xattn[0].alpha_xattn.zero_()
    with gated.reading(media, PHI), twin.gated_xattn.reading(media, PHI):
        assert not torch.allclose(model(PROMPT).logits, twin(PROMPT).logits)
    assert gated[0].alpha_xattn != 0


def test_bad_input():
    model, gated, media = with_layers(llama)
    with pytest.raises(ValueError, match="every >= 1, got 4 and every=0"):
        insert_into(model.model.layers, 0, **SIZES)
    wrong = [
        (media, PHI + 1, "phi must lie in 0..2"),
        (media, PHI[:1], r"= \[2, 6\] on cpu, got"),
        (media[0], PHI, r"must be \[B, N, R, D_m\].* got \[2, 3, 12\] and \[2, 6\]"),
    ]
    for images, phi, message in wrong:
        with pytest.raises(ValueError, match=message), gated.reading(images, phi):
            pass
    with gated.reading(media, PHI), pytest.raises(ValueError, match="LlamaDecoderLayer got no hid"):
        model.model.layers[0]()
