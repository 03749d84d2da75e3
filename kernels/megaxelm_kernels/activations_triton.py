"""Triton kernels of `activations`: elementwise tiles; the gradient of a bias from partial sums of a fixed number of programs."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # elements a program of SwiGLU: two 16-byte loads a thread and input in bf16
_WARPS = 4
_TILE = 2048  # elements of a tile of GELU
_WIDEST = 1024  # columns of it
_TALLEST = 32  # rows of it
_BACKWARD_WARPS = 8  # of GELU: the sum of a bias takes registers
_PROGRAMS = 512  # of the backward pass of GELU: four of 256 threads for each of about 128 multiprocessors


@triton.jit
def _sigmoid(z):
    """s = 1 / (1 + exp(-z)) and its derivative s * (1 - s), neither by a difference; no overflow for any z."""
    e = tl.exp(-tl.abs(z))
    r = 1.0 / (1.0 + e)
    return tl.where(z >= 0, r, e * r), e * r * r


@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    gate = tl.load(gate_ptr + place, mask=there, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=there, other=0.0).to(tl.float32)
    s, _ = _sigmoid(gate)
    tl.store(out_ptr + place, (gate * s * up).to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def swiglu_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, count, GATE: tl.constexpr, UP: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    grad = tl.load(grad_ptr + place, mask=there, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + place, mask=there, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=there, other=0.0).to(tl.float32)
    # The gradients may lie where the inputs lay: everything is read by now, and by this program alone.
    s, slope = _sigmoid(gate)
    if GATE:
        tl.store(grad_gate_ptr + place, (grad * up * (s + gate * slope)).to(grad_gate_ptr.dtype.element_ty), mask=there)
    if UP:
        tl.store(grad_up_ptr + place, (grad * gate * s).to(grad_up_ptr.dtype.element_ty), mask=there)


@triton.jit
def gelu_forward_kernel(
    x_ptr, bias_ptr, out_ptr, num_rows, size, BIAS: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < num_rows)[:, None] & (column < size)[None, :]
    place = row[:, None] * size + column[None, :]
    x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    if TANH:
        # (1 + tanh(z)) / 2 is the sigmoid of 2 z.
        s, _ = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = x * s
    else:
        y = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def gelu_backward_kernel(
    grad_ptr,
    x_ptr,
    bias_ptr,
    grad_x_ptr,
    partial_ptr,  # fp32 [programs, size]
    num_rows,
    size,
    BIAS: tl.constexpr,
    TANH: tl.constexpr,
    INPUT: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = column < size
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    bias_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(program * ROWS, num_rows, programs * ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        there = (row < num_rows)[:, None] & in_row[None, :]
        place = row[:, None] * size + column[None, :]
        grad = tl.load(grad_ptr + place, mask=there, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
        if BIAS:
            x += bias
        if TANH:
            s, slope = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
            # Where the slope has come down to 0 the square of x may be infinite.
            slope = tl.where(slope > 0, x * slope * 1.5957691216057308 * (1.0 + 0.134145 * x * x), 0.0)
        else:
            s = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
            slope = x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        grad *= s + slope
        if INPUT:
            tl.store(grad_x_ptr + place, grad.to(grad_x_ptr.dtype.element_ty), mask=there)
        if SUMS:
            bias_sum += grad  # of the gradient before it is rounded; 0 outside
    if SUMS:
        tl.store(partial_ptr + program.to(tl.int64) * size + column, tl.sum(bias_sum, axis=0), mask=in_row)


def tile(size: int) -> tuple[int, int]:
    """Rows and columns of a tile of GELU for rows of `size` features."""
    columns = min(max(triton.next_power_of_2(size), 32), _WIDEST)
    return min(_TILE // columns, _TALLEST), columns


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of contiguous tensors."""
    out = torch.empty_like(gate)
    if gate.numel():
        with torch.cuda.device_of(gate):
            swiglu_forward_kernel[(triton.cdiv(gate.numel(), _BLOCK),)](gate, up, out, gate.numel(), BLOCK=_BLOCK, num_warps=_WARPS)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor | None, grad_up: Tensor | None) -> None:
    """Write the gradients that are wanted; they may be the inputs themselves. All contiguous."""
    if gate.numel():
        with torch.cuda.device_of(gate):
            swiglu_backward_kernel[(triton.cdiv(gate.numel(), _BLOCK),)](
                grad, gate, up, grad_gate, grad_up, gate.numel(),
                GATE=grad_gate is not None, UP=grad_up is not None, BLOCK=_BLOCK, num_warps=_WARPS,
            )  # fmt: skip


def gelu_forward(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """gelu(x + bias) of contiguous tensors."""
    out = torch.empty_like(x)
    if x.numel():
        num_rows, size = _rows(x)
        rows, columns = tile(size)
        with torch.cuda.device_of(x):
            gelu_forward_kernel[(triton.cdiv(num_rows, rows), triton.cdiv(size, columns))](
                x, bias, out, num_rows, size, BIAS=bias is not None, TANH=tanh, ROWS=rows, COLUMNS=columns, num_warps=_WARPS
            )
    return out


def gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None, grad_x: Tensor | None, tanh: bool, *, sums: bool) -> Tensor | None:
    """Write the gradient of `x`, which may be `x` itself; with `sums` return that of the bias in fp32. All contiguous."""
    if not x.numel():
        return None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=x.device)
    num_rows, size = _rows(x)
    rows, columns = tile(size)
    across = triton.cdiv(size, columns)
    programs = min(triton.cdiv(num_rows, rows), max(1, _PROGRAMS // across))
    partial = torch.empty(programs, size, dtype=torch.float32, device=x.device) if sums else None
    with torch.cuda.device_of(x):
        gelu_backward_kernel[(programs, across)](
            grad, x, bias, grad_x, partial, num_rows, size,
            BIAS=bias is not None, TANH=tanh, INPUT=grad_x is not None, SUMS=sums, ROWS=rows, COLUMNS=columns, num_warps=_BACKWARD_WARPS,
        )  # fmt: skip
    return None if partial is None else partial.sum(0)


def _rows(x: Tensor) -> tuple[int, int]:
    size = x.shape[-1] if x.ndim else 1
    return x.numel() // size, size
