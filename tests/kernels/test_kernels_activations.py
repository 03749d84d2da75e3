"""SwiGLU and GELU with a bias: formulas, gradients, gradients in place, and the Triton kernels (by its interpreter without a GPU)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megaxelm_kernels import activations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("swiglu", "gelu", "gelu tanh", "gelu bias", "gelu bias tanh")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN, so an element that no program writes is seen."""
    pytest.importorskip("triton", reason="triton is not installed")
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: empty_like(*args, **options).fill_(torch.nan))


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2).to(dtype).to(DEVICE)


def inputs(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    shapes = [shape, shape] if kind == "swiglu" else [shape, shape[-1:]] if "bias" in kind else [shape]
    return [draw(shape, dtype, seed).requires_grad_() for seed, shape in enumerate(shapes)]


def run(kind: str, given: list[Tensor], **options: Any) -> Tensor:
    if kind == "swiglu":
        return activations.swiglu(*given, **options)
    return activations.gelu_bias(*given, approximate="tanh" if "tanh" in kind else "none", **options)


def reference(kind: str, given: list[Tensor]) -> Tensor:
    if kind == "swiglu":
        return activations.swiglu_reference(*given)
    return activations.gelu_bias_reference(*given, approximate="tanh" if "tanh" in kind else "none")


def everything(out: Tensor, given: list[Tensor], upstream: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, given, upstream.to(out.dtype))]


def check_against_fp64(kind: str, given: list[Tensor], factor: float = 2.0) -> None:
    """Error at most `factor` times that of torch in the same type, plus a few roundings of the largest element, where torch happens to
    be exact."""
    out = run(kind, given, kernels="triton")
    upstream = draw(tuple(out.shape), out.dtype, 7)
    found, judge = everything(out, given, upstream), everything(run(kind, given), given, upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    truth = everything(reference(kind, exact), exact, upstream)
    for number, (value, same, true) in enumerate(zip(found, judge, truth, strict=True)):
        assert value.dtype == same.dtype and value.shape == same.shape, number
        # A GPU rounds to bf16, the interpreter cuts off.
        roundings = 4 if value.dtype == torch.float32 else 2 if value.dtype == torch.bfloat16 and DEVICE == "cpu" else 1
        floor = roundings * torch.finfo(value.dtype).eps * true.abs().max()
        error = (value.double() - true).abs().max()
        assert error <= factor * (same.double() - true).abs().max() + floor, f"{number}: {error}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [run, reference])
def test_gradients_by_torch_and_of_the_reference(kind: str, function: Callable[[str, list[Tensor]], Tensor]) -> None:
    assert torch.autograd.gradcheck(lambda *given: function(kind, list(given)), tuple(inputs(kind, (3, 5), torch.float64)))


@pytest.mark.parametrize("kind", KINDS)
def test_torch_equals_the_reference(kind: str) -> None:
    given = inputs(kind, (2, 3, 9), torch.float64)
    torch.testing.assert_close(run(kind, given), reference(kind, given), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 63), (70, 127), (3, 2049), (1, 2048), (2, 3, 16), (0, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_triton_is_as_close_to_fp64_as_torch(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = inputs(kind, shape, dtype)
    if 0 in shape:
        out = run(kind, given, kernels="triton")
        gradients = torch.autograd.grad(out.sum(), given)
        assert out.shape == shape and [gradient.shape for gradient in gradients] == [tensor.shape for tensor in given]
        assert all(gradient.eq(0).all() for gradient in gradients)
        return
    check_against_fp64(kind, given)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["gelu bias", "gelu tanh"])
def test_a_program_of_the_backward_pass_takes_several_tiles(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megaxelm_kernels import activations_triton

    monkeypatch.setattr(activations_triton, "_PROGRAMS", 4)
    check_against_fp64(kind, inputs(kind, (13, 1100), torch.float32))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
def test_values_far_from_zero_stay_finite_and_right(kind: str) -> None:
    far = torch.tensor([0.0, 1e-20, 5.0, 12.0, 88.0, 90.0, 1e4, 1e13, 1e20, 3e38], device=DEVICE)
    x = torch.cat([far, -far])[None, :]
    given = [x] if kind != "swiglu" and "bias" not in kind else [x, torch.full_like(x if kind == "swiglu" else x[0], 0.5)]
    given = [tensor.requires_grad_() for tensor in given]
    out = run(kind, given, kernels="triton")
    gradient = torch.autograd.grad(out, given[0], torch.ones_like(out))[0]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    truth = run(kind, exact)  # by torch, whose gradient is NaN where its own powers are infinite in fp64
    true_gradient = torch.autograd.grad(truth, exact[0], torch.ones_like(truth))[0].nan_to_num()
    torch.testing.assert_close(out.detach().double(), truth.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number_is_passed_on(kind: str) -> None:
    given = [tensor.detach() for tensor in inputs(kind, (2, 4), torch.float32)]
    given[0][1, 2] = torch.nan
    given[0].requires_grad_()
    out = run(kind, given, kernels="triton")
    gradient = torch.autograd.grad(out.sum(), given[0])[0]
    assert out.isnan().nonzero().tolist() == gradient.isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_gradients_that_are_not_contiguous(kind: str) -> None:
    given = inputs(kind, (6, 24), torch.float32)
    strided = [torch.stack([tensor.detach()] * 2, -1)[..., 0].requires_grad_() for tensor in given]
    found, plain = run(kind, strided, kernels="triton"), run(kind, given, kernels="triton")
    upstream = draw((24, 6), torch.float32, 3).T
    assert not any(tensor.is_contiguous() for tensor in [*strided, upstream])
    for got, want in zip(everything(found, strided, upstream), everything(plain, given, upstream), strict=True):
        assert torch.equal(got, want)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["swiglu", "gelu bias"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_an_input_that_needs_no_gradient_changes_no_other(kind: str, frozen: int) -> None:
    given = inputs(kind, (5, 40), torch.float32)
    both = torch.autograd.grad(run(kind, given, kernels="triton").sum(), given)
    given[frozen].requires_grad_(False)
    (alone,) = torch.autograd.grad(run(kind, given, kernels="triton").sum(), given[1 - frozen])
    assert torch.equal(alone, both[1 - frozen])


@pytest.mark.usefixtures("poisoned")
def test_a_bias_in_fp32_of_an_input_in_bf16() -> None:
    x, bias = draw((9, 20), torch.bfloat16, 0), draw((20,), torch.float32, 1).requires_grad_()
    out = activations.gelu_bias(x, bias, kernels="triton")
    out.sum().backward()
    exact = bias.detach().double().requires_grad_()
    activations.gelu_bias_reference(x.double(), exact).sum().backward()
    assert out.dtype == torch.bfloat16 and bias.grad is not None
    torch.testing.assert_close(bias.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


class Block(torch.nn.Module):
    """A feed-forward block up to its activation, as the decoder has it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        generator = torch.Generator().manual_seed(5)
        shapes = [(12, 8), (12, 8)] if kind == "swiglu" else [(12, 8), (12,)] if "bias" in kind else [(12, 8)]
        self.weights = torch.nn.ParameterList(torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)

    def forward(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        given = [x @ weight.T if weight.ndim == 2 else weight for weight in self.weights]
        return run(self.kind, given, **options)


def block_gradients(kind: str, *, checkpointed: bool, **options: Any) -> list[Tensor]:
    block, x = Block(kind), draw((7, 8), torch.float32, 6).requires_grad_()
    out = checkpoint(block, x, options, use_reentrant=False) if checkpointed else block(x, options)
    return list(torch.autograd.grad(out.square().sum(), [x, *block.parameters()]))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_place_are_the_same_with_and_without_checkpointing(kind: str, checkpointed: bool) -> None:
    plain = block_gradients(kind, checkpointed=False, kernels="triton")
    in_place = block_gradients(kind, checkpointed=checkpointed, kernels="triton", in_place=True)
    assert all(torch.equal(got, want) for got, want in zip(in_place, plain, strict=True))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_place_take_the_memory_of_the_inputs(kind: str) -> None:
    given = [tensor * 1.0 if tensor.ndim == 2 else tensor for tensor in inputs(kind, (4, 6), torch.float32)]
    gradients = torch.autograd.grad(run(kind, given, kernels="triton", in_place=True).sum(), given)
    for tensor, gradient in zip(given, gradients, strict=True):
        assert (gradient.data_ptr() == tensor.data_ptr()) == (tensor.ndim == 2)


@pytest.mark.usefixtures("poisoned")
def test_in_place_leaves_an_input_that_needs_no_gradient_as_it_is() -> None:
    gate, up = draw((4, 6), torch.float32, 0), draw((4, 6), torch.float32, 1).requires_grad_() * 1.0
    before = gate.clone()
    activations.swiglu(gate, up, kernels="triton", in_place=True).sum().backward()
    assert torch.equal(gate, before)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_use_of_what_was_overwritten_is_an_error(kind: str) -> None:
    leaves = inputs(kind, (4, 6), torch.float32)
    given = [leaf.sin() if leaf.ndim == 2 else leaf for leaf in leaves]
    keeps_its_input = given[0].cos().sum()
    run(kind, given, kernels="triton", in_place=True).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        keeps_its_input.backward(retain_graph=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_backward_pass_in_place_is_an_error(kind: str) -> None:
    leaves = inputs(kind, (4, 6), torch.float32)
    loss = run(kind, [leaf * 1.0 for leaf in leaves], kernels="triton", in_place=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kernels", activations.KERNELS)
@pytest.mark.parametrize("view", [False, True])
def test_in_place_refuses_leaves_and_their_views(kernels: str, view: bool) -> None:
    leaf, other = (draw((4, 6), torch.float32, seed).requires_grad_() for seed in (0, 1))
    refused, fine = (leaf.view(24), other.flatten() * 1) if view else (leaf, other * 1)
    with pytest.raises(ValueError, match="gate .* is a leaf or a view of one"):
        activations.swiglu(refused, fine, in_place=True, kernels=kernels)
    with pytest.raises(ValueError, match="up .* is a leaf or a view of one"):
        activations.swiglu(fine, refused, in_place=True, kernels=kernels)
    with pytest.raises(ValueError, match="x .* is a leaf or a view of one"):
        activations.gelu_bias(refused, in_place=True, kernels=kernels)


@pytest.mark.usefixtures("poisoned")
def test_in_place_refuses_gate_and_up_in_the_same_memory() -> None:
    both = draw((6, 4), torch.float32, 0).requires_grad_() * 1.0
    for gate, up in ((both, both), (both[:4], both[2:])):
        with pytest.raises(ValueError, match="share memory"):
            activations.swiglu(gate, up, in_place=True, kernels="triton")
    (expected,) = torch.autograd.grad(activations.swiglu(both[:3], both[3:]).sum(), both)
    (found,) = torch.autograd.grad(activations.swiglu(both[:3], both[3:], in_place=True, kernels="triton").sum(), both)
    torch.testing.assert_close(found, expected)


def test_second_derivatives_are_refused() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    for kind in ("swiglu", "gelu"):
        given = inputs(kind, (2, 8), torch.float32)
        (gradient, *_) = torch.autograd.grad(run(kind, given, kernels="triton").square().sum(), given, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: activations.swiglu(x, x[:1]), "one shape and one type"),
        (lambda x: activations.swiglu(x, x.half()), "one shape and one type"),
        (lambda x: activations.swiglu(x, x, kernels="auto"), "kernels = 'auto': choose torch or triton"),
        (lambda x: activations.gelu_bias(x, kernels="auto"), "kernels = 'auto': choose torch or triton"),
        (lambda x: activations.swiglu(x.double(), x.double(), kernels="triton"), "gate is torch.float64"),
        (lambda x: activations.gelu_bias(x.double(), kernels="triton"), "x is torch.float64"),
        (lambda x: activations.gelu_bias(x, x[0, :1]), r"bias \(1,\): expected \[H\]"),
        (lambda x: activations.gelu_bias(x, x[0].half(), kernels="triton"), "bias is torch.float16"),
        (lambda x: activations.gelu_bias(x, approximate="sigmoid"), "approximate = 'sigmoid': choose none or tanh"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[Tensor], Tensor], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(torch.ones(2, 4, device=DEVICE))
