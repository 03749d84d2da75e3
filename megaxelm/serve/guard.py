"""What stands before the server's routes: whose request it is, how large it is, and how long it takes to come."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megaxelm.serve.errors import ApiError
from megaxelm.serve.limits import Limits

HEALTH = "/health"


@dataclass
class Gate:
    """Whether the server takes requests. `closed`: why it does not, once it is stopping."""

    closed: str | None = None


class Guard:
    """ASGI middleware. Every request passes it before anything else reads it.

    Args:
        key: that clients must send as `Authorization: Bearer <key>`; None for a server that only this machine reaches.
        answered: called with (path, status) at the end of each request.
    """

    def __init__(self, app: ASGIApp, limits: Limits, gate: Gate, key: str | None, answered: Callable[[str, int], None]) -> None:
        self._app, self._limits, self._gate, self._answered = app, limits, gate, answered
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._check(scope)
                receive = await self._whole_body(scope, receive)
            except ApiError as error:
                await error.response()(scope, receive, counted)
                return
            except _Left:
                status = 499
                return
            await self._app(scope, receive, counted)
        finally:
            # 499, as nginx has it: the client went away before there was an answer.
            self._answered(scope["path"], status or 499)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if scope["path"] == HEALTH:
            return
        if self._key is None:
            # A page of another site must not reach this server through a name that it lets point to this machine.
            if not _is_this_machine(headers.get("host", "")):
                raise ApiError(
                    403,
                    "the Host of this request is not this machine; a server without an API key answers only localhost",
                    code="wrong_host",
                )
        else:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # Compared even when nothing was given, so that the time tells nothing.
            if not hmac.compare_digest(given.strip().encode(), self._key) or scheme.lower() != "bearer":
                raise ApiError(
                    401,
                    "wrong or missing API key; send it as `Authorization: Bearer <key>`",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
        if self._gate.closed is not None and scope["method"] == "POST":
            raise ApiError(503, self._gate.closed, code="stopping", headers={"retry-after": "10", "connection": "close"})

    async def _whole_body(self, scope: Scope, receive: Receive) -> Receive:
        """The body is read here, within its bounds, and then given on as one message."""
        limit = self._limits.body_bytes
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
            raise _too_large(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Left
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise _too_large(limit)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not come within {self._limits.body_seconds:g} seconds", code="too_slow", headers={"connection": "close"}
            ) from None
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return replay


class _Left(Exception):
    """The client went away before its request was whole."""


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limit} bytes, the limit of this server", code="body_too_large", headers={"connection": "close"}
    )


def _is_this_machine(host: str) -> bool:
    """Whether a Host header names a loopback address."""
    name = host[1 : host.find("]")] if host.startswith("[") else host.rpartition(":")[0] or host
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
