"""Frequencies of rotary positions and their tables: yarn beside its paper and transformers, fields out of range."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megaxelm_kernels.rotary import inverse_frequencies, rotary_parameters, rotary_tables


def test_yarn_is_that_of_its_paper() -> None:
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "truncate": False}
    frequencies, factor = rotary_parameters(64, 10000.0, scaling)
    assert factor == pytest.approx(0.1 * math.log(8) + 1)
    for i in range(32):
        plain = 10000.0 ** (-2 * i / 64)
        turns = 4096 * plain / (2 * math.pi)
        # Equation 17 of the paper has a ramp in turns; its code, and every model, one in the index of the pair between the same ends.
        first, last = (64 * math.log(4096 / (2 * math.pi * beta)) / (2 * math.log(10000.0)) for beta in (32, 1))
        slowed = min(max((i - first) / (last - first), 0.0), 1.0)
        assert frequencies[i].item() == pytest.approx(plain / 8 * slowed + plain * (1 - slowed), rel=1e-5)
        if turns > 32:
            assert frequencies[i].item() == pytest.approx(plain, rel=1e-6)
        if turns < 1:
            assert frequencies[i].item() == pytest.approx(plain / 8, rel=1e-6)


YARNS: list[dict[str, Any]] = [
    {"factor": 4.0, "original_max_position_embeddings": 32768},
    {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.707},
    {"factor": 2.0, "original_max_position_embeddings": 128, "attention_factor": 1.5},
    {"factor": 1.0, "original_max_position_embeddings": 2048},
    {"factor": 2.0, "original_max_position_embeddings": 1_000_000},
]


@pytest.mark.parametrize("scaling", YARNS)
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_yarn_equals_transformers(scaling: dict[str, Any], partial: float) -> None:
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    given = {"rope_type": "yarn", "rope_theta": 50000.0, "partial_rotary_factor": partial} | scaling
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=given)
    theirs, their_factor = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    ours, our_factor = rotary_parameters(128, 50000.0, {"rope_type": "yarn"} | scaling, rotary_dim=int(128 * partial))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(their_factor)


def test_tables_carry_the_factor_of_attention() -> None:
    frequencies, factor = rotary_parameters(16, 10000.0, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})
    cos, sin = rotary_tables(torch.arange(9), frequencies, attention_factor=factor)
    assert factor > 1.1
    torch.testing.assert_close(cos.square() + sin.square(), torch.full((9, 8), factor**2))


def test_a_factor_that_would_be_lost_is_an_error() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match=r"yarn: cos and sin must be multiplied by 1\.1386.*rotary_parameters"):
        inverse_frequencies(16, 10000.0, scaling)
    torch.testing.assert_close(
        inverse_frequencies(16, 10000.0, scaling | {"attention_factor": 1.0}), rotary_parameters(16, 10000.0, scaling)[0]
    )


@pytest.mark.parametrize(
    ("scaling", "rotary_dim", "text"),
    [
        ({"rope_type": "yarn", "original_max_position_embeddings": 64}, None, "yarn needs factor"),
        ({"rope_type": "yarn", "factor": 2.0}, None, "needs original_max_position_embeddings"),
        ({"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 64}, None, "factor = 0.5"),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 1, "beta_slow": 2},
            None,
            "beta_fast = 1",
        ),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 0}, None, "attention_factor = 0"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, None, "llama3 needs high_freq_factor"),
        ({"rope_type": "dynamic"}, None, "rope_type = 'dynamic': choose linear, llama3, yarn"),
        (None, 5, "rotary_dim = 5"),
        (None, 18, "rotary_dim = 18: choose an even number from 2 to head_dim = 16"),
        (None, 0, "rotary_dim = 0"),
    ],
)
def test_fields_out_of_range_are_named(scaling: dict[str, Any] | None, rotary_dim: int | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        rotary_parameters(16, 10000.0, scaling, rotary_dim=rotary_dim)
