"""Activations on a GPU at real sizes: bf16 against fp64, twice the same bits, in a CUDA graph, without waiting for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaxelm_kernels import activations

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
KINDS = ("swiglu", "none", "tanh")


def inputs(rows: int, size: int) -> list[Tensor]:
    """Gate or x, up, bias."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = [(rows, size), (rows, size), (size,)]
    return [torch.randn(shape, device="cuda", generator=generator, dtype=torch.bfloat16).requires_grad_() for shape in shapes]


def run(given: list[Tensor], kind: str, kernels: str, in_place: bool = False) -> list[Tensor]:
    """The result, and all gradients for a fixed upstream one."""
    first, up, bias = given
    leaves = [first, up] if kind == "swiglu" else [first, bias]
    first, other = (first * 1, up * 1) if in_place else (first, up)
    if kind == "swiglu":
        out = activations.swiglu(first, other, kernels=kernels, in_place=in_place)
    else:
        out = activations.gelu_bias(first, bias, kind, kernels=kernels, in_place=in_place)
    return [out.detach(), *torch.autograd.grad(out, leaves, up.detach())]


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "size"), [(4096, 8192), (1001, 2049)])
def test_as_close_to_fp64_as_torch(rows: int, size: int, kind: str) -> None:
    given = inputs(rows, size)
    truth = run([tensor.detach().double().requires_grad_() for tensor in given], kind, "torch")
    for ours, judge, true in zip(run(given, kind, "triton"), run(given, kind, "torch"), truth, strict=True):
        assert relative(ours, true) <= 1.5 * relative(judge, true) + 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_agree_to_the_bit_in_place_or_not(kind: str) -> None:
    given = inputs(16384, 8192)
    first = run(given, kind, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, run(given, kind, "triton"), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, run(given, kind, "triton", in_place=True), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind: str) -> None:
    given = inputs(1024, 8192)
    run(given, kind, "triton")  # compiled before
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(given, kind, "triton", in_place=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cuda_graph_replays_with_new_values(kind: str, in_place: bool) -> None:
    given = inputs(512, 8192)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(given, kind, "triton", in_place)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(given, kind, "triton", in_place)
    with torch.no_grad():
        given[0].mul_(-2.0)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(given, kind, "triton"), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_beyond_int32(kind: str) -> None:
    rows, size = 270_000, 8192  # 2.2e9 elements, 4.4 GB each of inputs, result and gradients
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free memory")
    given = inputs(rows, size)
    found = run(given, kind, "triton")[:2]
    last = [given[0].detach()[-3:].requires_grad_(), given[1].detach()[-3:].requires_grad_(), given[2]]
    for whole, part in zip(found, run(last, kind, "triton")[:2], strict=True):
        assert torch.equal(whole[-3:], part)
