# mypy: allow-untyped-defs
"""Triton kernels of the per-head RMSNorm of queries and keys with the rotation after it, forward in one launch and backward in two.

The forward has one token a program. A program of the backward goes through several tokens with the weight's gradient in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaxelm_kernels.rotary_triton import heads_at_a_time, load_pairs, load_rest, load_table, num_warps, store_pairs, store_rest, widths

PROGRAMS = 1024  # at most, in the backward: several to each multiprocessor, and as many rows of partial weight gradients
# Pairs of features at a time and a thread in the backward, which holds x, the gradient and the sums of each: more would not fit.
BACKWARD_TILE, BACKWARD_PAIRS = 256, 4


@triton.jit
def _norm_turn_heads(
    x,
    out,
    weight,
    x_head_stride,
    cos,
    sin,
    eps,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    REST_WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    size: tl.constexpr = 2 * HALF + REST
    one = tl.zeros([1, 1], tl.int64)
    w_first, w_second = load_pairs(weight, one, one == 0, HALF, WIDTH, 1, INTERLEAVED)
    for start in range(0, NUM_HEADS, HEADS):
        head = (start + tl.arange(0, HEADS)[:, None]).to(tl.int64)
        present = head < NUM_HEADS
        rows = head * x_head_stride
        first, second = load_pairs(x, rows, present, HALF, WIDTH, HEADS, INTERLEAVED)
        squares = tl.sum(first * first + second * second, axis=1)[:, None]
        if REST > 0:
            rest = load_rest(x, rows, present, HALF, REST, REST_WIDTH)
            squares += tl.sum(rest * rest, axis=1)[:, None]
        root = tl.rsqrt(squares / size + eps)
        first = first * root * w_first
        second = second * root * w_second
        turned_first = first * cos - second * sin
        turned_second = second * cos + first * sin
        store_pairs(out, head * size, present, turned_first, turned_second, HALF, WIDTH, HEADS, INTERLEAVED)
        if REST > 0:
            w_rest = load_rest(weight, one, one == 0, HALF, REST, REST_WIDTH)
            store_rest(out, head * size, present, rest * root * w_rest, HALF, REST, REST_WIDTH)


@triton.jit
def norm_turn_kernel(
    q,
    k,
    q_weight,
    k_weight,
    q_out,
    k_out,
    cos_table,
    sin_table,
    eps,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    NUM_Q_HEADS: tl.constexpr,
    NUM_K_HEADS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    REST_WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """RMSNorm of each head, then the turn; outputs are contiguous. One token a program."""
    token = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = 2 * HALF + REST
    cos = load_table(cos_table, token, HALF, WIDTH)
    sin = load_table(sin_table, token, HALF, WIDTH)
    _norm_turn_heads(
        q + token * q_token_stride,
        q_out + token * NUM_Q_HEADS * size,
        q_weight,
        q_head_stride,
        cos,
        sin,
        eps,
        NUM_Q_HEADS,
        Q_HEADS,
        HALF,
        WIDTH,
        REST,
        REST_WIDTH,
        INTERLEAVED,
    )
    _norm_turn_heads(
        k + token * k_token_stride,
        k_out + token * NUM_K_HEADS * size,
        k_weight,
        k_head_stride,
        cos,
        sin,
        eps,
        NUM_K_HEADS,
        K_HEADS,
        HALF,
        WIDTH,
        REST,
        REST_WIDTH,
        INTERLEAVED,
    )


@triton.jit
def norm_turn_backward_kernel(
    x,
    grad_out,
    weight,
    grad_x,
    partial,
    cos_table,
    sin_table,
    eps,
    num_tokens,
    tokens_a_program,
    x_token_stride,
    x_head_stride,
    grad_token_stride,
    grad_head_stride,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    REST_WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Gradients of one of q and k: `grad_x` contiguous, and the weight's as one row of `partial` [programs, head_dim] a program.

    With n = x / rms and h the gradient turned back: dw = sum of h n, dx = (h w - n mean(h w n)) / rms.
    """
    size: tl.constexpr = 2 * HALF + REST
    one = tl.zeros([1, 1], tl.int64)
    w_first, w_second = load_pairs(weight, one, one == 0, HALF, WIDTH, 1, INTERLEAVED)
    sum_first = tl.zeros([HEADS, WIDTH], tl.float32)
    sum_second = tl.zeros([HEADS, WIDTH], tl.float32)
    sum_rest = tl.zeros([HEADS, REST_WIDTH], tl.float32)
    program = tl.program_id(0)
    begin = program * tokens_a_program
    for place in range(begin, tl.minimum(begin + tokens_a_program, num_tokens)):
        token = tl.cast(place, tl.int64)
        cos = load_table(cos_table, token, HALF, WIDTH)
        sin = load_table(sin_table, token, HALF, WIDTH)
        for start in range(0, NUM_HEADS, HEADS):
            head = (start + tl.arange(0, HEADS)[:, None]).to(tl.int64)
            present = head < NUM_HEADS
            rows = token * x_token_stride + head * x_head_stride
            grad_rows = token * grad_token_stride + head * grad_head_stride
            to_rows = (token * NUM_HEADS + head) * size
            first, second = load_pairs(x, rows, present, HALF, WIDTH, HEADS, INTERLEAVED)
            grad_first, grad_second = load_pairs(grad_out, grad_rows, present, HALF, WIDTH, HEADS, INTERLEAVED)
            squares = tl.sum(first * first + second * second, axis=1)[:, None]
            if REST > 0:
                rest = load_rest(x, rows, present, HALF, REST, REST_WIDTH)
                squares += tl.sum(rest * rest, axis=1)[:, None]
            root = tl.rsqrt(squares / size + eps)
            first *= root
            second *= root
            back_first = grad_first * cos + grad_second * sin
            back_second = grad_second * cos - grad_first * sin
            sum_first += back_first * first
            sum_second += back_second * second
            back_first *= w_first
            back_second *= w_second
            mean = tl.sum(back_first * first + back_second * second, axis=1)[:, None]
            if REST > 0:
                rest *= root
                back_rest = load_rest(grad_out, grad_rows, present, HALF, REST, REST_WIDTH)
                sum_rest += back_rest * rest
                back_rest *= load_rest(weight, one, one == 0, HALF, REST, REST_WIDTH)
                mean += tl.sum(back_rest * rest, axis=1)[:, None]
            mean = mean / size
            dx_first = (back_first - first * mean) * root
            dx_second = (back_second - second * mean) * root
            store_pairs(grad_x, to_rows, present, dx_first, dx_second, HALF, WIDTH, HEADS, INTERLEAVED)
            if REST > 0:
                store_rest(grad_x, to_rows, present, (back_rest - rest * mean) * root, HALF, REST, REST_WIDTH)
    row = one + tl.cast(program, tl.int64) * size
    dw_first, dw_second = tl.sum(sum_first, axis=0)[None, :], tl.sum(sum_second, axis=0)[None, :]
    store_pairs(partial, row, one == 0, dw_first, dw_second, HALF, WIDTH, 1, INTERLEAVED)
    if REST > 0:
        store_rest(partial, row, one == 0, tl.sum(sum_rest, axis=0)[None, :], HALF, REST, REST_WIDTH)


def norm_turn(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """q and k normed a head, scaled and turned; new contiguous tensors."""
    num_tokens, num_q_heads, head_dim = q.shape
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    sizes = widths(head_dim, cos.shape[1])
    width = max(sizes["WIDTH"], sizes["REST_WIDTH"])
    q_heads, k_heads = heads_at_a_time(num_q_heads, width), heads_at_a_time(k.shape[1], width)
    norm_turn_kernel[(num_tokens,)](
        q,
        k,
        q_weight,
        k_weight,
        q_out,
        k_out,
        cos,
        sin,
        eps,
        *q.stride()[:2],
        *k.stride()[:2],
        NUM_Q_HEADS=num_q_heads,
        NUM_K_HEADS=k.shape[1],
        Q_HEADS=q_heads,
        K_HEADS=k_heads,
        **sizes,
        INTERLEAVED=interleaved,
        num_warps=num_warps(q_heads, width),
    )
    return q_out, k_out


def norm_turn_backward(
    x: Tensor, grad_out: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of one of q and k and of its weight, which is summed from partial sums in a fixed order."""
    num_tokens, num_heads, head_dim = x.shape
    tokens_a_program = triton.cdiv(num_tokens, PROGRAMS)
    programs = triton.cdiv(num_tokens, tokens_a_program)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(programs, head_dim, dtype=torch.float32, device=x.device)
    sizes = widths(head_dim, cos.shape[1])
    width = max(sizes["WIDTH"], sizes["REST_WIDTH"])
    heads = heads_at_a_time(num_heads, width, BACKWARD_TILE)
    norm_turn_backward_kernel[(programs,)](
        x,
        grad_out,
        weight,
        grad_x,
        partial,
        cos,
        sin,
        eps,
        num_tokens,
        tokens_a_program,
        *x.stride()[:2],
        *grad_out.stride()[:2],
        NUM_HEADS=num_heads,
        HEADS=heads,
        **sizes,
        INTERLEAVED=interleaved,
        num_warps=num_warps(heads, width, BACKWARD_PAIRS),
    )
    return grad_x, partial.sum(0).to(weight.dtype)
