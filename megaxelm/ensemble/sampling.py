"""What a caller asks of generation, and what it is told, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megaxelm.errors import RoutingError

MOST_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when a text ends.

    Raises:
        RoutingError: a value out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy; else log-probabilities are divided by it."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this probability."""
    min_p: float = 0.0
    """Draw only tokens that are at least this times as likely as the likeliest."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    stop_at_eos: bool = True
    logprobs: int = 0
    """So many of the likeliest tokens are reported beside the one chosen."""

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "choose at least 1"),
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature), "choose 0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "choose at least 1, or 0 for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "choose above 0 up to 1"),
            ("min_p", 0 <= self.min_p < 1, "choose 0 up to below 1"),
            ("seed", -(1 << 63) <= self.seed < 1 << 63, "choose a number of 64 bits"),
            ("stop", all(self.stop), "an empty string would end every text"),
            ("logprobs", 0 <= self.logprobs <= MOST_LOGPROBS, f"choose 0 to {MOST_LOGPROBS}"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise RoutingError(f"{name} = {getattr(self, name)!r}: {rule}")


@dataclass(frozen=True)
class GenerationRequest:
    """One text to write on from. `prompt`: text, or token ids without a start token."""

    prompt: str | Sequence[int]
    language: str | None = None
    sampling: SamplingParams = SamplingParams()
    sequence: int = 0
    """Number of the draw: texts of one seed and prompt differ by it. Nothing else of a batch decides about a sample."""


@dataclass(frozen=True)
class TokenEvent:
    """One token that was written after a prompt."""

    request_id: int
    token_id: int
    text: str
    """What is new of the text; empty while a character is unfinished or while a stop string may have begun."""
    logprob: float
    """Under the mixture (nats), before temperature and filters."""
    weights: list[float]
    """Of each expert in the ensemble's order, sums to 1; 0 where it did not run."""
    top_logprobs: list[tuple[int, float]]
    """(token id, log-probability under the mixture) of the likeliest, best first; as many as `SamplingParams.logprobs`."""
    finish_reason: str | None = None
    """None while the text goes on; `stop` (EOS or a stop string), or `length`."""
    detected_language: str | None = None
    """What the language router read off a prompt that came without."""
