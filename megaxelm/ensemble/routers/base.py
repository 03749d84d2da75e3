"""What a router is: the contract, and what every router does with the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megaxelm.ensemble.routers.rows import join_rows, select_rows
from megaxelm.ensemble.weights import FALLBACK_BOUND, Weights, top_m

NO_TOKEN = -1
"""In `update`: this row of the batch has no token this time."""

ROUTER_NAMES = ("language", "tfidf", "posterior", "uniform", "fixed")


@dataclass(frozen=True)
class Request:
    """One text to route: the token ids of its prompt (without start token) and, where known, its language."""

    prompt_ids: Sequence[int] = ()
    language: str | None = None


class Space(Protocol):
    """What the tfidf router needs of a vector space (`megaxelm.cluster.space.TfidfSpace`). A state has `copy`, or is a tensor."""

    def start(self) -> Any: ...

    def push(self, state: Any, token_ids: Sequence[int]) -> None: ...

    def vector(self, state: Any) -> Any: ...

    def prefixes(self, state: Any, token_ids: Sequence[int]) -> Any: ...


class Router(Protocol):
    """A rule that turns the text so far into weights of experts. All weights are fp64 on the CPU.

    A state belongs to one batch. Rows come and go by `join` and `select`, which leave the states they are given as they were.
    """

    name: str
    num_experts: int
    """Length of a weight vector: the trained experts, then the fallback expert where there is one."""
    needs_expert_logprobs: bool
    """Whether `update` must be given every expert's log-probability of the token."""
    reads_all: bool
    """Whether it is to be told of every expert with weight, and not only of those that `keep` chose."""
    constant: bool
    """Whether the weights of a text never change once it has started."""
    constant_from: int | None
    """Tokens of a text, prompt counted, after which its weights never change again; None: they always may."""
    fallback: int | None
    """Index of the fallback expert, always the last; None: there is none."""

    def start(self, batch: Sequence[Request]) -> Any:
        """State of a batch whose prompts have been read (by a router that needs no experts)."""

    def weights(self, state: Any) -> Tensor:
        """Log weights [batch, experts] fp64 for the next token."""

    def update(self, state: Any, tokens: Tensor, expert_logprobs: Tensor | None = None) -> None:
        """Move `state` on by `tokens` [batch] (`NO_TOKEN` skips a row); `expert_logprobs` [batch, experts], -inf: has not run."""

    def along(self, request: Request, tokens: Sequence[int], expert_logprobs: Tensor | None = None) -> Tensor:
        """Log weights [tokens, experts] before each of `tokens`; the same as stepping. `expert_logprobs` [experts, tokens]."""

    def join(self, first: Any, second: Any) -> Any:
        """State of the rows of both, those of `first` in front."""

    def select(self, state: Any, rows: Sequence[int]) -> Any:
        """State of the given rows in the given order; a row may be named more than once."""

    def copy(self, state: Any) -> Any:
        """A state of its own with the same texts, to go on with and throw away."""

    def settled(self, state: Any) -> Tensor:
        """Whether the weights of each row will never change again, [batch] bool. Such a row needs no `update`."""

    def detected(self, state: Any) -> list[str | None]:
        """The language that was found for each row; None where it was given, or not looked for."""

    def keep(self, log_w: Tensor, m: int | None) -> Weights:
        """The experts that are run for log weights [..., experts]: the m heaviest trained ones, and the fallback where it is heard."""


class BaseRouter:
    """What routers share: `along` by stepping, rows of states that are tensors [batch, ...] or lists, and the choice of experts."""

    name: str
    num_experts: int
    needs_expert_logprobs = False
    reads_all = False
    constant = False
    constant_from: int | None = None
    fallback: int | None = None
    fallback_bound = FALLBACK_BOUND
    """A fallback expert of at most this weight is not run."""

    def start(self, batch: Sequence[Request]) -> Any:
        raise NotImplementedError

    def weights(self, state: Any) -> Tensor:
        raise NotImplementedError

    def update(self, state: Any, tokens: Tensor, expert_logprobs: Tensor | None = None) -> None:
        raise NotImplementedError

    def along(self, request: Request, tokens: Sequence[int], expert_logprobs: Tensor | None = None) -> Tensor:
        state, rows = self.start([request]), []
        for position, token in enumerate(tokens):
            rows.append(self.weights(state)[0])
            given = None if expert_logprobs is None else expert_logprobs[:, position].unsqueeze(0)
            self.update(state, torch.tensor([token]), given)
        return torch.stack(rows) if rows else torch.empty(0, self.num_experts, dtype=torch.float64)

    def join(self, first: Any, second: Any) -> Any:
        return join_rows(first, second)

    def select(self, state: Any, rows: Sequence[int]) -> Any:
        return select_rows(state, rows)

    def copy(self, state: Any) -> Any:
        return self.select(state, range(len(state)))

    def settled(self, state: Any) -> Tensor:
        return torch.full((len(state),), self.constant)

    def detected(self, state: Any) -> list[str | None]:
        return [None] * len(state)

    def keep(self, log_w: Tensor, m: int | None) -> Weights:
        return top_m(log_w, m, self.fallback, self.fallback_bound)


class ConstantRouter(BaseRouter):
    """Weights that depend on the request only: the state is the weights."""

    constant = True
    constant_from: int | None = 0

    def weights(self, state: Any) -> Tensor:
        return state

    def update(self, state: Any, tokens: Tensor, expert_logprobs: Tensor | None = None) -> None:
        pass

    def along(self, request: Request, tokens: Sequence[int], expert_logprobs: Tensor | None = None) -> Tensor:
        return self.weights(self.start([request])).expand(len(tokens), -1)
