"""MPTs whose queries and keys have norms (MosaicGPT): against a torch model of its own.

Written from the model's description, under both generations of names and configs.
"""

import numpy as np
import pytest

from miniflamingo.interop import PROJECTS, project_of
from miniflamingo.interop.loading import shapes_of
from tests.interop import test_open_flamingo
from tests.interop.agreement import check, compare, each_route, move, run_theirs
from tests.interop.test_llama import greedy
from tests.interop.test_open_flamingo import by_parts, checkpoint

torch = pytest.importorskip("torch")
nn = torch.nn

D, H, LAYERS, WORDS = 24, 3, 2, 40
TOKENS = np.random.default_rng(0).integers(0, WORDS, (2, 11))
NAMES = {  # norms, the last one, the feed-forward and its two parts
    "mosaic_gpt": ("ln_", "ln_f", "mlp", "mlp_up", "mlp_down"),
    "mpt": ("norm_", "norm_f", "ffn", "up_proj", "down_proj"),
}
SIZES = {"d_model": D, "n_heads": H, "n_layers": LAYERS, "vocab_size": WORDS, "no_bias": True}
CONFIGS = {
    "mosaic_gpt": SIZES | {
        "model_type": "mosaic_gpt", "attn_qk_ln": True, "attn_clip_qkv": None, "alibi": True,
        "alibi_bias_max": 8, "mlp_ratio": 4, "softmax_scale": None, "prefix_lm": False},
    "mpt": SIZES | {
        "model_type": "mpt", "expansion_ratio": 4,
        "attn_config": {"qk_ln": True, "alibi": True, "attn_type": "multihead_attention"}},
}  # fmt: skip
each_generation = pytest.mark.parametrize("kind", NAMES)


def norm():
    """A layer norm without a bias."""
    return nn.LayerNorm(D, bias=False)


def named(**modules):
    holder = nn.Module()
    for name, module in modules.items():
        setattr(holder, name, module)
    return holder


class MPT(nn.Module):
    """tokens [B, L] -> logits [B, L, V]."""

    def __init__(self, kind):
        super().__init__()
        _, last, self.ffn, self.up, self.down = self.names = NAMES[kind]
        parts = {"wte": nn.Embedding(WORDS, D), last: norm()}
        self.transformer = named(**parts, blocks=nn.ModuleList(self.block() for _ in range(LAYERS)))

    def block(self):
        attention = named(
            Wqkv=nn.Linear(D, 3 * D, bias=False), out_proj=nn.Linear(D, D, bias=False),
            q_ln=norm(), k_ln=norm(),
        )  # fmt: skip
        up, down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)
        parts = {f"{self.names[0]}{i}": norm() for i in (1, 2)}
        return named(**parts, attn=attention, **{self.ffn: named(**{self.up: up, self.down: down})})

    def forward(self, tokens):
        norms, last, *_ = self.names
        x = self.transformer.wte(tokens)
        for block in self.transformer.blocks:
            x = x + self.attend(block.attn, getattr(block, f"{norms}1")(x))
            ffn, y = getattr(block, self.ffn), getattr(block, f"{norms}2")(x)
            x = x + getattr(ffn, self.down)(nn.functional.gelu(getattr(ffn, self.up)(y)))
        return getattr(self.transformer, last)(x) @ self.transformer.wte.weight.T

    def attend(self, a, x):
        q, k, v = a.Wqkv(x).chunk(3, dim=-1)
        q, k = a.q_ln(q), a.k_ln(k)  # of all heads together
        q, k, v = (y.unflatten(-1, (H, D // H)).transpose(1, 2) for y in (q, k, v))
        length = x.shape[1]
        slopes = torch.tensor([2**-4.0, 2**-8.0, 2**-2.0], dtype=x.dtype)  # of four heads' series
        far = torch.arange(1 - length, 1, dtype=x.dtype)
        scores = q @ k.mT / (D // H) ** 0.5 + slopes[:, None, None] * far
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        out = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        return a.out_proj(out.transpose(1, 2).flatten(-2))


def theirs_and_ours(kind):
    model = move(MPT(kind).double())
    state = {name: x.detach().numpy().copy() for name, x in model.state_dict().items()}
    project = project_of(CONFIGS[kind], shapes_of(state))
    assert project == "mpt"
    return model, PROJECTS[project].build(CONFIGS[kind], state, np.float64)


@each_route
@each_generation
def test_logits_and_all_gradients(kind, route):
    if route == "fused":
        pytest.skip("a language model alone has no kernel")
    model, ours = theirs_and_ours(kind)
    peer = run_theirs(model, lambda: model(torch.from_numpy(TOKENS)), {}, CONFIGS[kind])
    assert any("q_ln" in name for name in peer.gradients)
    call = lambda m, to: m(to.of(TOKENS))  # noqa: E731
    check(compare(peer, PROJECTS["mpt"], ours, call, relative=True, route=route), 1e-12)


def test_the_cache_holds_keys_after_their_norm():
    model, ours = theirs_and_ours("mosaic_gpt")
    np.testing.assert_array_equal(greedy(ours, TOKENS, 8, True), greedy(ours, TOKENS, 8, False))
    far = model(torch.from_numpy(TOKENS)).detach().numpy()
    assert abs(far - ours(TOKENS)).max() < 1e-12


def test_an_open_flamingo_over_it_is_its_parts():
    pytest.importorskip("transformers")
    config, state = checkpoint("mpt", 2, True)
    old = {".norm_": ".ln_", ".ffn.up_proj": ".mlp.mlp_up", ".ffn.down_proj": ".mlp.mlp_down"}
    for name in [n for n in state if n.startswith("lang_encoder.transformer.")]:
        new = name
        for theirs, before in old.items():
            new = new.replace(theirs, before)
        state[new] = array = state.pop(name)
        if new.endswith("Wqkv.weight"):
            for norm in ("q_ln", "k_ln"):
                width = np.linspace(0.5, 1.5, array.shape[1])
                state[new.replace("Wqkv", norm)] = width
    sizes = {n: config["lang_config"][n] for n in ("d_model", "n_heads", "n_layers", "vocab_size")}
    config["lang_config"] = CONFIGS["mosaic_gpt"] | sizes
    whole, logits = by_parts(config, state)
    assert whole.config.lm.block.qk_norm
    tokens, pixels = test_open_flamingo.TOKENS, test_open_flamingo.PIXELS
    np.testing.assert_allclose(whole(tokens, pixels), logits, atol=1e-12)


def test_without_its_norms_it_is_another_model():
    model, _ = theirs_and_ours("mpt")
    state = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    without = CONFIGS["mpt"] | {"attn_config": {"alibi": True}}
    with pytest.raises(ValueError, match=r"unexpected: blocks.0.attention.k_norm.weight"):
        PROJECTS["mpt"].build(without, state)
    for name in [n for n in state if "q_ln" in n]:
        state.pop(name)
    with pytest.raises(ValueError, match=r"missing: blocks.0.attention.q_norm.weight \[24\]"):
        PROJECTS["mpt"].build(CONFIGS["mpt"], state)
