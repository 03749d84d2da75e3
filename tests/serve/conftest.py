"""Servers around a scripted engine: the protocol is tested without a model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

import openai  # noqa: E402
import uvicorn  # noqa: E402
from scripted_engine import ScriptedEngine  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from megaxelm.serve.app import Service, make_app  # noqa: E402
from megaxelm.serve.limits import Limits  # noqa: E402
from megaxelm.serve.metrics import Metrics  # noqa: E402
from megaxelm.serve.runner import EngineRunner  # noqa: E402
from megaxelm.serve.server import bind, uvicorn_config  # noqa: E402

EXPERTS = ["north", "south"]


@dataclass
class Served:
    """A service around a scripted engine, and where it is reached."""

    engine: ScriptedEngine
    service: Service
    url: str = ""

    def client(self) -> openai.OpenAI:
        """The official client."""
        return openai.OpenAI(base_url=self.url, api_key="none is wanted", max_retries=0, timeout=20)

    def async_client(self) -> openai.AsyncOpenAI:
        """The official client for asyncio."""
        return openai.AsyncOpenAI(base_url=self.url, api_key="none is wanted", max_retries=0, timeout=20)

    def test_client(self, **settings: object) -> TestClient:
        """A client without a connection."""
        return TestClient(make_app(self.service), base_url="http://localhost", **settings)  # type: ignore[arg-type]


@pytest.fixture
def make_service() -> Iterator[Callable[..., Served]]:
    """A service whose engine's thread runs."""
    made: list[Served] = []

    def make(*, max_batch: int = 4, delay: float = 0.0, key: str | None = None, **limits: object) -> Served:
        engine = ScriptedEngine(max_batch, delay)
        settings = Limits(batch=max_batch, **({"queue": 64} | limits))  # type: ignore[arg-type]
        metrics = Metrics(EXPERTS)
        runner = EngineRunner(engine, settings.capacity, metrics)
        runner.start()
        made.append(Served(engine, Service("tiny", EXPERTS, engine.tokenizer, runner, metrics, settings, key)))
        return made[-1]

    yield make
    for served in made:
        served.service.runner.stop(2)


@pytest.fixture
def serve(make_service: Callable[..., Served]) -> Iterator[Callable[..., Served]]:
    """A server on a port of its own, in a thread of this process."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(**settings: object) -> Served:
        served = make_service(**settings)
        listening = bind("127.0.0.1", 0, has_key=False)
        config = uvicorn_config(served.service)
        config.timeout_graceful_shutdown = 1
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        running.append((server, thread))
        served.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        return served

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(5)
