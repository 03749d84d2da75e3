"""Triton kernel of `grouped_norms`: a tile of whole rows a program, each row with the weights of its group."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaxelm_kernels import norms_triton
from megaxelm_kernels.row_groups import RowGroups

MANY_ROWS = 2048  # from which a program has several rows; before, the rows are fewer than what the device runs at once


@triton.jit
def grouped_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    group_ptr,
    normed_ptr,
    total_ptr,
    num_rows,
    size,
    x_row_stride,
    residual_row_stride,
    weight_group_stride,
    bias_group_stride,
    eps,
    ADD: tl.constexpr,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = (row < num_rows)[:, None] & (column < size)[None, :]
    place = row[:, None] * size + column[None, :]
    group = tl.load(group_ptr + row, mask=row < num_rows, other=0).to(tl.int64)
    x = tl.load(x_ptr + row[:, None] * x_row_stride + column[None, :], mask=there, other=0.0).to(tl.float32)
    if ADD:
        residual_at = residual_ptr + row[:, None] * residual_row_stride + column[None, :]
        total = (x + tl.load(residual_at, mask=there, other=0.0).to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + place, total, mask=there)
        x = total.to(tl.float32)
    if CENTRED:
        x = tl.where(there, x - (tl.sum(x, axis=1) / size)[:, None], 0.0)
    weight_at = weight_ptr + group[:, None] * weight_group_stride + column[None, :]
    weight = tl.load(weight_at, mask=there, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=1) / size + eps)[:, None] * weight
    if CENTRED:
        bias_at = bias_ptr + group[:, None] * bias_group_stride + column[None, :]
        y += tl.load(bias_at, mask=there, other=0.0).to(tl.float32)
    tl.store(normed_ptr + place, y.to(normed_ptr.dtype.element_ty), mask=there)


def launch(num_rows: int, size: int, itemsize: int) -> tuple[int, int, int]:
    """ROWS, BLOCK and warps."""
    rows, block, warps = norms_triton.launch(size, itemsize)
    if num_rows < MANY_ROWS:
        return 1, block, max(1, min(block // 256, 16))
    return rows, block, warps


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, groups: RowGroups
) -> tuple[Tensor, Tensor | None]:
    """Norm, and the sum (None without a residual)."""
    x = x if x.stride(1) == 1 else x.contiguous()
    residual = residual if residual is None or residual.stride(1) == 1 else residual.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    bias = bias if bias is None or bias.stride(1) == 1 else bias.contiguous()
    num_rows, size = x.shape
    normed = torch.empty(num_rows, size, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(normed)
    if num_rows:
        rows, block, warps = launch(num_rows, size, x.element_size())
        with torch.cuda.device_of(x):
            grouped_norm_kernel[(triton.cdiv(num_rows, rows),)](
                x, residual, weight, bias, groups.group_of_row, normed, total, num_rows, size,
                x.stride(0), 0 if residual is None else residual.stride(0), weight.stride(0), 0 if bias is None else bias.stride(0), eps,
                ADD=residual is not None, CENTRED=bias is not None, ROWS=rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return normed, total
