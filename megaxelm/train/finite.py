"""Steps whose gradient is not finite are skipped, in every ZeRO stage.

DeepSpeed's own optimisers do so: the step is not applied and counted. Around a plain optimiser (stage 0 in fp32) it only clips, NaN would
go into the weights and the norm is not told; `guard` gives that one the same manners.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def guard(engine: Any) -> None:
    """Make the optimiser of a DeepSpeed engine skip a step whose gradient is not finite; then `engine.was_step_applied()` is false."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    apply, limit = optimizer.step, engine.gradient_clipping()

    def step(closure: Any = None) -> Any:
        # Gradients are summed over the ranks before, so the norm is the same on all.
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf)
        optimizer._global_grad_norm = norm  # type: ignore[attr-defined]
        optimizer.overflow = not bool(torch.isfinite(norm))  # type: ignore[attr-defined]
        return None if optimizer.overflow else apply(closure)  # type: ignore[attr-defined]

    optimizer.step = step  # type: ignore[method-assign]
    engine.clip_fp32_gradients = lambda: None  # it is done above
