"""The completions API, asked by the official client over a real connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest
from scripted_engine import ByteTokenizer, scripted_text, wait_for

from megaxelm.ensemble.sampling import GenerationRequest, SamplingParams


def test_the_official_client_gets_a_completion_and_its_usage(serve: Callable[..., Any]) -> None:
    found = serve().client().completions.create(model="tiny", prompt="The cat", max_tokens=9, temperature=0)
    assert found.choices[0].text == scripted_text("The cat", count=9)
    assert (found.choices[0].finish_reason, found.choices[0].logprobs, found.model) == ("length", None, "tiny")
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (7, 9, 16)


def test_sixteen_tokens_are_written_unless_told_otherwise_and_a_text_may_end_by_itself(serve: Callable[..., Any]) -> None:
    client = serve().client()
    found = client.completions.create(model="tiny", prompt=["The cat", "eos"], temperature=0)
    assert found.choices[0].text == scripted_text("The cat", count=16)
    assert (found.choices[1].text, found.choices[1].finish_reason) == (scripted_text("eos", count=3), "stop")
    assert found.usage is not None and found.usage.completion_tokens == 16 + 4
    longer = client.completions.create(model="tiny", prompt="eos", temperature=0, extra_body={"ignore_eos": True})
    assert longer.choices[0].finish_reason == "length"


def test_every_form_of_prompt_is_the_same_text(serve: Callable[..., Any]) -> None:
    client, ids = serve().client(), ByteTokenizer().encode(["The cat", "x"])
    for prompt, texts in (("The cat", ["The cat"]), (ids[0], ["The cat"]), (["The cat", "x"], ["The cat", "x"]), (ids, ["The cat", "x"])):
        found = client.completions.create(model="tiny", prompt=prompt, temperature=0, echo=True)
        assert [choice.text for choice in found.choices] == [text + scripted_text(text) for text in texts]
        assert [choice.index for choice in found.choices] == list(range(len(texts)))
        assert found.usage is not None and found.usage.prompt_tokens == sum(map(len, texts))


def test_n_choices_are_drawn_apart_and_a_seed_repeats_them(serve: Callable[..., Any]) -> None:
    client = serve().client()

    def draw(prompt: Any, seed: int | None, n: int = 3) -> list[str]:
        return [choice.text for choice in client.completions.create(model="tiny", prompt=prompt, seed=seed, n=n, best_of=n).choices]

    assert len(set(draw("a", 5))) == 3
    assert draw("a", 5) == draw("a", 5) != draw("a", 6)
    assert draw("a", 5)[0] == draw("a", 5, n=1)[0] == scripted_text("a", 5, 1.0)
    assert len(set(draw(["a", "a"], 5))) == 6
    assert draw("a", None) != draw("a", None)
    assert client.completions.create(model="tiny", prompt=["a", "b"], n=2).usage.prompt_tokens == 2


def test_logprobs_name_tokens_alternatives_and_offsets(serve: Callable[..., Any]) -> None:
    client = serve().client()
    found = client.completions.create(model="tiny", prompt="eos", temperature=0, logprobs=2).choices[0]
    text = scripted_text("eos", count=3)
    assert found.logprobs is not None
    assert found.logprobs.tokens == [*text, "token_id:2"]
    assert found.logprobs.token_logprobs == [-0.5] * 4
    assert found.logprobs.text_offset == [0, 1, 2, 3]
    assert found.logprobs.top_logprobs is not None
    assert found.logprobs.top_logprobs[0] == {text[0]: -0.5, chr(ord(text[0]) - 1): -1.5}
    plain = client.completions.create(model="tiny", prompt="x", temperature=0, logprobs=0).choices[0].logprobs
    assert plain is not None and plain.top_logprobs is None and len(plain.tokens) == 16


def test_mixture_weights_come_on_demand(serve: Callable[..., Any]) -> None:
    client = serve().client()
    choice = client.completions.create(
        model="tiny", prompt="x", max_tokens=2, extra_body={"weights": True, "top_k": 3, "min_p": 0.1}
    ).choices[0]
    assert choice.weights == {"experts": ["north", "south"], "tokens": [[0.75, 0.25]] * 2}
    assert not hasattr(client.completions.create(model="tiny", prompt="x", max_tokens=2).choices[0], "weights")


@pytest.mark.parametrize("with_usage", [True, False])
def test_a_stream_has_the_tokens_of_the_whole_answer(serve: Callable[..., Any], with_usage: bool) -> None:
    client = serve().client()
    options: Any = {"model": "tiny", "prompt": ["The cat", "eos"], "seed": 3, "n": 2, "echo": True}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True} if with_usage else openai.omit))
    texts, reasons = [""] * 4, [None] * 4
    for chunk in chunks[: len(chunks) - with_usage]:
        (choice,) = chunk.choices
        assert reasons[choice.index] is None and chunk.usage is None and chunk.id == chunks[0].id
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    if with_usage:
        assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_a_streamed_logprob_has_its_place_in_the_text(serve: Callable[..., Any]) -> None:
    stream = (
        serve().client().completions.create(model="tiny", prompt="x", max_tokens=3, stream=True, logprobs=0, extra_body={"weights": True})
    )
    chunks = list(stream)
    assert [chunk.choices[0].logprobs.text_offset for chunk in chunks] == [[0], [1], [2]]
    assert [chunk.choices[0].weights["tokens"] for chunk in chunks] == [[[0.75, 0.25]]] * 3


def test_a_stream_is_server_sent_events_and_says_when_it_is_done(make_service: Callable[..., Any]) -> None:
    with make_service().test_client() as client:
        response = client.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 3, "stream": True, "echo": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.text.split("\n\n")
        assert all(line.startswith("data: {") for line in lines[:-2]) and lines[-2:] == ["data: [DONE]", ""]


def test_all_of_a_request_reaches_the_engine(make_service: Callable[..., Any]) -> None:
    served = make_service()
    given = {"max_tokens": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 9, "logprobs": 2, "ignore_eos": True}
    with served.test_client() as client:
        for more in (given | {"language": "xx", "stop": ["a", "bc"], "n": 2}, {"stop": "z"}):
            assert client.post("/v1/completions", json={"model": "tiny", "prompt": "x"} | more).status_code == 200
    full = SamplingParams(7, 0.5, 3, 0.9, 0.1, 9, ("a", "bc"), False, 2)
    ids = [ord("x") + 4]
    assert served.engine.asked[:2] == [GenerationRequest(ids, "xx", full, 0), GenerationRequest(ids, "xx", full, 1)]
    drawn = served.engine.asked[2].sampling.seed
    assert served.engine.asked[2:] == [GenerationRequest(ids, None, SamplingParams(16, 1.0, seed=drawn, stop=("z",)))]


def test_a_stream_comes_while_it_is_written(serve: Callable[..., Any]) -> None:
    served = serve(delay=0.05)
    stream = iter(served.client().completions.create(model="tiny", prompt="x", max_tokens=100, stream=True))
    next(stream)
    assert served.engine.steps < 20
    stream.close()  # type: ignore[attr-defined]


def test_sixteen_clients_at_once_get_what_each_gets_alone(serve: Callable[..., Any]) -> None:
    served = serve(max_batch=8, delay=0.001)
    prompts = [f"{'long ' * (number % 5)}{number}" for number in range(16)]

    async def ask(client: openai.AsyncOpenAI, number: int, stream: bool) -> str:
        options: Any = {"model": "tiny", "prompt": prompts[number], "max_tokens": 5 + 3 * number, "seed": number}
        if not stream:
            return (await client.completions.create(**options)).choices[0].text
        return "".join([chunk.choices[0].text async for chunk in await client.completions.create(**options, stream=True)])

    async def all_at_once() -> list[str]:
        async with served.async_client() as client:
            return list(await asyncio.gather(*(ask(client, number, number % 2 == 0) for number in range(16))))

    assert asyncio.run(all_at_once()) == [scripted_text(prompts[number], number, 1.0, 5 + 3 * number) for number in range(16)]
    assert served.engine.widest == 8, "they were not written together"
    wait_for(lambda: served.service.runner.num_taken == 0)


def test_the_models_are_listed(serve: Callable[..., Any]) -> None:
    client = serve().client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").experts == ["north", "south"]  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt/4")
    assert error.value.code == "model_not_found" and "tiny" in error.value.message


def test_a_base_model_does_not_chat(serve: Callable[..., Any]) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        serve().client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])
    assert error.value.code == "chat_not_supported" and "/v1/completions" in error.value.message
