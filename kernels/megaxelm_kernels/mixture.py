"""From the experts' hidden states to the next token of a mixture: head, log-sum-exp over experts, temperature, filters, noise.

The mixture of B sequences over their m experts, in fp32:

    mixture      log p(v) = logsumexp_e(log w_e + z_e,v - lse_e)
    logit_mean   log p(v) = log_softmax_v(sum_e w_e z_e,v)

`hidden` [R, H] has one row a (sequence, expert), sorted by expert; `heads` [E, V_padded, H], of stride 0 over E where the experts share one
head; `rows` [B, m] int64 says which row of `hidden` belongs to each kept expert of a sequence and `log_w` [B, m] fp32 how much it weighs
(normalised). Where log_w is -inf the row may be any, and its values are not looked at. No tensor [batch, experts, vocabulary] of
probabilities is made: by torch a block of sequences at a time, by Triton none at all. There are no gradients.

For a CUDA graph use `groups.device_offsets` once before the capture; at a replay the offsets may be others, of as many rows in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import choose_kernels
from .gumbel import expert_noise, vocabulary_noise
from .row_groups import RowGroups
from .token_choice import Sampling, check_sampling, choose_tokens, draw

__all__ = [
    "COMBINE",
    "DrawnToken",
    "MixtureToken",
    "Sampling",
    "choose_tokens",
    "draw_expert_then_token",
    "mixture_logprobs",
    "mixture_next_token",
    "partial_mixture",
]
COMBINE = ("mixture", "logit_mean")
TEMPERATURE_ON = ("mixture", "experts")
KERNELS = ("torch", "triton")
_PIECE = 1 << 18  # numbers of a head that one product of few rows takes: 1 MB, the cache of a core
_BLOCK = 1 << 20  # probabilities of a block of sequences on a CPU: 4 MB, which stay in the cache
_FEW_ROWS = 12  # up to so many, a CPU's product of one row after another with the head is slower than that of the head with the rows


@dataclass(frozen=True)
class MixtureToken:
    """The next token of each of B sequences, and how likely it was."""

    token: Tensor
    """[B] int64."""
    logprob: Tensor
    """[B] fp32: under the mixture, before temperature and filters."""
    expert_logprob: Tensor
    """[B, m] fp32: of the token under each kept expert, before temperature; -inf where log_w is -inf."""


@dataclass(frozen=True)
class DrawnToken:
    """What `draw_expert_then_token` draws for each of B sequences."""

    token: Tensor
    """[B] int64."""
    slot: Tensor
    """[B] int64, 0 to m - 1: the kept expert that the token was drawn from."""
    expert_logprob: Tensor
    """[B] fp32: of the token under that expert."""


@torch.no_grad()
def mixture_next_token(
    hidden: Tensor,
    heads: Tensor,
    groups: RowGroups,
    rows: Tensor,
    log_w: Tensor,
    sampling: Sampling,
    *,
    vocab_size: int,
    combine: str = "mixture",
    temperature_on: str = "mixture",
    kernels: str = "torch",
) -> MixtureToken:
    """Draw the next token of each sequence from the mixture (arguments: see the module).

    With temperature_on="experts" the logits of each expert are divided by the temperature before they are mixed, and the draw is from the
    mixture as it is; for `logit_mean` that is the same as the other. Greedy sequences take the likeliest token, the lower id of equals.

    Raises:
        ValueError: shapes, types or devices that do not fit; an unknown `combine`, `temperature_on` or `kernels`.
    """
    _check(hidden, heads, groups, rows, log_w, vocab_size, combine, kernels)
    check_sampling(sampling, rows.shape[0], hidden.device)
    if temperature_on not in TEMPERATURE_ON:
        raise ValueError(f"temperature_on = {temperature_on!r}: choose {' or '.join(TEMPERATURE_ON)}")
    on_experts = temperature_on == "experts" and combine == "mixture" and not sampling.greedy
    if kernels == "triton":
        from . import mixture_triton

        mean = combine == "logit_mean"
        return MixtureToken(
            *mixture_triton.next_token(hidden, heads, groups, rows, log_w, sampling, vocab_size, mean=mean, on_experts=on_experts)
        )
    logits = head_logits(hidden, heads, groups, vocab_size)
    log_w = log_w.to(logits.dtype)
    if combine == "mixture" and not on_experts and logits.device.type == "cpu":
        shares, lse = _mixed_shares(logits, rows, log_w)
        token = shares.argmax(-1) if sampling.greedy else choose_tokens(_log_of_shares(shares, logits, rows, log_w), sampling)
        logprob = None
    else:
        lse = row_lse(logits)[rows]
        logprobs = mix_logits(logits, rows, log_w) if combine == "mixture" else mean_logits(logits, rows, log_w).log_softmax(-1)
        if on_experts:
            warm = torch.where(sampling.temperature > 0, sampling.temperature, 1.0)
            token = draw(mix_logits(logits, rows, log_w, warm), sampling)
        else:
            token = choose_tokens(logprobs, sampling)
        logprob = logprobs.gather(1, token[:, None])[:, 0]
    expert_logprob = (logits[rows, token[:, None]] - lse).masked_fill_(log_w == -torch.inf, -torch.inf)
    if combine == "mixture":
        logprob = (log_w + expert_logprob).logsumexp(-1)
    assert logprob is not None
    return MixtureToken(token, logprob, expert_logprob)


@torch.no_grad()
def mixture_logprobs(
    hidden: Tensor,
    heads: Tensor,
    groups: RowGroups,
    rows: Tensor,
    log_w: Tensor,
    *,
    vocab_size: int,
    combine: str = "mixture",
    kernels: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the mixture [B, vocab_size] fp32, and the log-sum-exp of the logits of each row of `hidden` [R] fp32.

    Raises:
        ValueError: as `mixture_next_token`.
    """
    _check(hidden, heads, groups, rows, log_w, vocab_size, combine, kernels)
    if kernels == "triton":
        from . import mixture_triton

        mixed, lse = mixture_triton.mixed_logprobs(hidden, heads, groups, rows, log_w, vocab_size, mean=combine == "logit_mean")
    else:
        logits = head_logits(hidden, heads, groups, vocab_size)
        mixed, lse = _partial(logits, rows, log_w.to(logits.dtype), combine), row_lse(logits)
    return mixed if combine == "mixture" else torch.log_softmax(mixed, -1, out=mixed), lse


@torch.no_grad()
def partial_mixture(
    hidden: Tensor,
    heads: Tensor,
    groups: RowGroups,
    rows: Tensor,
    log_w: Tensor,
    *,
    vocab_size: int,
    combine: str = "mixture",
    kernels: str = "torch",
) -> Tensor:
    """The part of some experts in a mixture whose other experts are elsewhere, [B, vocab_size] fp32, not normalised.

    `mixture`: logsumexp over the given experts of log w + log p, -inf where a sequence has none here; the parts are joined by logsumexp.
    `logit_mean`: sum of w z, 0 where there is none; the parts are added, and log_softmax follows.

    Raises:
        ValueError: as `mixture_next_token`.
    """
    _check(hidden, heads, groups, rows, log_w, vocab_size, combine, kernels)
    if kernels == "triton":
        from . import mixture_triton

        return mixture_triton.mixed_logprobs(hidden, heads, groups, rows, log_w, vocab_size, mean=combine == "logit_mean")[0]
    logits = head_logits(hidden, heads, groups, vocab_size)
    return _partial(logits, rows, log_w.to(logits.dtype), combine)


@torch.no_grad()
def draw_expert_then_token(
    hidden: Tensor,
    heads: Tensor,
    groups: RowGroups,
    rows: Tensor,
    log_w: Tensor,
    expert_keys: Tensor,
    sampling: Sampling,
    *,
    vocab_size: int,
    kernels: str = "torch",
) -> DrawnToken:
    """Draw an expert by its weight, then a token from it alone: the mixture's distribution at temperature 1, by the heads of B rows only.

    Not the same sample as `mixture_next_token`'s. The temperatures in `sampling` are not read: the caller sees to it that all are 1.

    Args:
        expert_keys: [B, m] int64, a number of the name of each kept expert, so that the draw does not depend on their order.

    Raises:
        ValueError: as `mixture_next_token`; `sampling` is greedy or has filters.
    """
    _check(hidden, heads, groups, rows, log_w, vocab_size, "mixture", kernels)
    check_sampling(sampling, rows.shape[0], hidden.device)
    if sampling.greedy or sampling.filtered:
        raise ValueError("sampling is greedy or has filters: draw_expert_then_token draws at temperature 1 from all tokens")
    if expert_keys.shape != rows.shape or expert_keys.dtype != torch.int64:
        raise ValueError(f"expert_keys {expert_keys.dtype} {tuple(expert_keys.shape)}: expected int64 {tuple(rows.shape)} as rows")
    if kernels == "triton":
        from . import mixture_triton

        return DrawnToken(*mixture_triton.draw_from_experts(hidden, heads, groups, rows, log_w, expert_keys, sampling, vocab_size))
    slot = (log_w + expert_noise(sampling.key, sampling.position, expert_keys)).argmax(-1)
    row = rows.gather(1, slot[:, None])[:, 0]
    by_expert, order = torch.sort(groups.group_of_row[row], stable=True)
    drawn_from = RowGroups.from_counts(by_expert.bincount(minlength=groups.num_groups).tolist(), hidden.device)
    logits = head_logits(hidden[row[order]], heads, drawn_from, vocab_size)[order.argsort()]
    token = (logits + vocabulary_noise(sampling.key, sampling.position, vocab_size)).argmax(-1)
    return DrawnToken(token, slot, logits.gather(1, token[:, None])[:, 0] - row_lse(logits))


def head_logits(hidden: Tensor, heads: Tensor, groups: RowGroups, vocab_size: int) -> Tensor:
    """Logits [R, vocab_size] of each row by the head of its group, in fp32 (fp64 for fp64)."""
    heads = heads[:, :vocab_size]
    shared = heads.shape[0] == 1 or heads.stride(0) == 0
    spans = [(0, 0, groups.num_rows)] if shared else [(g, *groups.offsets[g : g + 2]) for g in range(groups.num_groups)]
    logits = torch.empty(hidden.shape[0], vocab_size, dtype=_wide(hidden.dtype), device=hidden.device)
    for group, start, end in spans:
        if start < end:
            _product(hidden[start:end], heads[group], logits[start:end])
    return logits


def _product(hidden: Tensor, head: Tensor, out: Tensor) -> None:
    """out [rows, vocab] = hidden [rows, H] @ head [vocab, H].T"""
    rows, size = hidden.shape
    if hidden.device.type == "cpu" and rows <= _FEW_ROWS and out.dtype == hidden.dtype:
        # Few rows are bound by the reading of the head: pieces of it as a batch, each with the weight on the left, are read as fast as
        # memory gives them, while one product of all takes two to four times as long.
        piece = max(1, _PIECE // size)
        pieces = head.shape[0] // piece
        whole = pieces * piece
        if pieces:
            columns = hidden.T.expand(pieces, size, rows)
            out[:, :whole].copy_(torch.bmm(head[:whole].view(pieces, piece, size), columns).view(whole, rows).T)
        if whole < head.shape[0]:
            out[:, whole:].copy_((head[whole:] @ hidden.T).T)
    elif out.dtype == hidden.dtype:
        torch.mm(hidden, head.T, out=out)
    else:
        out.copy_(hidden @ head.T)


def row_lse(logits: Tensor) -> Tensor:
    """Log-sum-exp of each row of logits [R, vocab]: [R]."""
    if logits.device.type != "cpu":
        return logits.logsumexp(-1)
    # softmax is one pass of vector instructions, and its largest value is exp(max - lse); logsumexp takes several times as long.
    lse = torch.empty(logits.shape[0], dtype=logits.dtype)
    step = max(1, _BLOCK // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        block = logits[start : start + step]
        lse[start : start + step] = block.amax(-1) - block.softmax(-1).amax(-1).log_()
    return lse


def _mixed_shares(logits: Tensor, rows: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of the mixture [B, vocab], with 0 for what is too small, and log-sum-exp of the kept experts' rows [B, m]; on a CPU."""
    (batch, m), vocab = rows.shape, logits.shape[1]
    shares = torch.empty(batch, vocab, dtype=logits.dtype)
    lse = torch.empty(batch, m, dtype=logits.dtype)
    weight = log_w.exp()
    dropped = log_w == -torch.inf
    any_dropped = bool(dropped.any())
    step = max(1, _BLOCK // (m * vocab))
    for start in range(0, batch, step):
        part = slice(start, start + step)
        block = logits[rows[part].flatten()]
        top = block.amax(-1)
        # In its own place: each row is read before it is written.
        torch.softmax(block, -1, out=block)
        lse[part] = (top - block.amax(-1).log_()).view(-1, m)
        if any_dropped:
            block.masked_fill_(dropped[part].reshape(-1, 1), 0.0)
        torch.bmm(weight[part, None], block.view(-1, m, vocab), out=shares[part, None])
    return shares, lse


def _log_of_shares(shares: Tensor, logits: Tensor, rows: Tensor, log_w: Tensor) -> Tensor:
    """Log-probabilities from the result of `_mixed_shares`; a sequence with a token too rare for that is mixed again by logarithms."""
    least = shares.amin(-1) < 1e8 * torch.finfo(shares.dtype).tiny
    rare = least & (log_w > -torch.inf).any(-1)
    logprobs = shares.log_()
    if bool(rare.any()):
        logprobs[rare] = mix_logits(logits, rows[rare], log_w[rare])
    return logprobs


def mix_logits(logits: Tensor, rows: Tensor, log_w: Tensor, temperature: Tensor | None = None) -> Tensor:
    """Log of the mixture [B, vocab], one kept expert after the other, by logarithms; the logits divided by `temperature` [B]."""
    total = torch.empty(0)
    for slot in range(rows.shape[1]):
        part = logits[rows[:, slot]]
        if temperature is not None:
            part /= temperature[:, None]
        torch.log_softmax(part, -1, out=part)
        part += log_w[:, slot, None]
        part.masked_fill_((log_w[:, slot] == -torch.inf)[:, None], -torch.inf)
        total = torch.logaddexp(total, part, out=total) if slot else part
    return total


def mean_logits(logits: Tensor, rows: Tensor, log_w: Tensor) -> Tensor:
    """Weighted sum [B, vocab] of the logits of the kept experts."""
    total = torch.zeros(rows.shape[0], logits.shape[1], dtype=logits.dtype, device=logits.device)
    for slot in range(rows.shape[1]):
        part = logits[rows[:, slot]]
        part.masked_fill_((log_w[:, slot] == -torch.inf)[:, None], 0.0)
        total.addcmul_(part, log_w[:, slot, None].exp())
    return total


def _partial(logits: Tensor, rows: Tensor, log_w: Tensor, combine: str) -> Tensor:
    if combine == "logit_mean":
        return mean_logits(logits, rows, log_w)
    if logits.device.type != "cpu":
        return mix_logits(logits, rows, log_w)
    shares, _ = _mixed_shares(logits, rows, log_w)
    return _log_of_shares(shares, logits, rows, log_w)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(
    hidden: Tensor, heads: Tensor, groups: RowGroups, rows: Tensor, log_w: Tensor, vocab_size: int, combine: str, kernels: str
) -> None:
    if hidden.ndim != 2 or heads.ndim != 3 or hidden.shape[1] != heads.shape[2]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and heads {tuple(heads.shape)}: expected [R, H] and [E, V, H]")
    if hidden.dtype != heads.dtype or hidden.device != heads.device:
        raise ValueError(f"hidden is {hidden.dtype} on {hidden.device}, heads {heads.dtype} on {heads.device}: give both one of each")
    if groups.num_groups != heads.shape[0] or groups.num_rows != hidden.shape[0]:
        raise ValueError(
            f"groups: {groups.num_groups} of {groups.num_rows} rows; expected {heads.shape[0]}, one a head, of {hidden.shape[0]} rows"
        )
    if rows.ndim != 2 or rows.dtype != torch.int64 or rows.shape[1] < 1:
        raise ValueError(f"rows {rows.dtype} {tuple(rows.shape)}: expected int64 [batch, kept experts]")
    if log_w.shape != rows.shape or log_w.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log_w {log_w.dtype} {tuple(log_w.shape)}: expected float32 {tuple(rows.shape)} as rows")
    if not 1 <= vocab_size <= heads.shape[1]:
        raise ValueError(f"vocab_size = {vocab_size}: choose 1 to {heads.shape[1]}, the rows of a head")
    if combine not in COMBINE:
        raise ValueError(f"combine = {combine!r}: choose {' or '.join(COMBINE)}")
    if kernels not in KERNELS:
        raise ValueError(f"kernels = {kernels!r}: choose {' or '.join(KERNELS)}")
    if kernels == "triton":
        choose_kernels(kernels, hidden.device)
