"""What a client may ask: OpenAI's completions, and what of them this server does not do.

A field that would change the answer and is not supported is refused; those that only describe the caller are ignored.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from megaxelm.ensemble.sampling import MOST_LOGPROBS, GenerationRequest, SamplingParams
from megaxelm.errors import RoutingError
from megaxelm.serve.errors import ApiError
from megaxelm.serve.limits import Limits


def _prompt_form(value: Any) -> Any:
    """One sentence instead of an error for each form."""
    if isinstance(value, str) or (isinstance(value, list) and value and _homogeneous(value)):
        return value
    raise ValueError("give a string, a list of strings, a list of token ids, or a list of such lists; at least one text")


def _homogeneous(values: list[Any]) -> bool:
    if all(isinstance(value, str) for value in values):
        return True
    lists = values if all(isinstance(value, list) for value in values) else [values]
    return all(type(token) is int for tokens in lists for token in tokens)


Prompt = Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_prompt_form)]


class StreamOptions(BaseModel):
    """Of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    """The last chunk counts the tokens."""
    include_obfuscation: bool | None = None
    """Ignored: chunks are never padded."""


class Sampling(BaseModel):
    """Fields that completions and chat have in common. None is the default everywhere, as in OpenAI's API."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Any = None
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # Of the caller, not of the text: ignored.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Extensions of this server.
    language: str | None = None
    """Of the prompts, for the language router."""
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, lt=1, allow_inf_nan=False)
    ignore_eos: bool | None = None
    weights: bool | None = None
    """Each choice has the mixture weights of every token."""


class CompletionRequest(Sampling):
    """Body of POST /v1/completions."""

    prompt: Prompt
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


class TokenizerLike(Protocol):
    """What is used of `megaxelm.corpus.tokenizer.Tokenizer`."""

    vocab_size: int
    eos_id: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class PromptText:
    """One prompt: its token ids without a start token, and its text."""

    ids: list[int]
    text: str


def refuse_unsupported(body: Sampling) -> None:
    """Raises ApiError for a field whose value would change the answer in a way that is not built."""
    if body.presence_penalty or body.frequency_penalty:
        name = "presence_penalty" if body.presence_penalty else "frequency_penalty"
        raise ApiError(400, f"{name}: not supported; leave it out or set it to 0", name, "unsupported_parameter")
    if body.logit_bias:
        raise ApiError(400, "logit_bias: not supported; leave it out", "logit_bias", "unsupported_parameter")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: only with stream = true", "stream_options", "invalid_value")
    if not isinstance(body, CompletionRequest):
        return
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(
            400, f"best_of = {body.best_of}: not supported but as n = {body.n or 1}; leave it out", "best_of", "unsupported_parameter"
        )
    if body.suffix:
        raise ApiError(400, "suffix: these models only write on from the left; leave it out", "suffix", "unsupported_parameter")
    if body.echo and body.logprobs is not None:
        raise ApiError(
            400,
            "echo with logprobs: the prompt's own log-probabilities are not served; leave one of the two out",
            "echo",
            "unsupported_parameter",
        )


def stop_strings(body: Sampling, limits: Limits) -> tuple[str, ...]:
    """Raises ApiError for too many, too long or empty ones."""
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stop) > limits.stop_strings:
        raise ApiError(400, f"stop: {len(stop)} strings, at most {limits.stop_strings}", "stop", "invalid_value")
    for text in stop:
        if not text or len(text) > limits.stop_characters or not _is_utf8(text):
            raise ApiError(400, f"stop: a string of 1 to {limits.stop_characters} characters in UTF-8 is wanted", "stop", "invalid_value")
    return stop


def read_prompts(prompt: str | list[str] | list[int] | list[list[int]], tokenizer: TokenizerLike) -> list[PromptText]:
    """The prompts of a request, tokenised. Takes time for long texts: not for the event loop.

    Raises:
        ApiError: a text that is not UTF-8, or an id that the vocabulary does not have.
    """
    if isinstance(prompt, str) or isinstance(prompt[0], str):
        texts: list[str] = [prompt] if isinstance(prompt, str) else prompt
        if not all(_is_utf8(text) for text in texts):
            raise ApiError(400, "prompt: not UTF-8 (half of a surrogate pair)", "prompt", "invalid_value")
        return [PromptText(list(ids), text) for ids, text in zip(tokenizer.encode(texts), texts, strict=True)]
    lists: list[list[int]] = [prompt] if isinstance(prompt[0], int) else prompt
    for token in (token for ids in lists for token in ids):
        if not 0 <= token < tokenizer.vocab_size:
            raise ApiError(
                400, f"prompt: token id {token} is not in 0..{tokenizer.vocab_size - 1}, the vocabulary", "prompt", "invalid_value"
            )
    return [PromptText(ids, tokenizer.decode(ids)) for ids in lists]


def generation_requests(
    body: Sampling, prompts: Sequence[PromptText], max_tokens: int, logprobs: int, limits: Limits
) -> list[GenerationRequest]:
    """One request of the engine for each choice: `n` for each prompt, in the order of the answer.

    Choices of equal prompts have the same seed and different numbers of the draw, so a prompt gets the same answer alone and in a list.

    Raises:
        ApiError: too long, or a value that sampling refuses.
    """
    for prompt in prompts:
        if limits.tokens is not None and len(prompt.ids) + max_tokens > limits.tokens:
            raise ApiError(
                400,
                f"prompt of {len(prompt.ids)} tokens and max_tokens = {max_tokens}: more than {limits.tokens} together; shorten the prompt "
                "or lower max_tokens",
                "max_tokens",
                "context_length_exceeded",
            )
    seed = secrets.randbits(63) if body.seed is None else body.seed
    stop = stop_strings(body, limits)
    drawn: Counter[tuple[int, ...]] = Counter()
    draws: list[tuple[PromptText, int]] = []
    for prompt in prompts:
        for _ in range(body.n or 1):
            draws.append((prompt, drawn[tuple(prompt.ids)]))
            drawn[tuple(prompt.ids)] += 1
    try:
        return [
            GenerationRequest(
                prompt.ids,
                body.language,
                SamplingParams(
                    max_new_tokens=max_tokens,
                    temperature=1.0 if body.temperature is None else body.temperature,
                    top_k=body.top_k or 0,
                    top_p=1.0 if body.top_p is None else body.top_p,
                    min_p=body.min_p or 0.0,
                    seed=seed,
                    stop=stop,
                    stop_at_eos=not body.ignore_eos,
                    logprobs=logprobs,
                ),
                sequence,
            )
            for prompt, sequence in draws
        ]
    except RoutingError as error:
        raise ApiError(400, str(error), code="invalid_value") from None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
