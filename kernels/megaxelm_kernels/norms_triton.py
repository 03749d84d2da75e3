"""Triton kernels of `norms`: a tile of whole rows a program.

The gradients of weight and bias: a fixed number of programs, for a shape always the same, each adds up its rows in fp32 and writes one
partial row; these are added after. So the order of the additions never changes.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 8192  # bytes of an input a program: many loads in flight, and one barrier of the row sums for two rows of 2048 in bf16
_TALLEST = 32  # rows of a tile
_BYTES_A_THREAD = 32  # of an input: two loads of 16 bytes
BACKWARD_WARPS = 16  # at most: 32 leave a thread too few registers
_ONE_PASS = 8192  # features of a row up to which it and its sums for weight and bias stay in registers in the backward pass
LONG_BLOCK, LONG_WARPS = 4096, 16  # features that a program of `norm_backward_long` takes at once
_COLUMN_TILE = (32, 128)  # rows and columns of a tile of `norm_sums`
_COLUMN_PROGRAMS = 512


@triton.jit
def norm_forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    normed_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    size,
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
    x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + place, mask=there, other=0.0).to(tl.float32)
        total = (x + residual).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + place, total, mask=there)
        x = total.to(tl.float32)
    if CENTRED:
        mean = tl.sum(x, axis=1) / size
        tl.store(mean_ptr + row, mean, mask=row < num_rows)
        x = tl.where(there, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / size + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    weight = tl.load(weight_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    y = x * rstd[:, None] * weight[None, :]
    if CENTRED:
        y += tl.load(bias_ptr + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    tl.store(normed_ptr + place, y.to(normed_ptr.dtype.element_ty), mask=there)


@triton.jit
def norm_backward(
    grad_normed_ptr,
    grad_total_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_ptr,  # fp32 [1 or 2, programs, size]: weight, bias
    num_rows,
    size,
    ADD: tl.constexpr,
    CENTRED: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    in_row = column < size
    weight = tl.load(weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(program * ROWS, num_rows, programs * ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        there = (row < num_rows)[:, None] & in_row[None, :]
        place = row[:, None] * size + column[None, :]
        x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed_ptr + place, mask=there, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)
        if CENTRED:
            x -= tl.load(mean_ptr + row, mask=row < num_rows, other=0.0)[:, None]
        x *= rstd[:, None]
        if SUMS:
            # A column beyond the row or a row beyond the last has a gradient of 0 here.
            weight_sum += grad * x
            if CENTRED:
                bias_sum += grad
        grad *= weight
        # The weight is 0 beyond the row, so x - mean there does not count.
        grad_x = grad - x * (tl.sum(grad * x, axis=1) / size)[:, None]
        if CENTRED:
            grad_x -= (tl.sum(grad, axis=1) / size)[:, None]
        grad_x *= rstd[:, None]
        if ADD:
            grad_x += tl.load(grad_total_ptr + place, mask=there, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=there)
    if SUMS:
        at = partial_ptr + program.to(tl.int64) * size + column
        tl.store(at, tl.sum(weight_sum, axis=0), mask=in_row)
        if CENTRED:
            tl.store(at + programs.to(tl.int64) * size, tl.sum(bias_sum, axis=0), mask=in_row)


@triton.jit
def norm_backward_long(
    grad_normed_ptr,
    grad_total_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    size,
    ADD: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, which the registers cannot hold: read for its sums and again, from the cache, for the gradient."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0
    if CENTRED:
        mean = tl.load(mean_ptr + row)
    along_x = tl.zeros((BLOCK,), tl.float32)
    along_one = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * size + column, mask=column < size, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed_ptr + row * size + column, mask=column < size, other=0.0).to(tl.float32)
        grad *= tl.load(weight_ptr + column, mask=column < size, other=0.0).to(tl.float32)
        along_x += grad * (x - mean) * rstd
        along_one += grad
    sum_x, sum_one = tl.sum(along_x, axis=0) / size, tl.sum(along_one, axis=0) / size
    for first in range(0, size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * size + column, mask=column < size, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed_ptr + row * size + column, mask=column < size, other=0.0).to(tl.float32)
        grad *= tl.load(weight_ptr + column, mask=column < size, other=0.0).to(tl.float32)
        grad -= (x - mean) * rstd * sum_x
        if CENTRED:
            grad -= sum_one
        grad *= rstd
        if ADD:
            grad += tl.load(grad_total_ptr + row * size + column, mask=column < size, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * size + column, grad.to(grad_x_ptr.dtype.element_ty), mask=column < size)


@triton.jit
def norm_sums(
    grad_normed_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,  # fp32 [1 or 2, programs, size]: weight, bias
    num_rows,
    size,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = column < size
    weight_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(program * ROWS, num_rows, programs * ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        there = (row < num_rows)[:, None] & in_row[None, :]
        place = row[:, None] * size + column[None, :]
        x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed_ptr + place, mask=there, other=0.0).to(tl.float32)
        if CENTRED:
            x -= tl.load(mean_ptr + row, mask=row < num_rows, other=0.0)[:, None]
            bias_sum += grad
        weight_sum += grad * x * tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)[:, None]
    at = partial_ptr + program.to(tl.int64) * size + column
    tl.store(at, tl.sum(weight_sum, axis=0), mask=in_row)
    if CENTRED:
        tl.store(at + programs.to(tl.int64) * size, tl.sum(bias_sum, axis=0), mask=in_row)


def launch(size: int, itemsize: int, most_warps: int = 32) -> tuple[int, int, int]:
    """ROWS, BLOCK and warps of a tile of whole rows of `size` features of `itemsize` bytes."""
    block = max(triton.next_power_of_2(size), 32)
    rows = max(1, min(_TILE // (block * itemsize), _TALLEST))
    return rows, block, max(1, min(rows * block * itemsize // (32 * _BYTES_A_THREAD), most_warps))


def programs_of(num_rows: int, size: int, itemsize: int, centred: bool) -> int:
    """Programs of `norm_backward`. Those of 256 threads run three at a time on each of about 128 multiprocessors, with the second sum of
    LayerNorm two; larger ones are as many fewer."""
    rows, block, _ = launch(size, itemsize)
    resident = 256 if centred else 384
    return min(triton.cdiv(num_rows, rows), resident * _TILE // max(rows * block * itemsize, _TILE))


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Norm, sum (None without a residual), mean (None without a bias) and 1 / deviation of each row, of contiguous tensors."""
    size, num_rows = x.shape[-1], x.numel() // x.shape[-1]
    normed = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    mean = None if bias is None else torch.empty_like(rstd)
    if num_rows:
        rows, block, warps = launch(size, x.element_size())
        with torch.cuda.device_of(x):
            norm_forward[(triton.cdiv(num_rows, rows),)](
                x, residual, weight, bias, normed, total, mean, rstd, num_rows, size, eps,
                ADD=residual is not None, CENTRED=bias is not None, ROWS=rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return normed, total, mean, rstd


def backward(
    grad_normed: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor, *, sums: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `x` (the sum, where there was a residual), and with `sums` those of weight and bias in fp32; all contiguous."""
    size, num_rows, centred = x.shape[-1], rstd.shape[0], mean is not None
    grad_x = torch.empty_like(x)
    if not num_rows:
        zeros = torch.zeros(size, dtype=torch.float32, device=x.device) if sums else None
        return grad_x, zeros, zeros if centred else None
    rows, block, warps = launch(size, x.element_size(), BACKWARD_WARPS)
    columns = triton.cdiv(size, _COLUMN_TILE[1])
    if block <= _ONE_PASS:
        programs = programs_of(num_rows, size, x.element_size(), centred)
    else:
        programs = min(triton.cdiv(num_rows, _COLUMN_TILE[0]), max(1, _COLUMN_PROGRAMS // columns))
    partial = torch.empty(1 + centred, programs, size, dtype=torch.float32, device=x.device) if sums else None
    with torch.cuda.device_of(x):
        if block <= _ONE_PASS:
            norm_backward[(programs,)](
                grad_normed, grad_total, x, weight, mean, rstd, grad_x, partial, num_rows, size,
                ADD=grad_total is not None, CENTRED=centred, SUMS=sums, ROWS=rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        else:
            norm_backward_long[(num_rows,)](
                grad_normed, grad_total, x, weight, mean, rstd, grad_x, size,
                ADD=grad_total is not None, CENTRED=centred, BLOCK=LONG_BLOCK, num_warps=LONG_WARPS,
            )  # fmt: skip
            if sums:
                norm_sums[(programs, columns)](
                    grad_normed, x, mean, rstd, partial, num_rows, size,
                    CENTRED=centred, ROWS=_COLUMN_TILE[0], COLUMNS=_COLUMN_TILE[1], num_warps=8,
                )  # fmt: skip
    if partial is None:
        return grad_x, None, None
    total = partial.sum(1)
    return grad_x, total[0], total[1] if centred else None
