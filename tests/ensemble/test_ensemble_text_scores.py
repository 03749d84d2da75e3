"""Log-likelihoods of long texts against plain fp64 loops of transformers models, and the identities of the mixture."""

from __future__ import annotations

import gc
import gzip
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_ensemble import NAMES, write_byte_ensemble

from megaxelm.ensemble.folder import Ensemble, load_ensemble
from megaxelm.ensemble.packed import document_jobs
from megaxelm.ensemble.routers import Request
from megaxelm.ensemble.scoring import document_streams, expert_streams, score_documents, weighted_scores
from megaxelm.ensemble.side_by_side import combine_rows, rows_hidden
from megaxelm.ensemble.text_scores import Text, read_texts, score_texts, total_score
from megaxelm.ensemble.windows import Windows
from megaxelm.errors import CorpusError, RoutingError

LONG = "the cat sat on the mat and a dog ran in the park; кот сидел на ковре, собака бежала в парке. " * 2
ROUTERS = ["language", "tfidf", "posterior", "uniform", "fixed"]
POSITIONS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_ensemble(tmp_path_factory.mktemp("byte"), POSITIONS)


@pytest.fixture(scope="module")
def ensemble(folder: Path) -> Ensemble:
    return load_ensemble(folder)


@pytest.fixture(scope="module")
def transformers_models(folder: Path) -> list[Any]:
    from transformers import AutoModelForCausalLM

    return [AutoModelForCausalLM.from_pretrained(folder / "experts" / name, dtype=torch.float64).eval() for name in NAMES]


@torch.no_grad()
def plain_scores(
    models: list[Any], ensemble: Ensemble, router_name: str, ids: list[int], combine: str, top_m: int, size: int, context: int
) -> list[float]:
    """Each token by a forward of its own over the window it belongs to, mixed in fp64: the meaning of scoring."""
    text = [ensemble.tokenizer.start_id, *ids]
    router = ensemble.router(router_name)
    state = router.start([Request((), "ru")])
    found = []
    for position, token in enumerate(ids):
        if position < size:
            begin = 0
        else:
            last = min(size + math.ceil((position + 1 - size) / (size - context + 1)) * (size - context + 1), len(ids))
            begin = last - size
        logits = torch.stack([model(torch.tensor([text[begin : position + 1]])).logits[0, -1] for model in models])
        log_w = router.weights(state)[0]
        kept = log_w.argsort(descending=True, stable=True)[:top_m]
        weights = log_w[kept].log_softmax(-1)
        if combine == "mixture":
            mixed = (logits[kept].log_softmax(-1) + weights[:, None]).logsumexp(0)
        else:
            mixed = torch.nan_to_num(logits[kept] * weights.exp()[:, None]).sum(0).log_softmax(-1)
        found.append(float(mixed[token]))
        router.update(state, torch.tensor([token]), logits.log_softmax(-1)[:, token][None])
    return found


@pytest.mark.parametrize("combine", ["mixture", "logit_mean"])
@pytest.mark.parametrize(("router", "top_m"), [("tfidf", 2), ("posterior", 3), ("posterior", 2), ("language", 3), ("fixed", 3)])
def test_a_long_text_scores_as_a_plain_fp64_loop_of_transformers_models(
    router: str, top_m: int, combine: str, ensemble: Ensemble, transformers_models: list[Any]
) -> None:
    ids = ensemble.tokenizer.encode([LONG])[0][:62]
    short = ensemble.tokenizer.encode(["кот"])[0]
    options = {"top_m": top_m, "combine": combine, "windows": Windows(24, 9)}
    found = score_documents(ensemble.decoders, [short, ids], 1, ensemble.router(router), ["ru", "ru"], token_budget=50, **options)
    for each, mixed in zip([short, ids], found, strict=True):
        expected = plain_scores(transformers_models, ensemble, router, each, combine, top_m, 24, 9)
        assert mixed.tolist() == pytest.approx(expected, abs=1e-4)
        assert sum(mixed.tolist()) == pytest.approx(sum(expected), rel=2e-6)


def test_a_text_that_fits_scores_the_same_with_and_without_windows(ensemble: Ensemble) -> None:
    ids = ensemble.tokenizer.encode([LONG])[0][:POSITIONS]
    whole = document_streams(ensemble.decoder(0), [ids, ids[:5]], 1)
    assert all(map(torch.equal, whole, document_streams(ensemble.decoder(0), [ids, ids[:5]], 1, windows=Windows())))


def test_every_expert_alone_is_bit_equal_to_its_one_hot_mixture(ensemble: Ensemble) -> None:
    ids = ensemble.tokenizer.encode([LONG])[0]
    alone = document_streams(ensemble.decoder(2), [ids], 1, windows=Windows())[0]
    for combine in ("mixture", "logit_mean"):
        router = ensemble.router("fixed", fixed_weights={"e2": 3.0})
        found = score_documents(ensemble.decoders, [ids], 1, router, windows=Windows(), combine=combine)[0]
        assert torch.equal(found.float(), alone), combine


def test_all_experts_run_and_the_cumulative_posterior_is_the_mixture_of_whole_texts(ensemble: Ensemble) -> None:
    """sum_t log p(x_t) = logsumexp_e(log prior_e + sum_t log p_e(x_t))."""
    ids = ensemble.tokenizer.encode([LONG])[0]
    stream = expert_streams(ensemble.decoders, [ids], 1, windows=Windows())[0].double()
    prior = [0.5, 0.3, 0.2]
    router = ensemble.router("posterior", posterior_prior=prior)
    found = score_documents(ensemble.decoders, [ids], 1, router, windows=Windows())[0]
    expected = (torch.tensor(prior, dtype=torch.float64).log() + stream.sum(-1)).logsumexp(0)
    assert float(found.sum()) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("combine", ["mixture", "logit_mean"])
def test_identities_of_the_mixture(combine: str, folder: Path, ensemble: Ensemble) -> None:
    ids = ensemble.tokenizer.encode([LONG[:90]])[0]
    windows = Windows(32, 8)

    def scores(decoders: Any, router: Any, top_m: int | None = None) -> torch.Tensor:
        return score_documents(decoders, [ids], 1, router, ["en"], top_m, windows=windows, combine=combine)[0]

    same = [lambda: ensemble.decoder(1)] * 3
    alone = document_streams(ensemble.decoder(1), [ids], 1, windows=windows)[0].double()
    for name in ("tfidf", "posterior", "uniform", "fixed"):
        assert torch.allclose(scores(same, ensemble.router(name)), alone, atol=2e-5), f"identical experts, {name}"
    order = [2, 0, 1]
    turned = [ensemble.decoders[expert] for expert in order]
    tfidf = ensemble.router("tfidf", centres=ensemble.data.centres[order])  # type: ignore[index]
    assert torch.allclose(scores(turned, tfidf), scores(ensemble.decoders, ensemble.router("tfidf")), atol=2e-5), "permuted experts"
    best = scores(ensemble.decoders, ensemble.router("tfidf"), 1)
    cold = scores(ensemble.decoders, ensemble.router("tfidf", temperature=1e-9))
    assert torch.allclose(best[30:], cold[30:], atol=1e-6), "m = 1 is the arg max, and so is T -> 0"
    hot = scores(ensemble.decoders, ensemble.router("tfidf", temperature=1e9))
    assert torch.allclose(hot, scores(ensemble.decoders, ensemble.router("uniform")), atol=1e-6), "T -> inf is uniform"


def test_the_mixture_is_no_worse_than_an_expert_times_its_weight(ensemble: Ensemble) -> None:
    ids = ensemble.tokenizer.encode([LONG])[0]
    streams = expert_streams(ensemble.decoders, [ids], 1, windows=Windows())[0].double()
    for name in ROUTERS:
        (score,) = weighted_scores(ensemble.decoders, [ids], 1, ensemble.router(name), ["ru"], windows=Windows())
        bound = (streams.T + score.log_w).amax(-1)
        assert bool((score.logprob >= bound - 1e-12).all()), name


@torch.no_grad()
def test_the_best_token_is_the_arg_max_of_the_mixture_in_chunks_of_any_size(ensemble: Ensemble) -> None:
    ids = ensemble.tokenizer.encode([LONG])[0][:40]
    jobs = document_jobs([ids], None, 0)
    hidden = [rows_hidden(ensemble.decoder(expert), [ids], jobs, 1) for expert in range(3)]
    log_w = ensemble.router("tfidf").along(Request(), ids)
    log_w[5:9, 1] = -math.inf
    own = torch.stack([ensemble.decoder(expert).logits(hidden[expert]).detach().double() for expert in range(3)], 1)
    for combine in ("mixture", "logit_mean"):
        if combine == "mixture":
            expected = (own.log_softmax(-1) + log_w[:, :, None]).logsumexp(1)
        else:
            expected = (own * log_w.exp()[:, :, None]).sum(1).log_softmax(-1)
        for rows in (1, 7, None):
            found = combine_rows(ensemble.decoders, hidden, log_w, torch.tensor(ids), combine, rows)
            assert torch.equal(found.best, expected.argmax(-1))
            assert torch.allclose(found.logprob, expected[torch.arange(40), torch.tensor(ids)], atol=2e-5)


def test_logit_mean_runs_experts_only_where_they_have_weight(ensemble: Ensemble) -> None:
    read: list[int] = []

    def loader(expert: int) -> Any:
        def load() -> Any:
            read.append(expert)
            return ensemble.decoder(expert)

        return load

    documents = [ensemble.tokenizer.encode([text])[0] for text in ("cat", "кот", "")]
    score_documents(
        [loader(expert) for expert in range(3)], documents, 1, ensemble.router("language"), ["en", "ru", "en"], combine="logit_mean"
    )
    assert set(read) == {0, 1}


def test_figures_of_texts(ensemble: Ensemble) -> None:
    texts = [Text(LONG, "ru", "long"), Text("", "ru", "empty"), Text("кот", "en", "short")]
    found = score_texts(ensemble, texts, router="language", windows=Windows(32, 8))
    documents = ensemble.tokenizer.encode([text.text for text in texts])
    for score, text, ids, expert in zip(found, texts, documents, [1, 1, 0], strict=True):
        stream = document_streams(ensemble.decoder(expert), [ids], 1, windows=Windows(32, 8))[0].double()
        assert score.log_likelihood == pytest.approx(float(stream.sum()), rel=1e-7)
        assert (score.tokens, score.bytes) == (len(text.text.encode()), len(text.text.encode()))
    long, empty, short = found
    assert long.perplexity == pytest.approx(math.exp(-long.log_likelihood / long.tokens))
    assert long.bits_per_byte == pytest.approx(-long.log_likelihood / math.log(2) / len(LONG.encode()))
    assert empty.perplexity is None and empty.bits_per_byte is None and empty.log_likelihood == 0
    assert long.weights == {"e0": 0.0, "e1": 1.0, "e2": 0.0}
    total = total_score(found)
    assert total.log_likelihood == pytest.approx(long.log_likelihood + short.log_likelihood)
    assert total.tokens == long.tokens + 6 and total.weights["e0"] == pytest.approx(6 / total.tokens)


def test_one_expert_is_in_memory_at_a_time(folder: Path) -> None:
    ensemble = load_ensemble(folder)
    alive: list[weakref.ref[Any]] = []
    most = 0

    def spied(load: Any) -> Any:
        def loader() -> Any:
            nonlocal most
            decoder = load()
            alive.append(weakref.ref(decoder))
            gc.collect()
            most = max(most, sum(reference() is not None for reference in alive))
            return decoder

        return loader

    ensemble.loaders = [spied(load) for load in ensemble.loaders]
    score_texts(ensemble, [Text(LONG)], router="posterior")
    assert len(alive) == 3 and most == 1


def test_a_broken_expert_is_told(folder: Path) -> None:
    ensemble = load_ensemble(folder)
    with torch.no_grad():
        ensemble.decoder(0).norm.weight.fill_(math.nan)
    for router in ("posterior", "uniform"):
        with pytest.raises(RoutingError, match="expert number 0 gives log-probabilities that are not numbers"):
            score_texts(ensemble, [Text("cat")], router=router)
    with pytest.raises(RoutingError, match="page: its log-likelihood is nan"):
        score_texts(ensemble, [Text("cat", name="page")], expert="e0", combine="logit_mean")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": "fixed", "expert": "e0"}, "leave one out"),
        ({"expert": "e9"}, "this ensemble has e0, e1, e2"),
        ({"top_m": 4}, "top_m = 4"),
        ({"combine": "sum"}, "combine = 'sum'"),
        ({"windows": Windows(65)}, "window = 65: choose 1 to 64"),
        ({"router": "language"}, "has no language"),
    ],
)
def test_what_cannot_be_scored_is_told(options: dict[str, Any], words: str, ensemble: Ensemble) -> None:
    with pytest.raises(RoutingError, match=words):
        score_texts(ensemble, [Text("cat")], **options)


def test_texts_of_files(tmp_path: Path) -> None:
    rows = [{"text": "cat", "language": "en"}, {"text": "кот", "other": 1}]
    content = ("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n").encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "c.txt").write_text("one\ntwo\n")
    assert read_texts(tmp_path / "a.jsonl") == [Text("cat", "en", "a.jsonl:1"), Text("кот", None, "a.jsonl:2")]
    assert [text.language for text in read_texts(tmp_path / "b.jsonl.gz", "ru")] == ["ru", "ru"]
    assert read_texts(tmp_path / "c.txt") == [Text("one\ntwo\n", None, "c.txt")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"[1]\n", "line 1: no text"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "a"}\n', "line 2: no text .KeyError: 'text'"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: no text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: no text"),
        ("a.jsonl", b'{"text": "a", "language": 3}\n', "language = 3"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: no text"),
        ("a.txt", b"\xff", "not UTF-8"),
        ("a.jsonl.gz", b"\xff", "cannot be read"),
    ],
)
def test_a_file_without_texts_is_told(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=words):
        read_texts(tmp_path / name)
    with pytest.raises(CorpusError, match="no such file"):
        read_texts(tmp_path / "nowhere")
