"""How often weights are made anew: for every token, for every chunk of r tokens, or until r tokens have been read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megaxelm.ensemble.routers.base import NO_TOKEN, BaseRouter, Request, Router
from megaxelm.ensemble.weights import Weights
from megaxelm.errors import RoutingError

REFRESH = ("token", "chunk", "frozen")


@dataclass
class RefreshState:
    """The state of the router within, and the weights that hold at present."""

    inner: Any
    held: Tensor  # [batch, experts] log weights; not those of the text while `due`
    due: Tensor  # [batch] bool: the weights are to be made of the text as it is now
    length: Tensor  # [batch] int64, tokens of the text that the router has been told of
    prompt: Tensor  # [batch] int64, tokens of the prompt

    def __len__(self) -> int:
        return len(self.length)


class RefreshRouter(BaseRouter):
    """Another router's weights, made anew less often.

    `chunk`: after the prompt, and then every r tokens; the weights of a chunk are those at its beginning. `frozen`: for every token until
    the text, prompt counted, has r tokens; then they stay, and experts without weight need not run any more (`constant_from`). In
    either case a token costs no more than the router within does.

    Raises:
        RoutingError: `refresh` is not chunk or frozen, or r is below 1.
    """

    def __init__(self, inner: Router, refresh: str, refresh_tokens: int) -> None:
        if refresh not in REFRESH[1:]:
            raise RoutingError(f"ensemble.refresh = {refresh!r}: choose one of {', '.join(REFRESH)}")
        if not (isinstance(refresh_tokens, int) and refresh_tokens >= 1):
            raise RoutingError(f"ensemble.refresh_tokens = {refresh_tokens}: choose 1 or more")
        self.inner, self.refresh, self.refresh_tokens = inner, refresh, refresh_tokens
        self.name, self.num_experts = inner.name, inner.num_experts
        self.needs_expert_logprobs, self.reads_all, self.fallback = inner.needs_expert_logprobs, inner.reads_all, inner.fallback
        self.constant_from = refresh_tokens if refresh == "frozen" else None

    def _is_due(self, length: Tensor, prompt: Tensor) -> Tensor:
        """Whether the weights after `length` tokens are made of exactly these, [...] bool."""
        if self.refresh == "frozen":
            return length <= self.refresh_tokens
        return (length <= prompt) | ((length - prompt) % self.refresh_tokens == 0)

    def start(self, batch: Sequence[Request]) -> RefreshState:
        prompt = torch.tensor([len(request.prompt_ids) for request in batch], dtype=torch.int64)
        if self.refresh == "frozen":
            batch = [replace(request, prompt_ids=request.prompt_ids[: self.refresh_tokens]) for request in batch]
        return RefreshState(
            self.inner.start(batch),
            torch.zeros(len(batch), self.num_experts, dtype=torch.float64),
            torch.ones(len(batch), dtype=torch.bool),
            # A router that learns from the experts is told of the prompt token by token.
            torch.zeros_like(prompt) if self.needs_expert_logprobs else prompt.clone(),
            prompt,
        )

    def weights(self, state: RefreshState) -> Tensor:
        self._make(state, state.due)
        return state.held.clone()

    def _make(self, state: RefreshState, rows: Tensor) -> None:
        if bool(rows.any()):
            state.held = torch.where(rows.unsqueeze(-1), self.inner.weights(state.inner), state.held)
            state.due = state.due & ~rows

    def update(self, state: RefreshState, tokens: Tensor, expert_logprobs: Tensor | None = None) -> None:
        moves = tokens.cpu() != NO_TOKEN
        after = state.length + moves
        due = self._is_due(after, state.prompt)
        # Weights that nobody asked for yet, and that the next tokens go on with, are made before the text moves on.
        self._make(state, state.due & moves & ~due)
        told = moves & ~self.settled(state)
        if bool(told.any()):
            self.inner.update(state.inner, torch.where(told.to(tokens.device), tokens, NO_TOKEN), expert_logprobs)
        state.length, state.due = after, state.due | (moves & due)

    def along(self, request: Request, tokens: Sequence[int], expert_logprobs: Tensor | None = None) -> Tensor:
        prompt = len(request.prompt_ids)
        told_before = 0 if self.needs_expert_logprobs else prompt
        r = self.refresh_tokens
        if self.refresh == "frozen" and told_before > r:
            return self.weights(self.start([request])).expand(len(tokens), -1)
        each = self.inner.along(request, tokens, expert_logprobs)
        length = told_before + torch.arange(len(tokens))
        since = (length - prompt).clamp_min(0) % r
        made = length.clamp_max(r) if self.refresh == "frozen" else length - since
        return each[made - told_before]

    def join(self, first: RefreshState, second: RefreshState) -> RefreshState:
        return RefreshState(
            self.inner.join(first.inner, second.inner),
            *(super(RefreshRouter, self).join(*pair) for pair in zip(_tensors(first), _tensors(second), strict=True)),
        )

    def select(self, state: RefreshState, rows: Sequence[int]) -> RefreshState:
        return RefreshState(
            self.inner.select(state.inner, rows), *(super(RefreshRouter, self).select(part, rows) for part in _tensors(state))
        )

    def settled(self, state: RefreshState) -> Tensor:
        return state.length >= self.refresh_tokens if self.refresh == "frozen" else self.inner.settled(state.inner)

    def detected(self, state: RefreshState) -> list[str | None]:
        return self.inner.detected(state.inner)

    def keep(self, log_w: Tensor, m: int | None) -> Weights:
        return self.inner.keep(log_w, m)


def _tensors(state: RefreshState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return state.held, state.due, state.length, state.prompt
