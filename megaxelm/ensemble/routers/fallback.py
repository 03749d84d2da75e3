"""The fallback expert: the seed or the dense model takes part with a weight of its own, w_f, and the trained experts share 1 - w_f.

How much it is heard says how little the router trusts the experts. With f = `ensemble.fallback_weight`:

- `uniform`, `fixed`: w_f = f.
- `language`: w_f = 0 for a language that an expert holds, 1 for any other.
- `tfidf`: w_f = sigmoid((d - d_q) / s), d = squared distance of the text to the nearest centre, s = (d_q - d_50) / log((1 - f) / f).
  d_50 and d_q are the median and the quantile `ensemble.fallback_quantile` of d over the beginnings of texts that the experts were made
  for. So w_f is f for a text as near as half of those, 1/2 at the quantile, and goes to 1 far from every centre. A text without any known
  term has w_f = 1.
- `posterior`: one more expert with prior f; the text decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megaxelm.errors import RoutingError

_NARROWEST = 1e-6
"""Least s, where all texts are equally far from their centre."""


def check_fallback_weight(weight: float) -> float:
    """`weight`, if it may be one.

    Raises:
        RoutingError: not in 0..0.5. Half and more would be a baseline with experts beside it.
    """
    if not 0 <= weight < 0.5:
        raise RoutingError(f"ensemble.fallback_weight = {weight}: choose 0 (the fallback is not heard) to below 0.5")
    return weight


def add_fallback(log_w: Tensor, log_fallback: Tensor, log_rest: Tensor) -> Tensor:
    """Log weights [..., experts + 1] from those of the trained experts [..., experts], log w_f and log (1 - w_f), both [...]."""
    return torch.cat([log_w + log_rest.unsqueeze(-1), log_fallback.unsqueeze(-1)], -1)


def add_fixed_fallback(log_w: Tensor, weight: float | None) -> Tensor:
    """Log weights [..., experts + 1] with w_f = `weight`; `log_w` itself where that is None: there is no fallback expert."""
    if weight is None:
        return log_w
    fallback = torch.full(log_w.shape[:-1], check_fallback_weight(weight), dtype=log_w.dtype)
    return add_fallback(log_w, fallback.log(), (-fallback).log1p())


@dataclass(frozen=True)
class DistanceTrust:
    """How near a text must be to a centre for the experts to be trusted.

    Args:
        median, quantile: of the squared distance to the nearest centre, over texts that the experts were made for.
        weight: f, the weight of the fallback at the median.

    Raises:
        RoutingError: the distances are no numbers in order, or the weight is out of range.
    """

    median: float
    quantile: float
    weight: float

    def __post_init__(self) -> None:
        check_fallback_weight(self.weight)
        if not 0 <= self.median <= self.quantile < math.inf:
            raise RoutingError(
                f"router tfidf: the distances of the fallback, {self.median} and {self.quantile}, are damaged; build the ensemble again"
            )

    def log_weights(self, nearest: Tensor) -> tuple[Tensor, Tensor]:
        """log w_f and log (1 - w_f), both [...], of squared distances [...] to the nearest centre."""
        nearest = nearest.to(torch.float64)
        if self.weight == 0:
            return torch.full_like(nearest, -torch.inf), torch.zeros_like(nearest)
        scale = (self.quantile - self.median) / math.log((1 - self.weight) / self.weight)
        score = (nearest - self.quantile) / max(scale, _NARROWEST)
        return logsigmoid(score), logsigmoid(-score)

    def log_weights_of_nothing(self) -> tuple[float, float]:
        """log w_f and log (1 - w_f) of a text without any known term."""
        return (0.0, -math.inf) if self.weight else (-math.inf, 0.0)
