"""Costs of a decoding step: against figures reckoned by hand, and launches against those that the kernels make."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megaxelm_kernels import decode_cost
from megaxelm_kernels.decode_cost import Cost, DecodeShape, decode_step_cost

XGLM = DecodeShape(24, 2048, 16, 16, 8192, 256008, experts=4, rows=4, context=512, biases=True, centred=True)


def test_the_step_of_four_xglm() -> None:
    layer = 4 * 2048 * 2048 + 2 * 2048 * 8192 + (4 * 2048 + 8192 + 2048) + 4 * 2048  # matrices, biases, two norms
    weights = 4 * 2 * (24 * layer + 2 * 2048 + 256008 * 2048)
    cache = 2 * 2 * 4 * 24 * 2048 * (512 + 1)
    cost = decode_step_cost(XGLM)
    assert (cost.weight_bytes, cost.cache_bytes) == (weights, cache)
    assert cost.floor_bytes == weights + cache and cost.bytes == cost.floor_bytes + cost.other_bytes
    assert 1e3 * cost.floor_bytes / 4.3e12 == pytest.approx(3.3, abs=0.05)  # ms on one H200
    assert cost.other_bytes < 0.01 * cost.bytes


def test_a_shared_embedding_is_read_once() -> None:
    saved = decode_step_cost(XGLM).weight_bytes - decode_step_cost(dataclasses.replace(XGLM, shared_embedding=True)).weight_bytes
    assert saved == 3 * 2 * 256008 * 2048


def test_launches_do_not_grow_with_the_experts() -> None:
    for batch in (1, 8, 64):
        shapes = [dataclasses.replace(XGLM, experts=experts, rows=batch * experts) for experts in (1, 2, 4, 8, 16)]
        launches = [decode_step_cost(shape).launches for shape in shapes]
        # Few rows need the second kernels, that join splits.
        assert launches == sorted(launches, reverse=True)
        assert 1 + 24 * 9 + 1 + 2 <= launches[-1] <= launches[0] <= 1 + 24 * 13 + 1 + 2
    assert launches[-1] == 1 + 24 * 9 + 1 + 2


def test_experts_without_rows_are_not_read() -> None:
    one = decode_step_cost(dataclasses.replace(XGLM, rows=1))
    assert one.weight_bytes == decode_step_cost(dataclasses.replace(XGLM, rows=1, experts=1)).weight_bytes


def test_a_gated_decoder_with_grouped_queries() -> None:
    shape = DecodeShape(2, 64, 4, 2, 96, 100, experts=3, rows=6, context=10, itemsize=4, gated=True, rotary=True)
    cost = decode_step_cost(shape)
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
    assert cost.weight_bytes == 4 * 3 * (2 * layer + 64 + 100 * 64)
    assert cost.cache_bytes == 4 * 2 * 2 * 6 * 32 * 11
    assert cost.launches == decode_step_cost(dataclasses.replace(shape, rotary=False)).launches + 2


def test_costs_add_up() -> None:
    assert Cost(1, 2, 3, 4) + Cost(10, 20, 30, 40) * 2 == Cost(21, 42, 63, 84)
    assert Cost(1, 2, 3, 4).bytes == 6


@pytest.mark.parametrize(("rows", "sizes"), [(1, (16, 1024)), (4, (64, 64))])
def test_launches_of_a_product_are_those_that_it_makes(rows: int, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from megaxelm_kernels import grouped_linear_triton as kernels
    from megaxelm_kernels.row_groups import RowGroups

    device = "cuda" if torch.cuda.is_available() else "cpu"
    launched = []

    class Counted:
        def __init__(self, kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(grid)
            return self.kernel[grid]

    for name in ("grouped_linear_kernel", "add_splits_kernel"):
        monkeypatch.setattr(kernels, name, Counted(getattr(kernels, name)))
    x, weight = torch.randn(rows, sizes[1], device=device), torch.randn(2, *sizes, device=device)
    kernels.forward(x, weight, None, RowGroups.from_counts([rows, 0], device), torch.empty(rows, sizes[0], device=device))
    assert len(launched) == decode_cost.grouped_linear_cost(rows, 2, *sizes, 4).launches
