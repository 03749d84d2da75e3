"""Scoring of documents: the streams are right, routers share them, and only chosen experts run."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from megaxelm.ensemble.folder import Ensemble
from megaxelm.ensemble.routers import Request
from megaxelm.ensemble.scoring import document_streams, expert_streams, mix_streams, mixture_logprob, score_documents
from megaxelm.errors import RoutingError
from megaxelm.model.decoder import Decoder

START = 1
LENGTHS = [7, 1, 23, 0, 12, 30]


@pytest.fixture
def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(4, 260, (length,), generator=generator).tolist() for length in LENGTHS]


def full_forward_logprobs(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [tokens, vocab] in fp64, before each of `ids`, from one plain forward of the document alone."""
    tokens = torch.tensor([START, *ids[:-1]])
    hidden = decoder(tokens, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32))
    return decoder.logits(hidden).detach().double().log_softmax(-1)


def test_streams_are_those_of_each_document_alone_in_any_batch(decoders: list[Decoder], documents: list[list[int]]) -> None:
    for budget in (1, 25, 1000):
        for ids, stream in zip(documents, document_streams(decoders[0], documents, START, token_budget=budget), strict=True):
            assert stream.shape == (len(ids),)
            if ids:
                expected = full_forward_logprobs(decoders[0], ids)[torch.arange(len(ids)), torch.tensor(ids)]
                assert torch.allclose(stream.double(), expected, atol=2e-5)


def test_batches_stay_under_the_token_budget_and_report_progress(decoders: list[Decoder], documents: list[list[int]]) -> None:
    seen: list[int] = []

    class Spy:
        device = torch.device("cpu")

        def eval(self) -> None:
            pass

        def score(self, tokens: torch.Tensor, *rest: object, **more: object) -> object:
            seen.append(len(tokens))
            return decoders[0].score(tokens, *rest, **more)  # type: ignore[arg-type]

    done: list[int] = []
    document_streams(Spy(), documents, START, token_budget=31, on_batch=done.append)  # type: ignore[arg-type]
    assert seen == [30, 23, 20] and sum(done) == 5


def test_mixture_agrees_with_fp64_mixing_of_full_forwards(
    make_ensemble: Callable[..., Ensemble], decoders: list[Decoder], documents: list[list[int]]
) -> None:
    ensemble = make_ensemble(decoders)
    ids = documents[2]
    stream = expert_streams(ensemble.decoders, [ids], START)[0]
    full = torch.stack([full_forward_logprobs(decoder, ids) for decoder in decoders])
    targets = full[:, torch.arange(len(ids)), torch.tensor(ids)]
    evidence = torch.cat([torch.zeros(4, 1, dtype=torch.float64), targets[:, :-1].cumsum(-1)], dim=1)
    expected = (evidence.log_softmax(0) + targets).logsumexp(0)
    assert torch.allclose(mixture_logprob(stream, ensemble.router("posterior"), ids), expected, atol=2e-5)


def test_only_text_before_a_token_weighs_it(
    make_ensemble: Callable[..., Ensemble], decoders: list[Decoder], documents: list[list[int]]
) -> None:
    """Changing token t leaves the mixture of all tokens up to t - 1 as it was, for every router."""
    ensemble = make_ensemble(decoders)
    ids = documents[5]
    changed = [*ids[:10], (ids[10] + 7) % 250 + 4, *ids[11:]]
    for name in ("language", "tfidf", "posterior", "uniform", "fixed"):
        first, second = score_documents(ensemble.decoders, [ids, changed], START, ensemble.router(name), ["l2", "l2"])
        assert torch.allclose(first[:10], second[:10], atol=1e-5), name
        assert not torch.allclose(first[10:], second[10:], atol=1e-3), name


def test_experts_without_weight_do_not_run(make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]) -> None:
    documents = [[10, 11, 12], [20, 21], [30, 31, 32, 33]]
    read = [0] * 4

    def counting(ensemble: Ensemble) -> list[Callable[[], Decoder]]:
        def loader(expert: int) -> Callable[[], Decoder]:
            def load() -> Decoder:
                read[expert] += 1
                return ensemble.decoder(expert)

            return load

        return [loader(expert) for expert in range(4)]

    ensemble = make_ensemble(decoders)
    score_documents(counting(ensemble), documents, START, ensemble.router("language"), ["l1", "l3", "l1"])
    assert read == [0, 1, 0, 1]
    read[:] = [0] * 4
    score_documents(counting(ensemble), documents, START, ensemble.router("fixed"))
    assert read == [1, 0, 0, 1]
    read[:] = [0] * 4
    score_documents(counting(ensemble), documents, START, ensemble.router("uniform"), top_m=2)
    assert read == [1, 1, 0, 0]


def test_one_hot_scoring_is_bit_equal_to_that_expert(
    make_ensemble: Callable[..., Ensemble], decoders: list[Decoder], documents: list[list[int]]
) -> None:
    ensemble = make_ensemble(decoders)
    alone = document_streams(decoders[2], documents, START)
    mixed = score_documents(ensemble.decoders, documents, START, ensemble.router("language"), ["l2"] * len(documents))
    assert all(torch.equal(one.float(), two) for one, two in zip(mixed, alone, strict=True))


def test_top_1_scoring_follows_the_arg_max_of_each_token(
    make_ensemble: Callable[..., Ensemble], decoders: list[Decoder], documents: list[list[int]]
) -> None:
    ensemble = make_ensemble(decoders)
    ids = documents[5]
    router = ensemble.router("tfidf")
    stream = expert_streams(ensemble.decoders, [ids], START)[0].double()
    best = router.along(Request(), ids).argmax(-1)
    assert len(best.unique()) > 1
    assert torch.equal(mixture_logprob(stream, router, ids, top_m=1), stream[best, torch.arange(len(ids))])


def test_identical_experts_score_like_one(
    make_ensemble: Callable[..., Ensemble], decoders: list[Decoder], documents: list[list[int]]
) -> None:
    ensemble = make_ensemble([decoders[0]] * 3)
    alone = document_streams(decoders[0], documents, START)
    for name in ("tfidf", "posterior", "uniform"):
        for mixed, one in zip(score_documents(ensemble.decoders, documents, START, ensemble.router(name)), alone, strict=True):
            assert torch.allclose(mixed, one.double(), atol=1e-6, rtol=1e-7)


def test_an_expert_with_weight_that_was_not_run_is_an_error() -> None:
    stream = torch.tensor([[-1.0], [math.nan]])
    assert mix_streams(stream, torch.tensor([[0.0, -math.inf]])).tolist() == [-1.0]
    with pytest.raises(RoutingError, match="was not run"):
        mix_streams(stream, torch.tensor([[-0.7, -0.7]]))
