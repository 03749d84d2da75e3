"""The kernels of a decoding step at real sizes: against fp64, twice the same bits, without waiting, graphs replayed with other counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megaxelm_kernels.decode_attention import decode_attention, decode_attention_reference, store_kv
from megaxelm_kernels.grouped_linear import grouped_linear, grouped_linear_reference
from megaxelm_kernels.grouped_norms import grouped_layer_norm, grouped_norm_reference
from megaxelm_kernels.row_groups import RowGroups

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

COUNTS = [[1, 1, 1, 1], [4, 0, 0, 0], [9, 8, 8, 7], [64, 64, 64, 64], [200, 3, 53, 0], [2048, 100, 1000, 900]]


def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(size, device="cuda", dtype=dtype)


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-30))


def by_groups(x: Tensor, weight: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
    """The reference for many rows, which copies no weight."""
    return torch.cat([torch.nn.functional.linear(rows, weight[g], bias[g]) for g, rows in enumerate(x.split(counts))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192), (2049, 127)])
@pytest.mark.parametrize("counts", COUNTS)
def test_linear_is_as_close_to_fp64_as_torch_and_twice_the_same(counts: list[int], sizes: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = (
        draw(sum(counts), sizes[1], dtype=dtype),
        draw(4, *sizes, dtype=dtype) / sizes[1] ** 0.5,
        draw(4, sizes[0], dtype=dtype),
    )
    groups = RowGroups.from_counts(counts, "cuda")
    found = grouped_linear(x, weight, bias, groups, kernels="triton")
    assert torch.equal(found, grouped_linear(x, weight, bias, groups, kernels="triton"))
    truth = by_groups(x.double(), weight.double(), bias.double(), counts)
    assert relative(found, truth) <= 1.5 * relative(by_groups(x, weight, bias, counts), truth) + 1e-6


@pytest.mark.parametrize("rows", [1, 4, 64, 300])
def test_a_shared_weight(rows: int) -> None:
    torch.manual_seed(0)
    x, weight = draw(rows, 2048), draw(1, 2048, 2048).expand(4, -1, -1) / 45
    groups = RowGroups.from_counts([rows, 0, 0, 0], "cuda")
    found = grouped_linear(x, weight, None, groups, kernels="triton")
    truth = x.double() @ weight[0].double().T
    assert relative(found, truth) <= 1.5 * relative(x @ weight[0].T, truth) + 1e-6


@pytest.mark.parametrize("rows", [4, 4096])
@pytest.mark.parametrize("size", [2048, 16384])
def test_norms(rows: int, size: int) -> None:
    torch.manual_seed(0)
    groups = RowGroups.from_counts([rows // 2, 0, rows // 4, rows // 4], "cuda")
    x, residual, weight, bias = draw(rows, size), draw(rows, size), draw(4, size), draw(4, size)
    normed, total = grouped_layer_norm(x, weight, bias, 1e-5, groups, residual=residual, kernels="triton")
    assert torch.equal(total, x + residual)
    truth = grouped_norm_reference(total.double(), weight.double(), bias.double(), 1e-5, groups)
    assert relative(normed, truth) <= 3e-3


SHAPES = [(16, 16, 128), (16, 16, 64), (32, 8, 64), (64, 8, 128), (8, 8, 256)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_as_close_to_fp64_as_explicit_scores(
    shape: tuple[int, int, int], rows: int, window: int | None, dtype: torch.dtype
) -> None:
    heads, kv_heads, head_dim = shape
    torch.manual_seed(0)
    lengths = torch.randint(0, 2049, (rows,), device="cuda")
    lengths[0] = 2048
    slots = torch.randperm(rows + 3, device="cuda")[:rows]
    keys, values = (torch.full((rows + 3, kv_heads, 2048, head_dim), torch.nan, device="cuda", dtype=dtype) for _ in range(2))
    for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
        for cache in (keys, values):
            cache[slot, :, :length] = draw(kv_heads, length, head_dim, dtype=dtype)
    q = draw(rows, heads, head_dim, dtype=dtype)
    found = decode_attention(q, keys, values, slots, lengths, longest=2048, sliding_window=window, kernels="triton")
    assert torch.equal(found, decode_attention(q, keys, values, slots, lengths, longest=2048, sliding_window=window, kernels="triton"))
    options = {"scale": head_dim**-0.5, "sliding_window": window}
    truth = decode_attention_reference(q.double(), keys.double(), values.double(), slots, lengths, **options)
    assert relative(found, truth) <= 1.5 * relative(decode_attention_reference(q, keys, values, slots, lengths, **options), truth) + 1e-6


def step() -> tuple[Callable[[], list[Tensor]], dict[str, Tensor], RowGroups]:
    """One layer's operations, the tensors that a replay may find changed, and the groups."""
    torch.manual_seed(0)
    groups = RowGroups.from_counts([4, 4, 4, 4], "cuda")
    x, weight, bias, norm_weight = draw(16, 2048), draw(4, 6144, 2048) / 45, draw(4, 6144), draw(4, 2048)
    keys, values = draw(20, 16, 2048, 128), draw(20, 16, 2048, 128)
    tensors = {
        "x": x, "slots": torch.arange(16, device="cuda"), "lengths": torch.full((16,), 500, device="cuda"),
        "offsets": groups.device_offsets, "group_of_row": groups.group_of_row,
    }  # fmt: skip

    def run() -> list[Tensor]:
        normed, total = grouped_layer_norm(x, norm_weight, norm_weight, 1e-5, groups, residual=x, kernels="triton")
        q, k, v = grouped_linear(normed, weight, bias, groups, kernels="triton").view(16, 3, 16, 128).unbind(1)
        store_kv(keys, values, k, v, tensors["slots"], tensors["lengths"] - 1, kernels="triton")
        return [total, q, decode_attention(q, keys, values, tensors["slots"], tensors["lengths"], longest=2048, kernels="triton")]

    return run, tensors, groups


def test_nothing_waits_for_the_device() -> None:
    run, *_ = step()
    run()  # compiled before
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_with_other_rows_lengths_and_counts() -> None:
    run, tensors, _ = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    other = RowGroups.from_counts([0, 13, 1, 2], "cuda")
    tensors["x"].mul_(-2.0)
    tensors["offsets"].copy_(other.device_offsets)
    tensors["group_of_row"].copy_(other.group_of_row)
    tensors["slots"].copy_(torch.arange(19, 3, -1, device="cuda"))
    tensors["lengths"].copy_(torch.arange(1, 17, device="cuda") * 128)
    graph.replay()
    found = [tensor.clone() for tensor in captured]
    assert all(torch.equal(a, b) for a, b in zip(found, run(), strict=True))


def test_offsets_beyond_int32() -> None:
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free memory")
    weight = torch.empty(20, 16384, 8192, device="cuda", dtype=torch.bfloat16).normal_()  # 2.7e9 elements
    x = draw(1, 8192)
    found = grouped_linear(x, weight, None, RowGroups.from_counts([0] * 19 + [1], "cuda"), kernels="triton")
    torch.testing.assert_close(found, x @ weight[19].T, rtol=2e-2, atol=1.0)
    del weight
    keys, values = (torch.zeros(600, 16, 2048, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))  # 2.5e9 elements each
    slots, lengths, q = torch.tensor([599], device="cuda"), torch.tensor([3], device="cuda"), draw(1, 16, 128)
    for position in range(3):
        store_kv(keys, values, draw(1, 16, 128), draw(1, 16, 128), slots, lengths * 0 + position, kernels="triton")
    found = decode_attention(q, keys, values, slots, lengths, longest=2048, kernels="triton")
    truth = decode_attention_reference(q, keys[599:], values[599:], slots * 0, lengths, scale=128**-0.5)
    assert found.abs().max() > 0
    torch.testing.assert_close(found, truth, rtol=2e-2, atol=2e-2)


def test_the_reference_of_few_rows_is_that_of_many() -> None:
    torch.manual_seed(0)
    x, weight, bias = draw(6, 64), draw(4, 32, 64), draw(4, 32)
    groups = RowGroups.from_counts([1, 2, 0, 3], "cuda")
    torch.testing.assert_close(
        grouped_linear_reference(x, weight, bias, groups), by_groups(x, weight, bias, [1, 2, 0, 3]), rtol=2e-2, atol=0.1
    )
