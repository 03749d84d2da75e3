"""An engine with a script in place of models, to test what stands around one."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megaxelm.ensemble.sampling import GenerationRequest, TokenEvent
from megaxelm.ensemble.streaming import TextStream
from megaxelm.errors import RoutingError

POSITIONS = 400


class ByteTokenizer:
    """Ids are UTF-8 bytes + 4; BOS 1, EOS 2."""

    start_id, eos_id, vocab_size = 1, 2, 260

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte + 4 for byte in text.encode()] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token - 4 for token in ids if token >= 4).decode("utf-8", "replace")


@dataclass
class _Job:
    request: GenerationRequest
    prompt: list[int]
    stream: TextStream
    written: int = 0


def scripted_ids(prompt: Sequence[int], seed: int, temperature: float, count: int, sequence: int = 0) -> list[int]:
    """What the scripted engine writes: letters that follow from prompt, seed and draw (unless greedy) and place; no EOS."""
    key = f"{list(prompt)}|{(seed, sequence) if temperature else 0}|"
    return [97 + 4 + hashlib.blake2b(f"{key}{place}".encode()).digest()[0] % 26 for place in range(count)]


class ScriptedEngine:
    """Behaves like the engine, with the texts of `scripted_ids`. A prompt `eos` ends after three letters."""

    def __init__(self, max_batch: int = 4, delay: float = 0.0) -> None:
        self.max_batch, self.delay = max_batch, delay
        self.tokenizer = ByteTokenizer()
        self.running: dict[int, _Job] = {}
        self.waiting: dict[int, _Job] = {}
        self.asked: list[GenerationRequest] = []
        self.cancelled: list[int] = []
        self.widest = 0
        self.steps = 0
        self.fail = False
        self.owner: int | None = None
        self.number = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    def _own(self) -> None:
        self.owner = self.owner or threading.get_ident()
        assert self.owner == threading.get_ident(), "two threads use the engine"

    def add(self, request: GenerationRequest) -> int:
        self._own()
        ids = list(request.prompt) if not isinstance(request.prompt, str) else self.tokenizer.encode([request.prompt])[0]
        if 1 + len(ids) + request.sampling.max_new_tokens - 1 > POSITIONS:
            raise RoutingError(f"prompt and max_new_tokens together make too many tokens, the experts have {POSITIONS} positions")
        if request.language not in (None, "xx"):
            raise RoutingError(f"router language: no expert for the language {request.language!r}")
        self.number += 1
        self.asked.append(request)
        self.waiting[self.number] = _Job(request, ids, TextStream(self.tokenizer.decode, ids))
        return self.number

    def prompt_tokens(self, request_id: int) -> int:
        return len({**self.running, **self.waiting}[request_id].prompt)

    def cancel(self, request_id: int) -> None:
        self._own()
        if self.running.pop(request_id, None) or self.waiting.pop(request_id, None):
            self.cancelled.append(request_id)

    def step(self) -> list[TokenEvent]:
        self._own()
        if self.fail:
            raise RuntimeError("planted")
        time.sleep(self.delay)
        while self.waiting and len(self.running) < self.max_batch:
            number = next(iter(self.waiting))
            self.running[number] = self.waiting.pop(number)
        self.widest = max(self.widest, len(self.running))
        self.steps += 1
        events = []
        for number, job in list(self.running.items()):
            sampling = job.request.sampling
            token = scripted_ids(job.prompt, sampling.seed, sampling.temperature, job.written + 1, job.request.sequence)[-1]
            reason = None
            if job.prompt == self.tokenizer.encode(["eos"])[0] and job.written == 3 and sampling.stop_at_eos:
                token, reason = self.tokenizer.eos_id, "stop"
            job.written += 1
            text = "" if reason else job.stream.push([token])
            if reason is None and job.written == sampling.max_new_tokens:
                reason, text = "length", text + job.stream.flush()
            top = [(token - rank, -0.5 - rank) for rank in range(sampling.logprobs)]
            events.append(TokenEvent(number, token, text, -0.5, [0.75, 0.25], top, reason))
            if reason:
                del self.running[number]
        return events


def scripted_text(prompt: str, seed: int = 0, temperature: float = 0.0, count: int = 16) -> str:
    """The text of `scripted_ids` after a prompt."""
    return ByteTokenizer().decode(scripted_ids(ByteTokenizer().encode([prompt])[0], seed, temperature, count))


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until something holds; an AssertionError when it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)
