"""The router `posterior`: experts that predicted the text so far well are believed (c-BTM, section 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megaxelm.ensemble.routers.base import NO_TOKEN, BaseRouter, Request
from megaxelm.ensemble.routers.fallback import add_fixed_fallback
from megaxelm.errors import RoutingError

READS = ("kept", "all")
DECAY_NAMES = {"cumulative": 1.0, "one-step": 0.0}


class PosteriorRouter(BaseRouter):
    """w_e(t) ~ prior_e * prod_{s<t} p_e(x_s)^(decay^(t-1-s)).

    The forms by their names: `decay` 1 is the cumulative posterior, the exact Bayes mixture of whole texts while all experts run; 0 is the
    one-step form w_e(t) ~ prior_e * p_e(x_{t-1}); between them the log-probability of a token counts the less the older it is.

    An expert that has not run on a token (-inf) is dropped for good, since what it thinks of the text is no longer known. So with fewer
    experts kept than there are, `reads` decides: `kept` runs the kept ones alone after the prompt, which is cheap, and who is dropped stays
    out; `all` runs every expert on every token and keeps the m heaviest for the mixture alone, which costs as much as the whole
    mixture, but follows a text that changes its language, and is what scoring computes. Where all are kept both are the same. A fallback
    expert is one more with prior `fallback_weight`, and always runs.

    Args:
        num_experts: the trained ones. prior: [num_experts], normalised here; None: uniform.
        fallback_weight: prior of the fallback expert behind them; None: there is none.
    """

    name = "posterior"
    needs_expert_logprobs = True
    fallback_bound = 0.0

    def __init__(
        self,
        num_experts: int,
        prior: Sequence[float] | None = None,
        decay: float = 1.0,
        fallback_weight: float | None = None,
        reads: str = "kept",
    ) -> None:
        given = torch.ones(num_experts, dtype=torch.float64) if prior is None else torch.tensor(prior, dtype=torch.float64)
        if given.shape != (num_experts,) or not bool((given >= 0).all()) or not 0 < float(given.sum()) < math.inf:
            raise RoutingError(f"posterior prior = {prior}: needs {num_experts} weights, none negative, at least one above zero")
        if not 0 <= decay <= 1:
            raise RoutingError(f"posterior decay = {decay}: choose 0 (one-step: the last token only) to 1 (cumulative: the whole text)")
        if reads not in READS:
            raise RoutingError(f"ensemble.posterior_reads = {reads!r}: choose {' or '.join(READS)}")
        self.log_prior, self.decay = add_fixed_fallback((given / given.sum()).log(), fallback_weight), decay
        self.num_experts, self.fallback = len(self.log_prior), None if fallback_weight is None else num_experts
        self.reads_all = reads == "all"

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
