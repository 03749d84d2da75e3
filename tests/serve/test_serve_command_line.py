"""`megaxelm serve` over real experts, as a process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from scripted_engine import wait_for
from tiny_mixture import write_mixture
from tiny_run import REPOSITORY

from megaxelm.cli import app
from megaxelm.console import run_guarded

PYTHONPATH = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"


@dataclass
class Server:
    run: Path
    url: str
    said: str
    process: subprocess.Popen[str]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none is wanted", max_retries=0, timeout=60)

    def metric(self, name: str) -> float:
        text = httpx.get(self.url.replace("/v1", "/metrics")).text
        return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    run = write_mixture(tmp_path_factory.mktemp("served") / "tiny")
    command = [sys.executable, "-m", "megaxelm.cli", "serve", str(run), "--port", "0", "--router", "posterior", "--max-batch", "8"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ) | {"PYTHONPATH": PYTHONPATH}) as process:
        assert process.stderr is not None
        said = process.stderr.readline() + process.stderr.readline()
        found = re.search(r"ready: (\S+) serves the model tiny", said)
        assert found, said + process.stderr.read()
        yield Server(run, found[1], said, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def options(number: int) -> dict[str, Any]:
    """A request of its own length, greedy or sampled."""
    prompt = "The river " * (number % 4) + str(number)
    return {"model": "tiny", "prompt": prompt, "max_tokens": 4 + 2 * number, "temperature": (number % 3) / 2, "seed": number, "logprobs": 0}


def text_of(answer: Any) -> tuple[str, list[str]]:
    choice = answer.choices[0]
    return choice.text, choice.logprobs.tokens


def test_what_was_chosen_is_printed(server: Server) -> None:
    assert "router posterior, 2 of 2 experts" in server.said and "no API key" in server.said
    assert server.url.startswith("http://127.0.0.1:")


def test_sixteen_clients_at_once_get_what_each_gets_alone(server: Server) -> None:
    client = server.client()
    alone = [text_of(client.completions.create(**options(number))) for number in range(16)]

    async def at_once() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="x", max_retries=0) as many:
            return list(await asyncio.gather(*(many.completions.create(**options(number)) for number in range(16))))

    together = [text_of(answer) for answer in asyncio.run(at_once())]
    assert together == alone
    assert len({tuple(tokens) for _, tokens in alone}) == 16


def test_the_server_writes_what_the_library_writes(server: Server) -> None:
    from megaxelm.ensemble.folder import load_ensemble
    from megaxelm.ensemble.generation import generate

    ensemble = load_ensemble(server.run / "ensemble")
    for temperature in (0.0, 1.0):
        found = server.client().completions.create(
            model="tiny", prompt=["one", "two"], max_tokens=20, temperature=temperature, seed=3, extra_body={"weights": True}
        )
        wanted = generate(ensemble, ["one", "two"], max_new_tokens=20, temperature=temperature, seed=3, router="posterior")
        assert [choice.text for choice in found.choices] == [result.text for result in wanted]
        for choice, result in zip(found.choices, wanted, strict=True):
            for given, own in zip(choice.weights["tokens"], result.weights, strict=True):  # type: ignore[attr-defined]
                assert given == pytest.approx(own, abs=1e-4)


STREAMING_CLIENT = """
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
body = {"model": "tiny", "prompt": "gone", "max_tokens": 80, "extra_body": {"ignore_eos": True, "weights": True}}
while True:
    for chunk in client.completions.create(**body, stream=True):
        print("token", flush=True)
"""


def test_a_client_killed_in_the_middle_of_a_stream_leaves_the_server_to_the_others(server: Server) -> None:
    before = text_of(server.client().completions.create(**options(7)))
    with subprocess.Popen([sys.executable, "-c", STREAMING_CLIENT, server.url], stdout=subprocess.PIPE) as victim:
        assert victim.stdout is not None
        for _ in range(3):
            assert victim.stdout.readline() == b"token\n"
        victim.send_signal(signal.SIGKILL)
    assert text_of(server.client().completions.create(**options(7))) == before
    wait_for(lambda: server.metric("megaxelm_running_texts") == 0 == server.metric("megaxelm_waiting_texts"))
    assert server.metric("megaxelm_engine_alive") == 1


def test_without_the_extra_the_way_to_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # an import of it fails
    assert run_guarded(lambda: app(["serve", str(tmp_path)], standalone_mode=False)) == 2
    assert "pip install 'megaxelm[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "0.0.0.0"), "--api-key-file"),
        (("--max-queue", "-1"), "queue = -1"),
        (("--api-key-file", "no.such"), "cannot be read"),
        ((), "not an ensemble folder"),
    ],
)
def test_a_server_that_may_not_start_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert run_guarded(lambda: app(["serve", str(tmp_path), "--port", "0", *arguments], standalone_mode=False)) == 2
    assert words in capsys.readouterr().err
