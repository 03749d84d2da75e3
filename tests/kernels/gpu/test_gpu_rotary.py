"""The rotary kernels at real sizes: against fp64, bit-equal twice, in a CUDA graph, without waiting, and past 2^31 elements."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaxelm_kernels.rotary import (
    apply_rotary_qk,
    apply_rotary_reference,
    norm_rotary_qk,
    norm_rotary_qk_reference,
    rotary_parameters,
    rotary_tables,
    split_qkv,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EPS = 1e-6
SHAPES = [(16384, 16, 16, 128, 128), (16384, 32, 8, 64, 64), (4099, 16, 4, 256, 64)]  # tokens, heads, kv_heads, head_dim, rotary_dim


def batch(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    tokens, heads, kv_heads, head_dim, rotary_dim = shape
    torch.manual_seed(0)
    made = {
        name: torch.randn(tokens, n, head_dim, device="cuda", dtype=dtype)
        for name, n in (("q", heads), ("k", kv_heads), ("gq", heads), ("gk", kv_heads))
    }
    for name in ("q_weight", "k_weight"):
        made[name] = 1 + 0.3 * torch.randn(head_dim, device="cuda", dtype=dtype)
    frequencies, _ = rotary_parameters(head_dim, 500000.0, rotary_dim=rotary_dim)
    positions = torch.arange(tokens, device="cuda") % 2048
    made["cos"], made["sin"] = rotary_tables(positions, frequencies.cuda())
    return made


def turned(made: dict[str, Tensor], kernels: str, interleaved: bool) -> list[Tensor]:
    q, k = made["q"].detach().requires_grad_(), made["k"].detach().requires_grad_()
    if kernels == "reference":
        out = [apply_rotary_reference(x, made["cos"], made["sin"], interleaved=interleaved) for x in (q, k)]
    else:
        out = list(apply_rotary_qk(q, k, made["cos"], made["sin"], interleaved=interleaved, kernels=kernels))
    return [*(x.detach() for x in out), *torch.autograd.grad(out, (q, k), (made["gq"], made["gk"]))]


def normed(made: dict[str, Tensor], kernels: str, interleaved: bool) -> list[Tensor]:
    inputs = [made[name].detach().requires_grad_() for name in ("q", "k", "q_weight", "k_weight")]
    if kernels == "reference":
        out = norm_rotary_qk_reference(*inputs, EPS, made["cos"], made["sin"], interleaved=interleaved)
    else:
        out = norm_rotary_qk(*inputs, EPS, made["cos"], made["sin"], interleaved=interleaved, kernels=kernels)
    return [*(x.detach() for x in out), *torch.autograd.grad(out, inputs, (made["gq"], made["gk"]))]


@pytest.mark.parametrize("run", [turned, normed])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_the_truth_rounded_once_and_twice_the_same(shape: tuple[int, ...], interleaved: bool, run) -> None:
    made = batch(shape)
    found, again = run(made, "triton", interleaved), run(made, "triton", interleaved)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    truth = run({name: x.double() for name, x in made.items()}, "reference", interleaved)
    peers = run(made, "torch", interleaved)
    for ours, peer, right in zip(found, peers, truth, strict=True):
        assert (ours.double() - right).norm() <= 1.5 * (peer.double() - right).norm()
        floor = 1e-4 if right.ndim > 1 else 1e-2  # a weight's gradient is a sum over all heads and tokens
        assert ((ours.double() - right).abs() <= 0.51 * torch.finfo(torch.bfloat16).eps * right.abs() + floor).all()


@pytest.mark.parametrize("in_place", [False, True])
def test_views_of_a_packed_projection(in_place: bool) -> None:
    made = batch(SHAPES[1])
    tokens, heads, kv_heads, head_dim, _ = SHAPES[1]
    whole = torch.cat([made["q"].flatten(1), made["k"].flatten(1), made["gk"].flatten(1)], 1).requires_grad_()
    q, k, v = split_qkv(whole * 1, heads, kv_heads, head_dim)
    out = apply_rotary_qk(q, k, made["cos"], made["sin"], kernels="triton", in_place=in_place)
    (grad,) = torch.autograd.grad([*out, v], whole, [made["gq"].clone(), made["gk"].clone(), made["gk"].clone()])
    plain = turned(made, "triton", False)
    assert torch.equal(out[0], plain[0]) and torch.equal(out[1], plain[1]) and torch.equal(v, made["gk"])
    assert torch.equal(grad, torch.cat([plain[2].flatten(1), plain[3].flatten(1), made["gk"].flatten(1)], 1))
    assert (out[0].data_ptr() == q.data_ptr()) == in_place
    assert tokens == grad.shape[0]


@pytest.mark.parametrize("run", [turned, normed])
def test_no_call_waits_for_the_device(run) -> None:
    made = batch(SHAPES[0])
    run(made, "triton", False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(made, "triton", False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("run", [turned, normed])
def test_a_cuda_graph_replays_it(run) -> None:
    made = batch(SHAPES[1])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(made, "triton", False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(made, "triton", False)
    for name in ("q", "k", "gq", "gk"):
        made[name].normal_()
    graph.replay()
    torch.cuda.synchronize()
    for ours, right in zip(captured, run(made, "triton", False), strict=True):
        assert torch.equal(ours, right)


def test_offsets_past_31_bits() -> None:
    """140000 tokens x 128 heads x 128 features: 2.3e9 elements, 4.6 GB in bf16; about 25 GB with gradients."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    tokens, heads, head_dim = 140_000, 128, 128
    q = torch.randn(tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(tokens, 1, head_dim, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(head_dim, device="cuda", dtype=torch.bfloat16)
    cos, sin = rotary_tables(torch.arange(tokens, device="cuda"), rotary_parameters(head_dim, 1e6)[0].cuda())
    last = slice(tokens - 5, tokens)
    for run in (
        lambda q, k, *tables: apply_rotary_qk(q, k, *tables, kernels="triton"),
        lambda q, k, *tables: norm_rotary_qk(q, k, weight, weight, EPS, *tables, kernels="triton"),
    ):
        whole = q.detach().requires_grad_()
        out = run(whole, k, cos, sin)[0]
        (grad,) = torch.autograd.grad(out, whole, q)
        few = q[last].clone().requires_grad_()
        few_out = run(few, k[last], cos[last], sin[last])[0]
        assert torch.equal(out[last], few_out)
        assert torch.equal(grad[last], torch.autograd.grad(few_out, few, q[last])[0])
        del out, grad
