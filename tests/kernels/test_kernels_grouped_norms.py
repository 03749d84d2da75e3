"""Norms whose weights differ by group: formulas, and the Triton kernel (by its interpreter without a GPU)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megaxelm_kernels import grouped_norms, norms
from megaxelm_kernels.row_groups import RowGroups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
KINDS = ("rms", "layer")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN, so an element that no program writes is seen."""
    pytest.importorskip("triton", reason="triton is not installed")
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: empty_like(*args, **options).fill_(torch.nan))


def inputs(kind: str, counts: list[int], size: int, dtype: torch.dtype, *, add: bool = False) -> dict[str, Any]:
    """The offset of x makes a wrong mean show. Weights of empty groups are NaN: nobody may read them."""
    generator = torch.Generator().manual_seed(size)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    given: dict[str, Any] = {"x": draw(sum(counts), size) * 2 + 0.5, "weight": draw(len(counts), size) + 1}
    given["weight"][torch.tensor([count == 0 for count in counts], device=DEVICE)] = torch.nan
    if kind == "layer":
        given["bias"] = draw(len(counts), size)
    if add:
        given["residual"] = draw(sum(counts), size)
    return given | {"groups": RowGroups.from_counts(counts, DEVICE)}


def norm(kind: str, given: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    function = grouped_norms.grouped_layer_norm if kind == "layer" else grouped_norms.grouped_rms_norm
    out = function(**given, eps=EPS, **options)
    return out if isinstance(out, tuple) else (out,)


def check(kind: str, given: dict[str, Any], kernels: str) -> None:
    """Error at most 1.2 times that of torch's norm of each group in the same type, plus a few roundings in fp32: so each element is
    rounded once. The interpreter is allowed twice as much and a rounding more, since it cuts off where a GPU rounds to bf16."""
    cuts = kernels == "triton" and DEVICE == "cpu"
    found = norm(kind, given, kernels=kernels)
    x, groups = given["x"], given["groups"]
    assert len(found) == 1 + ("residual" in given)
    total = x + given["residual"] if "residual" in given else x
    if "residual" in given:
        allowed = torch.finfo(x.dtype).eps if cuts and x.dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(found[1], total, rtol=allowed, atol=0.0)
        total = found[1]
    bias = given.get("bias")
    truth = grouped_norms.grouped_norm_reference(
        total.double(), given["weight"].double(), None if bias is None else bias.double(), EPS, groups
    )
    judge = torch.empty_like(truth)
    for row, group in enumerate(groups.group_of_row.tolist()):
        weight = given["weight"][group].to(x.dtype)
        plain = (
            norms.rms_norm(total[row], weight, EPS) if bias is None else norms.layer_norm(total[row], weight, bias[group].to(x.dtype), EPS)
        )
        judge[row] = plain.double()
    assert found[0].dtype == x.dtype and found[0].shape == x.shape
    if not truth.numel():
        return
    largest = truth.abs().max().clamp_min(1.0)
    floor = 4 * torch.finfo(torch.float32).eps * largest
    if cuts and x.dtype not in (torch.float32, torch.float64):
        floor += torch.finfo(x.dtype).eps * largest
    assert (found[0].double() - truth).abs().max() <= (2.4 if cuts else 1.2) * (judge - truth).abs().max() + floor


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kernels", norms.KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("counts", "size"), [([1, 1, 1], 63), ([0, 5, 2], 127), ([2, 0, 1], 2049), ([3], 1), ([0, 0], 8), ([7, 0, 4, 1], 256), ([2, 1, 3], 300)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_as_close_to_fp64_as_the_norm_of_a_group(kind: str, counts: list[int], size: int, dtype: torch.dtype, kernels: str) -> None:
    check(kind, inputs(kind, counts, size, dtype), kernels=kernels)
    check(kind, inputs(kind, counts, size, dtype, add=True), kernels=kernels)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kernels", norms.KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_all_groups_share_and_weights_in_fp32(kind: str, kernels: str) -> None:
    for add in (False, True):
        given = inputs(kind, [2, 1, 4], 40, torch.float32, add=add)
        for name in {"weight", "bias"} & set(given):
            given[name] = given[name][:1].expand(3, -1)
        check(kind, given, kernels=kernels)
        given = inputs(kind, [2, 1, 4], 40, torch.float16, add=add)
        for name in {"weight", "bias"} & set(given):
            given[name] = given[name].float()
        check(kind, given, kernels=kernels)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_of_several_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megaxelm_kernels import grouped_norms_triton

    monkeypatch.setattr(grouped_norms_triton, "MANY_ROWS", 1)
    assert grouped_norms_triton.launch(75, 96, 4)[0] == 16
    check(kind, inputs(kind, [30, 0, 45], 96, torch.float32, add=True), kernels="triton")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kernels", norms.KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_room_between_them(kind: str, kernels: str) -> None:
    given = inputs(kind, [2, 0, 3], 24, torch.float32, add=True)
    wide = {name: torch.full((value.shape[0], 30), torch.nan, device=DEVICE) for name, value in given.items() if isinstance(value, Tensor)}
    for name, room in wide.items():
        room[:, 2:-4] = given[name]
    check(kind, given | {name: room[:, 2:-4] for name, room in wide.items()}, kernels=kernels)
    check(kind, given | {name: given[name].T.contiguous().T for name in wide}, kernels=kernels)


@pytest.mark.usefixtures("poisoned")
def test_the_device_says_whose_each_row_is() -> None:
    given = inputs("rms", [3, 3], 16, torch.float32)
    given["groups"].group_of_row.copy_(torch.tensor([0, 1, 1, 1, 1, 1]))
    later = RowGroups.from_counts([1, 5], DEVICE)
    truth = grouped_norms.grouped_norm_reference(given["x"], given["weight"], None, EPS, later)
    torch.testing.assert_close(norm("rms", given, kernels="triton")[0], truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", norms.KERNELS)
def test_rows_of_zeros_and_the_size_of_eps(kernels: str) -> None:
    if kernels == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    given = inputs("rms", [1, 1], 16, torch.float32)
    given["x"] = torch.zeros(2, 16, device=DEVICE)
    given["x"][1] = 1e-3
    assert torch.equal(norm("rms", given, kernels=kernels)[0][0], torch.zeros(16, device=DEVICE))
    check("rms", given, kernels=kernels)


@pytest.mark.parametrize(
    ("changed", "kernels", "text"),
    [
        ({}, "cuda", "kernels = 'cuda': choose torch or triton"),
        ({"x": (5, 7), "residual": (5, 7)}, "torch", r"weight \(2, 8\): expected \[2, 7\]"),
        ({"x": (4, 8)}, "triton", r"x \(4, 8\): expected \[5, H\]"),
        ({"bias": (1, 8)}, "torch", r"bias \(1, 8\): expected \[2, 8\]"),
        ({"residual": (1, 8)}, "torch", "one shape and one type"),
        ({"residual": torch.float16}, "triton", "one shape and one type"),
        ({"weight": torch.float16}, "torch", "weight is torch.float16"),
        ({"x": torch.float64, "residual": torch.float64}, "triton", "choose kernels = torch"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], kernels: str, text: str) -> None:
    given = inputs("layer", [2, 3], 8, torch.float32, add=True)
    for name, change in changed.items():
        given[name] = given[name].to(change) if isinstance(change, torch.dtype) else torch.ones(change, device=DEVICE)
    with pytest.raises(ValueError, match=text):
        norm("layer", given, kernels=kernels)
