"""Cross-entropy of a linear head without the full logits.

The logits exist for at most `chunk_rows` tokens at a time. When gradients are needed, those of hidden states and weight are
computed in the forward pass, chunk by chunk, while the logits of the chunk are at hand, so nothing is recomputed and nothing of size
[N, vocabulary] is kept. The idea is that of Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, chunk_rows: int) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: expected [N, H] and [V, H]")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}: give both one type")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)}: expected [{hidden.shape[0]}], one a row of hidden")
    if not 1 <= vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size = {vocab_size}: choose 1 to {weight.shape[0]}, the rows of the head")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows = {chunk_rows}: choose at least 1")


class _Logits:
    """Logits of one chunk after another in the same memory: memory that is taken anew each time costs page faults on a CPU."""

    def __init__(self, weight: Tensor, vocab_size: int, rows: int) -> None:
        self.weight, self.vocab_size = weight, vocab_size
        self.product = torch.empty(rows, weight.shape[0], dtype=weight.dtype, device=weight.device)
        exact = weight.dtype in (torch.float32, torch.float64)
        self.wide = self.product if exact else torch.empty(self.product.shape, dtype=torch.float32, device=weight.device)

    def of(self, hidden: Tensor) -> Tensor:
        """[rows, V] in fp32 or fp64, valid until the next call. Padding columns are multiplied, for aligned products, and then -inf."""
        rows = hidden.shape[0]
        torch.mm(hidden, self.weight.T, out=self.product[:rows])
        wide = self.wide[:rows]
        if self.wide is not self.product:
            wide.copy_(self.product[:rows])
        wide[:, self.vocab_size :] = -torch.inf
        return wide

    def narrow(self, wide: Tensor) -> Tensor:
        """`wide` in the type of the weight; the product's memory is free again and takes it."""
        return wide if self.wide is self.product else self.product[: wide.shape[0]].copy_(wide)


def _sum_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None, vocab_size: int, chunk_rows: int
    ) -> tuple[Tensor, Tensor]:
        rows, needs_hidden, needs_weight = hidden.shape[0], ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        sum_dtype = _sum_dtype(hidden)
        total = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        each = torch.empty(rows, dtype=sum_dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=sum_dtype, device=weight.device) if needs_weight else None
        logits = _Logits(weight, vocab_size, min(chunk_rows, rows))
        for start in range(0, rows, chunk_rows):
            part = slice(start, start + chunk_rows)
            chunk, target = hidden[part], labels[part]
            counted = target != IGNORE_INDEX
            scale = counted.to(sum_dtype) if loss_weights is None else loss_weights[part].to(sum_dtype) * counted
            target = target.masked_fill(~counted, 0)[:, None]
            z = logits.of(chunk)
            z -= z.amax(dim=-1, keepdim=True)
            target_z = z.gather(1, target)[:, 0]
            sums = z.exp_().sum(dim=-1)
            # where, not a product alone: a token that does not count may have any logit, infinite too.
            each[part] = torch.where(counted, sums.log() - target_z, 0.0)
            total += (each[part] * scale).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            z *= (scale / sums)[:, None]
            z.scatter_add_(1, target, -scale[:, None])
            grad_logits = logits.narrow(z)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ chunk
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(each)
        return total, each

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        hidden = None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype)
        weight = None if grad_weight is None else grad_weight * scale.to(grad_weight.dtype)
        return hidden, weight, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    loss_weights: Tensor | None = None,
    chunk_rows: int = 1024,
) -> Tensor:
    """Sum over tokens of loss_weight * -log softmax(hidden @ weight.T)[label], a scalar in fp32 (fp64 for fp64 input), in nats.

    Args:
        hidden: [N, H].
        weight: [V, H]; rows from `vocab_size` on are padding: they get no probability and no gradient.
        labels: [N] int64; -100 is not counted.
        loss_weights: [N], weight of each token; None counts each once. No gradient flows to it.
        chunk_rows: rows of logits that exist at one time.

    Raises:
        ValueError: shapes that do not fit, vocab_size or chunk_rows out of range.
    """
    return linear_cross_entropy_each(hidden, weight, labels, vocab_size=vocab_size, loss_weights=loss_weights, chunk_rows=chunk_rows)[0]


def linear_cross_entropy_each(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    loss_weights: Tensor | None = None,
    chunk_rows: int = 1024,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy`, and the losses it is the weighted sum of, [N] in its type: 0 where the label is -100, without a gradient."""
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    _check(hidden, weight, labels, vocab_size, chunk_rows)
    if loss_weights is not None and loss_weights.shape != labels.shape:
        raise ValueError(f"loss_weights {tuple(loss_weights.shape)}: expected [{labels.shape[0]}], one a label")
    total, each = _LinearCrossEntropy.apply(hidden, weight, labels, loss_weights, vocab_size, chunk_rows)
    return total, each


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int | None = None, loss_weights: Tensor | None = None
) -> Tensor:
    """The same sum from the full logits, by torch's own operations: the truth that `linear_cross_entropy` is tested against."""
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    logits = (hidden @ weight[:vocab_size].T).to(_sum_dtype(hidden))
    nll = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    return nll.sum() if loss_weights is None else (nll * loss_weights).sum()


@torch.no_grad()
def target_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int | None = None, chunk_rows: int = 1024) -> Tensor:
    """log softmax(hidden @ weight.T)[label] of each row, [N] fp32 (fp64 for fp64 input), in nats; 0 where the label is -100.

    Raises:
        ValueError: as `linear_cross_entropy`.
    """
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    _check(hidden, weight, labels, vocab_size, chunk_rows)
    out = torch.zeros(labels.shape, dtype=_sum_dtype(hidden), device=hidden.device)
    logits = _Logits(weight, vocab_size, min(chunk_rows, hidden.shape[0]))
    for start in range(0, hidden.shape[0], chunk_rows):
        part = slice(start, start + chunk_rows)
        z = logits.of(hidden[part])
        counted = labels[part] != IGNORE_INDEX
        picked = z.gather(1, labels[part].masked_fill(~counted, 0)[:, None])[:, 0]
        out[part] = torch.where(counted, picked - z.logsumexp(-1), 0.0)
    return out
