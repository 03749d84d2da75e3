"""RMSNorm and LayerNorm over the last dimension."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; `x` [..., H], `weight` [H]; statistics in fp32 for half types.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension; `x` [..., H], `weight` and `bias` [H]."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
