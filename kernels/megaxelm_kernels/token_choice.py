"""One token of each sequence from its log-probabilities: temperature, filters, keyed Gumbel noise.

The order is vLLM's: temperature, then min_p, then top_k, then top_p, each over what the one before has left; only top_p depends on that,
as it is a share of the probability that is left (transformers has min_p last). Tokens stand in the order of their probability, equal ones
in that of their id, and each filter keeps the first of them: exactly top_k, and top_p up to and with the token that reaches p. The
likeliest always stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .gumbel import vocabulary_noise

_CANDIDATES = 256
"""Of the likeliest tokens, sorted first on a CPU: what most filters leave is among them, and they cost a fifth of all or less."""


@dataclass(frozen=True)
class Sampling:
    """How the next token of each of B sequences is chosen; tensors [B] on the device of the hidden states."""

    temperature: Tensor
    """fp32; 0 is greedy."""
    top_k: Tensor
    """int64; 0 is off."""
    top_p: Tensor
    """fp32; 1 is off."""
    min_p: Tensor
    """fp32; 0 is off."""
    key: Tensor
    """int64: identity of seed and sequence, made by the caller."""
    position: Tensor
    """int64: number of the token that is drawn in its sequence."""
    greedy: bool
    """Whether every temperature is 0: told by the caller, so that nobody waits for the device to find out."""
    filtered: bool
    """Whether some top_k, top_p or min_p is on."""


def check_sampling(sampling: Sampling, batch: int, device: torch.device) -> None:
    """Raises ValueError for a tensor of another shape, type or device."""
    floats = ("temperature", "top_p", "min_p")
    for name in (*floats, "top_k", "key", "position"):
        tensor: Tensor = getattr(sampling, name)
        dtype = torch.float32 if name in floats else torch.int64
        if tensor.shape != (batch,) or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"sampling.{name} {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}: expected {dtype} [{batch}] on {device}"
            )


def choose_tokens(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """The next token of each sequence, [B] int64, from log-probabilities [B, vocab] of the mixture: the same as `mixture_next_token` draws.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    if logprobs.ndim != 2 or not logprobs.is_floating_point():
        raise ValueError(f"logprobs {logprobs.dtype} {tuple(logprobs.shape)}: expected log-probabilities [batch, vocabulary]")
    check_sampling(sampling, logprobs.shape[0], logprobs.device)
    # Equal values: the first, on every device.
    return logprobs.argmax(-1) if sampling.greedy else draw(tempered(logprobs, sampling.temperature), sampling)


def tempered(logprobs: Tensor, temperature: Tensor) -> Tensor:
    """Scores [B, vocab] = log-probabilities / temperature; those of greedy sequences as they are."""
    return logprobs / torch.where(temperature > 0, temperature, 1.0)[:, None]


def draw(scores: Tensor, sampling: Sampling) -> Tensor:
    """arg max [B] of the tempered scores [B, vocab] and the noise, over the tokens that the filters leave; `scores` is overwritten."""
    if sampling.filtered:
        scores.masked_fill_(~allowed_tokens(scores, sampling.top_k, sampling.top_p, sampling.min_p), -torch.inf)
    noise = vocabulary_noise(sampling.key, sampling.position, scores.shape[1])
    scores += noise.mul_((sampling.temperature > 0)[:, None])
    return scores.argmax(-1)


def allowed_tokens(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens may be drawn: bool [B, vocab], from scores [B, vocab] that are log-probabilities up to a constant."""
    if scores.device.type != "cpu" or scores.shape[1] <= 2 * _CANDIDATES:
        return _allowed_of_all(scores, top_k, top_p, min_p)
    values, tokens = scores.topk(_CANDIDATES, dim=-1)
    tokens, by_id = tokens.sort(dim=-1)
    values, by_value = torch.sort(values.gather(1, by_id), dim=-1, descending=True, stable=True)
    keep, all_found = _kept(values, scores, top_k, top_p, min_p)
    allowed = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, tokens.gather(1, by_value), keep)
    off = (top_k <= 0) & (min_p <= 0) & (top_p >= 1)
    allowed |= off[:, None]
    rest = ~(all_found | off)
    if bool(rest.any()):
        allowed[rest] = _allowed_of_all(scores[rest], top_k[rest], top_p[rest], min_p[rest])
    return allowed


def _allowed_of_all(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    values, tokens = torch.sort(scores, dim=-1, descending=True, stable=True)
    keep, _ = _kept(values, scores, top_k, top_p, min_p)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, tokens, keep)


def _kept(values: Tensor, scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the sorted `values` [B, n], the largest of `scores` [B, vocab], stay; and whether no token beyond them would, [B]."""
    bounded = (top_k > 0) | (min_p > 0)
    rank = torch.arange(values.shape[1], device=values.device)
    keep = (values >= values[:, :1] + min_p.log()[:, None]) & ((rank < top_k[:, None]) | (top_k <= 0)[:, None])
    keep[:, 0] = True
    by_bounds = _last(values, keep)
    shares = (values - values[:, :1]).exp_() * keep
    # Without min_p and top_k the tokens beyond `values` count in the whole too.
    whole = torch.where(bounded, shares.sum(-1), (scores - values[:, :1]).exp_().sum(-1))
    before = F.pad(shares.cumsum(-1)[:, :-1], (1, 0))
    keep &= (before < (top_p * whole)[:, None]) | (top_p >= 1)[:, None]
    keep[:, 0] = True
    # Tokens of one value may lie inside and beyond: it must be above the last one.
    return keep, torch.where(bounded, by_bounds, _last(values, keep)) > values[:, -1]


def _last(values: Tensor, keep: Tensor) -> Tensor:
    """The smallest value [B] that stays."""
    return values.gather(1, keep.sum(-1, keepdim=True) - 1)[:, 0]
