"""Triton kernels of `grouped_linear`: a tile of a group's rows meets a tile of its weight's outputs in a program.

Decoding has few rows, so a product is the reading of its weight: tiles of outputs are small enough that the programs fill the device, and
each streams its part of the weight once through a deep pipeline. Where even the smallest tiles are too few the features are cut too, and a
second kernel adds the parts in fp32, always in one order. A program reads on the device which rows it has: the grid is a bound for any
counts.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaxelm_kernels.backend import interpreted
from megaxelm_kernels.row_groups import RowGroups

PROGRAMS = 256  # wanted at least: about two on each of 132 multiprocessors
_PIPELINE_BYTES = 100 * 1024  # of shared memory a program, so that two fit on a multiprocessor
_LEAST_STEPS, _MOST_SPLITS = 4, 8
SUM_BLOCK = 1024


@dataclass(frozen=True)
class Launch:
    """Tiles and grid of one shape."""

    rows: int
    outs: int
    features: int
    splits: int
    """Parts of the features, each of `features_a_split`."""
    features_a_split: int
    row_tiles: int
    """As many as the rows can need, however they are spread over the groups."""
    stages: int
    warps: int


@triton.jit
def grouped_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,  # [N, out], or fp32 [splits, N, out]
    offsets_ptr,
    num_rows,
    size_out,
    size_in,
    features_a_split,
    x_row_stride,
    weight_group_stride,
    bias_group_stride,
    out_row_stride,
    out_split_stride,
    NUM_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    FEATURES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Row tiles are numbered through all groups, the first group's first. SHARED: one group. EVEN: tiles divide outputs and features."""
    row_tile = tl.program_id(0)
    if SHARED:
        group = 0
        begin, end = row_tile * ROWS, num_rows
    else:
        groups = tl.arange(0, GROUPS)
        begins = tl.load(offsets_ptr + groups, mask=groups < NUM_GROUPS, other=0)
        ends = tl.load(offsets_ptr + groups + 1, mask=groups < NUM_GROUPS, other=0)
        tiles = (ends - begins + ROWS - 1) // ROWS
        tiles_so_far = tl.cumsum(tiles, axis=0)
        if row_tile >= tl.sum(tiles, axis=0):
            return
        group = tl.sum((tiles_so_far <= row_tile).to(tl.int32), axis=0)
        mine = groups == group
        tile_of_group = row_tile - tl.sum(tl.where(mine, tiles_so_far - tiles, 0), axis=0)
        begin = tl.sum(tl.where(mine, begins, 0), axis=0) + tile_of_group * ROWS
        end = tl.sum(tl.where(mine, ends, 0), axis=0)
    row = begin + tl.arange(0, ROWS)
    column = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    first = tl.program_id(2) * features_a_split
    feature = first + tl.arange(0, FEATURES)
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_row_stride + feature[None, :]
    weight_at = weight_ptr + tl.cast(group, tl.int64) * weight_group_stride + column.to(tl.int64)[None, :] * size_in + feature[:, None]
    total = tl.zeros((ROWS, OUTS), tl.float32)
    for done in range(0, features_a_split, FEATURES):
        if EVEN:
            x = tl.load(x_at, mask=row[:, None] < end, other=0.0)
            weight = tl.load(weight_at)
        else:
            left = size_in - done
            x = tl.load(x_at, mask=(row[:, None] < end) & (feature[None, :] < left), other=0.0)
            weight = tl.load(weight_at, mask=(column[None, :] < size_out) & (feature[:, None] < left), other=0.0)
        if UPCAST:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(x, weight, total, input_precision="ieee")
        x_at += FEATURES
        weight_at += FEATURES
    if HAS_BIAS:
        bias_at = bias_ptr + tl.cast(group, tl.int64) * bias_group_stride + column
        total += tl.load(bias_at, mask=column < size_out, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + tl.cast(tl.program_id(2), tl.int64) * out_split_stride + row.to(tl.int64)[:, None] * out_row_stride + column[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=(row[:, None] < end) & (column[None, :] < size_out))


@triton.jit
def add_splits_kernel(
    partial_ptr,  # fp32 [splits, N, out]
    bias_ptr,
    out_ptr,
    offsets_ptr,
    num_rows,
    size_out,
    bias_group_stride,
    out_row_stride,
    NUM_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    if SHARED:
        group = 0
    else:
        groups = tl.arange(0, GROUPS)
        ends = tl.load(offsets_ptr + groups + 1, mask=groups < NUM_GROUPS, other=0)
        if row >= tl.max(ends, axis=0):
            return
        group = tl.sum(((ends <= row) & (groups < NUM_GROUPS)).to(tl.int32), axis=0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = partial_ptr + tl.cast(row, tl.int64) * size_out + column
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(at + tl.cast(num_rows, tl.int64) * size_out * split, mask=column < size_out, other=0.0)
    if HAS_BIAS:
        bias_at = bias_ptr + tl.cast(group, tl.int64) * bias_group_stride + column
        total += tl.load(bias_at, mask=column < size_out, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.cast(row, tl.int64) * out_row_stride + column, total.to(out_ptr.dtype.element_ty), mask=column < size_out)


def launch(num_rows: int, num_groups: int, size_out: int, size_in: int, itemsize: int) -> Launch:
    """By bounds that the host knows: the same for any counts of the groups."""
    rows = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64 if num_rows <= 128 or itemsize == 4 else 128
    busy = min(num_groups, num_rows)
    row_tiles = min(num_rows, (num_rows + (rows - 1) * busy) // rows)
    # Each program reads the features of all its rows: wide tiles where rows are many, narrow ones where programs are few.
    outs = 128 if rows == 128 and row_tiles > 2 * busy else 64
    while outs > 16 and rows <= 64 and triton.cdiv(size_out, outs) * row_tiles < PROGRAMS:
        outs //= 2
    features = (256 if rows <= 32 else 128) // itemsize
    if itemsize == 4:
        features = 32
    features = min(features, max(16, triton.next_power_of_2(size_in)))
    wanted = PROGRAMS // (triton.cdiv(size_out, outs) * row_tiles)
    splits = max(1, min(wanted, size_in // (_LEAST_STEPS * features), _MOST_SPLITS))
    features_a_split = triton.cdiv(triton.cdiv(size_in, splits), features) * features
    return Launch(
        rows=rows,
        outs=outs,
        features=features,
        splits=triton.cdiv(size_in, features_a_split),
        features_a_split=features_a_split,
        row_tiles=row_tiles,
        stages=max(2, min(6, _PIPELINE_BYTES // ((rows + outs) * features * itemsize))),
        warps=8 if rows == 128 or itemsize == 4 else 4,
    )


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, groups: RowGroups, out: Tensor) -> None:
    """Write the products to `out`, of a shape that is not empty; rows beyond the last of `groups.device_offsets` are left alone."""
    x = x if x.stride(1) == 1 else x.contiguous()
    num_rows, size_in = x.shape
    num_groups, size_out = weight.shape[:2]
    shared = weight.stride(0) == 0 and (bias is None or bias.stride(0) == 0)
    num_groups = 1 if shared else num_groups
    offsets = None if shared else groups.device_offsets
    tile = launch(num_rows, num_groups, size_out, size_in, x.element_size())
    split = tile.splits > 1
    target = torch.empty(tile.splits, num_rows, size_out, dtype=torch.float32, device=x.device) if split else out[None]
    bias_group_stride = 0 if bias is None else bias.stride(0)
    padded = triton.next_power_of_2(max(num_groups, 2))
    with torch.cuda.device_of(x):
        grouped_linear_kernel[(tile.row_tiles, triton.cdiv(size_out, tile.outs), tile.splits)](
            x, weight, bias, target, offsets, num_rows, size_out, size_in, tile.features_a_split,
            x.stride(0), weight.stride(0), bias_group_stride, target.stride(1), target.stride(0),
            NUM_GROUPS=num_groups, GROUPS=padded, SHARED=shared, HAS_BIAS=bias is not None and not split,
            EVEN=size_out % tile.outs == 0 and size_in % tile.features_a_split == 0,
            ROWS=tile.rows, OUTS=tile.outs, FEATURES=tile.features, UPCAST=interpreted() and x.dtype != torch.float32,
            num_stages=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
        if split:
            add_splits_kernel[(num_rows, triton.cdiv(size_out, SUM_BLOCK))](
                target, bias, out, offsets, num_rows, size_out, bias_group_stride, out.stride(0),
                NUM_GROUPS=num_groups, GROUPS=padded, SHARED=shared, HAS_BIAS=bias is not None, SPLITS=tile.splits, BLOCK=SUM_BLOCK,
                num_warps=4,
            )  # fmt: skip
