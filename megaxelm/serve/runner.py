"""The thread that owns the engine: requests in from the event loop, tokens out to it.

The engine is not thread-safe, so all it is told goes through the inbox of one thread. Between two steps of the batch this thread takes
what has come: new texts join, abandoned ones leave. What a step wrote is handed to the event loop in one call.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from megaxelm.ensemble.sampling import GenerationRequest, TokenEvent
from megaxelm.errors import MegaxelmError


class EngineLike(Protocol):
    """What is used of `megaxelm.ensemble.engine.Engine`."""

    def add(self, request: GenerationRequest) -> int: ...

    def step(self) -> list[TokenEvent]: ...

    def cancel(self, request_id: int) -> None: ...

    def prompt_tokens(self, request_id: int) -> int: ...

    @property
    def has_work(self) -> bool: ...

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...


class Observer(Protocol):
    """Is told what happens to each text; called from the engine's thread."""

    def text_started(self, prompt_tokens: int) -> None: ...

    def first_token(self, seconds: float, weights: Sequence[float]) -> None: ...

    def next_token(self, seconds: float, weights: Sequence[float]) -> None: ...

    def text_ended(self, reason: str) -> None: ...


class QueueFull(Exception):
    """As many texts wait as may wait."""


class Unavailable(Exception):
    """The engine does not write on: it has failed, or the server is stopping."""


class Texts:
    """The texts of one request, while they are written. Iterate to get (index of the text, token); always `close` at the end."""

    def __init__(self, runner: EngineRunner, requests: Sequence[GenerationRequest]) -> None:
        self.requests = list(requests)
        self.prompt_tokens: list[int] = []
        self.closed = False
        self._runner = runner
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, TokenEvent] | Exception] = asyncio.Queue()
        self._accepted: asyncio.Future[None] = self._loop.create_future()

    async def __aiter__(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        """Each token as it is written.

        Raises:
            Unavailable: the engine failed, or the server's time to stop was over.
        """
        going_on = len(self.requests)
        while going_on:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            going_on -= event[1].finish_reason is not None
            yield event

    def close(self) -> None:
        """Give up what is not finished; nothing happens to what is."""
        if not self.closed:
            self.closed = True
            self._runner._order("drop", self)

    # What follows runs on the event loop, called from the engine's thread.

    def _accept(self, prompt_tokens: list[int]) -> None:
        self.prompt_tokens = prompt_tokens
        if not self._accepted.done():
            self._accepted.set_result(None)

    def _refuse(self, error: Exception) -> None:
        if not self._accepted.done():
            self._accepted.set_exception(error)
        else:
            self._events.put_nowait(error)


@dataclass(eq=False)
class _Text:
    """One text in the engine."""

    owner: Texts
    index: int
    asked: float = field(default_factory=time.monotonic)
    last: float | None = None


class EngineRunner:
    """Runs an engine on a thread of its own.

    Args:
        capacity: texts taken at one time, running or waiting.
    """

    def __init__(self, engine: EngineLike, capacity: int, observer: Observer | None = None) -> None:
        self._engine, self._capacity, self._observer = engine, capacity, observer
        self._wake = threading.Condition()
        self._inbox: list[tuple[Literal["add", "drop"], Texts]] = []
        self._taken = 0  # texts accepted and not ended; under the lock of `_wake`
        self._stopping = False
        self._failure: str | None = None
        self._texts: dict[int, _Text] = {}  # by the engine's request id; the thread's own
        self._counts = (0, 0)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, seconds: float = 10.0) -> None:
        """End the thread after the step it is in; what is still running is told `Unavailable`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        """Whether the engine can write."""
        return self._failure is None and self._thread.is_alive()

    @property
    def num_taken(self) -> int:
        """Texts accepted and not ended."""
        return self._taken

    @property
    def num_running(self) -> int:
        """Texts that the last step wrote a token of."""
        return self._counts[0]

    @property
    def num_waiting(self) -> int:
        """Texts taken and not yet running."""
        return max(self._taken - self._counts[0], 0)

    async def submit(self, requests: Sequence[GenerationRequest]) -> Texts:
        """Have texts written, all of them or none.

        Raises:
            QueueFull: they do not fit beside those already taken.
            RoutingError: the engine refuses one of them.
            Unavailable: the engine failed, or the server is stopping.
        """
        texts = Texts(self, requests)
        with self._wake:
            if self._failure is not None or self._stopping:
                raise Unavailable(self._failure or "the server is stopping")
            if self._taken + len(requests) > self._capacity:
                raise QueueFull
            self._taken += len(requests)
            self._inbox.append(("add", texts))
            self._wake.notify()
        try:
            await texts._accepted
        except BaseException:
            texts.close()
            raise
        return texts

    def _order(self, what: Literal["add", "drop"], texts: Texts) -> None:
        with self._wake:
            self._inbox.append((what, texts))
            self._wake.notify()

    # Everything below runs on the engine's thread.

    def _run(self) -> None:
        failure = "the server is stopping"
        try:
            while self._turn():
                pass
        except BaseException as error:
            traceback.print_exc()
            failure = f"the engine failed ({type(error).__name__})"
        with self._wake:
            self._failure = failure
            waiting = [texts for what, texts in self._inbox if what == "add"]
            self._inbox = []
        # Nobody waits for ever: what was running and what had come is told so.
        running = {id(text.owner): text.owner for text in self._texts.values()}
        self._end(len(self._texts) + sum(len(texts.requests) for texts in waiting), "failed")
        self._texts.clear()
        self._counts = (0, 0)
        for texts in [*running.values(), *waiting]:
            self._tell(texts, lambda texts=texts: texts._refuse(Unavailable(failure)))  # type: ignore[misc]

    def _turn(self) -> bool:
        """Take what has come and write one token of each text; False when it is time to end."""
        with self._wake:
            while not (self._inbox or self._stopping or self._engine.has_work):
                self._wake.wait()
            if self._stopping:
                return False
            orders, self._inbox = self._inbox, []
        for what, texts in orders:
            if what == "add":
                self._add(texts)
            else:
                self._drop(texts)
        if self._engine.has_work:
            self._hand_out(self._engine.step())
        self._counts = (self._engine.num_running, self._engine.num_waiting)
        return True

    def _add(self, texts: Texts) -> None:
        added: list[int] = []
        try:
            if not texts.closed:
                for request in texts.requests:
                    added.append(self._engine.add(request))
        except Exception as error:
            for number in added:
                self._engine.cancel(number)
            self._end(len(texts.requests), "refused")
            refusal = error
            if not isinstance(error, MegaxelmError):
                # The engine took nothing in, so the others go on; this one is told of a defect.
                traceback.print_exc()
                refusal = Unavailable(f"the engine failed on this request ({type(error).__name__})")
            self._tell(texts, lambda: texts._refuse(refusal))
            return
        if texts.closed:
            self._end(len(texts.requests), "cancelled")
            return
        counts = [self._engine.prompt_tokens(number) for number in added]
        for index, number in enumerate(added):
            self._texts[number] = _Text(texts, index)
            if self._observer:
                self._observer.text_started(counts[index])
        self._tell(texts, lambda: texts._accept(counts))

    def _drop(self, texts: Texts) -> None:
        for number in [number for number, text in self._texts.items() if text.owner is texts]:
            self._engine.cancel(number)
            del self._texts[number]
            self._end(1, "cancelled")

    def _hand_out(self, events: Sequence[TokenEvent]) -> None:
        now = time.monotonic()
        found: list[tuple[Texts, int, TokenEvent]] = []
        for event in events:
            text = self._texts.get(event.request_id)
            if text is None:
                continue
            if self._observer:
                if text.last is None:
                    self._observer.first_token(now - text.asked, event.weights)
                else:
                    self._observer.next_token(now - text.last, event.weights)
            text.last = now
            found.append((text.owner, text.index, event))
            if event.finish_reason is not None:
                del self._texts[event.request_id]
                self._end(1, event.finish_reason)

        def put() -> None:
            for texts, index, event in found:
                texts._events.put_nowait((index, event))

        if found:
            self._tell(found[0][0], put)

    def _end(self, count: int, reason: str) -> None:
        with self._wake:
            self._taken -= count
        if self._observer:
            for _ in range(count):
                self._observer.text_ended(reason)

    @staticmethod
    def _tell(texts: Texts, call: Callable[[], None]) -> None:
        try:
            texts._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the event loop has ended, and with it whoever would have listened
            return
