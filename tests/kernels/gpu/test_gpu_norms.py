"""Norms on a GPU at real sizes: bf16 against fp64, twice the same bits, in a CUDA graph, without waiting for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaxelm_kernels import norms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
EPS = 1e-5


def inputs(rows: int, size: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """x, residual, weight, bias."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = [(rows, size), (rows, size), (size,), (size,)]
    return [torch.randn(shape, device="cuda", generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def both(given: list[Tensor], centred: bool, kernels: str) -> list[Tensor]:
    """Results of the norm of x + residual, and all gradients for fixed upstream ones."""
    x, residual, weight, bias = given
    if centred:
        outputs, leaves = norms.add_layer_norm(x, residual, weight, bias, EPS, kernels=kernels), given
    else:
        outputs, leaves = norms.add_rms_norm(x, residual, weight, EPS, kernels=kernels), given[:3]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, [residual.detach(), x.detach()])]


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(16384, 2048), (16384 * 16, 128), (1000, 2049), (2048, 16384)])
def test_as_close_to_fp64_as_torch(rows: int, size: int, centred: bool) -> None:
    given = inputs(rows, size)
    truth = both([tensor.detach().double().requires_grad_() for tensor in given], centred, "torch")
    for ours, judge, true in zip(both(given, centred, "triton"), both(given, centred, "torch"), truth, strict=True):
        assert relative(ours, true) <= 1.5 * relative(judge, true) + 1e-4


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("size", [2048, 16384])
def test_two_runs_agree_to_the_bit(size: int, centred: bool) -> None:
    given = inputs(8192, size)
    assert all(torch.equal(a, b) for a, b in zip(both(given, centred, "triton"), both(given, centred, "triton"), strict=True))


@pytest.mark.parametrize("centred", [False, True])
def test_nothing_waits_for_the_device(centred: bool) -> None:
    given = inputs(1024, 2048)
    both(given, centred, "triton")  # compiled before
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(given, centred, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("centred", [False, True])
def test_a_cuda_graph_replays_with_new_values(centred: bool) -> None:
    given = inputs(512, 2048)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both(given, centred, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(given, centred, "triton")
    with torch.no_grad():
        given[0].mul_(-2.0)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, both(given, centred, "triton"), strict=True))


def test_offsets_beyond_int32() -> None:
    rows, size = 270_000, 8192  # 2.2e9 elements, 4.4 GB each of x, result and gradient
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free memory")
    x = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.ones(size, device="cuda", dtype=torch.bfloat16)
    out = norms.rms_norm(x, weight, EPS, kernels="triton")
    (gradient,) = torch.autograd.grad(out, x, out.detach())
    last = x.detach()[-3:].clone().requires_grad_()
    expected = norms.rms_norm(last, weight, EPS, kernels="triton")
    assert torch.equal(out[-3:], expected)
    assert torch.equal(gradient[-3:], torch.autograd.grad(expected, last, expected.detach())[0])
