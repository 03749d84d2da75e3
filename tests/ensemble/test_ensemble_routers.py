"""Routers: check values of the method, stepping equals `along`, errors name the way out."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from megaxelm.cluster.space import TfidfSpace
from megaxelm.ensemble.folder import Ensemble
from megaxelm.ensemble.routers import (
    NO_TOKEN,
    FixedRouter,
    LanguageRouter,
    PosteriorRouter,
    Request,
    RouterData,
    TfidfRouter,
    UniformRouter,
    make_router,
)
from megaxelm.ensemble.routers.fallback import DistanceTrust
from megaxelm.ensemble.scoring import mixture_logprob
from megaxelm.errors import RoutingError
from megaxelm.recipe import TfidfConfig

TEXTS = [
    "the cat sat on the mat",
    "the dog ran in the park",
    "кот сидел на ковре",
    "собака бежала в парке",
    "猫が敷物に座った。",
    "犬が公園を走った。",
]


class FixedVector:
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


@pytest.mark.parametrize(("power", "expected"), [(2, (0.731, 0.269)), (4, (0.891, 0.109))])
def test_tfidf_weights_of_the_method(power: int, expected: tuple[float, float]) -> None:
    router = TfidfRouter(FixedVector([1.0]), torch.zeros(2, 1), temperature=0.1, distance_power=power)
    weights = router.log_weights(torch.tensor([1.0, 1.1], dtype=torch.float64)).exp()
    assert weights.tolist() == pytest.approx(expected, abs=5e-4)


def test_tfidf_measures_squared_distance_to_the_centres() -> None:
    router = TfidfRouter(FixedVector([1.0, 0.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), temperature=0.5)
    weights = router.weights(router.start([Request()]))[0].exp()
    assert weights.tolist() == pytest.approx(torch.tensor([0.0, -4.0, -1.6]).softmax(0).tolist(), abs=1e-6)


def test_tfidf_measures_to_the_nearest_of_an_experts_centres() -> None:
    centres = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    for trust in (None, DistanceTrust(0.5, 1.0, 0.1)):
        router = TfidfRouter(FixedVector([1.0, 0.0]), centres, 0.5, trust=trust, experts=[0, 1, 0, 1])
        assert (router.num_experts, router.fallback) == ((2, None) if trust is None else (3, 2))
        distance, known = router.distances(vectors)
        expected = torch.tensor([[0.8, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
        assert torch.allclose(distance, expected, atol=1e-6) and known.tolist() == [True, True, False]
        one_each = TfidfRouter(FixedVector([1.0, 0.0]), centres[[2, 1]], 0.5, trust=trust)
        assert torch.allclose(router.of_vectors(vectors[:1]), one_each.of_vectors(vectors[:1]))
        assert torch.allclose(router.of_vectors(vectors[2:]).exp()[:, :2].sum(), torch.tensor(0.0 if trust else 1.0, dtype=torch.float64))
    in_order = TfidfRouter(FixedVector([1.0, 0.0]), centres, 0.5, experts=[0, 1, 2, 3]).of_vectors(vectors)
    assert torch.equal(in_order, TfidfRouter(FixedVector([1.0, 0.0]), centres, 0.5).of_vectors(vectors))


@pytest.mark.parametrize("experts", [[0, 1], [0, 0, 2], [-1, 0, 1], [0, 1, 2, 2]])
def test_every_expert_needs_a_centre(experts: list[int]) -> None:
    with pytest.raises(RoutingError, match="every expert needs one"):
        TfidfRouter(FixedVector([1.0]), torch.zeros(3, 1), temperature=0.1, experts=experts)


def test_tfidf_is_uniform_before_any_known_term() -> None:
    router = TfidfRouter(FixedVector([0.0, 0.0]), torch.tensor([[1.0, 0.0], [0.1, 0.2]]), temperature=0.1)
    assert router.weights(router.start([Request()])).exp().tolist() == [[pytest.approx(0.5)] * 2]


def test_temperature_to_zero_is_top_1_and_to_infinity_uniform() -> None:
    distance = torch.tensor([0.7, 0.4, 0.400001], dtype=torch.float64)
    cold = TfidfRouter(FixedVector([1.0]), torch.zeros(3, 1), temperature=1e-300).log_weights(distance).exp()
    hot = TfidfRouter(FixedVector([1.0]), torch.zeros(3, 1), temperature=1e12).log_weights(distance).exp()
    assert cold.tolist() == [0.0, 1.0, 0.0]
    assert hot.tolist() == pytest.approx([1 / 3] * 3, abs=1e-9)


class CharacterIds:
    """Every character is a token."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[ord(character) for character in text] for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize("analyzer", ["subword", "char", "word"])
def test_tfidf_follows_the_text_token_by_token(analyzer: str) -> None:
    tokenizer = CharacterIds()
    space = TfidfSpace.fit(TEXTS, TfidfConfig(analyzer=analyzer, dimensions=4), 0, tokenizer)
    vectors = space.transform(TEXTS)
    centres = torch.from_numpy(np.stack([vectors[i : i + 2].mean(0) for i in (0, 2, 4)]))
    data = RouterData(["en", "ru", "ja"], space=space, centres=centres, decode=tokenizer.decode)
    router = make_router("tfidf", data)
    text = TEXTS[3]
    ids = tokenizer.encode([text])[0]
    along = router.along(Request(ids[:4]), ids[4:])
    for position in range(4, len(ids)):
        whole = torch.from_numpy(space.transform([text[:position]]))
        assert torch.allclose(along[position - 4], router.of_vectors(whole)[0], atol=1e-4)  # type: ignore[attr-defined]
    # A sentence has too few whole words in common with the five others to tell by them.
    assert analyzer == "word" or int(along[-1].argmax()) == 1


@pytest.mark.parametrize("name", ["language", "tfidf", "posterior", "uniform", "fixed"])
def test_along_equals_stepping_and_rows_do_not_touch(name: str, make_ensemble: Callable[..., Ensemble], decoders: list) -> None:
    router = make_ensemble(decoders).router(name)
    generator = torch.Generator().manual_seed(5)
    requests = [Request([10, 20, 30], "l1"), Request([], "l2")]
    texts = [torch.randint(4, 260, (9,), generator=generator).tolist(), torch.randint(4, 260, (6,), generator=generator).tolist()]
    streams = [-5 * torch.rand(4, len(text), generator=generator) for text in texts]
    state = router.start(requests)
    stepped: list[list[torch.Tensor]] = [[], []]
    for position in range(9):
        weights = router.weights(state)
        assert weights.shape == (2, 4) and weights.dtype == torch.float64
        assert torch.allclose(weights.exp().sum(-1), torch.ones(2, dtype=torch.float64))
        tokens = torch.tensor([text[position] if position < len(text) else NO_TOKEN for text in texts])
        logprobs = torch.stack([stream[:, position] if position < stream.shape[1] else torch.full((4,), math.nan) for stream in streams])
        for row, text in enumerate(texts):
            if position < len(text):
                stepped[row].append(weights[row].clone())
        router.update(state, tokens, logprobs if router.needs_expert_logprobs else None)
    for row, (request, text, stream) in enumerate(zip(requests, texts, streams, strict=True)):
        along = router.along(request, text, stream if router.needs_expert_logprobs else None)
        assert torch.allclose(torch.stack(stepped[row]), along, atol=1e-9)


def test_cumulative_posterior_telescopes_to_the_mixture_of_whole_texts() -> None:
    """sum_t log p(x_t) = logsumexp_e(log prior_e + sum_t log p_e(x_t))."""
    stream = -6 * torch.rand(3, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    prior = [0.5, 0.2, 0.3]
    router = PosteriorRouter(3, prior)
    total = mixture_logprob(stream, router, range(40)).sum()
    exact = (torch.tensor(prior, dtype=torch.float64).log() + stream.sum(-1)).logsumexp(0)
    assert float(total) == pytest.approx(float(exact), rel=1e-12)


def test_posterior_with_decay_zero_looks_at_the_last_token_only() -> None:
    stream = -6 * torch.rand(3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    along = PosteriorRouter(3, decay=0.0).along(Request(), range(5), stream)
    assert torch.allclose(along[0].exp(), torch.full((3,), 1 / 3, dtype=torch.float64))
    assert torch.allclose(along[1:], stream.T[:-1].log_softmax(-1))


def test_posterior_with_decay_weighs_by_age() -> None:
    stream = -6 * torch.rand(2, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    along = PosteriorRouter(2, decay=0.5).along(Request(), range(4), stream)
    expected = (0.25 * stream[:, 0] + 0.5 * stream[:, 1] + stream[:, 2]).log_softmax(-1)
    assert torch.allclose(along[3], expected)


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_an_expert_that_missed_a_token_is_dropped_for_good(decay: float) -> None:
    router = PosteriorRouter(3, decay=decay)
    state = router.start([Request()])
    router.update(state, torch.tensor([5]), torch.tensor([[-1.0, -math.inf, -2.0]]))
    router.update(state, torch.tensor([6]), torch.tensor([[-1.0, -0.1, -2.0]]))
    weights = router.weights(state)[0].exp()
    assert weights[1] == 0 and float(weights.sum()) == pytest.approx(1)


def test_posterior_without_expert_logprobs_says_what_it_needs() -> None:
    router = PosteriorRouter(2)
    with pytest.raises(RoutingError, match="needs the experts' log-probabilities"):
        router.update(router.start([Request()]), torch.tensor([1]))


def test_language_router_is_one_hot_on_the_owner() -> None:
    router = LanguageRouter(["a", "b"], {"de": "b", "fr": "a"})
    assert router.weights(router.start([Request((), "de"), Request((), "fr")])).exp().tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(("language", "text"), [("xx", "'xx'"), (None, "has no language")])
def test_language_without_expert_names_those_known(language: str | None, text: str) -> None:
    with pytest.raises(RoutingError, match=f"{text}.*languages known here: de, fr"):
        LanguageRouter(["a", "b"], {"de": "b", "fr": "a"}).start([Request((), language)])


def test_fixed_weights_are_normalised_and_the_rest_gets_none() -> None:
    router = FixedRouter(["a", "b", "c"], {"c": 3, "a": 1})
    assert router.weights(router.start([Request()])).exp().tolist() == [[pytest.approx(0.25), 0, pytest.approx(0.75)]]


@pytest.mark.parametrize("weights", [{"x": 1.0}, {"a": -1.0}, {"a": 0.0}, {"a": math.nan}, {"a": math.inf}])
def test_bad_fixed_weights_name_the_field(weights: dict[str, float]) -> None:
    with pytest.raises(RoutingError, match=r"ensemble\.fixed_weights"):
        FixedRouter(["a", "b"], weights)


def test_uniform_weights() -> None:
    router = UniformRouter(5)
    assert router.weights(router.start([Request()] * 2)).exp().tolist() == [[pytest.approx(0.2)] * 5] * 2


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("nearest", {}, "choose one of language, tfidf, posterior, uniform, fixed"),
        ("tfidf", {"space": None}, "without a vector space"),
        ("tfidf", {"temperature": 0.0}, "ensemble.temperature = 0.0"),
        ("tfidf", {"distance_power": 3}, "ensemble.distance_power = 3"),
        ("fixed", {"fixed_weights": {}}, "set ensemble.fixed_weights"),
        ("posterior", {"posterior_decay": 2.0}, "decay = 2.0"),
        ("posterior", {"posterior_prior": [1.0]}, "needs 4 weights"),
        ("language", {"language_expert": {"de": "nobody"}}, "nobody"),
    ],
)
def test_a_router_that_cannot_be_made_says_why(
    name: str, changes: dict, text: str, make_ensemble: Callable[..., Ensemble], decoders: list
) -> None:
    with pytest.raises(RoutingError, match=text):
        make_ensemble(decoders).router(name, **changes)
