"""The mixture-of-experts feed-forward part of a layer: a router chooses for each token which experts read it.

Weights as Mixtral (Jiang et al. 2024, arXiv 2401.04088, section 2.1) and Qwen3-MoE with `norm_topk_prob` have them: a softmax over the
router's scores, of which the k largest are kept and renormalised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megaxelm.model.config import DecoderConfig

if TYPE_CHECKING:
    from megaxelm.model.layers import Surroundings


def top_experts(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the k experts that the scores [N, experts] favour: [N, k] both, the weights fp32 of sum 1."""
    kept, chosen = scores.float().softmax(-1).topk(k, dim=-1)
    return kept / kept.sum(-1, keepdim=True), chosen


class MoeFeedForward(nn.Module):
    """`config.num_experts` feed-forward parts, of which each token is read by `config.experts_per_token`.

    In training every expert is run, also on no token: so each parameter has a gradient on every rank, and under ZeRO-3 all ranks gather
    the experts in the same order whatever their tokens are.
    """

    def __init__(self, config: DecoderConfig, router: nn.Module, experts: list[nn.Module]) -> None:
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.router = router
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor, kernels: str = "torch", around: Surroundings | None = None) -> Tensor:
        """`x` [N, H] -> [N, H]. `around` has no part in it: experts have no low-rank deltas, whose input it would drop."""
        weights, chosen = top_experts(self.router(x), self.experts_per_token)
        found = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            if not len(rows) and not torch.is_grad_enabled():
                continue
            # A kernel is not started on no rows.
            part = expert(x[rows], kernels if len(rows) else "torch") * weights[rows, place, None]
            found = found.index_add(0, rows, part.to(found.dtype))
        return found
