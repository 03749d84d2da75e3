"""One program a row of logits: log-sum-exp and loss in a first sweep, the gradient in the logits' place in a second."""

# Triton reads the annotations of its kernels itself.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 8  # neighbouring columns of one thread: 16 bytes of bf16, one load


@triton.jit
def _tanh(u):
    # Near 0 the quotient loses the digits that the series has: u - u^3/3 + 2u^5/15 - 17u^7/315 + 62u^9/2835.
    square = u * u
    near = u * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    decay = tl.exp(-2.0 * tl.abs(u))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(u) < 0.25, near, tl.where(u < 0, -far, far))


@triton.jit
def head_loss_kernel(
    logits,
    labels,
    row_weights,
    lse_out,
    target_out,
    nll_out,
    stride,
    columns,
    vocab_size,
    z_loss,
    soft_cap,
    IGNORE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_Z: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Row of `logits` [rows, columns] -> `lse`, `target`, `nll` [rows] fp32, 0 where the label is IGNORE.

    WITH_GRADIENT: the row becomes the gradient of row_weight * (nll + z_loss * lse^2) with respect to itself.
    """
    TILE: tl.constexpr = LANES * WIDTH
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    inside = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    num_tiles = tl.cdiv(columns, TILE)
    if label == IGNORE:
        # The row is not read: it may hold anything.
        tl.store(lse_out + row, 0.0)
        tl.store(target_out + row, 0.0)
        tl.store(nll_out + row, 0.0)
        if WITH_GRADIENT:
            for tile in range(num_tiles):
                at = tile * TILE + inside
                tl.store(logits + at, tl.zeros([LANES, WIDTH], logits.dtype.element_ty), mask=at < columns)
    else:
        # A label that is no token gives a loss of NaN, not a read beyond the row.
        target = tl.load(logits + label, mask=(label >= 0) & (label < vocab_size), other=float("nan")).to(tl.float32)
        if HAS_CAP:
            target = soft_cap * _tanh(target / soft_cap)
        # A maximum and a sum for each lane, so that the threads meet once a row and not once a tile.
        top = tl.full([LANES], float("-inf"), tl.float32)
        total = tl.zeros([LANES], tl.float32)
        for tile in range(tl.cdiv(vocab_size, TILE)):
            at = tile * TILE + inside
            # The mask of the load is by `columns`, a multiple of 16 where the head is padded, which keeps the loads whole.
            z = tl.load(logits + at, mask=at < columns, other=0.0).to(tl.float32)
            if HAS_CAP:
                z = soft_cap * _tanh(z / soft_cap)
            z = tl.where(at < vocab_size, z, float("-inf"))
            higher = tl.maximum(top, tl.max(z, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - base) + tl.sum(tl.exp(z - base[:, None]), 1)
            top = higher
        row_top = tl.max(top, 0)
        row_total = tl.sum(total * tl.exp(top - row_top), 0)
        log_total = tl.log(row_total)
        lse = row_top + log_total
        tl.store(lse_out + row, lse)
        tl.store(target_out + row, target)
        # Not lse - target: both may be large.
        tl.store(nll_out + row, log_total - (target - row_top))
        if WITH_GRADIENT:
            weight = tl.load(row_weights + row)
            factor = weight / row_total
            z_factor = factor * (2.0 * z_loss * lse)
            token = label.to(tl.int32)
            # Backwards: the end of the row is what the cache still holds.
            for step in range(num_tiles):
                at = (num_tiles - 1 - step) * TILE + inside
                z = tl.load(logits + at, mask=at < columns, other=0.0).to(tl.float32)
                slope = 1.0
                if HAS_CAP:
                    bent = _tanh(z / soft_cap)
                    z = soft_cap * bent
                    slope = (1.0 - bent) * (1.0 + bent)
                share = tl.exp(z - row_top)
                gradient = share * factor - tl.where(at == token, weight, 0.0)
                if HAS_Z:
                    # On its own: added to the factor, it loses its digits beside the 1 of a token that is certain.
                    gradient += share * z_factor
                gradient = gradient * slope
                gradient = tl.where(at < vocab_size, gradient, 0.0)
                tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < columns)


def launch_shape(columns: int) -> tuple[int, int]:
    """Lanes and warps for rows of so many columns: 8 columns a thread and tile, at most 16 warps.

    Few enough registers that three rows share a multiprocessor in bf16: loads of one hide the arithmetic of the others.
    """
    lanes = min(512, max(32, triton.next_power_of_2(triton.cdiv(columns, WIDTH))))
    return lanes, lanes // 32


def row_losses(
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    lse: Tensor,
    target: Tensor,
    nll: Tensor,
    *,
    vocab_size: int,
    z_loss: float,
    soft_cap: float | None,
    with_gradient: bool,
    ignore_index: int,
) -> None:
    """Fill `lse`, `target` and `nll` [rows] fp32 from `logits` [rows, columns], which become their gradient if asked.

    All are contiguous; `labels` int64 and `row_weights` fp32 are [rows].
    """
    rows, columns = logits.shape
    if rows == 0:
        return
    lanes, num_warps = launch_shape(columns)
    on_device: Any = torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext()
    with on_device:
        head_loss_kernel[(rows,)](
            logits,
            labels,
            row_weights,
            lse,
            target,
            nll,
            logits.stride(0),
            columns,
            vocab_size,
            float(z_loss),
            1.0 if soft_cap is None else float(soft_cap),
            IGNORE=ignore_index,
            HAS_CAP=soft_cap is not None,
            HAS_Z=z_loss != 0,
            WITH_GRADIENT=with_gradient,
            LANES=lanes,
            WIDTH=WIDTH,
            num_warps=num_warps,
        )
