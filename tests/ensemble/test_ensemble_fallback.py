"""The fallback expert: its weight under every router, and when it is run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megaxelm.ensemble.centres import nearest_distances
from megaxelm.ensemble.routers import (
    DistanceTrust,
    FixedRouter,
    PosteriorRouter,
    RefreshRouter,
    Request,
    RouterData,
    TfidfRouter,
    UniformRouter,
    make_router,
)
from megaxelm.ensemble.scoring import mixture_logprob
from megaxelm.ensemble.stage import posterior_prior
from megaxelm.ensemble.weights import FALLBACK_BOUND, top_m
from megaxelm.errors import RoutingError


class OneVector:
    """A space whose every text has the same vector."""

    reads_text = False

    def __init__(self, vector: list[float]) -> None:
        self._vector = np.array(vector, dtype=np.float32)

    def start(self) -> None:
        return None

    def push(self, state: None, token_ids: object) -> None:
        return None

    def vector(self, state: None) -> np.ndarray:
        return self._vector

    def prefixes(self, state: None, token_ids: list[int]) -> np.ndarray:
        return np.stack([self._vector] * len(token_ids))


def test_uniform_and_fixed_give_it_its_weight_always() -> None:
    uniform, fixed = UniformRouter(4, 0.2), FixedRouter(["a", "b"], {"a": 3.0, "b": 1.0}, 0.2)
    assert uniform.weights(uniform.start([Request()])).exp().tolist() == [[pytest.approx(0.2)] * 5]
    assert fixed.weights(fixed.start([Request()])).exp().tolist() == [pytest.approx([0.6, 0.2, 0.2])]
    assert (uniform.fallback, uniform.num_experts, fixed.fallback, fixed.num_experts) == (4, 5, 2, 3)


def test_distance_trust_is_f_at_the_median_and_half_at_the_quantile() -> None:
    trust = DistanceTrust(median=0.4, quantile=1.0, weight=0.05)
    log_fallback, log_rest = trust.log_weights(torch.tensor([0.4, 1.0, 1.6, 0.1], dtype=torch.float64))
    assert log_fallback.exp().tolist() == pytest.approx([0.05, 0.5, 0.95, 1 / (1 + 19**1.5)])
    assert torch.allclose(log_fallback.exp() + log_rest.exp(), torch.ones(4, dtype=torch.float64))


def test_distances_that_are_all_the_same_make_a_step() -> None:
    log_fallback, _ = DistanceTrust(0.5, 0.5, 0.1).log_weights(torch.tensor([0.4, 0.5, 0.6]))
    assert log_fallback.exp().tolist() == pytest.approx([0, 0.5, 1], abs=1e-9)


def test_tfidf_hears_it_far_from_every_centre_and_where_nothing_is_known() -> None:
    centres, trust = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), DistanceTrust(0.5, 1.0, 0.1)
    for vector, nearest in (([1.0, 0.0], 0.0), ([0.6, 0.8], 0.4), ([-0.6, -0.8], 3.2)):
        router = TfidfRouter(OneVector(vector), centres, 0.5, trust=trust)
        weights = router.weights(router.start([Request()]))[0].exp()
        expected = 1 / (1 + math.exp(-(nearest - 1.0) / (0.5 / math.log(9))))
        assert float(weights[2]) == pytest.approx(expected, rel=1e-5)
        alone = TfidfRouter(OneVector(vector), centres, 0.5)
        assert torch.allclose(weights[:2], alone.weights(alone.start([Request()]))[0].exp() * (1 - expected), atol=1e-6)
    nothing = TfidfRouter(OneVector([0.0, 0.0]), centres, 0.5, trust=trust)
    assert nothing.weights(nothing.start([Request()])).exp().tolist() == [[0, 0, 1]]
    assert nothing.along(Request(), [4, 5]).exp().tolist() == [[0, 0, 1]] * 2


def test_the_posterior_takes_it_as_one_more_expert_with_its_own_prior() -> None:
    """With the fallback too, sum_t log p(x_t) = logsumexp_e(log prior_e + sum_t log p_e(x_t))."""
    stream = -6 * torch.rand(4, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    router = PosteriorRouter(3, [5.0, 2.0, 3.0], fallback_weight=0.1)
    prior = torch.tensor([0.45, 0.18, 0.27, 0.1], dtype=torch.float64)
    assert torch.allclose(router.along(Request(), range(40), stream)[0].exp(), prior)
    total = mixture_logprob(stream, router, range(40)).sum()
    assert float(total) == pytest.approx(float((prior.log() + stream.sum(-1)).logsumexp(0)), rel=1e-12)


def test_the_posterior_always_runs_it_since_it_could_not_come_back() -> None:
    router = PosteriorRouter(2, fallback_weight=0.1)
    log_w = torch.tensor([[0.0, -30.0, -20.0]], dtype=torch.float64).log_softmax(-1)
    assert router.keep(log_w, 1).experts.tolist() == [[0, 2]]
    assert float(router.keep(log_w, 1).log_w[0, 1]) > -math.inf
    assert torch.equal(RefreshRouter(router, "chunk", 4).keep(log_w, 1).log_w, router.keep(log_w, 1).log_w)


def test_top_m_counts_the_trained_and_leaves_the_fallback_its_weight() -> None:
    log_w = torch.tensor([[0.1, 0.5, 0.2, 0.2], [0.1, 0.2, 0.1, 0.6]], dtype=torch.float64).log()
    kept = top_m(log_w, 2, fallback=3)
    assert kept.dense(4).exp().tolist() == [pytest.approx([0, 0.8 * 5 / 7, 0.8 * 2 / 7, 0.2]), pytest.approx([0.4 / 3, 0.8 / 3, 0, 0.6])]
    assert kept.experts[1].tolist()[0] == 3, "heaviest first"
    assert torch.allclose(top_m(log_w, None, fallback=3).dense(4), log_w)
    with pytest.raises(RoutingError, match="top_m = 4: choose 1 to 3"):
        top_m(log_w, 4, fallback=3)


def test_a_fallback_within_the_bound_is_not_run_and_one_alone_is() -> None:
    at, above = FALLBACK_BOUND * 0.99, FALLBACK_BOUND * 1.01
    log_w = torch.tensor([[1 - at, 0, at], [1 - above, 0, above]], dtype=torch.float64).log()
    kept = top_m(log_w, None, fallback=2).dense(3)
    assert kept[0].exp().tolist() == [1, 0, 0] and float(kept[1, 2]) == pytest.approx(math.log(above))
    alone = top_m(torch.tensor([[-math.inf, -math.inf, 0.0]]), 1, fallback=2)
    assert alone.dense(3).tolist() == [[-math.inf, -math.inf, 0.0]]
    with pytest.raises(RoutingError, match="no expert with a weight above zero"):
        top_m(torch.full((1, 3), -math.inf), None, fallback=2)


@pytest.mark.parametrize("name", ["uniform", "fixed", "tfidf", "posterior"])
def test_weight_zero_is_as_if_there_were_none(name: str) -> None:
    common = {"fixed_weights": {"a": 1.0, "b": 2.0}, "space": OneVector([0.5, 0.1]), "centres": torch.eye(2)}
    without = make_router(name, RouterData(["a", "b"], **common))  # type: ignore[arg-type]
    data = RouterData(["a", "b", "seed"], fallback="seed", fallback_distance=[0.3, 0.6], **common)  # type: ignore[arg-type]
    router = make_router(name, data, fallback_weight=0.0)
    weights = router.weights(router.start([Request()]))
    assert torch.allclose(weights[:, :2], without.weights(without.start([Request()]))) and float(weights[0, 2]) == -math.inf
    heard = make_router(name, data).weights(make_router(name, data).start([Request()]))
    assert heard.shape == (1, 3) and float(heard[0, 2]) > -math.inf


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("uniform", {"fallback_weight": 0.5}, "fallback_weight = 0.5: choose 0"),
        ("posterior", {"fallback_weight": -0.1}, "fallback_weight = -0.1"),
        ("tfidf", {"fallback_weight": math.nan}, "fallback_weight = nan"),
        ("tfidf", {"fallback_distance": None}, "without the distances that its fallback is heard by"),
        ("tfidf", {"fallback_distance": [2.0, 1.0]}, "2.0 and 1.0, are damaged"),
        ("fixed", {"fixed_weights": {"seed": 1.0}}, "no expert seed; the experts are a, b"),
        ("uniform", {"fallback_wait": 1}, "no setting fallback_wait; there are experts, "),
    ],
)
def test_bad_values_name_the_field(name: str, changes: dict, text: str) -> None:
    data = RouterData(["a", "b", "seed"], fallback="seed", fallback_distance=[0.3, 0.6], space=OneVector([1.0]), centres=torch.zeros(2, 1))
    with pytest.raises(RoutingError, match=text):
        make_router(name, data, **changes)


class Lengths:
    """A space of texts: the first axis is 1, the second the number of characters in hundreds; nothing is known of an empty text."""

    def transform(self, texts: list[str]) -> np.ndarray:
        return np.array([[1.0, len(text) / 100] if text else [0.0, 0.0] for text in texts], dtype=np.float32)


def test_trust_is_measured_on_the_beginnings_of_the_sample() -> None:
    centres = torch.tensor([[1.0, 0.0], [1.0, 5.0]])
    found = nearest_distances(Lengths(), centres, ["x" * 100, "x" * 50, "", "x" * 500], 0.75)
    # 200 characters are two away from the first centre, three from the second.
    assert found == pytest.approx([1.0, 2.5])
    with pytest.raises(RoutingError, match="no document of the sample has a known term"):
        nearest_distances(Lengths(), centres, [""], 0.75)


def test_priors_are_uniform_by_tokens_or_by_name() -> None:
    tokens = {"a": {"en": 30, "de": 10}, "b": {"ru": 60}}
    assert posterior_prior("uniform", tokens) is None
    assert posterior_prior("tokens", tokens) == [40.0, 60.0]
    assert posterior_prior({"b": 2.0}, tokens) == [0.0, 2.0]
    with pytest.raises(RoutingError, match="ensemble.posterior_prior: no expert c; the experts are a, b"):
        posterior_prior({"c": 1.0}, tokens)
