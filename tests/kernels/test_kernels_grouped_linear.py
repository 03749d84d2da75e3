"""Grouped linear layers: the formula, every way the torch path takes, and the Triton kernels (by its interpreter without a GPU)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from megaxelm_kernels import grouped_linear as module
from megaxelm_kernels.grouped_linear import grouped_linear, grouped_linear_reference
from megaxelm_kernels.row_groups import RowGroups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN, so an element that no program writes is seen."""
    pytest.importorskip("triton", reason="triton is not installed")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(torch.nan))


def inputs(counts: list[int], size_out: int, size_in: int, dtype: torch.dtype, shared: str = "") -> dict[str, Any]:
    """x, weight, bias and groups; `shared` is empty, "weight" or "both". Weights of empty groups are NaN: nobody may read them."""
    generator = torch.Generator().manual_seed(size_out + size_in)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    weight, bias = draw(len(counts), size_out, size_in), draw(len(counts), size_out) * 3
    if shared:
        weight = weight[:1].expand(len(counts), -1, -1)
        bias = bias[:1].expand(len(counts), -1) if shared == "both" else bias
    else:
        empty = torch.tensor([count == 0 for count in counts], device=DEVICE)
        weight[empty], bias[empty] = torch.nan, torch.nan
    return {"x": draw(sum(counts), size_in), "weight": weight, "bias": bias, "groups": RowGroups.from_counts(counts, DEVICE)}


def check(given: dict[str, Any], factor: float = 2.0, **options: Any) -> Tensor:
    """Error at most `factor` times that of torch's `F.linear` a group in the same type, plus a few roundings of the largest element."""
    found = grouped_linear(**given, **options)
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}
    truth = grouped_linear_reference(**wide)
    judge = torch.empty_like(truth)
    for group, (begin, end) in enumerate(itertools.pairwise(given["groups"].offsets)):
        bias = None if given["bias"] is None else given["bias"][group]
        judge[begin:end] = torch.nn.functional.linear(given["x"][begin:end], given["weight"][group], bias).double()
    assert found.dtype == given["x"].dtype and found.shape == truth.shape
    if not truth.numel():
        return found
    error, allowed = (found.double() - truth).abs().max(), (judge - truth).abs().max()
    largest = truth.abs().max().clamp_min(1.0)
    # The interpreter cuts off where a GPU rounds to bf16.
    floor = 8 * torch.finfo(torch.float32).eps * largest + (0 if found.dtype in WIDE else torch.finfo(found.dtype).eps * largest)
    assert error <= factor * allowed + floor, f"{error} > {factor} x {allowed} + {floor}"
    return found


WIDE = (torch.float32, torch.float64)
COUNTS = [[1, 1, 1, 1], [2, 0, 2, 2], [0, 3, 1, 0, 9], [5], [17], [0, 0, 1], [0, 0], [40, 3, 30], [8, 8]]
SIZES = [(1, 1), (63, 127), (127, 63), (8, 16), (64, 2049)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("sizes", [*SIZES, (2049, 64)])
def test_torch_is_as_close_to_fp64_as_a_product_a_group(counts: list[int], sizes: tuple[int, int], dtype: torch.dtype) -> None:
    given = inputs(counts, *sizes, dtype)
    check(given)
    check(given | {"bias": None})


@pytest.mark.parametrize("kernels", module.KERNELS)
@pytest.mark.parametrize("shared", ["weight", "both"])
@pytest.mark.parametrize("counts", [[1, 1, 1], [0, 5, 2], [40, 0, 3]])
def test_a_weight_that_all_groups_share(counts: list[int], shared: str, kernels: str) -> None:
    if kernels == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    for sizes in ((48, 33), (16, 64)):
        given = inputs(counts, *sizes, torch.float32, shared)
        check(given, kernels=kernels)
        check(given | {"bias": None}, kernels=kernels)


def test_neighbours_of_one_count_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []
    one_count = module._one_count
    monkeypatch.setattr(module, "_one_count", lambda x, *rest: (groups.append(tuple(x.shape[:2])), one_count(x, *rest)))
    check(inputs([2, 2, 0, 2, 5, 5, 5], 8, 8, torch.float32))
    assert groups == [(2, 2), (1, 2), (3, 5)]
    groups.clear()
    check(inputs([2, 2, 3], 8, 8, torch.float32, "weight"))
    assert groups == [(1, 7)]  # a plain product of all rows


def test_no_weight_is_copied() -> None:
    """Of the memory that torch takes for a product, nothing is as large as a weight."""
    if DEVICE == "cuda":
        pytest.skip("the torch path is the CPU's")
    for counts, shared in itertools.product([[1, 1, 1], [1, 2, 0], [9, 9, 9], [4, 30, 1]], ["", "both"]):
        given = inputs(counts, 512, 512, torch.float32, shared)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            grouped_linear(**given)
        assert max(event.self_cpu_memory_usage for event in profile.key_averages()) < 512 * 512 * 4 / 2


# Every counts and every sizes, not all pairs: the interpreter is slow.
PAIRS = [(counts, SIZES[number % len(SIZES)], torch.float32) for number, counts in enumerate(COUNTS)]
PAIRS += [(COUNTS[2], sizes, dtype) for sizes in SIZES[1:] for dtype in (torch.float16, torch.bfloat16)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("counts", "sizes", "dtype"), PAIRS)
def test_triton_is_as_close_to_fp64_as_torch(counts: list[int], sizes: tuple[int, int], dtype: torch.dtype) -> None:
    given = inputs(counts, *sizes, dtype)
    check(given, kernels="triton")
    if sizes == SIZES[1]:
        check(given | {"bias": None}, kernels="triton")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("counts", [[100, 0, 150], [3, 250, 1, 2], [129]])
def test_many_rows_need_several_tiles_a_group(counts: list[int]) -> None:
    check(inputs(counts, 70, 40, torch.float16), kernels="triton")
    check(inputs(counts, 40, 70, torch.float32), kernels="triton")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("counts", [[1], [1, 0, 2], [0, 20]])
@pytest.mark.parametrize("sizes", [(40, 1000), (16, 1024)])
def test_features_in_splits(counts: list[int], sizes: tuple[int, int]) -> None:
    from megaxelm_kernels import grouped_linear_triton as kernels

    assert kernels.launch(sum(counts), len(counts), *sizes, 4).splits > 2
    given = inputs(counts, *sizes, torch.float32)
    check(given, kernels="triton")
    check(given | {"bias": None}, kernels="triton")
    assert torch.equal(grouped_linear(**given, kernels="triton"), grouped_linear(**given, kernels="triton"))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kernels", module.KERNELS)
@pytest.mark.parametrize("counts", [[1, 1], [3, 0, 12]])
@pytest.mark.parametrize("sizes", [(24, 32), (16, 700)])
def test_rows_of_inputs_and_outputs_with_room_between_them(counts: list[int], sizes: tuple[int, int], kernels: str) -> None:
    given = inputs(counts, *sizes, torch.float32)
    room = torch.full((sum(counts), sizes[1] + 3), torch.nan, device=DEVICE)
    room[:, 1:-2] = given["x"]
    wider = torch.full((sum(counts), sizes[0] + 5), -7.0, device=DEVICE)
    out = wider[:, 2:-3]
    found = check(given | {"x": room[:, 1:-2]}, kernels=kernels, out=out)
    assert found.data_ptr() == out.data_ptr()
    assert wider[:, :2].eq(-7).all() and wider[:, -3:].eq(-7).all()
    check(given | {"x": given["x"].T.contiguous().T}, kernels=kernels)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("sizes", [(24, 32), (16, 700)])
def test_the_device_says_which_rows_are_whose(sizes: tuple[int, int]) -> None:
    """A CUDA graph is replayed with other counts: rows that then belong to nobody are left alone."""
    given = inputs([3, 3, 3, 3], *sizes, torch.float32)
    later = RowGroups.from_counts([0, 7, 1, 2], DEVICE)
    given["groups"].device_offsets.copy_(later.device_offsets)
    out = torch.full((12, sizes[0]), -7.0, device=DEVICE)
    grouped_linear(**given, kernels="triton", out=out)
    truth = grouped_linear_reference(**(given | {"x": given["x"][:10], "groups": later}))
    torch.testing.assert_close(out[:10], truth, rtol=1e-4, atol=1e-4)
    assert out[10:].eq(-7).all()


def test_tiles_are_enough_for_any_counts_and_fill_the_device() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from megaxelm_kernels.grouped_linear_triton import PROGRAMS, launch

    for num_rows, num_groups in itertools.product([1, 2, 15, 16, 17, 33, 64, 100, 129, 256, 1000], [1, 2, 3, 8]):
        tile = launch(num_rows, num_groups, 2048, 2048, 2)
        lone = [1] * min(num_groups - 1, num_rows - 1)
        for counts in ([num_rows], lone + [num_rows - len(lone)], [-(-num_rows // num_groups)] * (num_rows // -(-num_rows // num_groups))):
            assert sum(-(-count // tile.rows) for count in counts) <= tile.row_tiles
    for size_out, size_in in ((6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192)):
        for num_rows in (1, 4, 32, 64):
            tile = launch(num_rows, 4, size_out, size_in, 2)
            assert tile.row_tiles * -(-size_out // tile.outs) * tile.splits >= PROGRAMS
            assert tile.splits == 1 or num_rows == 1  # the second kernel is for a lone row


@pytest.mark.parametrize(
    ("changed", "kernels", "text"),
    [
        ({}, "cuda", "kernels = 'cuda': choose torch or triton"),
        ({"x": (6, 8)}, "torch", r"x \(6, 8\): expected \[5, 8\]"),
        ({"x": (5, 7)}, "triton", r"x \(5, 7\): expected \[5, 8\]"),
        ({"weight": (3, 4, 8)}, "torch", r"weight \(3, 4, 8\): expected \[2, out, in\]"),
        ({"weight": torch.float16}, "torch", "give both one type"),
        ({"bias": (2, 5)}, "torch", r"bias .* \(2, 5\): expected"),
        ({"bias": torch.float16}, "torch", "bias torch.float16"),
        ({"out": (5, 5)}, "triton", r"out .*: expected torch.float32 \[5, 4\]"),
        ({"x": torch.float64, "weight": torch.float64, "bias": torch.float64, "out": torch.float64}, "triton", "choose kernels = torch"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], kernels: str, text: str) -> None:
    given = inputs([2, 3], 4, 8, torch.float32) | {"out": torch.empty(5, 4, device=DEVICE)}
    for name, change in changed.items():
        given[name] = given[name].to(change) if isinstance(change, torch.dtype) else torch.ones(change, device=DEVICE)
    with pytest.raises(ValueError, match=text):
        grouped_linear(**given, kernels=kernels)


def test_strides_that_would_be_read_wrongly_are_refused() -> None:
    given = inputs([2, 3], 4, 8, torch.float32)
    for name, wrong in (
        ("weight", torch.ones(2, 8, 4, device=DEVICE).transpose(1, 2)),
        ("bias", torch.ones(4, 2, device=DEVICE).T),
        ("out", torch.ones(4, 5, device=DEVICE).T),
    ):
        with pytest.raises(ValueError, match=f"{name} has strides"):
            grouped_linear(**(given | {name: wrong}))
