"""Cross-entropy of a linear head without the full logits.

The logits exist for a chunk of rows at a time, as many as a budget of bytes allows. When gradients are needed, those of hidden states
and weight are computed in the forward pass, chunk by chunk, while the logits of the chunk are at hand, so nothing is recomputed and
nothing of size [N, vocabulary] is kept. The idea is that of Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv
2410.10989). The weight's gradient is summed in fp32 and rounded once, in the backward pass, where it is scaled anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .head_chunks import add_product, is_exact, rows_per_chunk

IGNORE_INDEX = -100


@dataclass(frozen=True)
class _Settings:
    vocab_size: int
    chunk_rows: int
    z_loss: float
    soft_cap: float | None
    kernels: str


def _sum_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, settings: _Settings) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: expected [N, H] and [V, H]")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}: give both one type")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels {labels.dtype} {tuple(labels.shape)}: expected int64 [{hidden.shape[0]}], one a row of hidden")
    if not 1 <= settings.vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size = {settings.vocab_size}: choose 1 to {weight.shape[0]}, the rows of the head")
    if settings.z_loss < 0:
        raise ValueError(f"z_loss = {settings.z_loss}: choose 0 or more")
    if settings.soft_cap is not None and not settings.soft_cap > 0:
        raise ValueError(f"soft_cap = {settings.soft_cap}: choose a number above 0, or None for no cap")
    if settings.kernels not in ("torch", "triton"):
        raise ValueError(f"kernels = {settings.kernels!r}: choose torch or triton")
    if settings.kernels == "triton" and hidden.dtype == torch.float64:
        raise ValueError("kernels = triton: hidden is torch.float64; the kernel counts in fp32, choose torch")


class _TorchRows:
    """Losses of one chunk after another in the same memory: memory that is taken anew each time costs page faults on a CPU."""

    def __init__(self, weight: Tensor, settings: _Settings, rows: int, with_gradient: bool) -> None:
        self.weight, self.settings, self.with_gradient = weight, settings, with_gradient
        self.product = torch.empty(rows, weight.shape[0], dtype=weight.dtype, device=weight.device)
        exact = is_exact(weight.dtype)
        self.wide = self.product if exact else torch.empty(self.product.shape, dtype=torch.float32, device=weight.device)
        self.slope = torch.empty_like(self.wide) if settings.soft_cap is not None and with_gradient else None

    def __call__(self, hidden: Tensor, labels: Tensor, row_weights: Tensor, lse: Tensor, target: Tensor, nll: Tensor) -> Tensor | None:
        """Fill `lse`, `target`, `nll` [rows]; the gradient [rows, V] of the weighted losses with respect to the products, valid until
        the next call. Padding columns are multiplied, for aligned products, and then -inf."""
        rows, settings = hidden.shape[0], self.settings
        product, z = self.product[:rows], self.wide[:rows]
        torch.mm(hidden, self.weight.T, out=product)
        if z.data_ptr() != product.data_ptr():
            z.copy_(product)
        if settings.soft_cap is not None:
            z.div_(settings.soft_cap).tanh_()
            if self.slope is not None:
                torch.mul(z, z, out=self.slope[:rows]).neg_().add_(1.0)
            z.mul_(settings.soft_cap)
        z[:, settings.vocab_size :] = -torch.inf
        counted = labels != IGNORE_INDEX
        token = labels.masked_fill(~counted, 0)[:, None]
        picked = z.gather(1, token)[:, 0]
        top = z.amax(dim=-1, keepdim=True)
        sums = z.sub_(top).exp_().sum(dim=-1)
        top, log_sums = top[:, 0], sums.log()
        # where, not a product: a token that does not count may have any logit, infinite too.
        lse.copy_(torch.where(counted, log_sums + top, 0.0))
        target.copy_(torch.where(counted, picked, 0.0))
        nll.copy_(torch.where(counted, log_sums - (picked - top), 0.0))  # not lse - target: both may be large
        if not self.with_gradient:
            return None
        factor = row_weights / sums
        if settings.z_loss != 0:
            factor = factor * (1.0 + 2.0 * settings.z_loss * lse)
        z.mul_(factor[:, None])
        z.scatter_add_(1, token, -row_weights[:, None])
        if self.slope is not None:
            z.mul_(self.slope[:rows])
            z[:, settings.vocab_size :] = 0.0
        return z if z.data_ptr() == product.data_ptr() else product.copy_(z)


class _TritonRows:
    """The same by the kernel, which needs no logits in fp32."""

    def __init__(self, weight: Tensor, settings: _Settings, rows: int, with_gradient: bool) -> None:
        self.weight, self.settings, self.with_gradient = weight, settings, with_gradient
        self.product = torch.empty(rows, weight.shape[0], dtype=weight.dtype, device=weight.device)

    def __call__(self, hidden: Tensor, labels: Tensor, row_weights: Tensor, lse: Tensor, target: Tensor, nll: Tensor) -> Tensor | None:
        from .linear_cross_entropy_triton import row_losses

        product = self.product[: hidden.shape[0]]
        torch.mm(hidden, self.weight.T, out=product)
        row_losses(
            product,
            labels,
            row_weights,
            lse,
            target,
            nll,
            vocab_size=self.settings.vocab_size,
            z_loss=self.settings.z_loss,
            soft_cap=self.settings.soft_cap,
            with_gradient=self.with_gradient,
            ignore_index=IGNORE_INDEX,
        )
        return product if self.with_gradient else None


@dataclass
class _Losses:
    """What the chunks gave: `lse`, `target`, `nll` and `row_weights` [N], 0 where the label is -100, and the gradients asked for."""

    lse: Tensor
    target: Tensor
    nll: Tensor
    row_weights: Tensor
    grad_hidden: Tensor | None = None
    grad_weight: Tensor | None = None


def _run(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor | None,
    settings: _Settings,
    needs_hidden: bool = False,
    needs_weight: bool = False,
) -> _Losses:
    rows, dtype, chunk_rows = hidden.shape[0], _sum_dtype(hidden), settings.chunk_rows
    labels = labels.contiguous()
    row_weights = (labels != IGNORE_INDEX).to(dtype)
    if loss_weights is not None:
        row_weights = torch.where(row_weights != 0, loss_weights.to(dtype), 0.0)
    lse, target, nll = (torch.empty(rows, dtype=dtype, device=hidden.device) for _ in range(3))
    losses = _Losses(lse, target, nll, row_weights)
    if needs_hidden:
        losses.grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    if needs_weight:
        losses.grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    make = _TritonRows if settings.kernels == "triton" else _TorchRows
    chunk_losses = make(weight, settings, min(chunk_rows, rows), needs_hidden or needs_weight)
    for start in range(0, rows, chunk_rows):
        part = slice(start, start + chunk_rows)
        grad_logits = chunk_losses(hidden[part], labels[part], row_weights[part], lse[part], target[part], nll[part])
        if losses.grad_hidden is not None and grad_logits is not None:
            torch.mm(grad_logits, weight, out=losses.grad_hidden[part])
        if losses.grad_weight is not None and grad_logits is not None:
            add_product(losses.grad_weight, grad_logits, hidden[part])
    return losses


def _total(losses: _Losses, z_loss: float) -> Tensor:
    each = losses.nll if z_loss == 0 else losses.nll + z_loss * losses.lse.square()
    return (each * losses.row_weights).sum()


def _graph_is_kept() -> bool:
    try:
        return bool(torch._C._autograd._get_current_graph_task_keep_graph())
    except AttributeError:  # not public: without it, one more tensor
        return True


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * scale in `dtype`, in place where nothing else wants it: no second tensor of the size of the weight in fp32."""
    if gradient.dtype == dtype and not _graph_is_kept():
        return gradient.mul_(scale.to(dtype))
    return torch.mul(gradient, scale, out=torch.empty(gradient.shape, dtype=dtype, device=gradient.device))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None, settings: _Settings
    ) -> tuple[Tensor, Tensor]:
        losses = _run(hidden, weight, labels, loss_weights, settings, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(losses.grad_hidden, losses.grad_weight)
        ctx.mark_non_differentiable(losses.nll)
        return _total(losses, settings.z_loss), losses.nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = (None if saved is None else _scaled(saved, grads[0], ctx.dtype) for saved in ctx.saved_tensors)
        return hidden, weight, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    loss_weights: Tensor | None = None,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk_rows: int | None = None,
    chunk_bytes: int | None = None,
    kernels: str = "torch",
) -> Tensor:
    """Sum over tokens of loss_weight * (-log softmax(z)[label] + z_loss * logsumexp(z)^2), a scalar in fp32 (fp64 for fp64 input), in nats.

    z = hidden @ weight.T, or soft_cap * tanh(hidden @ weight.T / soft_cap). Sources: Chowdhery et al. 2022, arXiv 2204.02311, section 5
    (z-loss); Gemma Team 2024, arXiv 2408.00118, section 2 (soft cap).

    Args:
        hidden: [N, H].
        weight: [V, H]; rows from `vocab_size` on are padding: they get no probability and no gradient.
        labels: [N] int64; -100 is not counted. Another that is no token: an error on a CPU, a loss of NaN by Triton.
        loss_weights: [N], weight of each token; None counts each once. No gradient flows to it.
        chunk_rows: rows of logits that exist at one time; None: as many as `chunk_bytes` allows (`rows_per_chunk`).
        kernels: `torch` or `triton`, as `backend.choose_kernels` says.

    Raises:
        ValueError: shapes or types that do not fit, a number out of range, fp64 by Triton.
    """
    return linear_cross_entropy_each(
        hidden,
        weight,
        labels,
        vocab_size=vocab_size,
        loss_weights=loss_weights,
        z_loss=z_loss,
        soft_cap=soft_cap,
        chunk_rows=chunk_rows,
        chunk_bytes=chunk_bytes,
        kernels=kernels,
    )[0]


def _settings(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int | None,
    z_loss: float,
    soft_cap: float | None,
    chunk_rows: int | None,
    chunk_bytes: int | None,
    kernels: str,
) -> _Settings:
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    rows = rows_per_chunk(
        hidden.shape[0],
        weight.shape[0],
        weight.dtype,
        weight.device.type,
        chunk_rows=chunk_rows,
        chunk_bytes=chunk_bytes,
        capped=soft_cap is not None,
        kernels=kernels,
    )
    settings = _Settings(vocab_size, rows, z_loss, soft_cap, kernels)
    _check(hidden, weight, labels, settings)
    return settings


def linear_cross_entropy_each(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    loss_weights: Tensor | None = None,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk_rows: int | None = None,
    chunk_bytes: int | None = None,
    kernels: str = "torch",
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy`, and each token's -log softmax(z)[label], [N] in its type: without loss weight and z-loss, 0 where the label
    is -100, and without a gradient."""
    settings = _settings(hidden, weight, labels, vocab_size, z_loss, soft_cap, chunk_rows, chunk_bytes, kernels)
    if loss_weights is not None and loss_weights.shape != labels.shape:
        raise ValueError(f"loss_weights {tuple(loss_weights.shape)}: expected [{labels.shape[0]}], one a label")
    if not torch.is_grad_enabled():
        losses = _run(hidden, weight, labels, loss_weights, settings)
        return _total(losses, z_loss), losses.nll
    total, each = _LinearCrossEntropy.apply(hidden, weight, labels, loss_weights, settings)
    return total, each


@torch.no_grad()
def linear_cross_entropy_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    chunk_rows: int | None = None,
    chunk_bytes: int | None = None,
    kernels: str = "torch",
) -> tuple[Tensor, Tensor]:
    """logsumexp(z) and z[label] of each row, [N] fp32 each (fp64 for fp64 input), z as in `linear_cross_entropy`; both 0 where the label
    is -100. Their difference is the log-probability; where both are large, `target_logprobs` has more of its digits.

    Raises:
        ValueError: as `linear_cross_entropy`.
    """
    settings = _settings(hidden, weight, labels, vocab_size, 0.0, soft_cap, chunk_rows, chunk_bytes, kernels)
    losses = _run(hidden, weight, labels, None, settings)
    return losses.lse, losses.target


@torch.no_grad()
def target_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    chunk_rows: int | None = None,
    chunk_bytes: int | None = None,
    kernels: str = "torch",
) -> Tensor:
    """log softmax(z)[label] of each row, [N] fp32 (fp64 for fp64 input), in nats; z as in `linear_cross_entropy`, 0 where the label
    is -100.

    Raises:
        ValueError: as `linear_cross_entropy`.
    """
    settings = _settings(hidden, weight, labels, vocab_size, 0.0, soft_cap, chunk_rows, chunk_bytes, kernels)
    return -_run(hidden, weight, labels, None, settings).nll


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    loss_weights: Tensor | None = None,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
) -> Tensor:
    """The same sum from the full logits, by torch's own operations: the truth that `linear_cross_entropy` is tested against."""
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    z = (hidden @ weight[:vocab_size].T).to(_sum_dtype(hidden))
    if soft_cap is not None:
        z = soft_cap * torch.tanh(z / soft_cap)
    each = torch.nn.functional.cross_entropy(z, labels, ignore_index=IGNORE_INDEX, reduction="none")
    if z_loss != 0:
        each = each + z_loss * torch.where(labels != IGNORE_INDEX, z.logsumexp(-1), 0.0).square()
    return each.sum() if loss_weights is None else (each * loss_weights).sum()
