"""Triton kernels of `decode_attention`: the places of a row are cut into splits, each with an online softmax; a second kernel joins them.

A program has one split of one key head of one row and all query heads that share it, so keys and values are read once. Statistics are in
fp32; the splits are joined in one order, without atomics. Sources: Dao, Haziza, Massa and Sizov 2023, Flash-Decoding for long-context
inference; online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaxelm_kernels.backend import interpreted

PROGRAMS = 512  # wanted at least: about four on each of 132 multiprocessors
_LEAST_PLACES = 128  # of a split
_MOST_SPLITS = 32  # which the second kernel holds at once
_LOG2_E = 1.4426950408889634
STORE_BLOCK = 1024


@dataclass(frozen=True)
class Launch:
    """Tiles and grid of one shape."""

    splits: int
    places_a_split: int
    places: int
    """Of a tile."""
    heads: int
    """Of a tile: the query heads of a key head, padded."""
    head_dim: int
    stages: int
    warps: int


@triton.jit
def decode_attention_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    lengths_ptr,
    out_ptr,  # [R, heads, D], or fp32 [R, heads, splits, D]
    sums_ptr,  # fp32 [R, heads, splits], with several splits: log2 of the sum of 2^score
    capacity,
    longest,
    window,
    places_a_split,
    q_row_stride,
    q_head_stride,
    scale,  # times log2 e
    HEADS_A_KEY: tl.constexpr,
    SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
    PLACES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    kv_head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.minimum(tl.load(lengths_ptr + row), longest).to(tl.int32)
    begin = tl.maximum(length - window, 0) + split * places_a_split
    end = tl.minimum(begin + places_a_split, length)
    if SPLITS > 1 and begin >= end:
        return
    head = tl.arange(0, HEADS)
    feature = tl.arange(0, WIDTH)
    place = tl.arange(0, PLACES)
    present = (head < HEADS_A_KEY)[:, None] & (feature < HEAD_DIM)[None, :]
    query_head = kv_head * HEADS_A_KEY + head
    q = tl.load(q_ptr + row * q_row_stride + query_head[:, None] * q_head_stride + feature[None, :], mask=present, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    found = tl.zeros((HEADS, WIDTH), tl.float32)
    slot = tl.load(slots_ptr + row).to(tl.int64) * tl.num_programs(0) + kv_head
    keys_ptr += slot * capacity * HEAD_DIM
    values_ptr += slot * capacity * HEAD_DIM
    for first in range(begin, end, PLACES):
        here = first + place
        seen = here < end
        there = here[:, None] * HEAD_DIM + feature[None, :]
        inside = seen[:, None] & (feature < HEAD_DIM)[None, :]
        keys = tl.load(keys_ptr + there, mask=inside, other=0.0)
        values = tl.load(values_ptr + there, mask=inside, other=0.0)
        if UPCAST:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        found = tl.dot(weights.to(values.dtype), values, found * shrink[:, None], input_precision="ieee")
        highest = higher
    found = found / tl.where(total > 0, total, 1.0)[:, None]  # a row of length 0 has no sum, and zeros
    at = row * tl.num_programs(0) * HEADS_A_KEY + query_head
    if SPLITS > 1:
        tl.store(sums_ptr + at * SPLITS + split, highest + tl.log2(total), mask=head < HEADS_A_KEY)
        tl.store(out_ptr + (at * SPLITS + split)[:, None] * HEAD_DIM + feature[None, :], found, mask=present)
    else:
        tl.store(out_ptr + at[:, None] * HEAD_DIM + feature[None, :], found.to(out_ptr.dtype.element_ty), mask=present)


@triton.jit
def join_splits_kernel(
    partial_ptr,
    sums_ptr,
    lengths_ptr,
    out_ptr,
    longest,
    window,
    places_a_split,
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One head of one row: the splits that it has, weighted by their sums."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.minimum(tl.load(lengths_ptr + row), longest).to(tl.int32)
    used = (tl.minimum(length, window) + places_a_split - 1) // places_a_split
    split = tl.arange(0, PADDED)
    feature = tl.arange(0, WIDTH)
    at = row * tl.num_programs(0) + head
    sums = tl.load(sums_ptr + at * SPLITS + split, mask=split < used, other=float("-inf"))
    # The highest of no split is minus infinity, less which nothing may be taken.
    shares = tl.exp2(sums - tl.where(used > 0, tl.max(sums, axis=0), 0.0))
    inside = (split < used)[:, None] & (feature < HEAD_DIM)[None, :]
    partial = tl.load(partial_ptr + (at * SPLITS + split)[:, None] * HEAD_DIM + feature[None, :], mask=inside, other=0.0)
    found = tl.sum(partial * shares[:, None], axis=0) / tl.where(used > 0, tl.sum(shares, axis=0), 1.0)
    tl.store(out_ptr + at * HEAD_DIM + feature, found.to(out_ptr.dtype.element_ty), mask=feature < HEAD_DIM)


@triton.jit
def store_kv_kernel(
    keys_ptr,
    values_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    positions_ptr,
    capacity,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of the features of one row, all heads one after another."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + row)
    if (position < 0) | (position >= capacity):
        return
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head, feature = element // HEAD_DIM, element % HEAD_DIM
    there = head < NUM_HEADS
    to = ((tl.load(slots_ptr + row) * NUM_HEADS + head) * capacity + position) * HEAD_DIM + feature
    k = tl.load(k_ptr + row * k_row_stride + head * k_head_stride + feature, mask=there)
    v = tl.load(v_ptr + row * v_row_stride + head * v_head_stride + feature, mask=there)
    tl.store(keys_ptr + to, k, mask=there)
    tl.store(values_ptr + to, v, mask=there)


def launch(num_rows: int, kv_heads: int, heads_a_key: int, head_dim: int, places: int, itemsize: int) -> Launch:
    """`places` is a bound of what a row sees. By bounds that the host knows: the same for any lengths."""
    width = max(16, triton.next_power_of_2(head_dim))
    tile = max(16, min(64, 16384 // (width * itemsize)))
    wanted = triton.cdiv(PROGRAMS, max(1, num_rows * kv_heads))
    splits = max(1, min(wanted, triton.cdiv(places, _LEAST_PLACES), _MOST_SPLITS))
    places_a_split = triton.cdiv(triton.cdiv(max(places, 1), splits), tile) * tile
    heads = max(16, triton.next_power_of_2(heads_a_key))
    return Launch(
        splits=triton.cdiv(max(places, 1), places_a_split),
        places_a_split=places_a_split,
        places=tile,
        heads=heads,
        head_dim=width,
        stages=3,
        warps=8 if itemsize == 4 else 4,  # products in fp32 are kept in registers
    )


def forward(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, longest: int, scale: float, sliding_window: int | None
) -> Tensor:
    """The attention of each row, [R, heads, D]; shapes are checked."""
    num_rows, num_heads, head_dim = q.shape
    kv_heads, capacity = keys.shape[1:3]
    q = q if q.stride(2) == 1 else q.contiguous()
    out = torch.empty(num_rows, num_heads, head_dim, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    window = longest if sliding_window is None else min(sliding_window, longest)
    tile = launch(num_rows, kv_heads, num_heads // kv_heads, head_dim, window, q.element_size())
    split = tile.splits > 1
    partial, sums = out, None
    if split:
        partial = torch.empty(num_rows, num_heads, tile.splits, head_dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(num_rows, num_heads, tile.splits, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        decode_attention_kernel[(kv_heads, num_rows, tile.splits)](
            q, keys, values, slots, lengths, partial, sums, capacity, longest, window, tile.places_a_split,
            q.stride(0), q.stride(1), scale * _LOG2_E,
            HEADS_A_KEY=num_heads // kv_heads, SPLITS=tile.splits, HEADS=tile.heads, PLACES=tile.places, HEAD_DIM=head_dim,
            WIDTH=tile.head_dim, UPCAST=interpreted() and q.dtype != torch.float32, num_stages=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
        if split:
            join_splits_kernel[(num_heads, num_rows)](
                partial, sums, lengths, out, longest, window, tile.places_a_split,
                SPLITS=tile.splits, PADDED=triton.next_power_of_2(tile.splits), HEAD_DIM=head_dim, WIDTH=tile.head_dim, num_warps=4,
            )  # fmt: skip
    return out


def store(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor) -> None:
    """Write k and v to their places; shapes are checked."""
    k, v = (new if new.stride(2) == 1 else new.contiguous() for new in (k, v))
    num_rows, kv_heads, head_dim = k.shape
    if not k.numel():
        return
    with torch.cuda.device_of(keys):
        store_kv_kernel[(num_rows, triton.cdiv(kv_heads * head_dim, STORE_BLOCK))](
            keys, values, k, v, slots, positions, keys.shape[2], k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            NUM_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK=STORE_BLOCK, num_warps=4,
        )  # fmt: skip
