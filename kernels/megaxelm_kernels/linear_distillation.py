"""Distillation into a linear head without the full logits: the loss against a teacher's distribution, chunk by chunk.

The loss of a row is (1 - a) * KL(p || q) + a * (-log q(label)) in nats, with the teacher's distribution p (forward KL: Hinton et al. 2015,
arXiv 1503.02531, at temperature 1) and the student's q = softmax(hidden @ weight.T). Its gradient with respect to the logits is q - t,
where t = (1 - a) p + a onehot(label). As in `linear_cross_entropy` the gradients of hidden states and weight are computed in the forward
pass while the logits of a chunk are at hand, so nothing of size [N, vocabulary] is kept: neither the student's nor the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .head_chunks import add_product, is_exact, rows_per_chunk

IGNORE_INDEX = -100

Teacher = Callable[[slice], Tensor]
"""Log-probabilities [rows, vocabulary] fp32 or fp64 of the teacher for some rows of the batch; -inf is allowed."""


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: Teacher,
    *,
    vocab_size: int | None = None,
    label_weight: float = 0.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the losses of the rows whose label is not -100, with gradients for `hidden` and `weight`; and the loss of each row [N].

    Args:
        hidden: [N, H]. weight: [V, H] of the same type; rows from `vocab_size` on are padding.
        labels: [N] int64; a row of -100 has no loss, whatever the teacher says.
        label_weight: a, the share of the hard label, 0 to 1.
        chunk_rows: rows of logits that exist at one time; None: what a memory budget holds.

    Returns:
        fp32 (fp64 for fp64): the sum, and the losses without a gradient.

    Raises:
        ValueError: shapes or values that do not fit.
    """
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden {hidden.dtype} {tuple(hidden.shape)} and weight {weight.dtype} {tuple(weight.shape)}: expected [N, H] and [V, H] of "
            "one type"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels {labels.dtype} {tuple(labels.shape)}: expected int64 [{hidden.shape[0]}], one a row of hidden")
    if not 1 <= vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size = {vocab_size}: choose 1 to {weight.shape[0]}, the rows of the head")
    if not 0 <= label_weight <= 1:
        raise ValueError(f"label_weight = {label_weight}: choose 0 (the teacher alone) to 1 (the labels alone)")
    # Twice the columns: the teacher's are there at the same time.
    rows = rows_per_chunk(hidden.shape[0], 2 * weight.shape[0], hidden.dtype, hidden.device.type, chunk_rows=chunk_rows)
    return _LinearDistillation.apply(hidden, weight, labels, teacher, vocab_size, label_weight, rows)


def _chunk(logits: Tensor, labels: Tensor, log_p: Tensor, label_weight: float) -> tuple[Tensor, Tensor]:
    """Loss [rows] and its slope [rows, vocabulary] with respect to the logits; rows of -100 give zeros."""
    counted = labels != IGNORE_INDEX
    token = labels.masked_fill(~counted, 0)[:, None]
    log_q = logits.log_softmax(-1)
    p = log_p.exp()
    # xlogy-like: a piece that the teacher rules out adds nothing, and its -inf must not meet a zero.
    divergence = torch.where(p > 0, p * (log_p.clamp_min(torch.finfo(log_p.dtype).min) - log_q), 0.0).sum(-1)
    loss = (1 - label_weight) * divergence - label_weight * log_q.gather(1, token)[:, 0]
    slope = log_q.exp_() - (1 - label_weight) * p
    slope.scatter_add_(1, token, torch.full_like(token, -label_weight, dtype=slope.dtype))
    return torch.where(counted, loss, 0.0), slope.masked_fill_(~counted[:, None], 0.0)


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Teacher, vocab_size: int, label_weight: float, chunk_rows: int
    ) -> tuple[Tensor, Tensor]:
        wide = hidden.dtype if is_exact(hidden.dtype) else torch.float32
        losses = torch.zeros(hidden.shape[0], dtype=wide, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], chunk_rows):
            part = slice(start, min(start + chunk_rows, hidden.shape[0]))
            logits = (hidden[part] @ weight[:vocab_size].T).to(wide)
            log_p = teacher(part).to(device=hidden.device, dtype=wide)
            if log_p.shape != logits.shape:
                raise ValueError(f"the teacher gave {tuple(log_p.shape)} for logits {tuple(logits.shape)}: one number a row and piece")
            losses[part], slope = _chunk(logits, labels[part], log_p, label_weight)
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight[:vocab_size], out=grad_hidden[part])
            if grad_weight is not None:
                add_product(grad_weight[:vocab_size], slope, hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        found_hidden = None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype)
        found_weight = None if grad_weight is None else (grad_weight * scale).to(ctx.dtype)
        return found_hidden, found_weight, None, None, None, None, None
