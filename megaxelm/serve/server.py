"""The process of the server: its address, its key, and how it stops.

SIGTERM or SIGINT closes the gate: what comes is refused with 503, running requests may end within `Limits.stop_seconds`, then they are
cancelled, and the process exits with 0. A second signal does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from megaxelm.errors import ServeError
from megaxelm.serve.app import Service, make_app
from megaxelm.serve.connection import TimedConnection

KEY_VARIABLE = "MEGAXELM_API_KEY"
_SHORTEST_KEY = 16
_IDLE_SECONDS = 15
_FLUSH_SECONDS = 5
"""For connections to take what is already written to them."""


def read_key(path: Path | None) -> str | None:
    """The API key from a file, or from the environment; None where neither is given. It is never taken from the command line.

    Raises:
        ServeError: the file cannot be read, or the key is too short or not plain ASCII.
    """
    if path is not None:
        try:
            key, where = path.read_text(encoding="utf-8").strip(), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ServeError(
                f"--api-key-file {path}: cannot be read ({type(error).__name__}); give a text file with the key alone"
            ) from None
    elif KEY_VARIABLE in os.environ:
        key, where = os.environ[KEY_VARIABLE].strip(), KEY_VARIABLE
    else:
        return None
    if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ServeError(
            f"{where}: an API key has at least {_SHORTEST_KEY} characters of ASCII without spaces; make one with `openssl rand -hex 32`"
        )
    return key


def bind(host: str, port: int, has_key: bool) -> socket.socket:
    """A socket bound to an address; port 0 takes a free one. It does not listen yet, so nobody can connect before the model is loaded.

    Raises:
        ServeError: other machines could reach it and there is no API key, or the address cannot be had.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ServeError(f"--host {host}: no address of this machine ({error.strerror}); 127.0.0.1 is the default") from None
    family, _, _, _, address = found[0]
    if not has_key and not all(_is_loopback(str(entry[4][0])) for entry in found):
        raise ServeError(
            f"--host {host}: other machines can reach this address, so clients must show a key: give --api-key-file, or set {KEY_VARIABLE} "
            "(make a key with `openssl rand -hex 32`); or leave --host out"
        )
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
    except OSError as error:
        server.close()
        raise ServeError(
            f"--host {host} --port {port}: {os.strerror(error.errno or 0).lower()}; choose another, or 0 for any free port"
        ) from None
    return server


def address_of(server: socket.socket) -> str:
    """URL of a bound socket."""
    host, port = server.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def uvicorn_config(service: Service) -> uvicorn.Config:
    """How uvicorn runs the service: without logs of requests, which may be private."""
    return uvicorn.Config(
        make_app(service),
        http=TimedConnection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=service.limits.connections,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
    )


def run_server(service: Service, server: socket.socket, say: Callable[[str], None]) -> None:
    """Serve until a signal; starts the engine's thread and ends it. `say` is told when the server is ready and when it stops."""
    service.runner.start()
    try:
        asyncio.run(_Server(uvicorn_config(service), service, say).serve(sockets=[server]))
    finally:
        service.runner.stop()
        server.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self._service, self._say = service, say
        self._stopping: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn's own way closes the listening socket at once and raises the signal again at the end."""
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets
        self._say(f"ready: {address_of(sockets[0])}/v1 serves the model {self._service.name}")

    def _on_signal(self) -> None:
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop())
        else:
            self._service.runner.stop(0)
            self.force_exit = self.should_exit = True

    async def _stop(self) -> None:
        service = self._service
        service.gate.closed = "the server is stopping; ask another, or later"
        seconds = service.limits.stop_seconds
        if service.runner.num_taken:
            self._say(f"stopping: {service.runner.num_taken} texts may go on for {seconds:g} s")
        deadline = time.monotonic() + seconds
        while service.runner.num_taken and service.runner.alive and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if service.runner.num_taken:
            self._say(f"stopping: {service.runner.num_taken} texts are cancelled")
        await asyncio.to_thread(service.runner.stop)
        self.should_exit = True


def say_on_stderr(text: str) -> None:
    """One line, at once."""
    print(text, file=sys.stderr, flush=True)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
