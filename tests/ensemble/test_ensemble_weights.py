"""Mixture weights: the identities of the method as far as they are about weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaxelm.ensemble.scoring import mix_streams
from megaxelm.ensemble.weights import top_m
from megaxelm.errors import RoutingError

EPSILON = torch.finfo(torch.float32).eps


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_log_w(*shape: int, seed: int = 1) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).log_softmax(-1)


def test_top_m_keeps_the_heaviest_and_renormalises() -> None:
    log_w = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]], dtype=torch.float64).log()
    kept = top_m(log_w, 2)
    assert kept.experts.tolist() == [[1, 2], [0, 2]]
    assert torch.allclose(kept.log_w.exp(), torch.tensor([[2 / 3, 1 / 3], [5 / 8, 3 / 8]], dtype=torch.float64))
    assert torch.equal(kept.dense(3)[0].isneginf(), torch.tensor([True, False, False]))


def test_top_1_is_the_arg_max_with_all_weight() -> None:
    log_w = random_log_w(50, 5)
    kept = top_m(log_w, 1)
    assert torch.equal(kept.experts[:, 0], log_w.argmax(-1))
    assert torch.equal(kept.log_w, torch.zeros_like(kept.log_w))


def test_equal_weights_keep_the_lower_index() -> None:
    assert top_m(torch.zeros(1, 40), 3).experts.tolist() == [[0, 1, 2]]


def test_one_hot_weights_stay_exactly_one_hot() -> None:
    log_w = torch.tensor([[-math.inf, 0.0, -math.inf]])
    assert top_m(log_w, None).dense(3).tolist() == log_w.tolist()


@pytest.mark.parametrize("m", [0, 4, -1])
def test_top_m_out_of_range_says_what_is_allowed(m: int) -> None:
    with pytest.raises(RoutingError, match=rf"ensemble.top_m = {m}: choose 1 to 3"):
        top_m(torch.zeros(1, 3), m)


@pytest.mark.parametrize("row", [[-math.inf, -math.inf], [math.nan, 0.0]])
def test_a_text_without_any_expert_is_an_error(row: list[float]) -> None:
    with pytest.raises(RoutingError, match="no expert with a weight above zero"):
        top_m(torch.tensor([[0.0, 0.0], row]), None)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_mixture_loses_at_most_the_log_of_the_inverse_weight(seed: int, experts: int) -> None:
    stream = random_logits(experts, 20, seed=seed).clamp_max(0).double()
    log_w = random_log_w(20, experts, seed=seed + 1)
    mixed = mix_streams(stream, log_w)
    assert bool((-mixed.unsqueeze(-1) <= -stream.T - log_w + 1e-12).all())
