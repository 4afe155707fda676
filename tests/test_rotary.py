"""Rotary positions: the formula, its gradient, and the frequencies, against transformers'."""

import numpy as np
import pytest

from miniflamingo.rotary import RotaryConfig, frequencies, rotate
from tests.gradients import Case, each_of, normal

TURNS, POSITIONS = np.array([1.0, 0.3, 0.01]), np.array([[0, 1, 5], [2, 3, 40]])
x = normal(2, 3, 2, 6)


def by_complex_numbers(torch, x, positions, frequencies, scale=1.0):
    """Each pair as one complex number, multiplied by scale * exp(i angle)."""
    angle = torch.as_tensor(positions)[..., None, None] * torch.as_tensor(frequencies)
    turn = torch.polar(torch.full_like(angle, scale), angle)
    turned = torch.complex(x[..., :3], x[..., 3:]) * turn
    return torch.cat([turned.real, turned.imag], -1)


CASES = [
    Case(rotate, (x, POSITIONS), by_complex_numbers, {"frequencies": TURNS}),
    Case(
        rotate, (x, POSITIONS[:1]), by_complex_numbers, {"frequencies": TURNS, "scale": 1.2},
        note="scaled, one row of positions",
    ),
]  # fmt: skip


@each_of(CASES)
def test_formula(case, check):
    check(case)


def test_scores_depend_on_the_distance_alone():
    q, k = normal(1, 1, 1, 6), normal(1, 1, 1, 6, seed=1)

    def score(p):
        turned = (rotate(x, np.array([[at]]), TURNS) for x, at in ((q, p + 3), (k, p)))
        return np.vdot(*turned)

    assert score(0) == pytest.approx(score(9))
    assert score(0) != pytest.approx(np.vdot(q, k))


CONFIGS = [
    ({"rope_type": "default"}, {}),
    ({"rope_type": "linear", "factor": 4.0}, {"scaling": "linear", "factor": 4.0}),
    (
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        {"scaling": "llama3", "factor": 8.0, "original_length": 256},
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        {"scaling": "yarn", "factor": 4.0, "original_length": 512},
    ),
    (
        {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512,
            "attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0,
        },
        {
            "scaling": "yarn", "factor": 4.0, "original_length": 512,
            "attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize("theirs, ours", CONFIGS, ids=lambda c: str(len(c)))
def test_frequencies_are_those_of_transformers(theirs, ours):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=2048,
        rope_parameters={"rope_theta": 5e4, **theirs},
    )  # fmt: skip
    rotary, c = LlamaRotaryEmbedding(config), RotaryConfig(base=5e4, **ours)
    np.testing.assert_allclose(frequencies(c, 32), rotary.inv_freq.numpy(), rtol=2e-6)
    assert c.scale == pytest.approx(rotary.attention_scaling)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"scaling": "dynamic"}, "must be one of default, linear, llama3, yarn, got 'dynamic'"),
        ({"base": 0.5}, "base must be above 1, got 0.5"),
        ({"factor": 0.5}, "factor must be at least 1, got 0.5"),
        ({"scaling": "llama3", "low": 4.0}, "high must be above low = 4.0, got 4.0"),
        ({"original_length": 1.5}, "original_length must be int, got 1.5"),
    ],
)
def test_config_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        RotaryConfig(**wrong)
