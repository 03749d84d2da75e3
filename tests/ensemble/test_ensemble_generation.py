"""Generation: equal to a plain loop, independent of the batch, and only chosen experts run."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from megaxelm.ensemble.folder import Ensemble
from megaxelm.ensemble.generation import GenerationResult, _choose, generate
from megaxelm.ensemble.reading import ExpertReader
from megaxelm.ensemble.routers import Request
from megaxelm.ensemble.scoring import expert_streams
from megaxelm.errors import RoutingError
from megaxelm.model.decoder import Decoder

PROMPTS = ["The cat", "", "кот сидел на ковре и смотрел", "x"]
LANGUAGES = ["l0", "l1", "l2", "l1"]
ROUTERS = ["language", "tfidf", "posterior", "uniform", "fixed"]


def plain_loop(
    ensemble: Ensemble, prompt: str, language: str, router_name: str, top_m: int | None, steps: int
) -> tuple[list[int], list[float]]:
    """Greedy mixture by whole forwards of all experts and fp64 mixing: the meaning of `generate`."""
    router = ensemble.router(router_name)
    ids = ensemble.tokenizer.encode([prompt])[0]
    history = [ensemble.tokenizer.start_id, *ids]
    out: list[int] = []
    logprobs: list[float] = []
    dropped: set[int] = set()
    state = router.start([Request(ids, language)])
    for step in range(steps):
        tokens = torch.tensor(history)
        bounds = torch.tensor([0, len(history)], dtype=torch.int32)
        full = []
        for expert in range(len(ensemble.experts)):
            decoder = ensemble.decoder(expert)
            full.append(decoder.logits(decoder(tokens, torch.arange(len(history)), bounds)).detach().double().log_softmax(-1))
        own = torch.stack(full)
        if router.needs_expert_logprobs and step == 0:
            for position, token in enumerate(ids):
                router.update(state, torch.tensor([token]), own[:, position, token].unsqueeze(0))
        log_w = router.weights(state)[0]
        kept = log_w.argsort(descending=True, stable=True)[: top_m or len(log_w)].tolist()
        if router.needs_expert_logprobs and step == 0:
            dropped = set(range(len(log_w))) - set(kept)
        weights = log_w[kept].log_softmax(-1)
        mixed = (own[kept, -1] + weights.unsqueeze(-1)).logsumexp(0)
        token = int(mixed.argmax())
        out.append(token)
        logprobs.append(float(mixed[token]))
        history.append(token)
        given = own[:, -1, token].clone()
        given[list(dropped)] = -math.inf
        router.update(state, torch.tensor([token]), given.unsqueeze(0) if router.needs_expert_logprobs else None)
    return out, logprobs


@pytest.mark.parametrize("top_m", [None, 1, 2])
@pytest.mark.parametrize("router", ROUTERS)
def test_greedy_equals_a_plain_loop_of_whole_forwards(
    router: str, top_m: int | None, make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]
) -> None:
    ensemble = make_ensemble(decoders)
    results = generate(ensemble, PROMPTS, LANGUAGES, max_new_tokens=12, top_m=top_m, router=router, stop_at_eos=False)
    for prompt, language, result in zip(PROMPTS, LANGUAGES, results, strict=True):
        tokens, logprobs = plain_loop(ensemble, prompt, language, router, top_m, 12)
        assert result.token_ids == tokens
        assert result.logprobs == pytest.approx(logprobs, abs=5e-5)


@pytest.mark.parametrize("router", ["tfidf", "posterior", "language"])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_a_text_alone_is_the_text_in_a_batch(
    router: str, temperature: float, top_p: float, make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]
) -> None:
    ensemble = make_ensemble(decoders)
    options = {"max_new_tokens": 10, "temperature": temperature, "top_p": top_p, "seed": 3, "router": router, "top_m": 2}
    batch = generate(ensemble, PROMPTS, LANGUAGES, **options)
    alone = [generate(ensemble, [prompt], [language], **options)[0] for prompt, language in zip(PROMPTS, LANGUAGES, strict=True)]
    reverse = generate(ensemble, PROMPTS[::-1], LANGUAGES[::-1], **options)[::-1]
    assert [result.token_ids for result in batch] == [result.token_ids for result in alone] == [result.token_ids for result in reverse]


def test_a_seed_repeats_the_draws_and_another_changes_them(make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]) -> None:
    ensemble = make_ensemble(decoders)

    def draw(seed: int) -> list[list[int]]:
        results = generate(ensemble, ["same", "same"], max_new_tokens=12, temperature=1.0, seed=seed, router="uniform", stop_at_eos=False)
        return [result.token_ids for result in results]

    assert draw(1) == draw(1) != draw(2)
    assert draw(1)[0] != draw(1)[1]


def test_draws_follow_the_mixture(make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]) -> None:
    """1000 draws of one token against the mixture's own distribution, and none outside of the top_p set."""
    ensemble = make_ensemble(decoders)
    results = generate(ensemble, ["a"] * 1000, max_new_tokens=1, temperature=1.0, router="uniform", stop_at_eos=False)
    expected = mixture_after(ensemble, "a")
    counts = torch.zeros(260, dtype=torch.float64)
    for result in results:
        counts[result.token_ids[0]] += 1
        assert result.logprobs[0] == pytest.approx(math.log(expected[result.token_ids[0]]), abs=1e-4)
    seen = expected > 0.005
    assert ((counts / 1000 - expected).abs() <= 5 * (expected * (1 - expected) / 1000).sqrt())[seen].all()
    ordered, ids = expected.sort(descending=True)
    allowed = set(ids[: int((ordered.cumsum(0) - ordered < 0.5).sum())].tolist())
    nucleus = generate(ensemble, ["a"] * 200, max_new_tokens=1, temperature=1.0, top_p=0.5, router="uniform", stop_at_eos=False)
    assert {result.token_ids[0] for result in nucleus} <= allowed and len(allowed) > 1


@pytest.mark.parametrize(
    ("top_p", "temperature", "draw", "expected"),
    [(1.0, 1.0, 0.0, 2), (1.0, 1.0, 0.99, 3), (0.5, 1.0, 0.999, 0), (0.5, 1.0, 0.5, 2), (0.4, 1.0, 0.999, 2), (1.0, 0.01, 0.9, 2)],
)
def test_a_draw_inverts_the_cumulative_distribution_of_the_nucleus(top_p: float, temperature: float, draw: float, expected: int) -> None:
    """The token that crosses top_p belongs to the set: of .4, .3, .2, .1 the first two make 0.5."""
    logprobs = torch.tensor([0.3, 0.2, 0.4, 0.1]).log()
    assert _choose(logprobs, temperature, top_p, iter([draw])) == expected


def test_a_forgotten_text_frees_its_place_and_leaves_the_others(decoders: list[Decoder]) -> None:
    texts = {0: [1, 50, 60], 1: [1, 70], 2: [1, 80, 90, 100]}
    reader, fresh = ExpertReader(decoders[0], "e0", 16), ExpertReader(decoders[0], "e0", 16)
    reader.read(texts)
    reader.forget(1)
    assert reader._cache is not None and reader._cache.lengths.tolist() == [3, 4]
    longer = {2: [*texts[2], 110], 0: [*texts[0], 120]}
    assert torch.allclose(reader.read(longer), fresh.read(longer), atol=1e-4)
    reader.forget(0)
    reader.forget(2)
    assert reader._cache is None


def mixture_after(ensemble: Ensemble, prompt: str) -> torch.Tensor:
    tokens = torch.tensor([1, *ensemble.tokenizer.encode([prompt])[0]])
    bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
    own = []
    for expert in range(len(ensemble.experts)):
        decoder = ensemble.decoder(expert)
        own.append(decoder.logits(decoder(tokens, torch.arange(len(tokens)), bounds))[-1].detach().double().softmax(-1))
    return torch.stack(own).mean(0)


class CountingDecoder:
    """A decoder that counts the tokens of its rows that were asked for."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self.tokens = decoder, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._decoder, name)

    def eval(self) -> CountingDecoder:
        return self

    def decode(self, tokens: torch.Tensor, lengths: torch.Tensor, cache: object, *, all_positions: bool = False) -> torch.Tensor:
        self.tokens += int(lengths.sum())
        return self._decoder.decode(tokens, lengths, cache, all_positions=all_positions)  # type: ignore[arg-type]


def counted(make_ensemble: Callable[..., Ensemble], decoders: list[Decoder], **options: object) -> tuple[list[int], list[GenerationResult]]:
    spies = [CountingDecoder(decoder) for decoder in decoders]
    results = generate(make_ensemble(spies), **options)  # type: ignore[arg-type]
    return [spy.tokens for spy in spies], results


def test_only_chosen_experts_run(make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]) -> None:
    """A prompt of 3 bytes and the start token are read once, each new token but the last once, by the chosen alone."""
    common = {"prompts": ["abc", "abd"], "max_new_tokens": 5, "stop_at_eos": False}
    tokens, _ = counted(make_ensemble, decoders, router="language", languages=["l1", "l3"], **common)
    assert tokens == [0, 8, 0, 8]
    tokens, _ = counted(make_ensemble, decoders, expert="e2", **common)
    assert tokens == [0, 0, 16, 0]
    tokens, _ = counted(make_ensemble, decoders, router="uniform", top_m=2, **common)
    assert tokens == [16, 16, 0, 0]


def test_posterior_has_all_read_the_prompt_and_the_chosen_go_on(make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]) -> None:
    tokens, results = counted(make_ensemble, decoders, prompts=["hello"], router="posterior", top_m=2, max_new_tokens=5, stop_at_eos=False)
    assert sorted(tokens) == [6, 6, 10, 10]
    for row in results[0].weights:
        assert sum(weight > 0 for weight in row) <= 2 and sum(row) == pytest.approx(1)


def test_a_posterior_that_reads_all_lets_an_expert_come_back(make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]) -> None:
    """All run on every token and one speaks; the weights are those of scoring the text that was written."""
    ensemble = make_ensemble(decoders)
    router = ensemble.router("posterior", posterior_reads="all", posterior_decay=0.0)
    [result] = generate(ensemble, ["hello"], router=router, top_m=1, max_new_tokens=12, temperature=1.5, stop_at_eos=False)
    ids = ensemble.tokenizer.encode(["hello"])[0] + result.token_ids
    streams = expert_streams(ensemble.decoders, [ids], 1)[0]
    expected = router.along(Request(), ids, streams)[-12:].argmax(-1).tolist()
    assert [max(range(4), key=row.__getitem__) for row in result.weights] == expected
    assert all(sorted(row) == [0, 0, 0, 1] for row in result.weights) and len(set(expected)) > 1
    tokens, _ = counted(make_ensemble, decoders, prompts=["hello"], router=router, top_m=1, max_new_tokens=5, stop_at_eos=False)
    assert tokens == [10, 10, 10, 10]


def test_temperature_on_experts_sharpens_each_before_they_are_mixed(
    make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]
) -> None:
    """The counts of 1000 draws against both distributions, which differ."""
    ensemble = make_ensemble(decoders, temperature_on="experts")
    results = generate(ensemble, ["a"] * 1000, max_new_tokens=1, temperature=0.25, router="uniform", stop_at_eos=False)
    tokens, bounds = torch.tensor([1, *ensemble.tokenizer.encode(["a"])[0]]), torch.tensor([0, 2], dtype=torch.int32)
    logits = [decoder.logits(decoder(tokens, torch.arange(2), bounds))[-1].detach().double() for decoder in decoders]
    of_experts = torch.stack([(one / 0.25).softmax(-1) for one in logits]).mean(0)
    of_mixture = mixture_after(ensemble, "a").pow(4) / mixture_after(ensemble, "a").pow(4).sum()
    counts = torch.bincount(torch.tensor([result.token_ids[0] for result in results]), minlength=260) / 1000
    seen = of_experts > 0.005
    assert ((counts - of_experts).abs() <= 5 * (of_experts * (1 - of_experts) / 1000).sqrt())[seen].all()
    assert not ((counts - of_mixture).abs() <= 5 * (of_mixture * (1 - of_mixture) / 1000).sqrt())[of_mixture > 0.005].all()
    greedy = [
        generate(make_ensemble(decoders, temperature_on=where), ["a"], max_new_tokens=6, router="uniform", stop_at_eos=False)[0].token_ids
        for where in ("experts", "mixture")
    ]
    assert greedy[0] == greedy[1]


def test_an_expert_chosen_late_reads_what_it_missed(make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]) -> None:
    """Each expert reads each token at most once although the tfidf router changes its mind."""
    tokens, results = counted(make_ensemble, decoders, prompts=["ab"], router="tfidf", top_m=1, max_new_tokens=30, stop_at_eos=False)
    chosen = [max(range(4), key=row.__getitem__) for row in results[0].weights]
    assert len(set(chosen)) > 1, "the text of this test must make the router change"
    last = {expert: step for step, expert in enumerate(chosen)}
    assert tokens == [3 + last[expert] if expert in last else 0 for expert in range(4)]


def test_generation_stops_at_eos_and_hides_it(make_ensemble: Callable[..., Ensemble], make_decoder: Callable[..., Decoder]) -> None:
    decoder = make_decoder(0)
    ensemble = make_ensemble([decoder])
    open_end = generate(ensemble, ["abc"], max_new_tokens=6, stop_at_eos=False)[0]
    ensemble.tokenizer.eos_id = open_end.token_ids[2]  # type: ignore[misc]
    stop = open_end.token_ids.index(open_end.token_ids[2]) + 1
    result = generate(ensemble, ["abc"], max_new_tokens=6)[0]
    assert result.token_ids == open_end.token_ids[:stop]
    assert result.text == ensemble.tokenizer.decode(result.token_ids[:-1])
    assert len(result.weights) == len(result.logprobs) == stop


def test_streamed_text_is_the_text(make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]) -> None:
    ensemble = make_ensemble(decoders)
    pieces = ["", ""]

    def on_token(row: int, token: int, text: str) -> None:
        pieces[row] += text

    results = generate(ensemble, ["a", "ж"], max_new_tokens=20, temperature=1.0, router="uniform", on_token=on_token)
    assert pieces == [result.text for result in results]


def test_mean_weights_are_by_name(make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]) -> None:
    result = generate(make_ensemble(decoders), ["a"], max_new_tokens=3, router="fixed", stop_at_eos=False)[0]
    assert result.mean_weights() == pytest.approx({"e0": 0.25, "e1": 0.0, "e2": 0.0, "e3": 0.75})


def test_logit_mean_is_another_way_to_combine(make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]) -> None:
    ensemble = make_ensemble(decoders)
    results = [
        generate(ensemble, ["abc"], max_new_tokens=8, router="uniform", combine=combine, stop_at_eos=False)[0]
        for combine in ("mixture", "logit_mean")
    ]
    assert results[0].logprobs != pytest.approx(results[1].logprobs, abs=1e-3)


def test_no_prompt_gives_no_result(make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]) -> None:
    assert generate(make_ensemble(decoders), []) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_m": 5}, r"ensemble.top_m = 5: choose 1 to 4"),
        ({"expert": "nobody"}, "this ensemble has e0, e1, e2, e3"),
        ({"expert": "e0", "router": "uniform"}, "leave one out"),
        ({"router": "best"}, "choose one of language"),
        ({"router": "language"}, "has no language"),
        ({"languages": ["l0", "l1"]}, "2 languages for 1 prompts"),
        ({"combine": "sum"}, "choose one of mixture, logit_mean"),
        ({"max_new_tokens": 200}, "has 128 positions"),
    ],
)
def test_bad_values_name_the_field_and_the_way_out(
    options: dict, text: str, make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]
) -> None:
    with pytest.raises(RoutingError, match=text):
        generate(make_ensemble(decoders), ["abc"], **options)
