"""Routers whose weights do not depend on the text: `uniform` and `fixed`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megaxelm.ensemble.routers.base import ConstantRouter, Request
from megaxelm.ensemble.routers.fallback import add_fixed_fallback
from megaxelm.errors import RoutingError


class _SameForAll(ConstantRouter):
    """One weight vector for every text."""

    log_w: Tensor

    def _set(self, log_w: Tensor, fallback_weight: float | None) -> None:
        self.log_w = add_fixed_fallback(log_w, fallback_weight)
        self.num_experts = len(self.log_w)
        self.fallback = None if fallback_weight is None else len(log_w)

    def start(self, batch: Sequence[Request]) -> Tensor:
        return self.log_w.expand(len(batch), -1)


class UniformRouter(_SameForAll):
    """Every trained expert has the same weight.

    Args:
        num_experts: the trained ones. fallback_weight: of the fallback expert behind them; None: there is none.
    """

    name = "uniform"

    def __init__(self, num_experts: int, fallback_weight: float | None = None) -> None:
        self._set(torch.full((num_experts,), -math.log(num_experts), dtype=torch.float64), fallback_weight)


class FixedRouter(_SameForAll):
    """Given weights by expert name; normalised; experts not named get none.

    Args:
        experts: names of the trained experts. fallback_weight: of the fallback expert behind them; None: there is none.

    Raises:
        RoutingError: unknown expert, a weight below zero or not finite, or no weight above zero.
    """

    name = "fixed"

    def __init__(self, experts: Sequence[str], weights: Mapping[str, float], fallback_weight: float | None = None) -> None:
        unknown = [name for name in weights if name not in experts]
        if unknown:
            raise RoutingError(f"ensemble.fixed_weights: no expert {', '.join(unknown)}; the experts are {', '.join(experts)}")
        bad = {name: value for name, value in weights.items() if not (math.isfinite(value) and value >= 0)}
        if bad or not any(weights.values()):
            shown = ", ".join(f"{name} = {value}" for name, value in bad.items()) or "no weight above zero"
            raise RoutingError(f"ensemble.fixed_weights: {shown}; weights are finite, not negative, and at least one is above zero")
        given = torch.tensor([float(weights.get(name, 0.0)) for name in experts], dtype=torch.float64)
        self._set((given / given.sum()).log(), fallback_weight)
