"""Distillation into a linear head: loss and gradients are those of the full logits, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaxelm_kernels.linear_distillation import linear_distillation

ROWS, SIZE, PIECES, PADDED = 13, 6, 11, 16


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, labels of which two do not count, and a teacher that rules out a piece in some rows."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, SIZE, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, SIZE, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, PIECES, (ROWS,), generator=draw)
    labels[3] = labels[12] = -100
    scores = 2 * torch.randn(ROWS, PIECES, generator=draw, dtype=torch.float64)
    scores[:5, 2] = -torch.inf
    return hidden, weight, labels, scores.log_softmax(-1)


def full_losses(hidden: Tensor, weight: Tensor, labels: Tensor, log_p: Tensor, share: float) -> Tensor:
    log_q = (hidden @ weight[:PIECES].T).log_softmax(-1)
    p = log_p.exp()
    divergence = (p * (log_p.masked_fill(p == 0, 0.0) - log_q)).sum(-1)
    right = -log_q[torch.arange(ROWS), labels.clamp_min(0)]
    return ((1 - share) * divergence + share * right) * (labels >= 0)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_rows", [1, 4, 13, 100])
def test_loss_and_gradients_are_those_of_full_logits(share: float, chunk_rows: int) -> None:
    hidden, weight, labels, log_p = problem()
    expected = full_losses(hidden, weight, labels, log_p, share)
    wanted = torch.autograd.grad(3.0 * expected.sum(), (hidden, weight))
    asked: list[slice] = []

    def teacher(rows: slice) -> Tensor:
        asked.append(rows)
        return log_p[rows]

    total, losses = linear_distillation(hidden, weight, labels, teacher, vocab_size=PIECES, label_weight=share, chunk_rows=chunk_rows)
    found = torch.autograd.grad(3.0 * total, (hidden, weight))
    torch.testing.assert_close(total, expected.sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    assert not losses.requires_grad
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert [rows.start for rows in asked] == list(range(0, ROWS, chunk_rows))
    assert max(rows.stop - rows.start for rows in asked) <= chunk_rows


def test_a_student_that_is_its_teacher_has_no_loss_and_no_slope() -> None:
    hidden, weight, labels, _ = problem()
    log_p = (hidden @ weight[:PIECES].T).log_softmax(-1).detach()
    total, _ = linear_distillation(hidden, weight, labels, lambda rows: log_p[rows], vocab_size=PIECES)
    total.backward()
    assert abs(float(total.detach())) < 1e-12 and float(hidden.grad.abs().max()) < 1e-12  # type: ignore[union-attr]


def test_half_precision_counts_in_fp32() -> None:
    hidden, weight, labels, log_p = problem(torch.bfloat16)
    total, losses = linear_distillation(hidden, weight, labels, lambda rows: log_p[rows], vocab_size=PIECES, label_weight=0.5)
    expected = full_losses(hidden.double(), weight.double(), labels, log_p, 0.5)
    assert losses.dtype == total.dtype == torch.float32
    assert float((losses - expected).abs().max()) < 0.1
    total.backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"label_weight": 1.5}, "label_weight = 1.5"),
        ({"vocab_size": 17}, "vocab_size = 17"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"expected int64 \[13\]"),
        ({"teacher": lambda rows: torch.zeros(1, 3)}, "the teacher gave"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], text: str) -> None:
    hidden, weight, labels, log_p = problem()
    given = {"labels": labels, "teacher": lambda rows: log_p[rows], "vocab_size": PIECES} | change
    with pytest.raises(ValueError, match=text):
        linear_distillation(hidden, weight, **given)  # type: ignore[arg-type]
