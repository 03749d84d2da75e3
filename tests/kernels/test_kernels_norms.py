"""Norms, alone and of a sum with the residual stream: formulas, gradients, and the Triton kernels (by its interpreter without a GPU)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megaxelm_kernels import norms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
KINDS = ("rms", "add_rms", "layer", "add_layer")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN, so an element that no program writes is seen."""
    pytest.importorskip("triton", reason="triton is not installed")
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: empty_like(*args, **options).fill_(torch.nan))


def inputs(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Tensors by name. The offset of x makes a wrong mean or a missing centring show."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    found = {"x": draw(*shape) * 2 + 0.5, "weight": draw(shape[-1]) + 1}
    if kind.startswith("add"):
        found["residual"] = draw(*shape)
    if kind.endswith("layer"):
        found["bias"] = draw(shape[-1])
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def norm(kind: str, given: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    function: Callable[..., Any] = {
        "rms": norms.rms_norm, "add_rms": norms.add_rms_norm, "layer": norms.layer_norm, "add_layer": norms.add_layer_norm
    }[kind]  # fmt: skip
    out = function(**given, eps=EPS, **options)
    return out if isinstance(out, tuple) else (out,)


def reference(kind: str, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    total = given["x"] + given["residual"] if kind.startswith("add") else given["x"]
    if kind.endswith("layer"):
        normed = norms.layer_norm_reference(total, given["weight"], given["bias"], EPS)
    else:
        normed = norms.rms_norm_reference(total, given["weight"], EPS)
    return (normed, total) if kind.startswith("add") else (normed,)


def grads_for(outputs: tuple[Tensor, ...], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype).to(DEVICE) for out in outputs]


def everything(outputs: tuple[Tensor, ...], given: dict[str, Tensor], upstream: list[Tensor]) -> dict[str, Tensor]:
    """Results and gradients by name."""
    gradients = torch.autograd.grad(outputs, list(given.values()), [up.to(out.dtype) for up, out in zip(upstream, outputs, strict=True)])
    named = {f"output {number}": out.detach() for number, out in enumerate(outputs)}
    return named | {f"gradient of {name}": gradient for name, gradient in zip(given, gradients, strict=True)}


def wide(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}


def check_against_fp64(kind: str, given: dict[str, Tensor], factor: float = 2.0) -> None:
    """Error at most `factor` times that of torch in the same type, plus a few roundings of the largest element, where torch happens to be
    exact."""
    ours = norm(kind, given, kernels="triton")
    upstream = grads_for(ours)
    found = everything(ours, given, upstream)
    judge = everything(norm(kind, given), given, upstream)
    exact_given = wide(given)
    truth = everything(reference(kind, exact_given), exact_given, upstream)
    for name, value in found.items():
        assert value.dtype == judge[name].dtype and value.shape == judge[name].shape, name
        error = (value.double() - truth[name]).abs().max()
        floor = 4 * torch.finfo(torch.float32).eps * truth[name].abs().max().clamp_min(1.0)
        if value.dtype != torch.float32:
            # A GPU rounds to bf16, the interpreter cuts off.
            floor += (
                (2 if value.dtype == torch.bfloat16 and DEVICE == "cpu" else 1) * torch.finfo(value.dtype).eps * truth[name].abs().max()
            )
        assert error <= factor * (judge[name].double() - truth[name]).abs().max() + floor, f"{name}: {error}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [norm, reference])
def test_gradients_by_torch_and_of_the_reference(kind: str, function: Callable[..., tuple[Tensor, ...]]) -> None:
    given = inputs(kind, (3, 7), torch.float64)
    names = list(given)
    assert torch.autograd.gradcheck(lambda *args: function(kind, dict(zip(names, args, strict=True))), tuple(given.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_torch_equals_the_reference(kind: str) -> None:
    given = inputs(kind, (2, 3, 9), torch.float64)
    torch.testing.assert_close(norm(kind, given), reference(kind, given), rtol=1e-12, atol=1e-12)


SHAPES = [(1, 1), (5, 63), (70, 127), (3, 2049), (2, 3, 2, 16), (33, 128), (0, 8)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_triton_is_as_close_to_fp64_as_torch(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = inputs(kind, shape, dtype)
    if 0 in shape:
        outputs = norm(kind, given, kernels="triton")
        found = everything(outputs, given, grads_for(outputs))
        assert outputs[0].shape == shape and found["gradient of x"].shape == shape
        assert found["gradient of weight"].eq(0).all()
        return
    check_against_fp64(kind, given)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["add_rms", "add_layer"])
def test_rows_too_long_for_one_pass(kind: str) -> None:
    check_against_fp64(kind, inputs(kind, (2, 8200), torch.float32))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["rms", "add_layer"])
def test_a_program_of_the_backward_pass_takes_several_tiles(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megaxelm_kernels import norms_triton

    monkeypatch.setattr(norms_triton, "programs_of", lambda *_: 2)
    check_against_fp64(kind, inputs(kind, (163, 40), torch.float32))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("kind", "size"), [("rms", 200), ("add_layer", 256)])
def test_long_rows_in_several_blocks_and_column_sums_of_several_tiles(kind: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from megaxelm_kernels import norms_triton

    monkeypatch.setattr(norms_triton, "_ONE_PASS", 32)
    monkeypatch.setattr(norms_triton, "LONG_BLOCK", 64)
    monkeypatch.setattr(norms_triton, "_COLUMN_PROGRAMS", 4)
    check_against_fp64(kind, inputs(kind, (99, size), torch.float32))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_fp32_of_inputs_in_bf16(kind: str) -> None:
    given = inputs(kind, (6, 96), torch.bfloat16)
    for name in ("weight", "bias"):
        if name in given:
            given[name] = given[name].detach().float().requires_grad_()
    outputs = norm(kind, given, kernels="triton")
    found = everything(outputs, given, grads_for(outputs))
    exact = wide(given)
    truth = everything(reference(kind, exact), exact, grads_for(outputs))
    assert outputs[0].dtype == torch.bfloat16 and found["gradient of weight"].dtype == torch.float32
    for name in found:
        torch.testing.assert_close(found[name].double(), truth[name], rtol=0.02, atol=0.02 * float(truth[name].abs().max()))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kernels", norms.KERNELS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_fused_sum_is_the_sum_and_then_the_norm_bit_for_bit(kind: str, kernels: str) -> None:
    given = inputs(f"add_{kind}", (9, 130), torch.float16)  # the interpreter does not round to bf16 but cuts off
    outputs = norm(f"add_{kind}", given, kernels=kernels)
    alone = {name: tensor for name, tensor in given.items() if name != "residual"}
    total = given["x"] + given["residual"]
    assert torch.equal(outputs[1], total)
    assert torch.equal(outputs[0], norm(kind, alone | {"x": total}, kernels=kernels)[0])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("kind", ["add_rms", "add_layer"])
def test_one_of_the_two_results_is_enough(kind: str, used: int) -> None:
    given = inputs(kind, (4, 33), torch.float32)
    names = ["x", "residual"]
    found = norm(kind, given, kernels="triton")[used].square().sum()
    expected = norm(kind, given)[used].square().sum()
    for got, want in zip(*(torch.autograd.grad(out, [given[name] for name in names]) for out in (found, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("poisoned")
def test_the_gradients_of_input_and_residual_do_not_share_memory() -> None:
    given = inputs("add_rms", (4, 8), torch.float32)
    sum(out.sum() for out in norm("add_rms", given, kernels="triton")).backward()  # type: ignore[union-attr]
    assert torch.equal(given["x"].grad, given["residual"].grad)
    assert given["x"].grad.data_ptr() != given["residual"].grad.data_ptr()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_gradients_that_are_not_contiguous(kind: str) -> None:
    given = inputs(kind, (6, 24), torch.float32)
    strided = {name: torch.stack([t.detach(), t.detach()], -1)[..., 0].requires_grad_() for name, t in given.items()}
    strided["x"] = given["x"].detach().T.contiguous().T.requires_grad_()
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    found, plain = norm(kind, strided, kernels="triton"), norm(kind, given, kernels="triton")
    upstream = [up.T.contiguous().T for up in grads_for(found)]
    for got, want in zip(everything(found, strided, upstream).values(), everything(plain, given, upstream).values(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_frozen_weights_get_no_gradient_and_change_no_other(kind: str) -> None:
    given = inputs(kind, (5, 40), torch.float32)
    upstream = grads_for((given["x"],))
    all_of_them = everything(norm(kind, given, kernels="triton"), given, upstream)
    for name in ("weight", "bias"):
        if name in given:
            given[name].requires_grad_(False)
    (alone,) = torch.autograd.grad(norm(kind, given, kernels="triton"), [given["x"]], upstream)
    assert torch.equal(alone, all_of_them["gradient of x"])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_the_size_of_eps(kind: str) -> None:
    given = {
        name: tensor.detach() * (0.0 if name in ("x", "residual") else 1.0) for name, tensor in inputs(kind, (3, 16), torch.float32).items()
    }
    given["x"][1:] = 1e-3
    given["x"][2, ::2] = -1e-3
    for got, want in zip(norm(kind, given, kernels="triton"), norm(kind, given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_second_derivatives_are_refused() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    given = inputs("rms", (2, 8), torch.float32)
    (gradient,) = torch.autograd.grad(norm("rms", given, kernels="triton")[0].square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changed", "kernels", "text"),
    [
        ({}, "cuda", "kernels = 'cuda': choose torch or triton"),
        ({"weight": (7,)}, "torch", r"weight \(7,\): expected \[8\]"),
        ({"bias": (1,)}, "triton", r"bias \(1,\): expected \[8\]"),
        ({"residual": (1, 8)}, "torch", "one shape and one type"),
        ({"residual": torch.float16}, "triton", "one shape and one type"),
        ({"x": torch.float64, "residual": torch.float64}, "triton", "choose kernels = torch"),
        ({"weight": torch.float16}, "triton", "weight is torch.float16"),
        ({name: (2, 16385) for name in ("x", "residual")} | {name: (16385,) for name in ("weight", "bias")}, "triton", "at most 16384"),
        ({"x": (2, 0), "residual": (2, 0), "weight": (0,), "bias": (0,)}, "torch", "at least 1"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], kernels: str, text: str) -> None:
    given = {name: tensor.detach() for name, tensor in inputs("add_layer", (2, 8), torch.float32).items()}
    for name, change in changed.items():
        given[name] = given[name].to(change) if isinstance(change, torch.dtype) else torch.ones(change, device=DEVICE)
    with pytest.raises(ValueError, match=text):
        norm("add_layer", given, kernels=kernels)


def test_the_parts_of_a_sum_do_not_depend_on_the_machine() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from megaxelm_kernels.norms_triton import programs_of

    assert [programs_of(16384, size, 2, False) for size in (128, 2048, 4096, 16384)] == [384, 384, 384, 96]
    assert [programs_of(16384, size, 4, True) for size in (2048, 16384)] == [256, 32]
    assert programs_of(3, 2048, 2, False) == 2
