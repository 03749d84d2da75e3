"""The weighted mean of the experts' parameters, tensor by tensor.

Weights of one seed's branches may be averaged (model soups: Wortsman et al. 2022, arXiv 2203.05482; Branch-Train-Merge: Li et al. 2022,
arXiv 2208.03306, section 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaxelm.errors import MergeError
from megaxelm.model.config import DecoderConfig
from megaxelm.model.source import WeightSource


def average_source(sources: Sequence[WeightSource], weights: Sequence[float], config: DecoderConfig | None = None) -> WeightSource:
    """The mean of some models under `weights`, which are normalised. One tensor of one model is in memory at a time; sums are in fp64.

    Args:
        config: of the mean; None: that of the first model.

    Raises:
        MergeError: weights that are negative, or all zero, or not one a model.
    """
    if len(weights) != len(sources) or not sources:
        raise MergeError(f"{len(weights)} weights for {len(sources)} experts: give one each")
    total = sum(weights)
    if not total > 0 or any(not weight >= 0 for weight in weights):
        raise MergeError(f"weights {', '.join(f'{weight:g}' for weight in weights)}: none may be negative, and one must be above 0")
    shares = [weight / total for weight in weights]

    def weight(name: str) -> Tensor:
        mean: Tensor | None = None
        for source, share in zip(sources, shares, strict=True):
            if share:
                part = source.weight(name).to(torch.float64) * share
                mean = part if mean is None else mean.add_(part)
        assert mean is not None
        return mean.to(torch.float32)

    return WeightSource(config or sources[0].config, weight)
