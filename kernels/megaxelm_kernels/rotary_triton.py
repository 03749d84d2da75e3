# mypy: allow-untyped-defs
"""Triton kernel of rotary positions: queries and keys turned in one launch; what `norm_rotary_triton.py` shares with it.

A program has one token, whose row of the tables it reads once for all heads of q and k. Arithmetic is in fp32 with one rounding at the
end. Every product of a row and a stride is taken in 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # pairs of features at a time: 8 a thread of 4 warps


@triton.jit
def load_pairs(pointer, rows, row_mask, HALF: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two features of each pair, fp32 [HEADS, WIDTH] each; 0 where there is none."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * WIDTH)[None, :]
        both = tl.load(pointer + rows + column, mask=row_mask & (column < 2 * HALF), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (HEADS, WIDTH, 2)))
    else:
        column = tl.arange(0, WIDTH)[None, :]
        mask = row_mask & (column < HALF)
        first = tl.load(pointer + rows + column, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(pointer + rows + HALF + column, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pairs(
    pointer, rows, row_mask, first, second, HALF: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, INTERLEAVED: tl.constexpr
):
    if INTERLEAVED:
        column = tl.arange(0, 2 * WIDTH)[None, :]
        both = tl.reshape(tl.join(first, second), (HEADS, 2 * WIDTH))
        tl.store(pointer + rows + column, both.to(pointer.dtype.element_ty), mask=row_mask & (column < 2 * HALF))
    else:
        column = tl.arange(0, WIDTH)[None, :]
        mask = row_mask & (column < HALF)
        tl.store(pointer + rows + column, first.to(pointer.dtype.element_ty), mask=mask)
        tl.store(pointer + rows + HALF + column, second.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_rest(pointer, rows, row_mask, HALF: tl.constexpr, REST: tl.constexpr, REST_WIDTH: tl.constexpr):
    """The features after the turned ones, fp32 [HEADS, REST_WIDTH]."""
    column = tl.arange(0, REST_WIDTH)[None, :]
    return tl.load(pointer + rows + 2 * HALF + column, mask=row_mask & (column < REST), other=0.0).to(tl.float32)


@triton.jit
def store_rest(pointer, rows, row_mask, values, HALF: tl.constexpr, REST: tl.constexpr, REST_WIDTH: tl.constexpr):
    column = tl.arange(0, REST_WIDTH)[None, :]
    tl.store(pointer + rows + 2 * HALF + column, values.to(pointer.dtype.element_ty), mask=row_mask & (column < REST))


@triton.jit
def load_table(pointer, token, HALF: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)[None, :]
    return tl.load(pointer + token * HALF + column, mask=column < HALF, other=0.0)


@triton.jit
def _turn_heads(
    x,
    out,
    x_head_stride,
    out_head_stride,
    cos,
    sin,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    REST_WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Turn the heads of one token, from `x` to `out`, which may be the same."""
    for start in range(0, NUM_HEADS, HEADS):
        head = (start + tl.arange(0, HEADS)[:, None]).to(tl.int64)
        present = head < NUM_HEADS
        from_rows, to_rows = head * x_head_stride, head * out_head_stride
        first, second = load_pairs(x, from_rows, present, HALF, WIDTH, HEADS, INTERLEAVED)
        turned_first = first * cos - second * sin
        turned_second = second * cos + first * sin
        store_pairs(out, to_rows, present, turned_first, turned_second, HALF, WIDTH, HEADS, INTERLEAVED)
        if REST > 0:
            rest = load_rest(x, from_rows, present, HALF, REST, REST_WIDTH)
            store_rest(out, to_rows, present, rest, HALF, REST, REST_WIDTH)


@triton.jit
def turn_kernel(
    q,
    k,
    q_out,
    k_out,
    cos_table,
    sin_table,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    q_out_token_stride,
    q_out_head_stride,
    k_out_token_stride,
    k_out_head_stride,
    NUM_Q_HEADS: tl.constexpr,
    NUM_K_HEADS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    REST_WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """One token a program. REST is 0 where the features after the turned ones stay where they are."""
    token = tl.program_id(0).to(tl.int64)
    cos = load_table(cos_table, token, HALF, WIDTH)
    sin = load_table(sin_table, token, HALF, WIDTH)
    if BACKWARD:
        sin = -sin
    _turn_heads(
        q + token * q_token_stride,
        q_out + token * q_out_token_stride,
        q_head_stride,
        q_out_head_stride,
        cos,
        sin,
        NUM_Q_HEADS,
        Q_HEADS,
        HALF,
        WIDTH,
        REST,
        REST_WIDTH,
        INTERLEAVED,
    )
    _turn_heads(
        k + token * k_token_stride,
        k_out + token * k_out_token_stride,
        k_head_stride,
        k_out_head_stride,
        cos,
        sin,
        NUM_K_HEADS,
        K_HEADS,
        HALF,
        WIDTH,
        REST,
        REST_WIDTH,
        INTERLEAVED,
    )


def widths(head_dim: int, half: int) -> dict[str, int]:
    """Sizes of the tiles in features, powers of two over what they hold."""
    rest = head_dim - 2 * half
    return {"HALF": half, "WIDTH": triton.next_power_of_2(half), "REST": rest, "REST_WIDTH": triton.next_power_of_2(max(rest, 1))}


def heads_at_a_time(num_heads: int, width: int, tile: int = TILE) -> int:
    return min(triton.next_power_of_2(num_heads), max(1, tile // width))


def num_warps(heads: int, width: int, pairs_a_thread: int = 8) -> int:
    return min(8, max(1, heads * width // (32 * pairs_a_thread)))


def turn(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, backward: bool) -> None:
    """Write q and k turned into `q_out` and `k_out`, which may be q and k themselves. Features lie one after another in all four."""
    num_tokens, num_q_heads, head_dim = q.shape
    sizes = widths(head_dim, cos.shape[1])
    if q_out.data_ptr() == q.data_ptr() and k_out.data_ptr() == k.data_ptr():
        sizes["REST"] = 0
    width = max(sizes["WIDTH"], sizes["REST_WIDTH"])
    q_heads, k_heads = heads_at_a_time(num_q_heads, width), heads_at_a_time(k.shape[1], width)
    strides = [stride for x in (q, k, q_out, k_out) for stride in x.stride()[:2]]
    turn_kernel[(num_tokens,)](
        q,
        k,
        q_out,
        k_out,
        cos,
        sin,
        *strides,
        NUM_Q_HEADS=num_q_heads,
        NUM_K_HEADS=k.shape[1],
        Q_HEADS=q_heads,
        K_HEADS=k_heads,
        **sizes,
        INTERLEAVED=interleaved,
        BACKWARD=backward,
        num_warps=num_warps(q_heads, width),
    )
