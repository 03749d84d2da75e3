"""Mixture weights of a batch and the choice of the m heaviest experts (paper, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaxelm.errors import RoutingError


@dataclass(frozen=True)
class Weights:
    """Mixture weights of one batch, heaviest first. `log_w` [batch, m] sums to 1 in probability; -inf drops an expert."""

    log_w: Tensor
    experts: Tensor  # [batch, m] int64, index into the ensemble

    def dense(self, num_experts: int) -> Tensor:
        """The same weights by expert: [batch, num_experts], -inf for experts that were not kept."""
        full = torch.full((*self.log_w.shape[:-1], num_experts), -torch.inf, dtype=self.log_w.dtype, device=self.log_w.device)
        return full.scatter(-1, self.experts, self.log_w)


def top_m(log_w: Tensor, m: int | None) -> Weights:
    """Keep the m heaviest experts of each row of `log_w` [batch, experts] and renormalise; equal weights keep the lower index.

    Args:
        m: experts kept; None keeps all.

    Raises:
        RoutingError: if m is not in 1..experts, or a row has no expert with a weight above zero.
    """
    num_experts = log_w.shape[-1]
    m = num_experts if m is None else m
    if not 1 <= m <= num_experts:
        raise RoutingError(f"ensemble.top_m = {m}: choose 1 to {num_experts}, the number of experts in this ensemble")
    kept, experts = log_w.sort(dim=-1, descending=True, stable=True)
    kept, experts = kept[..., :m], experts[..., :m]
    if not bool((kept[..., 0] > -torch.inf).all()):
        raise RoutingError(
            "router: a text has no expert with a weight above zero (or a weight is not a number); give at least one expert a weight"
        )
    return Weights(kept - kept.logsumexp(-1, keepdim=True), experts)
