"""Requests that are refused, in OpenAI's form of errors, and never with status 500."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_engine import ByteTokenizer, scripted_text
from starlette.testclient import TestClient

from megaxelm.errors import ServeError
from megaxelm.serve.answers import TokenTexts
from megaxelm.serve.errors import ApiError
from megaxelm.serve.limits import Limits
from megaxelm.serve.protocol import CompletionRequest

GOOD = {"model": "tiny", "prompt": "x", "temperature": 0, "max_tokens": 3}


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"model": "gpt-4"}, 404, "model", "tiny"),
        ({"model": None}, 400, "model", "model"),
        ({"prompt": None}, 400, "prompt", "list of token ids"),
        ({"prompt": []}, 400, "prompt", "at least one"),
        ({"prompt": ["a", 1]}, 400, "prompt", "list of token ids"),
        ({"prompt": [True]}, 400, "prompt", "list of token ids"),
        ({"prompt": [1.5]}, 400, "prompt", "list of token ids"),
        ({"prompt": [[1], 2]}, 400, "prompt", "list of token ids"),
        ({"prompt": [260]}, 400, "prompt", "0..259"),
        ({"prompt": [[5], [-1]]}, 400, "prompt", "-1"),
        ({"prompt": "\ud800"}, 400, "prompt", "UTF-8"),
        ({"prompt": "x" * 399}, 400, None, "400 positions"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "3"}, 400, "max_tokens", "integer"),
        ({"temperature": -0.1}, 400, "temperature", "0"),
        ({"temperature": 1e999}, 400, "temperature", "finite"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"top_p": 1.1}, 400, "top_p", "1"),
        ({"min_p": 1.0}, 400, "min_p", "less than 1"),
        ({"top_k": -1}, 400, "top_k", "0"),
        ({"n": 0}, 400, "n", "1"),
        ({"n": 33}, 400, "n", "at most 32 texts"),
        ({"n": 2, "prompt": ["x"] * 17}, 400, "n", "at most 32 texts"),
        ({"seed": 1 << 63}, 400, "seed", "less than"),
        ({"logprobs": 21}, 400, "logprobs", "20"),
        ({"stop": ["a"] * 5}, 400, "stop", "at most 4"),
        ({"stop": ""}, 400, "stop", "1 to 256"),
        ({"stop": "a" * 257}, 400, "stop", "1 to 256"),
        ({"stop": "\udfff"}, 400, "stop", "UTF-8"),
        ({"best_of": 2}, 400, "best_of", "leave it out"),
        ({"suffix": "end"}, 400, "suffix", "leave it out"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias", "leave it out"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "set it to 0"),
        ({"frequency_penalty": -0.5}, 400, "frequency_penalty", "set it to 0"),
        ({"echo": True, "logprobs": 1}, 400, "echo", "leave one"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream = true"),
        ({"language": "klingon"}, 400, None, "klingon"),
        ({"temprature": 0.5}, 400, "temprature", "did you mean `temperature`"),
        ({"guided_json": {}}, 400, "guided_json", "leave it out"),
        ({"\ud800": 1}, 400, None, "JSON object"),
    ],
)
def test_a_request_that_cannot_be_answered_as_it_stands_is_refused(
    make_service: Callable[..., Any], change: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    served = make_service()
    with served.test_client() as client:
        response = client.post("/v1/completions", content=json.dumps(GOOD | change), headers={"content-type": "application/json"})
        error = error_of(response, status)
        assert error["param"] == param and words in error["message"]
        assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
        # and the server goes on
        assert client.post("/v1/completions", json=GOOD).json()["choices"][0]["text"] == scripted_text("x", count=3)
    assert served.service.runner.num_taken == 0


def test_fields_of_the_caller_and_nulls_change_nothing(make_service: Callable[..., Any]) -> None:
    nulls = {name: None for name in CompletionRequest.model_fields if name not in GOOD}
    extras = {"user": "me", "metadata": {"a": "b"}, "store": False, "presence_penalty": 0, "logit_bias": {}, "suffix": "", "best_of": 1}
    with make_service().test_client() as client:
        for body in (GOOD | nulls, GOOD | extras):
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200 and response.json()["choices"][0]["text"] == scripted_text("x", count=3)


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (b"", "application/json", "JSON object"),
        (b"{", "application/json", "not JSON"),
        (b"[1]", "application/json", "JSON object"),
        (b"\xc3\x28", "application/json", "parsing the body"),
        (b"[" * 100_000, "application/json", "parsing the body"),
        (b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", "application/json", "parsing the body"),
        (json.dumps(GOOD).encode(), "text/plain", "Content-Type: application/json"),
        (json.dumps(GOOD).encode(), "application/x-www-form-urlencoded", "Content-Type: application/json"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(make_service: Callable[..., Any], content: bytes, kind: str, words: str) -> None:
    with make_service().test_client() as client:
        error = error_of(client.post("/v1/completions", content=content, headers={"content-type": kind}), 400)
        assert words in error["message"]


def test_an_error_is_sent_whatever_it_quotes() -> None:
    assert (
        b'"message":"not ? here","type":"invalid_request_error","param":"?"' in ApiError(400, "not \ud800 here", "\ud800").response().body
    )


def test_a_wrong_path_or_method_is_told_where_to_go(make_service: Callable[..., Any]) -> None:
    with make_service().test_client() as client:
        assert "/v1/completions" in error_of(client.post("/v1/complete", json=GOOD), 404)["message"]
        assert "/v1/completions" in error_of(client.get("/v1/completions"), 405)["message"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8) | st.just("tiny"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([*CompletionRequest.model_fields, "messages", "tools"])


@pytest.fixture(scope="module")
def module_client() -> Any:
    from scripted_engine import ScriptedEngine

    from megaxelm.serve.app import Service, make_app
    from megaxelm.serve.metrics import Metrics
    from megaxelm.serve.runner import EngineRunner

    engine, metrics, limits = ScriptedEngine(), Metrics(["a", "b"]), Limits(batch=4)
    runner = EngineRunner(engine, limits.capacity, metrics)
    runner.start()
    with TestClient(make_app(Service("tiny", ["a", "b"], engine.tokenizer, runner, metrics, limits)), "http://localhost") as client:
        yield client
    assert runner.alive and runner.num_taken == 0
    runner.stop()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=st.dictionaries(FIELDS, VALUES, max_size=4), whole=st.one_of(st.none(), VALUES))
def test_no_body_makes_the_server_fail(module_client: TestClient, change: dict[str, Any], whole: Any) -> None:
    body = GOOD | change if whole is None else whole
    response = module_client.post("/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        error_of(response, response.status_code)


def test_texts_of_tokens_can_be_told_apart() -> None:
    texts = TokenTexts(ByteTokenizer())
    assert [texts[token] for token in (ord("a") + 4, 2, 0xE2 + 4)] == ["a", "token_id:2", "token_id:230"]

    class DropsTheFirstSpace(ByteTokenizer):
        def decode(self, ids: Any) -> str:
            return super().decode(ids).removeprefix(" ")

    assert TokenTexts(DropsTheFirstSpace())[ord(" ") + 4] == " "


def test_limits_that_cannot_hold_are_refused() -> None:
    for bad in ({"batch": 0}, {"queue": -1}, {"tokens": 1}, {"body_bytes": 0}, {"batch": 1, "queue": 2, "texts": 4}):
        with pytest.raises(ServeError, match=r"choose"):
            Limits(**bad)
