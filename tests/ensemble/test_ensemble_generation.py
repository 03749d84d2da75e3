"""Generation: equal to a plain loop, independent of the batch, and only chosen experts run."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from megaxelm.ensemble.engine import Engine
from megaxelm.ensemble.folder import Ensemble
from megaxelm.ensemble.generation import GenerationResult, generate
from megaxelm.ensemble.routers import Request
from megaxelm.ensemble.sampling import GenerationRequest, SamplingParams
from megaxelm.ensemble.scoring import expert_streams
from megaxelm.ensemble.streaming import StopText
from megaxelm.errors import RoutingError
from megaxelm.model.decoder import Decoder
from megaxelm.model.stacked import Piece, Read, StackedDecoder

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


def mixture_after(ensemble: Ensemble, prompt: str) -> torch.Tensor:
    tokens = torch.tensor([1, *ensemble.tokenizer.encode([prompt])[0]])
    bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
    own = []
    for expert in range(len(ensemble.experts)):
        decoder = ensemble.decoder(expert)
        own.append(decoder.logits(decoder(tokens, torch.arange(len(tokens)), bounds))[-1].detach().double().softmax(-1))
    return torch.stack(own).mean(0)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]) -> Callable[..., tuple]:
    """`generate`, and the tokens that each expert has read."""

    def run(**options: object) -> tuple[list[int], list[GenerationResult]]:
        tokens = [0] * len(decoders)
        read = StackedDecoder.read

        def spy(self: StackedDecoder, pieces: list[Piece], *args: object, **named: object) -> Read:
            for piece in pieces:
                tokens[piece.expert] += len(piece.tokens)
            return read(self, pieces, *args, **named)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(StackedDecoder, "read", spy)
            results = generate(make_ensemble(decoders), **options)  # type: ignore[arg-type]
        return tokens, results

    return run


def test_only_chosen_experts_run(counted: Callable[..., tuple]) -> None:
    """A prompt of 3 bytes and the start token are read once, each new token but the last once, by the chosen alone."""
    common = {"prompts": ["abc", "abd"], "max_new_tokens": 5, "stop_at_eos": False}
    tokens, _ = counted(router="language", languages=["l1", "l3"], **common)
    assert tokens == [0, 8, 0, 8]
    tokens, _ = counted(expert="e2", **common)
    assert tokens == [16, 0, 0, 0]  # alone in its stack
    tokens, _ = counted(router="uniform", top_m=2, **common)
    assert tokens == [16, 16, 0, 0]


def test_posterior_has_all_read_the_prompt_and_the_chosen_go_on(counted: Callable[..., tuple]) -> None:
    tokens, results = counted(prompts=["hello"], router="posterior", top_m=2, max_new_tokens=5, stop_at_eos=False)
    assert sorted(tokens) == [5, 5, 10, 10]  # its last token is read by the chosen alone
    for row in results[0].weights:
        assert sum(weight > 0 for weight in row) <= 2 and sum(row) == pytest.approx(1)


def test_a_posterior_that_reads_all_lets_an_expert_come_back(
    counted: Callable[..., tuple], make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]
) -> None:
    """All run on every token and one speaks; the weights are those of scoring the text that was written."""
    ensemble = make_ensemble(decoders)
    router = ensemble.router("posterior", posterior_reads="all", posterior_decay=0.0)
    [result] = generate(ensemble, ["hello"], router=router, top_m=1, max_new_tokens=12, temperature=1.5, stop_at_eos=False)
    ids = ensemble.tokenizer.encode(["hello"])[0] + result.token_ids
    streams = expert_streams(ensemble.decoders, [ids], 1)[0]
    expected = router.along(Request(), ids, streams)[-12:].argmax(-1).tolist()
    assert [max(range(4), key=row.__getitem__) for row in result.weights] == expected
    assert all(sorted(row) == [0, 0, 0, 1] for row in result.weights) and len(set(expected)) > 1
    tokens, _ = counted(prompts=["hello"], router=router, top_m=1, max_new_tokens=5, stop_at_eos=False)
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


def test_an_expert_chosen_late_reads_what_it_missed(counted: Callable[..., tuple]) -> None:
    """Each expert reads each token at most once although the tfidf router changes its mind."""
    tokens, results = counted(prompts=["ab"], router="tfidf", top_m=1, max_new_tokens=30, stop_at_eos=False)
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


@pytest.mark.parametrize(
    ("router", "top_m"),
    [
        ("tfidf", 2),
        ("posterior", None),
        *(
            pytest.param(router, top_m, marks=pytest.mark.slow)
            for router in ("uniform", "tfidf", "posterior", "fixed")
            for top_m in (1, 2, None)
            if (router, top_m) not in (("tfidf", 2), ("posterior", None))
        ),
    ],
)
def test_drafts_turns_waiting_and_a_full_cache_change_no_token(
    router: str, top_m: int | None, make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]
) -> None:
    """A draft is verified, experts take turns in memory, texts wait for a place, experts that pause are forgotten: the texts stay."""
    ensemble = make_ensemble(decoders)
    for temperature in (0.0, 0.8):
        sampling = SamplingParams(max_new_tokens=16, temperature=temperature, stop_at_eos=False)
        expected = written(Engine(ensemble, router=router, top_m=top_m), sampling)
        rows = 4 if router == "posterior" else top_m or 4
        for options in (
            {"draft": "e0", "draft_tokens": 3},
            {"draft": "e3", "draft_tokens": 5, "max_batch": 3, "resident": 3},
            {"resident": 1},
            {"resident": 2, "max_batch": 2},
            {"max_tokens": 128 * (rows + 1)},
        ):
            engine = Engine(ensemble, router=router, top_m=top_m, **options)
            assert written(engine, sampling) == expected, options
            assert engine.cache.num_tokens == 0 and not engine.has_work
            assert (engine.drafted.accepted > 0) == ("draft" in options) or options.get("draft") == "e3"


def written(engine: Engine, sampling: SamplingParams) -> list[list[int]]:
    numbers = [engine.add(GenerationRequest(prompt, None, sampling)) for prompt in PROMPTS]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.has_work:
        for event in engine.step():
            found[event.request_id].append(event.token_id)
    return [found[number] for number in numbers]


def test_a_text_that_joins_late_and_one_that_is_cancelled_leave_the_others_alone(
    make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]
) -> None:
    ensemble = make_ensemble(decoders)
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, stop_at_eos=False)
    expected = written(Engine(ensemble, router="posterior"), sampling)
    engine = Engine(ensemble, router="posterior")
    found: dict[int, list[int]] = {}
    numbers = [engine.add(GenerationRequest(PROMPTS[0], None, sampling))]
    for step in range(40):
        if step == 3:
            numbers += [engine.add(GenerationRequest(prompt, None, sampling)) for prompt in PROMPTS[1:3]]
            assert engine.num_waiting == 2 and engine.prompt_tokens(numbers[1]) == 0
        if step == 5:
            engine.cancel(numbers[1])
            numbers.append(engine.add(GenerationRequest(PROMPTS[3], None, sampling)))
        for event in engine.step():
            found.setdefault(event.request_id, []).append(event.token_id)
    assert [found[numbers[index]] for index in (0, 2, 3)] == [expected[0], expected[2], expected[3]]
    assert len(found[numbers[1]]) == 2 and not engine.has_work and engine.cache.num_tokens == 0


def test_likely_alternatives_are_those_of_the_mixture(make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]) -> None:
    ensemble = make_ensemble(decoders)
    engine = Engine(ensemble, router="uniform")
    engine.add(GenerationRequest("a", sampling=SamplingParams(1, logprobs=5)))
    engine.add(GenerationRequest("a", sampling=SamplingParams(1)))
    asked, plain = engine.step()
    expected = mixture_after(ensemble, "a").log().topk(5)
    assert [token for token, _ in asked.top_logprobs] == expected.indices.tolist()
    assert [value for _, value in asked.top_logprobs] == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert asked.top_logprobs[0][0] == asked.token_id == plain.token_id and plain.top_logprobs == []


@pytest.mark.parametrize("stop", ["the end", "e", "nd ", "zz"])
def test_a_stop_string_ends_the_text_before_it(stop: str) -> None:
    whole = "this is thee the end and more"
    stopper, shown = StopText([stop, "unseen"]), ""
    for at in range(0, len(whole), 3):
        shown += stopper.push(whole[at : at + 3])
        assert stop not in shown
    shown += stopper.flush()
    assert shown == whole.split(stop)[0] and stopper.stopped == (stop in whole)


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
        ({"max_new_tokens": 200}, "have 128 positions"),
        ({"draft": "nobody"}, "draft = 'nobody': this ensemble has e0"),
        ({"draft": "e0", "draft_tokens": 0}, "draft_tokens = 0: choose at least 1"),
        ({"top_k": -1}, "top_k = -1"),
        ({"min_p": 1.0}, "min_p = 1.0"),
        ({"stop": [""]}, "an empty string would end every text"),
    ],
)
def test_bad_values_name_the_field_and_the_way_out(
    options: dict, text: str, make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]
) -> None:
    with pytest.raises(RoutingError, match=text):
        generate(make_ensemble(decoders), ["abc"], **options)


@pytest.mark.slow
@pytest.mark.parametrize(("router", "top_m", "temperature"), [("tfidf", 2, 0.0), ("posterior", None, 0.9)])
def test_steps_over_fixed_tensors_write_what_plain_steps_write(
    router: str, top_m: int | None, temperature: float, make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]
) -> None:
    """What a CUDA graph replays, here without a graph and by Triton's interpreter: buckets are filled up, texts come and go."""
    pytest.importorskip("triton", reason="triton is not installed")
    ensemble = make_ensemble(decoders)
    engines = [Engine(ensemble, router=router, top_m=top_m, kernels=kernels, graphs=kernels == "triton") for kernels in ("torch", "triton")]
    found: list[list[tuple[int, int]]] = [[], []]
    for engine, tokens in zip(engines, found, strict=True):
        for number, prompt in enumerate(PROMPTS[:3]):
            engine.add(GenerationRequest(prompt, None, SamplingParams(2 + number, temperature, top_k=20, stop_at_eos=False)))
        for _ in range(4):
            tokens += [(event.request_id, event.token_id) for event in engine.step()]
    assert engines[1]._graphs is not None and engines[1]._graphs._steps and engines[0]._graphs is None
    assert found[0] == found[1] and len(found[0]) == 9


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_by_the_only_expert_is_accepted_whole(
    temperature: float, make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]
) -> None:
    """Both sides draw with the same noise: what is the same distribution is the same sample."""
    engine = Engine(make_ensemble(decoders), expert="e1", draft="e1", draft_tokens=3)
    written(engine, SamplingParams(max_new_tokens=13, temperature=temperature, stop_at_eos=False))
    assert engine.drafted.accepted == engine.drafted.proposed > 0 and "accepted (100%)" in engine.drafted.line()


def test_the_first_of_several_stop_strings_ends_the_text() -> None:
    stopper = StopText(["late", "so"])
    assert stopper.push("it was so late") == "it was " and stopper.stopped and stopper.push("more") == ""


@pytest.mark.parametrize("combine", ["mixture", "logit_mean"])
@pytest.mark.parametrize("temperature_on", ["mixture", "experts"])
def test_a_report_of_alternatives_changes_no_draw(
    combine: str, temperature_on: str, make_ensemble: Callable[..., Ensemble], decoders: list[Decoder]
) -> None:
    """The fused operation and the one that keeps logits draw the same tokens."""
    ensemble = make_ensemble(decoders)
    found = []
    for logprobs in (0, 3):
        engine = Engine(ensemble, router="uniform", top_m=3, combine=combine, temperature_on=temperature_on)
        found.append(written(engine, SamplingParams(12, temperature=0.5, seed=2, stop_at_eos=False, logprobs=logprobs)))
    assert found[0] == found[1]
