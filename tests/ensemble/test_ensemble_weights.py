"""Mixture weights and the mixture: the identities of the method."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaxelm.ensemble.mixture import combine_logits, expert_logprobs, mean_logits, mix_logprobs
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


def test_mixture_agrees_with_fp64_probabilities() -> None:
    logits, log_w = random_logits(7, 3, 500), random_log_w(7, 3)
    exact = (logits.double().softmax(-1) * log_w.exp().unsqueeze(-1)).sum(-2).log()
    found = mix_logprobs(expert_logprobs(logits), log_w)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 8 * EPSILON * exact.abs().max()
    assert (found.double().logsumexp(-1)).abs().max() < 16 * EPSILON


def test_identical_experts_give_one_expert_whatever_the_weights() -> None:
    one = expert_logprobs(random_logits(5, 1, 300))
    found = mix_logprobs(one.expand(5, 6, 300), random_log_w(5, 6))
    assert (found - one[:, 0]).abs().max() <= 4 * EPSILON * one.abs().max()


def test_one_hot_weights_are_bit_equal_to_that_expert_even_beside_garbage() -> None:
    logprobs = expert_logprobs(random_logits(4, 3, 200))
    logprobs[:, 0], logprobs[:, 2] = math.nan, math.inf
    log_w = torch.tensor([-math.inf, 0.0, -math.inf]).expand(4, 3)
    assert torch.equal(mix_logprobs(logprobs, log_w), logprobs[:, 1])


def test_permuting_experts_changes_nothing_after_top_m() -> None:
    """Experts are summed by weight, so the order given does not even change a bit (weights all different)."""
    logits, log_w = random_logits(1, 4, 300), random_log_w(1, 4)
    results = []
    for order in itertools.permutations(range(4)):
        kept = top_m(log_w[:, list(order)], 3)
        chosen = logits[:, list(order)][0, kept.experts[0]].unsqueeze(0)
        results.append(mix_logprobs(expert_logprobs(chosen), kept.log_w))
    assert all(torch.equal(result, results[0]) for result in results)


def test_permuting_experts_of_equal_weight_moves_only_the_rounding() -> None:
    logprobs = expert_logprobs(random_logits(1, 4, 300))
    log_w = torch.full((1, 4), -math.log(4))
    found = [mix_logprobs(logprobs[:, list(order)], log_w) for order in itertools.permutations(range(4))]
    assert max((one - found[0]).abs().max() for one in found) <= 4 * EPSILON * found[0].abs().max()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_mixture_loses_at_most_the_log_of_the_inverse_weight(seed: int, experts: int) -> None:
    stream = random_logits(experts, 20, seed=seed).clamp_max(0).double()
    log_w = random_log_w(20, experts, seed=seed + 1)
    mixed = mix_streams(stream, log_w)
    assert bool((-mixed.unsqueeze(-1) <= -stream.T - log_w + 1e-12).all())


def test_mixture_of_bf16_experts_is_computed_in_fp32() -> None:
    logits = random_logits(2, 3, 100).bfloat16()
    found = mix_logprobs(expert_logprobs(logits), random_log_w(2, 3))
    exact = (logits.double().softmax(-1) * random_log_w(2, 3).exp().unsqueeze(-1)).sum(-2).log()
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 8 * EPSILON * exact.abs().max()


def test_logit_mean_is_a_normalised_product_of_experts() -> None:
    logits, log_w = random_logits(3, 2, 50), random_log_w(3, 2)
    product = (logits.double().log_softmax(-1) * log_w.exp().unsqueeze(-1)).sum(-2)
    exact = product - product.logsumexp(-1, keepdim=True)
    assert (mean_logits(logits, log_w) - exact).abs().max() <= 16 * EPSILON * exact.abs().max()
    assert torch.equal(combine_logits(logits, log_w, "logit_mean"), mean_logits(logits, log_w))


def test_unknown_way_to_combine_names_those_there_are() -> None:
    with pytest.raises(RoutingError, match="'sum': choose one of mixture, logit_mean"):
        combine_logits(random_logits(1, 2, 5), random_log_w(1, 2), "sum")
