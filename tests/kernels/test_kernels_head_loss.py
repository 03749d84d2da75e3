"""The loss of the head by its kernel, in the interpreter or on a GPU: against fp64, over odd shapes; every element is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megaxelm_kernels import linear_cross_entropy as module
from megaxelm_kernels.head_chunks import rows_per_chunk
from megaxelm_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_each,
    linear_cross_entropy_reference,
    linear_cross_entropy_stats,
    target_logprobs,
)

pytest.importorskip("triton", reason="triton is not installed")
device = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts fp32 off to bf16 where a GPU rounds to the nearest: twice the error, and all on one side.
FACTOR = {torch.float32: 2.0, torch.bfloat16: 2.0 if device == "cuda" else 4.0}
EXTRAS = [{}, {"z_loss": 0.01}, {"soft_cap": 3.0}, {"z_loss": 0.01, "soft_cap": 3.0}]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not written is NaN."""
    empty = torch.empty

    def poison(*size: object, **options: object) -> Tensor:
        out = empty(*size, **options)  # type: ignore[call-overload]
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(module.torch, "empty", poison)


def problem(rows: int, columns: int, vocab: int, hidden: int = 24, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, hidden, generator=g, dtype=torch.float64)
    w = torch.randn(columns, hidden, generator=g, dtype=torch.float64) * 0.3
    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[2::7] = -100
    loss_weights = torch.rand(rows, generator=g, dtype=torch.float64) + 0.25
    return h.to(device), w.to(device), labels.to(device), loss_weights.to(device)


def results(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def compare(h: Tensor, w: Tensor, labels: Tensor, dtype: torch.dtype, **options: object) -> None:
    """Ours by Triton is at most FACTOR times as far from fp64 as full logits by torch in `dtype`."""
    chunk_rows = options.pop("chunk_rows", None)
    low = [x.to(dtype).requires_grad_() for x in (h, w)]
    exact = [x.detach().double().requires_grad_() for x in low]
    truth = results(linear_cross_entropy_reference(*exact, labels, **options), *exact)  # type: ignore[arg-type]
    theirs = results(linear_cross_entropy_reference(*low, labels, **options), *low)  # type: ignore[arg-type]
    ours = results(linear_cross_entropy(*low, labels, kernels="triton", chunk_rows=chunk_rows, **options), *low)  # type: ignore[arg-type]
    for a, b, exactly in zip(ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype
        floor = (1e-6 if a.ndim == 0 else 3e-7) * exactly.norm() + 1e-12  # a sum of few roundings may be exact by luck
        assert (a.double() - exactly).norm() <= FACTOR[dtype] * (b.double() - exactly).norm() + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(("columns", "vocab"), [(1, 1), (63, 63), (128, 127), (2049, 2049), (4096, 4096), (4112, 4100), (9000, 8192)])
def test_error_against_fp64_is_that_of_full_logits(columns: int, vocab: int, extra: dict[str, float], dtype: torch.dtype) -> None:
    h, w, labels, loss_weights = problem(9, columns, vocab)
    compare(h, w, labels, dtype, vocab_size=vocab, loss_weights=loss_weights.float(), chunk_rows=4, **extra)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_vocabulary(dtype: torch.dtype) -> None:
    h, w, labels, loss_weights = problem(3, 256128, 256008, hidden=8)
    labels[:2] = torch.tensor([256007, 0])
    compare(h, w, labels, dtype, vocab_size=256008, loss_weights=loss_weights.float(), z_loss=1e-3)


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_torch_path_is_the_derivative_in_fp64(extra: dict[str, float]) -> None:
    h, w, labels, loss_weights = problem(6, 9, 7, hidden=3)
    h, w = (3 * h).requires_grad_(), w.requires_grad_()
    options = {"vocab_size": 7, "loss_weights": loss_weights, **extra}
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, chunk_rows=4, **options) * 0.5, (h, w))
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy_reference(h, w, labels, **options), (h, w))
    for ours, truth in zip(
        results(linear_cross_entropy(h, w, labels, **options), h, w),
        results(linear_cross_entropy_reference(h, w, labels, **options), h, w),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-13)


def test_the_reference_is_the_formula() -> None:
    h, w, labels, loss_weights = problem(5, 11, 9)
    z = 3.0 * torch.tanh(h @ w[:9].T / 3.0)
    lse = torch.log(torch.exp(z).sum(-1))
    counted = labels != -100
    each = lse - z.gather(1, labels.clamp_min(0)[:, None])[:, 0] + 0.1 * lse**2
    truth = (each * loss_weights)[counted].sum()
    ours = linear_cross_entropy_reference(h, w, labels, vocab_size=9, loss_weights=loss_weights, z_loss=0.1, soft_cap=3.0)
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("extra", [{}, {"soft_cap": 3.0}])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_padding_gets_no_gradient_whatever_it_is(kernels: str, extra: dict[str, float]) -> None:
    h, w, labels, _ = problem(4, 80, 69)
    w[69:] = 1e30
    h, w = h.float().requires_grad_(), w.float().requires_grad_()
    loss = linear_cross_entropy(h, w, labels, vocab_size=69, kernels=kernels, **extra)
    truth = results(linear_cross_entropy_reference(h, w[:69], labels, **extra), h)
    _, grad_h, grad_w = results(loss, h, w)
    assert not grad_w[69:].any()
    torch.testing.assert_close([loss.detach(), grad_h], truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("extra", [{}, {"soft_cap": 3.0}])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_padding_that_is_no_number_is_not_seen(kernels: str, extra: dict[str, float]) -> None:
    h, w, labels, _ = problem(4, 80, 69)
    w[69:] = torch.nan
    h, w = h.float(), w.float().requires_grad_()
    _, grad_w = results(linear_cross_entropy(h, w, labels, vocab_size=69, kernels=kernels, **extra), w)
    assert grad_w.isfinite().all() and not grad_w[69:].any()


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_losses_of_tokens_are_plain_whatever_is_added_to_the_total(kernels: str) -> None:
    h, w, labels, loss_weights = problem(9, 128, 101)
    h, w = h.float(), w.float()
    total, each = linear_cross_entropy_each(h, w, labels, vocab_size=101, loss_weights=loss_weights, z_loss=0.1, kernels=kernels)
    lse, target = linear_cross_entropy_stats(h, w, labels, vocab_size=101, kernels=kernels)
    torch.testing.assert_close(each, lse - target, rtol=1e-5, atol=1e-6)
    counted = labels != -100
    torch.testing.assert_close(total, ((each + 0.1 * lse**2) * loss_weights * counted).sum().float())
    assert torch.equal(each == 0, ~counted)
    assert not each.requires_grad


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_statistics_of_each_row(kernels: str, soft_cap: float | None) -> None:
    h, w, labels, _ = problem(9, 128, 101)
    low = h.float(), w.float()
    z = low[0].double() @ low[1][:101].double().T
    z = z if soft_cap is None else soft_cap * torch.tanh(z / soft_cap)
    counted = labels != -100
    picked = z.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    options = {"vocab_size": 101, "soft_cap": soft_cap, "kernels": kernels, "chunk_rows": 4}
    lse, target = linear_cross_entropy_stats(*low, labels, **options)
    assert lse.dtype == target.dtype == torch.float32
    torch.testing.assert_close(lse.double(), z.logsumexp(-1) * counted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(target.double(), picked * counted, rtol=1e-6, atol=1e-6)
    scores = target_logprobs(*low, labels, **options)
    torch.testing.assert_close(scores.double(), (picked - z.logsumexp(-1)) * counted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_digits_of_the_loss_survive_large_logits(kernels: str) -> None:
    # All logits near 2^14: their log-sum-exp is known to 2^-10 only, the loss to much more.
    w = (2.0**14 + torch.arange(8.0, device=device) / 64)[:, None]
    h, labels = torch.ones(1, 1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    truth = linear_cross_entropy_reference(h.double(), w.double(), labels)
    torch.testing.assert_close(linear_cross_entropy(h, w, labels, kernels=kernels).double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_an_ignored_row_may_hold_anything(kernels: str) -> None:
    h, w, labels, loss_weights = problem(9, 128, 101)
    h, w = h.float(), w.float()
    h[labels == -100], loss_weights[labels == -100] = torch.inf, torch.nan
    total, each = linear_cross_entropy_each(h, w, labels, vocab_size=101, loss_weights=loss_weights, kernels=kernels)
    keep = labels != -100
    torch.testing.assert_close(
        total, linear_cross_entropy_reference(h[keep], w, labels[keep], vocab_size=101, loss_weights=loss_weights[keep]).float()
    )
    assert each.isfinite().all()
    h.requires_grad_()
    if kernels == "triton":
        (grad,) = torch.autograd.grad(linear_cross_entropy(h, w, labels, vocab_size=101, kernels=kernels), h)
        assert not grad[~keep].any() and grad.isfinite().all()


def test_a_label_that_is_no_token_gives_nan_and_not_a_loss() -> None:
    h, w, labels, _ = problem(4, 128, 101)
    for wrong in (101, 127, 5000, -1):
        labels[1] = wrong
        assert linear_cross_entropy(h.float(), w.float(), labels, vocab_size=101, kernels="triton").isnan()


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_empty_and_non_contiguous(kernels: str) -> None:
    h, w, labels, loss_weights = problem(9, 128, 101)
    h, w, loss_weights = h.float(), w.float(), loss_weights.float()
    expected = results(linear_cross_entropy(*(low := [h.requires_grad_(), w.requires_grad_()]), labels, loss_weights=loss_weights), *low)
    strided = [x.detach().T.contiguous().T.requires_grad_() for x in low]
    twice = [torch.stack([x, x], 1)[:, 0] for x in (labels, loss_weights)]
    found = results(linear_cross_entropy(*strided, twice[0], loss_weights=twice[1], kernels=kernels), *strided)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    h = h[:0].detach().requires_grad_()
    loss, grad_h, grad_w = results(linear_cross_entropy(h, low[1], labels[:0], kernels=kernels), h, low[1])
    assert loss == 0 and grad_h.shape == h.shape and not grad_w.any()
    assert target_logprobs(h, low[1], labels[:0], kernels=kernels).shape == (0,)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulation_checkpointing_scale_and_a_kept_graph(kernels: str, dtype: torch.dtype) -> None:
    h, w, labels, _ = problem(8, 128, 101)
    h, w = h.to(dtype), w.to(dtype).requires_grad_()

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, labels, vocab_size=101, kernels=kernels)

    once = torch.autograd.grad(loss(h, w), w)[0]
    for _ in range(2):
        (0.5 * checkpoint(loss, h, w, use_reentrant=False)).backward()
    torch.testing.assert_close(w.grad, once, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    kept = 2 * loss(h, w)
    first = torch.autograd.grad(kept, w, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(kept, w)[0])
    torch.testing.assert_close(first, 2 * once, rtol=1e-6, atol=0)
    with torch.no_grad():
        assert torch.equal(loss(h, w), kept / 2)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone(kernels: str, wanted: int) -> None:
    h, w, labels, _ = problem(8, 128, 101)
    both = [x.float().requires_grad_() for x in (h, w)]
    expected = results(linear_cross_entropy(*both, labels, vocab_size=101, kernels=kernels), *both)[1 + wanted]
    leaves = [x.float().requires_grad_(i == wanted) for i, x in enumerate((h, w))]
    loss = linear_cross_entropy(*leaves, labels, vocab_size=101, kernels=kernels)
    loss.backward()
    assert torch.equal(leaves[wanted].grad, expected)  # type: ignore[arg-type]
    assert leaves[1 - wanted].grad is None


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    h, w, labels, _ = problem(3, 16, 16)
    w.requires_grad_()
    monkeypatch.setattr(module, "add_product", None)
    with torch.no_grad():
        linear_cross_entropy(h, w, labels)
    with pytest.raises(TypeError):
        linear_cross_entropy(h, w, labels)


def test_a_second_derivative_is_refused() -> None:
    h, w, labels, _ = problem(3, 16, 16)
    h.requires_grad_()
    (grad,) = torch.autograd.grad(linear_cross_entropy(h, w, labels).square(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_default_chunk_keeps_within_the_memory_promised() -> None:
    rows, columns, hidden = 16384, 256128, 2048
    chunk = rows_per_chunk(rows, columns, torch.bfloat16, "cuda", kernels="triton")
    assert chunk == 4096
    logits, grad_hidden, of_rows = 2 * chunk * columns, 2 * rows * hidden, rows * (4 * 4 + 8 + 8)
    # Forward: a chunk of logits, the gradient of the hidden states, and some numbers a row; cuBLAS has a workspace of 32 MiB.
    forward = logits + grad_hidden + of_rows + (32 << 20)
    # Backward: the fp32 sum is still there while it is rounded into the gradient in bf16; both gradients of the hidden states.
    backward = 2 * columns * hidden + 2 * grad_hidden + of_rows
    assert forward == 2_098_200_576 + 67_108_864 + 524_288 + 33_554_432
    assert max(forward, backward) <= 2.5e9


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"chunk_rows": 7}, 7),
        ({"chunk_rows": 7, "chunk_bytes": 1}, 7),
        ({"chunk_bytes": 1}, 1),
        ({"chunk_bytes": 400 * 1000 * 2, "kernels": "triton"}, 384),  # whole tiles of 128 rows; three equal chunks of 1000
        ({"chunk_bytes": 500 * 1000 * 2, "kernels": "triton"}, 384),  # two chunks of 500 would be 512 in whole tiles: too much
        ({"chunk_bytes": 100 * 1000 * 2, "kernels": "triton"}, 100),
        ({"chunk_bytes": 100 * 1000 * 6}, 100),  # bf16 and fp32
        ({"chunk_bytes": 100 * 1000 * 10, "capped": True}, 100),
        ({}, 1000),
    ],
)
def test_rows_of_a_chunk(options: dict[str, object], rows: int) -> None:
    assert rows_per_chunk(1000, 1000, torch.bfloat16, "cpu", **options) == rows  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kernels": "cuda"}, "kernels = 'cuda'"),
        ({"kernels": "triton"}, "fp32"),
        ({"z_loss": -1.0}, "z_loss = -1.0"),
        ({"soft_cap": 0.0}, "soft_cap = 0.0"),
        ({"chunk_bytes": 0}, "chunk_bytes = 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, object], text: str) -> None:
    h, w, labels, _ = problem(4, 16, 16)
    with pytest.raises(ValueError, match=text):
        linear_cross_entropy(h, w, labels, **change)  # type: ignore[arg-type]
