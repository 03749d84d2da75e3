"""The chunked loss against fp64, its memory, and what is not counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaxelm_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, target_logprobs


def problem(rows: int = 37, hidden: int = 24, columns: int = 128, vocab: int = 101, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, hidden, generator=g, dtype=torch.float64)
    w = torch.randn(columns, hidden, generator=g, dtype=torch.float64) * 0.3
    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[3::7] = -100
    return h, w, labels, torch.rand(rows, generator=g, dtype=torch.float64)


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def test_gradcheck_with_weights_padding_and_ignored_labels() -> None:
    h, w, labels, loss_weights = problem(rows=6, hidden=3, columns=9, vocab=7)
    h.requires_grad_()
    w.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels % 7, vocab_size=7, loss_weights=loss_weights, chunk_rows=4) * 0.5, (h, w)
    )


@pytest.mark.parametrize("chunk_rows", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_chunking_equals_the_reference_in_fp64(chunk_rows: int, weighted: bool) -> None:
    h, w, labels, loss_weights = problem()
    h.requires_grad_()
    w.requires_grad_()
    options = {"vocab_size": 101, "loss_weights": loss_weights if weighted else None}
    loss = linear_cross_entropy(h, w, labels, chunk_rows=chunk_rows, **options)
    reference = linear_cross_entropy_reference(h, w, labels, **options)
    torch.testing.assert_close(loss, reference, rtol=1e-13, atol=0)
    for ours, truth in zip(gradients(loss / 3, h, w), gradients(reference / 3, h, w), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_fp64_is_that_of_torchs_own_operations(dtype: torch.dtype) -> None:
    h, w, labels, _ = problem(rows=200, hidden=64, columns=512, vocab=500)
    low = [x.to(dtype).requires_grad_() for x in (h, w)]
    exact = [x.detach().double().requires_grad_() for x in low]
    truth = gradients(linear_cross_entropy_reference(*exact, labels, vocab_size=500), *exact)
    reference_loss = linear_cross_entropy_reference(*low, labels, vocab_size=500)
    reference = gradients(reference_loss, *low)
    loss = linear_cross_entropy(*low, labels, vocab_size=500, chunk_rows=64)
    true_loss = linear_cross_entropy_reference(*exact, labels, vocab_size=500)
    assert loss.dtype == torch.float32
    assert abs(loss.double() - true_loss) <= 2 * abs(reference_loss.double() - true_loss) + 1e-6 * true_loss
    for ours, theirs, exactly in zip(gradients(loss, *low), reference, truth, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exactly).norm() <= 1.5 * (theirs.double() - exactly).norm()


def test_padding_columns_get_no_probability_and_no_gradient() -> None:
    h, w, labels, _ = problem()
    w[101:] = 50.0 * w[101:].sign()
    h.requires_grad_()
    w.requires_grad_()
    loss = linear_cross_entropy(h, w, labels, vocab_size=101, chunk_rows=8)
    grad_h, grad_w = gradients(loss, h, w)
    assert torch.equal(grad_w[101:], torch.zeros_like(grad_w[101:]))
    torch.testing.assert_close(loss, linear_cross_entropy_reference(h, w[:101], labels))
    assert grad_h.isfinite().all()


def test_what_is_not_counted_may_be_anything() -> None:
    h, w, labels, _ = problem()
    h[3] = torch.inf
    h.requires_grad_()
    loss = linear_cross_entropy(h, w, labels, vocab_size=101, chunk_rows=8)
    keep = labels != -100
    torch.testing.assert_close(loss, linear_cross_entropy_reference(h[keep], w, labels[keep], vocab_size=101))


def test_all_ignored_gives_zero_loss_and_zero_gradients() -> None:
    h, w, labels, _ = problem()
    h.requires_grad_()
    w.requires_grad_()
    loss = linear_cross_entropy(h, w, torch.full_like(labels, -100))
    assert loss.item() == 0
    assert all(not grad.any() for grad in gradients(loss, h, w))


def test_large_logits_do_not_overflow() -> None:
    h, w, labels, _ = problem()
    h = (h * 1e4).float().requires_grad_()
    loss = linear_cross_entropy(h, w.float(), labels)
    torch.testing.assert_close(loss, linear_cross_entropy_reference(h, w.float(), labels), rtol=1e-5, atol=0)
    assert gradients(loss, h)[0].isfinite().all()


def test_target_logprobs_is_minus_the_loss_of_each_token() -> None:
    h, w, labels, _ = problem()
    scores = target_logprobs(h, w, labels, vocab_size=101, chunk_rows=10)
    torch.testing.assert_close(-scores.sum(), linear_cross_entropy_reference(h, w, labels, vocab_size=101))
    assert torch.equal(scores == 0, labels == -100)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation's result had."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("with_gradients", [True, False])
def test_no_tensor_is_larger_than_one_chunk_of_logits(with_gradients: bool) -> None:
    rows, columns, chunk = 512, 2048, 32
    h = torch.randn(rows, 16).requires_grad_(with_gradients)
    w = torch.randn(columns, 16).requires_grad_(with_gradients)
    labels = torch.randint(0, columns, (rows,))
    with LargestTensor() as mode:
        loss = linear_cross_entropy(h, w, labels, chunk_rows=chunk)
        if with_gradients:
            loss.backward()
    assert mode.largest <= chunk * columns * 4
    with LargestTensor() as mode:
        linear_cross_entropy_reference(h, w, labels)
    assert mode.largest >= rows * columns * 4, "the measurement sees full logits where there are some"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"vocab_size": 129}, "vocab_size = 129"),
        ({"chunk_rows": 0}, "chunk_rows = 0"),
        ({"loss_weights": torch.ones(3)}, "loss_weights"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, object], text: str) -> None:
    h, w, labels, _ = problem()
    with pytest.raises(ValueError, match=text):
        linear_cross_entropy(h, w, labels, **change)  # type: ignore[arg-type]
