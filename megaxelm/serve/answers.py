"""Tokens of the engine as choices of OpenAI's completions, whole or in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megaxelm.ensemble.sampling import TokenEvent
from megaxelm.serve.protocol import TokenizerLike

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class TokenTexts:
    """Texts of single tokens, as `logprobs` shows them."""

    def __init__(self, tokenizer: TokenizerLike) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        """Text of a token, with its space in front; `token_id:<id>` where it has none of its own: special tokens, parts of a character."""
        if token not in self._known:
            # Some tokenizers drop the space in front of a text; the second of two equal tokens keeps it.
            once, twice = self._tokenizer.decode([token]), self._tokenizer.decode([token, token])
            text = twice[len(once) :]
            self._known[token] = text if text and "\ufffd" not in text else f"token_id:{token}"
        return self._known[token]


class Choice:
    """One choice of an answer, made from its tokens all at once or one by one.

    Args:
        before: the prompt's text, if it is echoed.
        logprobs: None for none, else so many of the likeliest tokens beside the chosen one.
        experts: names of the mixture weights, if they are asked for.
    """

    def __init__(self, index: int, texts: TokenTexts, before: str, logprobs: int | None, experts: Sequence[str] | None) -> None:
        self._index, self._texts, self._logprobs, self._experts = index, texts, logprobs, experts
        self._before = before
        self._offset = len(before)  # characters of the choice's text so far
        self.fresh = True
        """Whether nothing of it has been shown."""

    def part(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """The choice as far as `events` bring it: all of it, if they are all."""
        written = "".join(event.text for event in events)
        part: dict[str, Any] = {
            "index": self._index,
            "text": self._before + written,
            "logprobs": self._logprobs_of(events) if self._logprobs is not None else None,
            "finish_reason": events[-1].finish_reason if events else None,
        }
        if self._experts is not None:
            part["weights"] = {
                "experts": list(self._experts),
                "tokens": [[round(weight, 6) for weight in event.weights] for event in events],
            }
        self._before, self.fresh = "", False
        return part

    def chunk(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """What `events` add to the choice, for a stream."""
        return self.part(events)

    def _logprobs_of(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        offsets = []
        for event in events:
            offsets.append(self._offset)
            self._offset += len(event.text)
        return {
            "tokens": [self._texts[event.token_id] for event in events],
            "token_logprobs": [max(event.logprob, LOWEST_LOGPROB) for event in events],
            "top_logprobs": [self._top(event) for event in events] if self._logprobs else None,
            "text_offset": offsets,
        }

    def _top(self, event: TokenEvent) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, logprob in event.top_logprobs:
            name = self._texts[token]
            top[name if name not in top else f"token_id:{token}"] = max(logprob, LOWEST_LOGPROB)
        return top


def usage(prompt_tokens: Sequence[int], completion_tokens: int) -> dict[str, int]:
    """Counts of a request; `prompt_tokens` of each of its prompts."""
    total = sum(prompt_tokens)
    return {"prompt_tokens": total, "completion_tokens": completion_tokens, "total_tokens": total + completion_tokens}
