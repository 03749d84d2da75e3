"""Mixture weights of a batch and the choice of the experts that are run: the m heaviest (paper, section 3.3), and the fallback."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaxelm.errors import RoutingError

FALLBACK_BOUND = 1e-3
"""A fallback expert of at most this weight is not run: what it could add to the probability of a token is below a thousandth."""


@dataclass(frozen=True)
class Weights:
    """Mixture weights of one batch, heaviest first. `log_w` [batch, m] sums to 1 in probability; -inf drops an expert.

    With a fallback expert there is one column more, wherever its weight puts it.
    """

    log_w: Tensor
    experts: Tensor  # [batch, m] int64, index into the ensemble

    def dense(self, num_experts: int) -> Tensor:
        """The same weights by expert: [batch, num_experts], -inf for experts that were not kept."""
        full = torch.full((*self.log_w.shape[:-1], num_experts), -torch.inf, dtype=self.log_w.dtype, device=self.log_w.device)
        return full.scatter(-1, self.experts, self.log_w)


def top_m(log_w: Tensor, m: int | None, fallback: int | None = None, bound: float = FALLBACK_BOUND) -> Weights:
    """Keep the m heaviest experts of each row of `log_w` [batch, experts] and renormalise; equal weights keep the lower index.

    Args:
        m: trained experts kept; None keeps all.
        fallback: index of the fallback expert, the last. It is not counted by m and keeps its weight, and the kept experts share the rest;
            where it has at most `bound` it is dropped.

    Raises:
        RoutingError: if m is not in 1..trained experts, or a row has no expert with a weight above zero.
    """
    trained = log_w.shape[-1] if fallback is None else fallback
    m = trained if m is None else m
    if not 1 <= m <= trained:
        raise RoutingError(f"ensemble.top_m = {m}: choose 1 to {trained}, the number of experts in this ensemble")
    kept, experts = log_w[..., :trained].sort(dim=-1, descending=True, stable=True)
    kept, experts = kept[..., :m], experts[..., :m]
    if fallback is not None:
        kept, experts = _with_fallback(log_w, kept, experts, bound)
    if not bool((kept[..., 0] > -torch.inf).all()):
        raise RoutingError(
            "router: a text has no expert with a weight above zero (or a weight is not a number); give at least one expert a weight"
        )
    return Weights(kept - kept.logsumexp(-1, keepdim=True), experts)


def _with_fallback(log_w: Tensor, kept: Tensor, experts: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """The kept trained experts, scaled up to what all trained ones had, and the fallback; heaviest first."""
    last = log_w.shape[-1] - 1
    of_trained = log_w[..., :last].logsumexp(-1, keepdim=True)
    # Where no trained expert has weight, the difference is not a number.
    scaled = torch.where(of_trained == -torch.inf, -torch.inf, kept - kept.logsumexp(-1, keepdim=True) + of_trained)
    own = log_w[..., last:]
    own = torch.where(own.exp() > bound, own, -torch.inf)
    both, order = torch.cat([scaled, own], -1).sort(dim=-1, descending=True, stable=True)
    return both, torch.cat([experts, torch.full_like(experts[..., :1], last)], -1).gather(-1, order)
