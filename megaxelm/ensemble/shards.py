"""Experts spread over the ranks of torch.distributed: each rank runs its own, the mixture is reduced, every rank chooses the same token.

All ranks hold the same texts and router and take the same steps. What crosses between them is a mixture [texts, vocab] a token, and for a
router that learns from the experts their log-probability of it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megaxelm.errors import RoutingError


class Shards:
    """Which experts this rank runs: number `rank`, `rank + ranks`, ...

    Args:
        num_experts: in the ensemble.
        rank, ranks: None takes those of the default process group.

    Raises:
        RoutingError: more ranks than experts.
    """

    def __init__(self, num_experts: int, rank: int | None = None, ranks: int | None = None) -> None:
        rank = dist.get_rank() if rank is None else rank
        ranks = dist.get_world_size() if ranks is None else ranks
        if ranks > num_experts:
            raise RoutingError(
                f"ensemble.devices = {ranks}: choose 1 to {num_experts}, the number of experts; a device without one would idle"
            )
        self.rank, self.ranks = rank, ranks
        self.experts = list(range(rank, num_experts, ranks))

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks."""
        dist.all_reduce(x)
        return x

    def maximum(self, x: Tensor) -> Tensor:
        """Maximum over the ranks."""
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def logsumexp(self, x: Tensor) -> Tensor:
        """Log of the sum over the ranks of exp(x)."""
        top = self.maximum(x.clone())
        base = torch.where(top > -torch.inf, top, 0.0)
        return self.sum((x - base).exp_()).log_() + base
