"""A text while it is written on: its tokens, what the experts keep of it, and how it becomes text and ends."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megaxelm.ensemble.sampling import GenerationRequest, SamplingParams
from megaxelm.ensemble.streaming import StopText, TextStream

if TYPE_CHECKING:
    from megaxelm.model.stacked_cache import CacheRow


@dataclass
class RunningText:
    """`history` is the start token, the prompt and what was written; `rows` what each expert has read of it."""

    request_id: int
    prompt_ids: list[int]
    language: str | None
    sampling: SamplingParams
    key: int
    history: list[int]
    stream: TextStream
    stopper: StopText
    rows: dict[int, CacheRow] = field(default_factory=dict)
    draft_row: CacheRow | None = None
    """What the expert that drafts has read, drafts included."""
    num_written: int = 0
    detected: str | None = None
    """The language that the router found."""

    @property
    def bound(self) -> int:
        """Tokens that experts read of it at most: the last one that is written is read by none."""
        return len(self.prompt_ids) + self.sampling.max_new_tokens

    def unread(self, expert: int) -> list[int]:
        """The tokens that an expert with a row has not read yet."""
        return self.history[self.rows[expert].length :]

    def take(self, token: int, eos_id: int | None) -> tuple[str, str | None]:
        """Put a token behind the text: what is new to show, and why the text ends (`stop`, `length`) or None."""
        self.history.append(token)
        self.num_written += 1
        if self.sampling.stop_at_eos and token == eos_id:
            return self._rest(), "stop"
        text = self.stopper.push(self.stream.push([token]))
        if self.stopper.stopped:
            return text, "stop"
        if self.num_written == self.sampling.max_new_tokens:
            text += self._rest()
            return text, "stop" if self.stopper.stopped else "length"
        return text, None

    def _rest(self) -> str:
        text = self.stopper.push(self.stream.flush())
        return text if self.stopper.stopped else text + self.stopper.flush()


def running_text(
    request_id: int, request: GenerationRequest, prompt_ids: Sequence[int], start_id: int, decode: Callable[[list[int]], str]
) -> RunningText:
    """A text before its first token is written."""
    ids = list(prompt_ids)
    return RunningText(
        request_id,
        ids,
        request.language,
        request.sampling,
        draw_key(request.sampling.seed, request.sequence, ids),
        [start_id, *ids],
        TextStream(decode, ids),
        StopText(request.sampling.stop),
    )


def draw_key(seed: int, sequence: int, prompt_ids: Sequence[int]) -> int:
    """What the draws of a text follow from, besides the place of the token: a hash of 64 bits of seed, number of the draw and prompt."""
    text = f"{seed}|{sequence}|{','.join(map(str, prompt_ids))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
