"""Many texts through one engine: requests from JSONL, and what was written after each, in their order.

A line is `{"prompt": ...}` with, where wished, `language`, `id` (given back as it is) and any field of `SamplingParams`.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from megaxelm.ensemble.generation import GenerationResult
from megaxelm.ensemble.sampling import GenerationRequest, SamplingParams, TokenEvent
from megaxelm.errors import MegaxelmError, RoutingError


class Writer(Protocol):
    """What is used of `megaxelm.ensemble.engine.Engine`."""

    @property
    def has_work(self) -> bool: ...

    def add(self, request: GenerationRequest) -> int: ...

    def step(self) -> list[TokenEvent]: ...


class _Line(BaseModel):
    """One line of a batch; what is not given is taken from the command line."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str | list[int]
    id: Any = None
    language: str | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_at_eos: bool | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Item:
    """One text of a batch. `where`: file and line, for errors; `given`: what the answer repeats of the line."""

    request: GenerationRequest
    where: str
    given: dict[str, Any]


def read_batch(lines: Iterable[bytes], name: str, language: str | None, sampling: SamplingParams) -> list[Item]:
    """The requests of a JSONL file; empty lines are passed over.

    Args:
        name: of the file, for errors. language, sampling: for lines that do not say.

    Raises:
        RoutingError: a line that cannot be read, or a field of it that is wrong; named with the number of the line.
    """
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            value = _Line.model_validate(orjson.loads(line))
            fields = {key: getattr(value, key) for key in value.model_fields_set if getattr(value, key) is not None}
            given: dict[str, Any] = {key: fields.pop(key) for key in ("id", "prompt") if key in fields}
            spoken = fields.pop("language", language)
            if "stop" in fields:
                fields["stop"] = (fields["stop"],) if isinstance(fields["stop"], str) else tuple(fields["stop"])
            request = GenerationRequest(given["prompt"], spoken, replace(sampling, **fields))
        except orjson.JSONDecodeError as error:
            raise RoutingError(f'{where}: not JSON in UTF-8 ({error}); a line is an object such as {{"prompt": "..."}}') from None
        except ValidationError as error:
            raise RoutingError(f"{where}: {_first_of(error)}") from None
        except RoutingError as error:
            raise RoutingError(f"{where}: {error}") from None
        items.append(Item(request, where, given))
    if not items:
        raise RoutingError(f'{name}: no line in it; a line is an object such as {{"prompt": "..."}}')
    return items


def numbered(items: Sequence[Item]) -> list[Item]:
    """The same texts, each of several with an equal prompt with a draw of its own."""
    seen: Counter[Any] = Counter()
    found = []
    for item in items:
        prompt = item.request.prompt
        key = prompt if isinstance(prompt, str) else tuple(prompt)
        found.append(replace(item, request=replace(item.request, sequence=seen[key])))
        seen[key] += 1
    return found


def add_all(engine: Writer, items: Sequence[Item]) -> dict[int, int]:
    """Give all texts to an engine; the number of each in `items` by the engine's number.

    Raises:
        RoutingError: the engine refuses a text, named with its line; nothing has been written then.
    """
    number_of: dict[int, int] = {}
    for number, item in enumerate(items):
        try:
            number_of[engine.add(item.request)] = number
        except MegaxelmError as error:
            raise RoutingError(f"{item.where}: {error}" if item.where else str(error)) from None
    return number_of


def write_all(
    engine: Writer, number_of: Mapping[int, int], experts: Sequence[str], on_token: Callable[[int, TokenEvent], None] | None = None
) -> Iterator[tuple[int, GenerationResult]]:
    """What is written after each text of `add_all`, in their order; each comes as soon as it and all before it are finished.

    Args:
        on_token: called with (number of the text, token) as they come.
    """
    results = {number: GenerationResult(list(experts)) for number in number_of.values()}
    turn = 0
    while engine.has_work:
        for event in engine.step():
            number = number_of[event.request_id]
            result = results[number]
            result.take(event)
            if on_token:
                on_token(number, event)
        while turn in results and results[turn].finish_reason is not None:
            yield turn, results.pop(turn)
            turn += 1


def record(item: Item, result: GenerationResult, with_weights: bool = False) -> dict[str, Any]:
    """One line of the answer. `logprob`: of the whole text under the mixture, in nats; `weights` [tokens][experts] on demand."""
    found = item.given | {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "num_tokens": len(result.token_ids),
        "logprob": sum(result.logprobs),
        "mean_weights": result.mean_weights(),
    }
    if with_weights:
        found |= {"token_ids": result.token_ids, "logprobs": result.logprobs, "experts": result.experts, "weights": result.weights}
    return found


@contextmanager
def whole_file(path: Path | None) -> Iterator[IO[bytes]]:
    """A file to write that appears under its name when it is whole; None is the standard output, which shows each line at once."""
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    aside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _first_of(error: ValidationError) -> str:
    first = error.errors()[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return f"{field}: no such field; there are {', '.join(_Line.model_fields)}"
    if field == "prompt" and first["type"] != "missing":
        return "prompt: give a string or a list of token ids"
    return f"{field}: {first['msg'][0].lower()}{first['msg'][1:]}" if field else "a JSON object is wanted"
