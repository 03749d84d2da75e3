"""The mixture of the experts' next-token distributions.

log p(v) = logsumexp_e(log w_e + log p_e(v)), in fp32 or wider; an expert of weight zero is dropped whatever its values, so it need not run.
`logit_mean` is what the released downstream code of the paper computes instead: a product of experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaxelm.errors import RoutingError

COMBINE = ("mixture", "logit_mean")
TEMPERATURE_ON = ("mixture", "experts")


def expert_logprobs(logits: Tensor) -> Tensor:
    """Log-probabilities [..., vocab] of logits [..., vocab], in fp32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def mix_logprobs(logprobs: Tensor, log_w: Tensor) -> Tensor:
    """Mixture of probabilities over the experts' axis.

    Args:
        logprobs: [..., m, vocab] log-probabilities of each expert, each normalised.
        log_w: [..., m] log weights, normalised; -inf drops an expert, even where its `logprobs` are not numbers.

    Returns:
        [..., vocab] in the wider of fp32 and the dtype of `logprobs`.
    """
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    weight = log_w.to(dtype).unsqueeze(-1)
    return torch.where(weight > -torch.inf, logprobs.to(dtype) + weight, -torch.inf).logsumexp(-2)


def mean_logits(logits: Tensor, log_w: Tensor) -> Tensor:
    """Product of experts: log-softmax of the weighted mean of logits [..., m, vocab], weights exp(log_w) [..., m]; [..., vocab]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    weight = log_w.to(dtype).exp().unsqueeze(-1)
    return torch.where(weight > 0, logits.to(dtype) * weight, 0.0).sum(-2).log_softmax(-1)


def combine_logits(logits: Tensor, log_w: Tensor, combine: str = "mixture") -> Tensor:
    """Log-probabilities [..., vocab] of experts' logits [..., m, vocab] under log weights [..., m].

    Raises:
        RoutingError: if `combine` is not one of `COMBINE`.
    """
    if combine == "mixture":
        return mix_logprobs(expert_logprobs(logits), log_w)
    if combine == "logit_mean":
        return mean_logits(logits, log_w)
    raise RoutingError(f"combine = {combine!r}: choose one of {', '.join(COMBINE)}")
