"""Routers: which expert may speak, and how loud, given the text so far.

A router is asked before every token: `start(batch)` reads the prompts, `weights(state)` gives the log weights for the next token,
`update(state, tokens, expert_logprobs)` tells what the token was. Token t is so predicted with the weights of the text before it.
A router with `needs_expert_logprobs` learns from the experts' own predictions: the caller tells it of the prompt's tokens through
`update` too. All weights are fp64, normalised over the experts; -inf drops an expert.

Routers: `language`, `tfidf`, `posterior`, `uniform`, `fixed` (paper, section 3.3; the posterior is c-BTM's, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megaxelm.ensemble.streaming import TextSpace
from megaxelm.errors import RoutingError

NO_TOKEN = -1
"""In `update`: this row of the batch has no token this time."""

ROUTER_NAMES = ("language", "tfidf", "posterior", "uniform", "fixed")


@dataclass(frozen=True)
class Request:
    """One text to route: the token ids of its prompt (without start token) and, where known, its language."""

    prompt_ids: Sequence[int] = ()
    language: str | None = None


class Space(Protocol):
    """What the tfidf router needs of a vector space (`megaxelm.cluster.space.TfidfSpace`)."""

    def start(self) -> Any: ...

    def push(self, state: Any, token_ids: Sequence[int]) -> None: ...

    def vector(self, state: Any) -> Any: ...

    def prefixes(self, state: Any, token_ids: Sequence[int]) -> Any: ...


class Router(Protocol):
    """A rule that turns the text so far into weights of experts."""

    name: str
    num_experts: int
    needs_expert_logprobs: bool
    """Whether `update` must be given every expert's log-probability of the token."""
    constant: bool
    """Whether the weights of a text never change once it has started."""

    def start(self, batch: Sequence[Request]) -> Any:
        """State of a batch whose prompts have been read (by a router that needs no experts)."""

    def weights(self, state: Any) -> Tensor:
        """Log weights [batch, experts] fp64 for the next token."""

    def update(self, state: Any, tokens: Tensor, expert_logprobs: Tensor | None = None) -> None:
        """Move `state` on by `tokens` [batch] (`NO_TOKEN` skips a row); `expert_logprobs` [batch, experts], -inf: has not run."""

    def join(self, first: Any, second: Any) -> Any:
        """The state of the texts of both."""

    def select(self, state: Any, rows: Sequence[int]) -> Any:
        """The state of some of the texts."""

    def along(self, request: Request, tokens: Sequence[int], expert_logprobs: Tensor | None = None) -> Tensor:
        """Log weights [tokens, experts] before each of `tokens`; the same as stepping. `expert_logprobs` [experts, tokens]."""


class _Base:
    """`along` by stepping, for routers without a shorter way."""

    def join(self, first: Any, second: Any) -> Any:
        return first + second if isinstance(first, list) else torch.cat([first, second])

    def select(self, state: Any, rows: Sequence[int]) -> Any:
        return [state[row] for row in rows] if isinstance(state, list) else state[list(rows)]

    name: str
    num_experts: int
    needs_expert_logprobs = False
    constant = False

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


class _Constant(_Base):
    """Weights that depend on the request only: the state is the weights."""

    constant = True

    def weights(self, state: Tensor) -> Tensor:
        return state

    def update(self, state: Tensor, tokens: Tensor, expert_logprobs: Tensor | None = None) -> None:
        pass

    def along(self, request: Request, tokens: Sequence[int], expert_logprobs: Tensor | None = None) -> Tensor:
        return self.start([request]).expand(len(tokens), -1)


class UniformRouter(_Constant):
    """Every expert has the same weight."""

    name = "uniform"

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def start(self, batch: Sequence[Request]) -> Tensor:
        return torch.full((len(batch), self.num_experts), -math.log(self.num_experts), dtype=torch.float64)


class FixedRouter(_Constant):
    """Given weights by expert name; normalised; experts not named get none.

    Raises:
        RoutingError: unknown expert, a weight below zero or not finite, or no weight above zero.
    """

    name = "fixed"

    def __init__(self, experts: Sequence[str], weights: Mapping[str, float]) -> None:
        self.num_experts = len(experts)
        unknown = [name for name in weights if name not in experts]
        if unknown:
            raise RoutingError(f"ensemble.fixed_weights: no expert {', '.join(unknown)}; the experts are {', '.join(experts)}")
        bad = {name: value for name, value in weights.items() if not (math.isfinite(value) and value >= 0)}
        if bad or not any(weights.values()):
            shown = ", ".join(f"{name} = {value}" for name, value in bad.items()) or "no weight above zero"
            raise RoutingError(f"ensemble.fixed_weights: {shown}; weights are finite, not negative, and at least one is above zero")
        given = torch.tensor([float(weights.get(name, 0.0)) for name in experts], dtype=torch.float64)
        self.log_w = (given / given.sum()).log()

    def start(self, batch: Sequence[Request]) -> Tensor:
        return self.log_w.expand(len(batch), -1)


class LanguageRouter(_Constant):
    """All weight on the expert of the request's language.

    Args:
        experts: names in the ensemble's order.
        language_expert: language code -> expert name: the cluster that holds the language, or, where clusters are not sets of
            languages, the one with most of its training tokens.
    """

    name = "language"

    def __init__(self, experts: Sequence[str], language_expert: Mapping[str, str]) -> None:
        self.num_experts = len(experts)
        self.language_expert = dict(language_expert)
        self._index = {name: index for index, name in enumerate(experts)}
        unknown = sorted(set(self.language_expert.values()) - set(experts))
        if unknown:
            raise RoutingError(f"router.json: languages point to experts that are not in the ensemble: {', '.join(unknown)}")

    def start(self, batch: Sequence[Request]) -> Tensor:
        known = f"languages known here: {', '.join(sorted(self.language_expert)) or 'none'}"
        log_w = torch.full((len(batch), self.num_experts), -torch.inf, dtype=torch.float64)
        for row, request in enumerate(batch):
            if request.language is None:
                raise RoutingError(f"router language: a text has no language; give one, or take another router. {known}")
            if request.language not in self.language_expert:
                raise RoutingError(f"router language: no expert for the language {request.language!r}; {known}; or take another router")
            log_w[row, self._index[self.language_expert[request.language]]] = 0.0
        return log_w


class TfidfRouter(_Base):
    """w_e ~ exp(-d2_e^(power/2) / T), d2_e = squared distance of the text's vector to the centre of expert e (paper, section 3.3).

    Before the first known term the text has no vector and the weights are uniform.

    Args:
        centres: [experts, dimensions].
        distance_power: 2 is the paper's formula, 4 what its released code computes.
    """

    name = "tfidf"

    def __init__(self, space: Space, centres: Tensor, temperature: float, distance_power: int = 2) -> None:
        if not temperature > 0:
            raise RoutingError(f"ensemble.temperature = {temperature}: must be above 0")
        if distance_power not in (2, 4):
            raise RoutingError(f"ensemble.distance_power = {distance_power}: choose 2 (the paper) or 4 (its code)")
        self.space, self.centres = space, centres.to(torch.float64)
        self.temperature, self.distance_power = temperature, distance_power
        self.num_experts = centres.shape[0]

    def log_weights(self, squared_distance: Tensor) -> Tensor:
        """Log weights [..., experts] of squared distances [..., experts]."""
        energy = squared_distance.to(torch.float64) ** (self.distance_power // 2)
        # The smallest is taken off first, so that T -> 0 gives top-1 and not -inf everywhere.
        return (-(energy - energy.amin(-1, keepdim=True)) / self.temperature).log_softmax(-1)

    def of_vectors(self, vectors: Tensor) -> Tensor:
        """Log weights [..., experts] of text vectors [..., dimensions]; a zero vector gives uniform weights."""
        vectors = vectors.to(torch.float64)
        distance = (vectors.unsqueeze(-2) - self.centres).square().sum(-1)
        known = vectors.abs().amax(-1, keepdim=True) > 0
        return torch.where(known, self.log_weights(distance), -math.log(self.num_experts))

    def start(self, batch: Sequence[Request]) -> list[Any]:
        states = [self.space.start() for _ in batch]
        for state, request in zip(states, batch, strict=True):
            if request.prompt_ids:
                self.space.push(state, list(request.prompt_ids))
        return states

    def weights(self, state: list[Any]) -> Tensor:
        return self.of_vectors(torch.from_numpy(np.stack([self.space.vector(row) for row in state])))

    def update(self, state: list[Any], tokens: Tensor, expert_logprobs: Tensor | None = None) -> None:
        for row, token in zip(state, tokens.tolist(), strict=True):
            if token != NO_TOKEN:
                self.space.push(row, [token])

    def along(self, request: Request, tokens: Sequence[int], expert_logprobs: Tensor | None = None) -> Tensor:
        if not len(tokens):
            return torch.empty(0, self.num_experts, dtype=torch.float64)
        return self.of_vectors(torch.from_numpy(self.space.prefixes(self.start([request])[0], tokens)))


class PosteriorRouter(_Base):
    """w_e(t) ~ prior_e * prod_{s<t} p_e(x_s): experts that predicted the text so far well are believed.

    With `decay` g the log-probability of a token counts g^age: 1 is the cumulative posterior, 0 only looks at the last token.
    An expert that does not run (-inf) is dropped for good.
    """

    name = "posterior"
    needs_expert_logprobs = True

    def __init__(self, num_experts: int, prior: Sequence[float] | None = None, decay: float = 1.0) -> None:
        self.num_experts = num_experts
        given = torch.ones(num_experts, dtype=torch.float64) if prior is None else torch.tensor(prior, dtype=torch.float64)
        if given.shape != (num_experts,) or not bool((given >= 0).all()) or not 0 < float(given.sum()) < math.inf:
            raise RoutingError(f"posterior prior = {prior}: needs {num_experts} weights, none negative, at least one above zero")
        if not 0 <= decay <= 1:
            raise RoutingError(f"posterior decay = {decay}: choose 0 (last token only) to 1 (the whole text)")
        self.log_prior, self.decay = (given / given.sum()).log(), decay

    def start(self, batch: Sequence[Request]) -> Tensor:
        return torch.zeros(len(batch), self.num_experts, dtype=torch.float64)

    def weights(self, state: Tensor) -> Tensor:
        return (self.log_prior + state).log_softmax(-1)

    def update(self, state: Tensor, tokens: Tensor, expert_logprobs: Tensor | None = None) -> None:
        if expert_logprobs is None:
            raise RoutingError("router posterior: needs the experts' log-probabilities of the text; run all experts on it")
        moved = self._step(state, expert_logprobs.to(state))
        state.copy_(torch.where((tokens != NO_TOKEN).to(state.device).unsqueeze(-1), moved, state))

    def _step(self, evidence: Tensor, logprobs: Tensor) -> Tensor:
        # 0 * -inf is not a number: a dropped expert stays dropped whatever the decay.
        aged = torch.where(evidence == -torch.inf, evidence, evidence * self.decay)
        return aged + logprobs

    def along(self, request: Request, tokens: Sequence[int], expert_logprobs: Tensor | None = None) -> Tensor:
        if expert_logprobs is None:
            raise RoutingError("router posterior: needs the experts' log-probabilities of the text; run all experts on it")
        given = expert_logprobs.to(torch.float64).T  # [tokens, experts]
        evidence = torch.zeros(len(tokens), self.num_experts, dtype=torch.float64)
        if self.decay == 1:
            evidence[1:] = given[:-1].cumsum(0)
        else:
            for position in range(1, len(tokens)):
                evidence[position] = self._step(evidence[position - 1], given[position - 1])
        return self.weights(evidence)


@dataclass
class RouterData:
    """What the routers of one ensemble are made from. `experts` gives the order of every weight vector."""

    experts: list[str]
    language_expert: dict[str, str] = field(default_factory=dict)
    fixed_weights: dict[str, float] = field(default_factory=dict)
    temperature: float = 0.1
    distance_power: int = 2
    posterior_prior: list[float] | None = None
    posterior_decay: float = 1.0
    space: Any = None
    centres: Tensor | None = None  # [experts, dimensions]
    decode: Callable[[list[int]], str] | None = None  # token ids to text, for a space that reads text


def make_router(name: str, data: RouterData, **overrides: Any) -> Router:
    """The router `name` of an ensemble; `overrides` replace fields of `data` (temperature, fixed_weights, posterior_decay, ...).

    Raises:
        RoutingError: unknown name, or the ensemble lacks what the router needs.
    """
    data = replace(data, **overrides) if overrides else data
    if name == "uniform":
        return UniformRouter(len(data.experts))
    if name == "language":
        return LanguageRouter(data.experts, data.language_expert)
    if name == "posterior":
        return PosteriorRouter(len(data.experts), data.posterior_prior, data.posterior_decay)
    if name == "fixed":
        if not data.fixed_weights:
            raise RoutingError(f"router fixed: no weights; set ensemble.fixed_weights for some of {', '.join(data.experts)}")
        return FixedRouter(data.experts, data.fixed_weights)
    if name == "tfidf":
        if data.space is None or data.centres is None:
            raise RoutingError("router tfidf: this ensemble was saved without a vector space; build it again, or take another router")
        space = data.space
        if space.reads_text:
            if data.decode is None:
                raise RoutingError(
                    f"router tfidf: the vector space reads text (clusters.tfidf.analyzer = {space.analyzer.name}); give the router a "
                    "tokenizer"
                )
            space = TextSpace(space, data.decode)
        return TfidfRouter(space, data.centres, data.temperature, data.distance_power)
    raise RoutingError(f"ensemble.router = {name!r}: choose one of {', '.join(ROUTER_NAMES)}")
