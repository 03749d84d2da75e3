"""The loss of the head at real sizes on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaxelm_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_stats

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
VOCAB, COLUMNS = 256008, 256128


def problem(rows: int, hidden: int = 2048, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator(device="cuda").manual_seed(0)
    h = torch.randn(rows, hidden, device="cuda", generator=g).to(dtype).requires_grad_()
    w = (torch.randn(COLUMNS, hidden, device="cuda", generator=g) * hidden**-0.5).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (rows,), device="cuda", generator=g)
    labels[::5] = -100
    return h, w, labels, torch.rand(rows, device="cuda", generator=g)


def gradients(h: Tensor, w: Tensor, labels: Tensor, loss_weights: Tensor, kernels: str, **options: float) -> list[Tensor]:
    loss = linear_cross_entropy(h, w, labels, vocab_size=VOCAB, loss_weights=loss_weights, kernels=kernels, **options)  # type: ignore[arg-type]
    return [loss.detach(), *torch.autograd.grad(loss, (h, w))]


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-4, "soft_cap": 30.0}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_error_against_fp64(dtype: torch.dtype, options: dict[str, float]) -> None:
    h, w, labels, loss_weights = problem(512, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in (h, w)]
    truth = gradients(*exact, labels, loss_weights, "torch", **options)
    theirs = gradients(h, w, labels, loss_weights, "torch", **options)
    ours = gradients(h, w, labels, loss_weights, "triton", **options)
    for a, b, exactly in zip(ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - exactly).norm() <= 2 * (b.double() - exactly).norm() + 1e-6 * exactly.norm()
    assert not ours[2][VOCAB:].any()


def test_two_runs_are_bit_equal() -> None:
    inputs = problem(1024)
    for a, b in zip(gradients(*inputs, "triton"), gradients(*inputs, "triton"), strict=True):
        assert torch.equal(a, b)


def test_rows_beyond_the_reach_of_32_bits() -> None:
    # 8448 x 256128 = 2.16e9 elements in one chunk: 4.3 GB of logits.
    h, w, labels, _ = problem(8448, hidden=128)
    options = {"vocab_size": VOCAB, "kernels": "triton"}
    whole = linear_cross_entropy(h, w, labels, chunk_rows=8448, **options)  # type: ignore[arg-type]
    parts = linear_cross_entropy(h, w, labels, chunk_rows=1056, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.autograd.grad(whole, h)[0], torch.autograd.grad(parts, h)[0], rtol=2e-2, atol=1e-4)
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=0)


def test_nothing_waits_for_the_gpu() -> None:
    h, w, labels, loss_weights = problem(512)
    gradients(h, w, labels, loss_weights, "triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(h, w, labels, loss_weights, "triton", z_loss=1e-4)
        linear_cross_entropy_stats(h, w, labels, vocab_size=VOCAB, kernels="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_it_on_new_inputs() -> None:
    h, w, labels, loss_weights = problem(256)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(h, w, labels, loss_weights, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(h, w, labels, loss_weights, "triton")
    with torch.no_grad():
        h.copy_(torch.randn_like(h))
        labels.copy_(labels.roll(1))
    graph.replay()
    for a, b in zip(captured, gradients(h, w, labels, loss_weights, "triton"), strict=True):
        assert torch.equal(a, b)


def test_memory_is_what_was_promised() -> None:
    h, w, labels, loss_weights = problem(16384)
    gradients(h, w, labels, loss_weights, "triton")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(h, w, labels, loss_weights, "triton")
    fp32_gradient = 4 * w.numel()
    assert torch.cuda.max_memory_allocated() - before - fp32_gradient <= 2.5e9
