"""Who may ask, how much at once, and how the process starts and stops."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from scripted_engine import scripted_text, wait_for
from tiny_run import REPOSITORY

from megaxelm.errors import ServeError
from megaxelm.serve.connection import TimedConnection
from megaxelm.serve.server import KEY_VARIABLE, address_of, bind, read_key

KEY = "0123456789abcdef0123"
BODY = {"model": "tiny", "prompt": "x", "max_tokens": 3, "temperature": 0}


@pytest.mark.parametrize("authorization", [None, "", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer", "Bearer é"])
def test_without_the_key_nothing_is_answered_but_health(make_service: Callable[..., Any], authorization: str | None) -> None:
    with make_service(key=KEY).test_client() as client:
        headers = {} if authorization is None else {"authorization": authorization.encode()}
        for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nowhere")):
            response = client.request(method, path, headers=headers)  # type: ignore[arg-type]
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key", path
            assert KEY not in response.text
        assert client.get("/health").json() == {"status": "ok"}


def test_with_the_key_all_is_answered(make_service: Callable[..., Any]) -> None:
    with make_service(key=KEY).test_client(headers={"authorization": f"Bearer {KEY}", "host": "my.cluster"}) as client:
        assert client.post("/v1/completions", json=BODY).status_code == 200
        assert client.get("/v1/models").status_code == client.get("/metrics").status_code == 200


def test_a_server_without_a_key_answers_only_names_of_this_machine(make_service: Callable[..., Any]) -> None:
    with make_service().test_client() as client:
        for host in ("localhost", "localhost:8000", "127.0.0.1", "127.0.0.1:80", "[::1]:8000", "LOCALHOST"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200, host
        for host in ("evil.example", "localhost.evil.example:8000", "192.168.0.1", "[fe80::1]", "", "0.0.0.0:8000"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 403, host


def test_a_body_that_is_too_large_is_refused_with_or_without_its_size(make_service: Callable[..., Any]) -> None:
    with make_service(body_bytes=100).test_client() as client:
        pieces: list[Any] = [b"x" * 101, iter([b"x" * 60, b"x" * 60])]
        for content in pieces:
            response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
            assert response.status_code == 413 and "100 bytes" in response.json()["error"]["message"]
        assert client.post("/v1/completions", json=BODY).status_code == 200


def test_a_declared_size_is_enough_to_refuse(serve: Callable[..., Any]) -> None:
    served = serve(body_bytes=100)
    port = int(served.url.split(":")[2].split("/")[0])
    with socket.create_connection(("127.0.0.1", port), 5) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 101\r\n\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_is_given_up_while_others_are_answered(serve: Callable[..., Any]) -> None:
    served = serve(body_seconds=0.5)
    port = int(served.url.split(":")[2].split("/")[0])
    with socket.create_connection(("127.0.0.1", port), 5) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{")
        assert served.client().completions.create(**BODY).choices
        assert raw.recv(4096).startswith(b"HTTP/1.1 408")
        raw.settimeout(5)
        while raw.recv(4096):
            pass  # and the connection ends


def test_a_head_that_does_not_come_ends_the_connection(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TimedConnection, "head_seconds", 0.4)
    served = serve(delay=0.1)
    port = int(served.url.split(":")[2].split("/")[0])
    with socket.create_connection(("127.0.0.1", port), 5) as silent, socket.create_connection(("127.0.0.1", port), 5) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += slow.recv(4096)
        slow.sendall(b"GET /health HTT")  # the second head of this connection
        # A request whose answer takes longer than the head may is not touched.
        assert len(served.client().completions.create(**BODY | {"max_tokens": 8}).choices[0].text) == 8
        assert silent.recv(1) == b"" and slow.recv(1) == b""


def test_prompt_and_answer_together_are_bounded(make_service: Callable[..., Any]) -> None:
    with make_service(tokens=10).test_client() as client:
        assert client.post("/v1/completions", json=BODY | {"prompt": "x" * 7}).status_code == 200
        error = client.post("/v1/completions", json=BODY | {"prompt": ["x", "x" * 8]}).json()["error"]
        assert error["code"] == "context_length_exceeded" and "10" in error["message"]


def test_the_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_key(None) is None
    path = tmp_path / "key"
    path.write_text(KEY + "\n")
    assert read_key(path) == KEY
    monkeypatch.setenv(KEY_VARIABLE, KEY + "env")
    assert read_key(None) == KEY + "env" and read_key(path) == KEY
    for bad in ("", "short", "k" * 20 + " k", "ключ" * 8, "\x07" * 20):
        path.write_text(bad)
        with pytest.raises(ServeError, match="openssl rand") as error:
            read_key(path)
        assert not bad.strip() or bad not in str(error.value)
    with pytest.raises(ServeError, match="cannot be read"):
        read_key(tmp_path / "none")


def test_other_machines_are_served_only_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("0.0.0.0", "", "::"):
        with pytest.raises(ServeError, match="--api-key-file"):
            bind(host, 0, has_key=False)
    with bind("0.0.0.0", 0, has_key=True) as any_address, bind("127.0.0.1", 0, has_key=False) as taken:
        assert address_of(any_address).startswith("http://0.0.0.0:")
        taken.listen()
        with pytest.raises(ServeError, match="already in use"):
            bind("127.0.0.1", taken.getsockname()[1], has_key=False)
    with pytest.raises(ServeError, match=r"--host no\.such"):
        bind("no.such.host.invalid", 0, has_key=True)
    # A name of several addresses, of which other machines reach one.
    addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.0.1", "192.0.2.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **settings: addresses)
    with pytest.raises(ServeError, match="--api-key-file"):
        bind("both.example", 0, has_key=False)


SERVER = """
import sys
from scripted_engine import ScriptedEngine
from megaxelm.console import end_on_signals, run_guarded
from megaxelm.serve.app import Service
from megaxelm.serve.limits import Limits
from megaxelm.serve.metrics import Metrics
from megaxelm.serve.runner import EngineRunner
from megaxelm.serve.server import bind, read_key, run_server, say_on_stderr

end_on_signals()
def serve():
    limits = Limits(batch=4, stop_seconds=float(sys.argv[1]))
    engine, metrics = ScriptedEngine(delay=0.02), Metrics(["a", "b"])
    service = Service("tiny", ["a", "b"], engine.tokenizer, EngineRunner(engine, limits.capacity, metrics), metrics, limits, read_key(None))
    run_server(service, bind("127.0.0.1", 0, True), say_on_stderr)
sys.exit(run_guarded(serve))
"""


@contextlib.contextmanager
def process(stop_seconds: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    env = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "kernels", REPOSITORY / "tests")))}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(stop_seconds)], stderr=subprocess.PIPE, text=True, env=env | {KEY_VARIABLE: KEY}
    ) as server:
        assert server.stderr is not None
        line = server.stderr.readline()
        found = re.search(r"ready: (http://127\.0\.0\.1:\d+/v1) serves the model tiny", line)
        assert found, line + server.stderr.read()
        try:
            yield server, found[1]
        finally:
            server.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_lets_running_requests_end_and_refuses_new_ones(number: signal.Signals) -> None:
    with process(stop_seconds=20) as (server, url):
        client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
        stream = client.completions.create(**BODY | {"max_tokens": 60}, stream=True)
        text = next(stream).choices[0].text
        server.send_signal(number)
        headers = {"authorization": f"Bearer {KEY}"}
        wait_for(lambda: httpx.get(url.replace("/v1", "/health")).status_code == 503)
        refused = httpx.post(f"{url}/completions", json=BODY, headers=headers)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping" and refused.headers["retry-after"]
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == scripted_text("x", count=60)
        assert server.wait(10) == 0
        assert server.stderr is not None
        said = server.stderr.read()
        assert "1 texts may go on for 20 s" in said and "Traceback" not in said and KEY not in said


def test_requests_that_do_not_end_in_time_are_cancelled() -> None:
    with process(stop_seconds=0.3) as (server, url):
        client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
        stream = client.completions.create(**BODY | {"max_tokens": 390}, stream=True)
        next(stream)
        errors: list[Any] = []

        def ask() -> None:
            try:
                client.completions.create(**BODY | {"max_tokens": 390})
            except openai.APIStatusError as error:
                errors.append(error.status_code)

        whole = threading.Thread(target=ask)
        whole.start()
        time.sleep(0.2)
        server.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)
        assert server.wait(10) == 0
        whole.join()
        assert errors == [503]


def test_a_second_signal_does_not_wait() -> None:
    with process(stop_seconds=60) as (server, url):
        client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
        stream = client.completions.create(**BODY | {"max_tokens": 390}, stream=True)
        next(stream)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.poll() is None
        server.send_signal(signal.SIGTERM)
        assert server.wait(4) == 0
        stream.close()
