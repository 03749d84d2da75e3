"""Routers of a mixture-of-experts model in closed form: no training, one pass over sample text.

After DUME (Fanì and Ersoy 2026, arXiv 2603.29765): in each layer W = (X'X + lambda I)^-1 X'Y, where X are the inputs of the feed-forward
part and Y says which expert's cluster holds the document; the columns of W are then normalised. Two things are this project's own:

- Layers are fitted in their order: the inputs of a layer are what the merged model computes with the routers of the layers before it, so
  each is fitted to what it will read.
- A router's scores go through a softmax, whose sharpness normalised columns leave open (with `top_k` above 1 it decides how the chosen
  experts are mixed). One scale a layer is fitted: that of the lowest cross-entropy of the expert on the same sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaxelm.errors import MergeError
from megaxelm.model.layerwise import feed_forward_inputs
from megaxelm.model.source import WeightSource

RIDGE = 0.01
"""lambda of the paper; the sum X'X is over all tokens."""
SCALES = (0.05, 5000.0)
"""Range of the fitted scale; where the sample is divided without a mistake, no scale would be the best."""
_CHUNK_ROWS = 8192


@dataclass(frozen=True)
class LayerFit:
    """How a layer's router came out on the sample: share of the tokens whose own expert has the highest score, scale of the scores, and
    cross-entropy of the own expert in nats."""

    accuracy: float
    scale: float
    cross_entropy: float


def fit_routers(
    source: WeightSource,
    routers: dict[int, Tensor],
    texts_tokens: Sequence[Sequence[int]],
    experts: Sequence[int],
    *,
    ridge: float = RIDGE,
    scale: float | None = None,
    device: torch.device | str = "cpu",
) -> list[LayerFit]:
    """Fill `routers` (layer -> [experts, H] fp32), which `source` reads from, layer after layer.

    Args:
        texts_tokens: sample texts with their start tokens. experts: number of the expert that each belongs to.
        scale: of the scores in every layer; None: fitted.

    Raises:
        MergeError: `ridge` or `scale` not above 0.
    """
    if not ridge > 0 or (scale is not None and not scale > 0):
        raise MergeError(f"--ridge {ridge:g}, --router-scale {scale}: both must be above 0")
    num_experts = source.config.num_experts
    owner = torch.cat([torch.full((len(text),), expert) for text, expert in zip(texts_tokens, experts, strict=True)])
    fits = []
    for layer, inputs in feed_forward_inputs(source, texts_tokens, device=device):
        weight = ridge_router(inputs, owner.to(inputs.device), num_experts, ridge)
        scores = torch.cat([part.double() @ weight.T for part in inputs.split(_CHUNK_ROWS)])
        chosen = fit_scale(scores, owner.to(inputs.device)) if scale is None else scale
        routers[layer] = (weight * chosen).float().cpu()
        mine = owner.to(inputs.device)
        entropy = float(torch.nn.functional.cross_entropy(scores * chosen, mine))
        fits.append(LayerFit(float((scores.argmax(-1) == mine).double().mean()), float(chosen), entropy))
    return fits


def ridge_router(inputs: Tensor, owner: Tensor, num_experts: int, ridge: float = RIDGE) -> Tensor:
    """Rows of unit length [experts, H] fp64: the normalised columns of (X'X + ridge I)^-1 X'Y.

    Args:
        inputs: X [N, H]. owner: [N] int64; Y is its one-hot form [N, experts].
    """
    size = inputs.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=inputs.device)
    products = torch.zeros(size, num_experts, dtype=torch.float64, device=inputs.device)
    for rows, mine in zip(inputs.split(_CHUNK_ROWS), owner.split(_CHUNK_ROWS), strict=True):
        rows = rows.double()
        gram.addmm_(rows.T, rows)
        products.addmm_(rows.T, torch.nn.functional.one_hot(mine, num_experts).double())
    gram.diagonal().add_(ridge)
    solved = torch.cholesky_solve(products, torch.linalg.cholesky(gram))
    return (solved / solved.norm(dim=0, keepdim=True).clamp_min(1e-30)).T


def fit_scale(scores: Tensor, owner: Tensor) -> float:
    """The factor of `scores` [N, experts] with the lowest cross-entropy of `owner` [N]: a golden-section search on its logarithm, in which
    the cross-entropy has one valley."""
    low, high = (math.log(bound) for bound in SCALES)
    ratio = (math.sqrt(5) - 1) / 2

    def loss(log_scale: float) -> float:
        return float(torch.nn.functional.cross_entropy(scores * math.exp(log_scale), owner))

    first, second = high - ratio * (high - low), low + ratio * (high - low)
    at_first, at_second = loss(first), loss(second)
    while high - low > 1e-3:
        if at_first < at_second:
            high, second, at_second = second, first, at_first
            first = high - ratio * (high - low)
            at_first = loss(first)
        else:
            low, first, at_first = first, second, at_second
            second = low + ratio * (high - low)
            at_second = loss(second)
    return math.exp((low + high) / 2)
