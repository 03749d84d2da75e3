"""Chat completions, for a tokenizer that has a chat template; a model without one is not asked to chat."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from megaxelm.ensemble.sampling import MOST_LOGPROBS, TokenEvent
from megaxelm.files import read_json
from megaxelm.serve.answers import LOWEST_LOGPROB, Choice
from megaxelm.serve.errors import ApiError
from megaxelm.serve.protocol import Sampling


class TemplateTokenizer(Protocol):
    """What is used of `megaxelm.corpus.tokenizer.Tokenizer`."""

    folder: Path

    @property
    def start_id(self) -> int: ...

    @property
    def hf(self) -> Any: ...


Template = Callable[[list[dict[str, str]]], list[int]]
"""Turns messages into token ids without a start token; raises ApiError for messages that the template refuses."""


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


def _only_text(value: Any) -> Any:
    """One sentence instead of an error for each form."""
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value)):
        return value
    raise ValueError('give a string, or parts {"type": "text", "text": ...}; these models read nothing else')


class Message(BaseModel):
    """One turn. The roles are few, since a template may build its control tokens from them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[TextPart], BeforeValidator(_only_text)]
    name: str | None = None
    """Ignored."""

    def plain(self) -> dict[str, str]:
        """As templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        """So many alternatives of each token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class ChatChoice(Choice):
    """One choice of a chat's answer."""

    def part(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """The whole choice."""
        part = super().part(events)
        return {"message": {"role": "assistant", "content": part.pop("text")}} | part

    def chunk(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """What `events` add to the choice."""
        role = {"role": "assistant"} if self.fresh else {}
        part = super().part(events)
        return {"delta": role | {"content": part.pop("text")}} | part

    def _logprobs_of(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self._texts[token]
            return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(text.encode())}

        return {
            "content": [
                entry(event.token_id, event.logprob) | {"top_logprobs": [entry(*pair) for pair in event.top_logprobs]} for event in events
            ]
        }


def load_template(tokenizer: TemplateTokenizer) -> Template | None:
    """The chat template of a tokenizer's folder, or None."""
    folder = tokenizer.folder
    if not (folder / "chat_template.jinja").exists() and not read_json(folder / "tokenizer_config.json").get("chat_template"):
        return None
    hf, lock = tokenizer.hf, threading.Lock()

    def render(messages: list[dict[str, str]]) -> list[int]:
        from jinja2 import TemplateError

        try:
            # Tokenizers of Hugging Face may not be used by two threads at once. Control tokens that a text spells stay text.
            with lock:
                ids = hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True)
        except (TemplateError, TypeError, ValueError) as error:
            raise ApiError(400, f"messages: the chat template of this model refuses them ({error})", "messages", "invalid_value") from None
        found = [int(token) for token in ids]
        # The engine puts the start token in front of every text.
        return found[1:] if found[:1] == [tokenizer.start_id] else found

    return render
