"""What happens around the engine's thread: queues, clients that leave, an engine that fails, a server that stops."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import ScriptedEngine, scripted_text, wait_for

from megaxelm.ensemble.sampling import GenerationRequest, SamplingParams
from megaxelm.errors import RoutingError
from megaxelm.serve.runner import EngineRunner, QueueFull, Unavailable

CLIENT = """
import http.client, json, sys
connection = http.client.HTTPConnection(sys.argv[1])
connection.request("POST", "/v1/completions", sys.argv[2], {"content-type": "application/json"})
print("token", flush=True)
print(connection.getresponse().read())
"""


@pytest.mark.parametrize(("stream", "texts"), [(True, 1), (False, 2)])
def test_a_killed_client_frees_its_place_and_the_others_go_on(serve: Callable[..., Any], stream: bool, texts: int) -> None:
    served = serve(max_batch=4, delay=0.02)
    body = json.dumps({"model": "tiny", "prompt": "gone", "max_tokens": 300, "n": texts, "stream": stream})
    command = [sys.executable, "-c", CLIENT, served.url.removeprefix("http://").removesuffix("/v1"), body]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as victim:
        assert victim.stdout is not None and victim.stdout.readline() == b"token\n"
        wait_for(lambda: len(served.engine.running) == texts, 30)
        beside = threading.Thread(
            target=lambda: found.append(served.client().completions.create(model="tiny", prompt="b", max_tokens=40, seed=1))
        )
        found: list[Any] = []
        beside.start()
        wait_for(lambda: len(served.engine.running) == texts + 1)
        victim.send_signal(signal.SIGKILL)
    wait_for(lambda: len(served.engine.cancelled) == texts)
    assert served.engine.steps < 250
    beside.join()
    assert found[0].choices[0].text == scripted_text("b", 1, 1.0, 40)
    after = served.client().completions.create(model="tiny", prompt="after", temperature=0)
    assert after.choices[0].text == scripted_text("after")
    wait_for(lambda: served.service.runner.num_taken == 0)


def test_a_client_that_leaves_while_it_waits_is_taken_out_of_the_queue(serve: Callable[..., Any]) -> None:
    served = serve(max_batch=1, delay=0.02)

    async def leave() -> None:
        async with served.async_client() as client:
            first = asyncio.ensure_future(client.completions.create(model="tiny", prompt="a", max_tokens=30, temperature=0))
            while not served.engine.running:
                await asyncio.sleep(0.005)
            second = asyncio.ensure_future(client.completions.create(model="tiny", prompt="b", max_tokens=30, temperature=0))
            while not served.engine.waiting:
                await asyncio.sleep(0.005)
            second.cancel()
            assert (await first).choices[0].text == scripted_text("a", count=30)

    asyncio.run(leave())
    wait_for(lambda: served.engine.cancelled == [2] and not served.engine.has_work)


def test_a_full_queue_is_told_so_and_empties_again(serve: Callable[..., Any]) -> None:
    served = serve(max_batch=1, delay=0.01, queue=2, texts=3)

    async def crowd() -> list[Any]:
        async with served.async_client() as client:
            return list(
                await asyncio.gather(
                    *(client.completions.create(model="tiny", prompt="x", max_tokens=20, temperature=0) for _ in range(8)),
                    return_exceptions=True,
                )
            )

    found = asyncio.run(crowd())
    refused = [answer for answer in found if isinstance(answer, openai.RateLimitError)]
    assert len(refused) == 5
    assert refused[0].code == "queue_full" and int(refused[0].response.headers["retry-after"]) > 0
    assert served.client().completions.create(model="tiny", prompt="x", n=3).choices


def test_all_texts_of_a_request_are_taken_or_none() -> None:
    engine = ScriptedEngine()
    runner = EngineRunner(engine, capacity=3)
    runner.start()
    good, bad = GenerationRequest([5]), GenerationRequest([5], "klingon")

    async def ask() -> None:
        with pytest.raises(QueueFull):
            await runner.submit([good] * 4)
        with pytest.raises(RoutingError, match="klingon"):
            await runner.submit([good, bad])
        assert engine.cancelled == [1] and not engine.has_work
        texts = await runner.submit([good] * 3)
        texts.close()
        await asyncio.to_thread(wait_for, lambda: runner.num_taken == 0)
        with pytest.raises(RoutingError, match="klingon"):
            await runner.submit([bad])

    asyncio.run(ask())
    wait_for(lambda: runner.num_taken == 0)
    runner.stop()


def test_an_engine_that_fails_is_told_to_everyone_who_waits(serve: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    served = serve(max_batch=2, delay=0.01)
    client = served.client()
    stream = client.completions.create(model="tiny", prompt="x", max_tokens=300, stream=True)
    next(stream)
    errors: list[Any] = []

    def ask() -> None:
        with pytest.raises(openai.APIStatusError) as error:
            client.completions.create(model="tiny", prompt="x", max_tokens=300, n=3)
        errors.append(error.value)

    waiting = threading.Thread(target=ask)
    waiting.start()
    wait_for(lambda: served.service.runner.num_taken == 4)
    served.engine.fail = True
    with pytest.raises(openai.APIError, match="the engine failed"):
        list(stream)
    waiting.join()
    assert errors[0].status_code == 503 and "RuntimeError" in errors[0].message
    with pytest.raises(openai.InternalServerError) as error:
        client.completions.create(model="tiny", prompt="x")
    assert error.value.status_code == 503
    with served.test_client() as direct:
        health = direct.get("/health")
        assert health.status_code == 503 and "restart" in health.json()["status"]
    assert served.service.runner.num_taken == 0
    assert "planted" in capsys.readouterr().err


def test_a_defect_of_the_engine_at_one_request_leaves_the_others() -> None:
    engine = ScriptedEngine()
    runner = EngineRunner(engine, capacity=8)
    runner.start()

    async def ask() -> None:
        with pytest.raises(Unavailable, match="AttributeError"):
            await runner.submit([GenerationRequest([5], sampling=None)])  # type: ignore[arg-type]
        texts = await runner.submit([GenerationRequest([5], sampling=SamplingParams(max_new_tokens=2))])
        assert len([event async for event in texts]) == 2

    asyncio.run(ask())
    assert runner.alive and runner.num_taken == 0
    runner.stop()


def test_a_runner_that_stops_leaves_nobody_waiting() -> None:
    runner = EngineRunner(ScriptedEngine(delay=0.01), capacity=8)
    runner.start()

    async def ask() -> None:
        texts = await runner.submit([GenerationRequest([5], sampling=SamplingParams(max_new_tokens=300))])
        await asyncio.to_thread(runner.stop)
        with pytest.raises(Unavailable, match="stopping"):
            async for _ in texts:
                pass
        with pytest.raises(Unavailable, match="stopping"):
            await runner.submit([GenerationRequest([5])])

    asyncio.run(ask())
    assert not runner.alive and runner.num_taken == 0


def test_metrics_count_what_was_done(make_service: Callable[..., Any]) -> None:
    served = make_service()
    with served.test_client() as client:
        body = {"model": "tiny", "prompt": ["abc", "eos"], "max_tokens": 5, "temperature": 0}
        assert client.post("/v1/completions", json=body).status_code == 200
        assert client.post("/v1/completions", json=body | {"language": "klingon"}).status_code == 400
        assert client.get("/nowhere").status_code == 404
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(client.get("/metrics").text)
            for sample in family.samples
        }
    assert found["megaxelm_requests_total", "/v1/completions", "200"] == 1
    assert found["megaxelm_requests_total", "/v1/completions", "400"] == 1
    assert found["megaxelm_requests_total", "other", "404"] == 1
    assert found["megaxelm_prompt_tokens_total",] == 6
    assert found["megaxelm_generated_tokens_total",] == 5 + 4
    assert found["megaxelm_texts_total", "length"] == found["megaxelm_texts_total", "stop"] == 1
    assert found["megaxelm_texts_total", "refused"] == 2
    assert found["megaxelm_time_to_first_token_seconds_count",] == 2
    assert found["megaxelm_time_per_token_seconds_count",] == 7
    assert found["megaxelm_expert_weight_total", "north"] == pytest.approx(9 * 0.75)
    assert found["megaxelm_expert_mean_weight", "south"] == pytest.approx(0.25)
    assert found["megaxelm_running_texts",] == found["megaxelm_waiting_texts",] == 0
    assert found["megaxelm_engine_alive",] == 1
