"""Rotary positions: layouts, the Triton kernels beside torch and fp64, in place and with the norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megaxelm_kernels.backend import choose_kernels, interpreted
from megaxelm_kernels.rotary import (
    apply_rotary,
    apply_rotary_qk,
    apply_rotary_reference,
    norm_rotary_qk,
    norm_rotary_qk_reference,
    rotary_parameters,
    rotary_tables,
    split_qkv,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
# tokens, heads, kv_heads, head_dim, rotary_dim
SHAPES = [
    (3, 4, 2, 16, 16),
    (2, 1, 1, 2, 2),
    (2, 3, 1, 63, 62),
    (2, 5, 3, 127, 40),
    (1, 1, 2, 2049, 2048),
    (2, 40, 8, 64, 64),
]


def has_triton() -> bool:
    try:
        return choose_kernels("triton", DEVICE) == "triton"
    except ValueError:
        return False


needs_triton = pytest.mark.skipif(not has_triton(), reason="triton cannot run here")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody has written is NaN, and nobody writes behind the end of what was asked for."""
    empty, guards = torch.empty, []

    def guarded(*size: Any, **options: Any) -> Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        memory = empty(shape.numel() + 4096, **options)
        if not memory.is_floating_point():
            return empty(*size, **options)
        memory[: shape.numel()] = torch.nan
        guards.append(memory[shape.numel() :].fill_(5))
        return memory[: shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    yield
    assert guards and all((guard == 5).all() for guard in guards)


def batch(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """q, k, weights and tables of random positions, packed documents starting anew; tables fp32."""
    tokens, heads, kv_heads, head_dim, rotary_dim = shape
    g = torch.Generator().manual_seed(sum(shape))
    sizes = {
        "q": (tokens, heads, head_dim),
        "k": (tokens, kv_heads, head_dim),
        "gq": (tokens, heads, head_dim),
        "gk": (tokens, kv_heads, head_dim),
    }
    made = {name: torch.randn(size, generator=g).to(DEVICE, dtype) for name, size in sizes.items()}
    for name in ("q_weight", "k_weight"):
        made[name] = (1 + 0.3 * torch.randn(head_dim, generator=g)).to(DEVICE, dtype)
    positions = torch.randint(0, 3000, (tokens,), generator=g)
    frequencies, _ = rotary_parameters(head_dim, 10000.0, rotary_dim=rotary_dim)
    made["cos"], made["sin"] = (x.to(DEVICE) for x in rotary_tables(positions, frequencies))
    return made


def exact(made: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().double() for name, x in made.items()}


def turned(made: dict[str, Tensor], kernels: str, interleaved: bool, **options: Any) -> list[Tensor]:
    """Outputs and gradients of the rotation."""
    q, k = made["q"].detach().requires_grad_(), made["k"].detach().requires_grad_()
    if kernels == "reference":
        out = [apply_rotary_reference(x, made["cos"], made["sin"], interleaved=interleaved) for x in (q, k)]
    else:
        out = list(apply_rotary_qk(q, k, made["cos"], made["sin"], interleaved=interleaved, kernels=kernels, **options))
    return [*(x.detach() for x in out), *torch.autograd.grad(out, (q, k), (made["gq"], made["gk"]))]


def normed(made: dict[str, Tensor], kernels: str, interleaved: bool) -> list[Tensor]:
    """Outputs and gradients of norm and rotation."""
    names = ("q", "k", "q_weight", "k_weight")
    inputs = [made[name].detach().requires_grad_() for name in names]
    if kernels == "reference":
        out = norm_rotary_qk_reference(*inputs, EPS, made["cos"], made["sin"], interleaved=interleaved)
    else:
        out = norm_rotary_qk(*inputs, EPS, made["cos"], made["sin"], interleaved=interleaved, kernels=kernels)
    return [*(x.detach() for x in out), *torch.autograd.grad(out, inputs, (made["gq"], made["gk"]))]


def check(found: list[Tensor], peers: list[Tensor], truth: list[Tensor], factor: float) -> None:
    """The error is at most `factor` times that of the peer, or a rounding of fp32 where that has none."""
    for ours, peer, right in zip(found, peers, truth, strict=True):
        assert ours.shape == right.shape and ours.dtype == peer.dtype
        assert (ours.double() - right).norm() <= factor * (peer.double() - right).norm() + 1e-7 * right.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_rotation_by_torch_is_that_of_its_matrix_in_fp64(shape: tuple[int, ...], interleaved: bool) -> None:
    made = exact(batch(shape))
    truth = turned(made, "reference", interleaved)
    for ours, right in zip(turned(made, "torch", interleaved), truth, strict=True):
        torch.testing.assert_close(ours, right)
    torch.testing.assert_close(apply_rotary(made["q"], made["cos"], made["sin"], interleaved=interleaved), truth[0])
    for ours, right in zip(normed(made, "torch", interleaved), normed(made, "reference", interleaved), strict=True):
        torch.testing.assert_close(ours, right)


def test_interleaved_pairs_are_neighbours_and_the_rest_passes() -> None:
    x = torch.randn(4, 2, 10, dtype=torch.float64)
    cos, sin = (table.double() for table in rotary_tables(torch.arange(4), rotary_parameters(10, 100.0, rotary_dim=6)[0]))
    whole = torch.complex(x[..., 0:6:2], x[..., 1:6:2]) * torch.complex(cos, sin).unsqueeze(1)
    out = apply_rotary(x, cos, sin, interleaved=True)
    torch.testing.assert_close(out[..., :6], torch.stack([whole.real, whole.imag], -1).flatten(-2))
    assert torch.equal(out[..., 6:], x[..., 6:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_by_torch_and_of_the_references(interleaved: bool) -> None:
    made = exact(batch((3, 2, 1, 6, 4)))
    tables = made["cos"], made["sin"]
    names = ("q", "k", "q_weight", "k_weight")
    q, k, q_weight, k_weight = (made[name].requires_grad_() for name in names)

    def both(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary_qk(q, k, *tables, interleaved=interleaved)

    assert torch.autograd.gradcheck(both, (q, k))
    assert torch.autograd.gradgradcheck(both, (q, k))
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, *tables, interleaved=interleaved), (q,))
    assert torch.autograd.gradcheck(lambda x: apply_rotary_reference(x, *tables, interleaved=interleaved), (q,))
    for function in (norm_rotary_qk, norm_rotary_qk_reference):
        assert torch.autograd.gradcheck(lambda *x, f=function: f(*x, EPS, *tables, interleaved=interleaved), (q, k, q_weight, k_weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_calls_by_torch_are_the_call_for_both(dtype: torch.dtype) -> None:
    made = batch((5, 4, 2, 16, 16), dtype)
    q, k = apply_rotary_qk(made["q"], made["k"], made["cos"], made["sin"])
    assert torch.equal(q, apply_rotary(made["q"], made["cos"], made["sin"]))
    assert torch.equal(k, apply_rotary(made["k"], made["cos"], made["sin"]))


def one_rounding(found: list[Tensor], truth: list[Tensor]) -> None:
    """bf16 results are the truth rounded once. The interpreter cuts off where a GPU rounds to the nearest: twice the error."""
    eps = torch.finfo(torch.bfloat16).eps * (1.01 if interpreted() else 0.51)
    for ours, right in zip(found, truth, strict=True):
        assert ours.dtype == torch.bfloat16
        assert ((ours.double() - right).abs() <= eps * right.abs() + 1e-5).all()


@needs_triton
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("run", [turned, normed])
def test_triton_is_no_worse_than_torch_and_rounds_once(run: Any, shape: tuple[int, ...], interleaved: bool, poisoned: None) -> None:
    made = batch(shape)
    check(run(made, "triton", interleaved), run(made, "torch", interleaved), run(exact(made), "reference", interleaved), 2.0)
    if sum(shape) < 500:
        made = batch(shape, torch.bfloat16)
        truth = run(exact(made), "reference", interleaved)
        one_rounding(run(made, "triton", interleaved), truth)
        # Where torch rounds the tables and each step, the fp32 result of the same inputs rounded at the end is nearer.
        wide = run({name: x.float() for name, x in made.items()}, "triton", interleaved)
        check([x.bfloat16() for x in wide], run(made, "torch", interleaved), truth, 1.0)


@needs_triton
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e4])
def test_the_norm_of_small_and_large_heads(scale: float) -> None:
    made = batch((4, 3, 2, 16, 8))
    made["q"] = made["q"] * scale
    check(normed(made, "triton", False), normed(made, "torch", False), normed(exact(made), "reference", False), 3.0)


@needs_triton
def test_weight_gradients_are_sums_over_more_tokens_than_programs(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    from megaxelm_kernels import norm_rotary_triton

    monkeypatch.setattr(norm_rotary_triton, "PROGRAMS", 3)
    for tokens in (3, 7):  # 7 tokens: three a program, one in the last
        made = batch((tokens, 3, 2, 16, 12))
        first, second = normed(made, "triton", False), normed(made, "triton", False)
        check(first, normed(made, "torch", False), normed(exact(made), "reference", False), 3.0)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
def test_weights_of_another_type_keep_it() -> None:
    made = batch((4, 3, 2, 16, 16), torch.bfloat16)
    made["q_weight"], made["k_weight"] = made["q_weight"].float(), made["k_weight"].float()
    found, truth = normed(made, "triton", False), normed(exact(made), "reference", False)
    assert [x.dtype for x in found] == [torch.bfloat16] * 2 + [torch.bfloat16] * 2 + [torch.float32] * 2
    for ours, right in zip(found, truth, strict=True):
        assert (ours.double() - right).norm() <= 4e-3 * right.norm()


def packed(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """q, k, v as views of one projection, and it; none is a leaf."""
    tokens, heads, kv_heads, head_dim, _ = shape
    made = batch(shape, dtype)
    whole = torch.cat([made["q"].flatten(1), made["k"].flatten(1), 7 * torch.ones_like(made["k"]).flatten(1)], 1).requires_grad_()
    q, k, v = split_qkv(whole * 1, heads, kv_heads, head_dim)
    return q, k, v, whole, made


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(5, 4, 2, 16, 16), (2, 5, 3, 127, 40)])
def test_views_of_a_packed_projection(shape: tuple[int, ...], interleaved: bool, in_place: bool, kernels: str) -> None:
    q, k, v, whole, made = packed(shape, torch.float32)
    before = q.detach().clone()
    out = apply_rotary_qk(q, k, made["cos"], made["sin"], interleaved=interleaved, kernels=kernels, in_place=in_place)
    truth = turned(exact(made), "reference", interleaved)
    peers = turned(made, "torch", interleaved)
    (grad,) = torch.autograd.grad([*out, v], whole, [made["gq"].clone(), made["gk"].clone(), torch.ones_like(v)])
    split = grad.split([q.shape[1] * q.shape[2], k.shape[1] * k.shape[2], v.shape[1] * v.shape[2]], dim=1)
    check([*out, *(x.view(y.shape) for x, y in zip(split, (q, k), strict=False))], peers, truth, 1.5)
    assert (split[2] == 1).all() and (v == 7).all()
    if in_place:
        assert out[0].data_ptr() == q.data_ptr() and out[1].data_ptr() == k.data_ptr()
    else:
        assert torch.equal(q, before)


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=needs_triton)])
def test_gradients_are_turned_in_place_only_where_that_was_asked_and_is_safe(kernels: str) -> None:
    for in_place in (False, True):
        q, k, _, whole, made = packed((5, 4, 2, 16, 16), torch.float32)
        out = apply_rotary_qk(q, k, made["cos"], made["sin"], kernels=kernels, in_place=in_place)
        grads = made["gq"].clone(), made["gk"].clone()
        torch.autograd.grad(out, whole, grads)
        assert torch.equal(grads[0], made["gq"]) != in_place
    q, k, _, whole, made = packed((5, 4, 4, 16, 16), torch.float32)
    out = apply_rotary_qk(q, k, made["cos"], made["sin"], kernels=kernels, in_place=True)
    shared = made["gq"].clone()
    torch.autograd.grad(out, whole, (shared, shared))
    assert torch.equal(shared, made["gq"])
    q, k, _, whole, made = packed((5, 4, 2, 16, 16), torch.float32)
    out = apply_rotary_qk(q, k, made["cos"], made["sin"], kernels=kernels, in_place=True)
    (ours,) = torch.autograd.grad([x.sum() for x in out], whole)  # expanded ones
    q, k, _, whole, made = packed((5, 4, 2, 16, 16), torch.float32)
    out = apply_rotary_qk(q, k, made["cos"], made["sin"])
    torch.testing.assert_close(ours, torch.autograd.grad([x.sum() for x in out], whole)[0])


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=needs_triton)])
def test_values_that_were_kept_before_a_rotation_in_place_are_refused(kernels: str) -> None:
    q, k, _, whole, made = packed((5, 4, 2, 16, 16), torch.float32)
    kept = q.square()
    apply_rotary_qk(q, k, made["cos"], made["sin"], kernels=kernels, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=needs_triton)])
def test_memory_that_cannot_be_written_in_place_is_refused(kernels: str) -> None:
    made = batch((4, 2, 2, 8, 8))
    tables = made["cos"], made["sin"]
    q, k = made["q"], made["k"]
    wrong = {
        "expanded": (q[:, :1].expand(4, 2, 8), k),
        "same memory": (q, q),
        "one after another": (q.transpose(1, 2).contiguous().transpose(1, 2), k),
        "is a leaf": (q.clone().requires_grad_(), k),
        "or a view of one": (q, k.clone().requires_grad_()[:, :1]),
    }
    for text, (one, other) in wrong.items():
        with pytest.raises(ValueError, match=f"in_place: .*{text}"):
            apply_rotary_qk(one, other, *tables, kernels=kernels, in_place=True)


@needs_triton
@pytest.mark.parametrize("interleaved", [False, True])
def test_any_strides_give_the_same_numbers(interleaved: bool, poisoned: None) -> None:
    made = batch((5, 4, 2, 16, 12))
    strided = dict(made)
    strided["q"] = made["q"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["k"] = made["k"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["gq"] = made["gq"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["gk"] = made["gk"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["cos"], strided["sin"] = (made[name].t().contiguous().t() for name in ("cos", "sin"))
    for run in (turned, normed):
        for ours, same in zip(run(strided, "triton", interleaved), run(made, "triton", interleaved), strict=True):
            assert torch.equal(ours, same)


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=needs_triton)])
def test_no_tokens(kernels: str) -> None:
    made = batch((0, 2, 1, 8, 8))
    for run in (turned, normed):
        found = run(made, kernels, False)
        assert [tuple(x.shape) for x in found[:2]] == [(0, 2, 8), (0, 1, 8)]
        assert all((x == 0).all() for x in found)


@needs_triton
def test_an_output_without_a_gradient() -> None:
    made = batch((3, 2, 1, 8, 8))
    q, k = made["q"].requires_grad_(), made["k"].requires_grad_()
    for out in (
        apply_rotary_qk(q, k, made["cos"], made["sin"], kernels="triton"),
        norm_rotary_qk(q, k, made["q_weight"], made["k_weight"], EPS, made["cos"], made["sin"], kernels="triton"),
    ):
        grad_q, grad_k = torch.autograd.grad(out[0].square().sum(), (q, k))
        assert grad_q.abs().sum() > 0 and (grad_k == 0).all()


def test_what_does_not_fit_is_said() -> None:
    made = batch((4, 2, 2, 8, 8))
    q, k, cos, sin = (made[name] for name in ("q", "k", "cos", "sin"))
    weight = made["q_weight"]
    wrong = [
        (lambda: apply_rotary_qk(q, k, cos, sin, kernels="cuda"), "kernels = 'cuda'"),
        (lambda: apply_rotary_qk(q, k[:3], cos, sin), "expected"),
        (lambda: apply_rotary_qk(q, k.double(), cos, sin), "one type"),
        (lambda: apply_rotary_qk(q, k, cos[:3], sin[:3]), "do not fit"),
        (lambda: apply_rotary(q, cos, sin[:, :2]), "do not fit"),
        (lambda: apply_rotary(q, cos.repeat(1, 2), sin.repeat(1, 2)), "rotary_dim from 2 to 8"),
        (lambda: apply_rotary_qk(q.double(), k.double(), cos, sin, kernels="triton"), "float64: the Triton kernel takes"),
        (lambda: split_qkv(q.flatten(1), 2, 1, 8), r"projection \(4, 16\): expected \[N, 32\]"),
        (lambda: norm_rotary_qk(q, k, weight[:4], weight, EPS, cos, sin), r"q_weight \(4,\)"),
    ]
    for call, text in wrong:
        with pytest.raises(ValueError, match=text):
            call()
