"""What one client may ask of the server, and how long it may take to ask."""

from __future__ import annotations

from dataclasses import dataclass

from megaxelm.errors import ServeError


@dataclass(frozen=True)
class Limits:
    """Bounds of the server. Times in seconds.

    Raises:
        ServeError: a value out of range.
    """

    batch: int = 32
    """Texts that the engine writes at one time."""
    queue: int = 128
    """Texts that may wait beside those; more are refused with 429."""
    texts: int = 32
    """Texts of one request: prompts times `n`."""
    tokens: int | None = None
    """Prompt and `max_tokens` of one text together; None: as many as the experts have positions."""
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    """How long the body of a request may take to come."""
    stop_strings: int = 4
    stop_characters: int = 256
    """Of one stop string."""
    connections: int = 1024
    stop_seconds: float = 30.0
    """How long running requests may go on after SIGTERM or SIGINT; then they are cancelled."""

    def __post_init__(self) -> None:
        for name in ("batch", "texts", "body_bytes", "connections"):
            if getattr(self, name) < 1:
                raise ServeError(f"{name} = {getattr(self, name)}: choose at least 1")
        for name in ("queue", "stop_seconds"):
            if getattr(self, name) < 0:
                raise ServeError(f"{name} = {getattr(self, name)}: choose at least 0")
        if self.tokens is not None and self.tokens < 2:
            raise ServeError(f"tokens = {self.tokens}: choose at least 2, one read and one written")
        if self.texts > self.capacity:
            raise ServeError(
                f"texts = {self.texts}: one request could never be taken whole; choose at most batch + queue = {self.capacity}"
            )

    @property
    def capacity(self) -> int:
        """Texts that are taken at one time, running or waiting."""
        return self.batch + self.queue
