"""Triton kernels of `mixture`: noise, head product, log-sum-exp of rows, the draw of an expert. Launched by `mixture_triton`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from . import gumbel

_GOLDEN = tl.constexpr(gumbel.GOLDEN)
_MIX_1 = tl.constexpr(gumbel.MIX_1)
_MIX_2 = tl.constexpr(gumbel.MIX_2)
_LARGEST_X = tl.constexpr(gumbel.LARGEST_X)


@triton.jit
def _mix(z):
    z = z ^ ((z >> 30) & 0x3FFFFFFFF)
    z = z * _MIX_1
    z = z ^ ((z >> 27) & 0x1FFFFFFFFF)
    z = z * _MIX_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def stream_key(key, position):
    """As `gumbel.stream_keys`."""
    return _mix((_mix(key + _GOLDEN) ^ position) + _GOLDEN)


@triton.jit
def token_noise(stream, token):
    """As `gumbel.gumbel_noise`, of int64 `token` in the stream of `stream_key`."""
    number = _mix(stream + (token >> 1) * _GOLDEN)
    return noise_of_bits(number >> ((token & 1) << 5))


@triton.jit
def noise_of_bits(number):
    """Noise of the lowest 31 bits of `number` int64."""
    bits = (number & 0x7FFFFFFF).to(tl.int32)
    x = tl.minimum((bits.to(tl.float32) + 0.5) * (0.5 / 1073741824.0), _LARGEST_X)
    # log(1 - x) with the digits of a small x (Goldberg 1991, theorem 4).
    y = 1.0 - x
    e = tl.where(y == 1.0, x, -tl.log(y) * (x / tl.where(y == 1.0, 1.0, 1.0 - y)))
    return -tl.log(e)


@triton.jit
def head_product(
    hidden,  # [rows, size]
    heads,  # [E, V, size]
    offsets,  # [E + 1] int32
    logits,  # [R, columns] fp32; not with DRAW
    tile_max,  # [R, tiles] fp32
    tile_sum,
    source,  # with DRAW: [R] int64, the row of `hidden` of each row
    order,  # and its sequence, [R] int64
    keys,  # [B] int64
    positions,
    tile_best,  # with DRAW: [R, tiles] of the best token of the tile: its score with the noise
    tile_token,
    tile_logit,
    num_rows,
    vocab_size,
    size,
    hidden_stride,
    group_stride,
    head_stride,
    logits_stride,
    num_tiles,
    SHARED: tl.constexpr,
    DRAW: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    if SHARED:
        start = 0
        end = num_rows
    else:
        start = tl.load(offsets + group)
        end = tl.load(offsets + group + 1)
    first_token = tile * BLOCK_V
    token = first_token + tl.arange(0, BLOCK_V)
    inside = token < vocab_size
    # Beyond the end the last token and the last row are read again: no load needs a mask.
    weight_row = tl.minimum(token, vocab_size - 1) - first_token
    weights = heads + group * group_stride + first_token.to(tl.int64) * head_stride
    feature = tl.arange(0, BLOCK_K)
    for first in range(start, end, BLOCK_R):
        at_row = tl.arange(0, BLOCK_R)
        there = first + at_row < end
        first_row = tl.cast(first, tl.int64)
        last = end - 1 - first
        if DRAW:
            states = hidden + tl.load(source + first_row + tl.minimum(at_row, last)) * hidden_stride
        else:
            states = hidden + first_row * hidden_stride + tl.minimum(at_row, last) * hidden_stride
        z = tl.zeros((BLOCK_V, BLOCK_R), tl.float32)
        for at in range(0, size, BLOCK_K):
            k = at + feature
            if EVEN:
                weight = tl.load(weights + weight_row[:, None] * head_stride + k[None, :])
                state = tl.load(states[None, :] + k[:, None])
            else:
                weight = tl.load(weights + weight_row[:, None] * head_stride + k[None, :], mask=k[None, :] < size, other=0.0)
                state = tl.load(states[None, :] + k[:, None], mask=k[:, None] < size, other=0.0)
            if UPCAST:
                weight = weight.to(tl.float32)
                state = state.to(tl.float32)
            z = tl.dot(weight, state, z, input_precision="ieee")
        z = tl.where(inside[:, None], z, float("-inf"))
        top = tl.max(z, axis=0)
        row = first_row + at_row
        place = row * num_tiles + tile
        tl.store(tile_max + place, top, mask=there)
        tl.store(tile_sum + place, tl.sum(tl.exp(z - top[None, :]), axis=0), mask=there)
        if DRAW:
            sequence = tl.load(order + row, mask=there, other=0)
            stream = stream_key(tl.load(keys + sequence), tl.load(positions + sequence))
            score = z + token_noise(stream[None, :], token.to(tl.int64)[:, None])
            best = tl.max(score, axis=0)
            chosen = tl.min(tl.where(score == best[None, :], token[:, None], vocab_size), axis=0)
            tl.store(tile_best + place, best, mask=there)
            tl.store(tile_token + place, chosen, mask=there)
            tl.store(tile_logit + place, tl.sum(tl.where(token[:, None] == chosen[None, :], z, 0.0), axis=0), mask=there)
        else:
            out = logits + first_row * logits_stride + first_token
            at = at_row[None, :] * logits_stride + tl.arange(0, BLOCK_V)[:, None]
            tl.store(out + at, z, mask=inside[:, None] & there[None, :])


@triton.jit
def sum_of_tiles(maxima, sums, count, SCAN: tl.constexpr):
    """Maximum of all and the logarithm of the sum beyond it, of tiles with a maximum and a sum of exponentials each."""
    tops = tl.full((SCAN,), float("-inf"), tl.float32)
    totals = tl.zeros((SCAN,), tl.float32)
    for first in range(0, count, SCAN):
        tile = first + tl.arange(0, SCAN)
        top = tl.load(maxima + tile, mask=tile < count, other=float("-inf"))
        total = tl.load(sums + tile, mask=tile < count, other=0.0)
        higher = tl.maximum(tops, top)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        totals = totals * tl.exp(tops - base) + total * tl.exp(top - base)
        tops = higher
    highest = tl.max(tops, axis=0)
    return highest, tl.log(tl.sum(totals * tl.exp(tops - highest), axis=0))


@triton.jit
def row_sums(tile_max, tile_sum, row_max, lse, num_tiles, SCAN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top, rest = sum_of_tiles(tile_max + row * num_tiles, tile_sum + row * num_tiles, num_tiles, SCAN)
    tl.store(row_max + row, top)
    tl.store(lse + row, top + rest)


@triton.jit
def first_of_best(best, best_token, count, none, SCAN: tl.constexpr):
    """The best score, and the lowest token that has it."""
    tops = tl.full((SCAN,), float("-inf"), tl.float32)
    tokens = tl.zeros((SCAN,), tl.int32) + none
    for first in range(0, count, SCAN):
        tile = first + tl.arange(0, SCAN)
        score = tl.load(best + tile, mask=tile < count, other=float("-inf"))
        token = tl.load(best_token + tile, mask=tile < count, other=2147483647)
        # Tiles come in the order of their tokens: an equal score later does not count.
        tokens = tl.where(score > tops, token, tokens)
        tops = tl.maximum(tops, score)
    highest = tl.max(tops, axis=0)
    return highest, tl.min(tl.where(tops == highest, tokens, none), axis=0)


@triton.jit
def draw_experts(
    log_w,  # [B, m] fp32
    rows,  # [B, m] int64
    expert_keys,  # [B, m] int64
    keys,  # [B] int64
    positions,
    offsets_in,  # [E + 1] int32, of the rows of all experts
    slot_out,  # [B] int64
    order_out,  # [B] int64: the sequences, sorted by the expert that was drawn
    source_out,  # [B] int64: the row of each in that order
    offsets_out,  # [E + 1] int32, of the rows in that order
    batch,
    m,
    num_groups,
    SHARED: tl.constexpr,
    BATCH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One program: the expert of each sequence by its weight and its noise, and the sequences sorted by it."""
    sequence = tl.arange(0, BATCH)
    there = sequence < batch
    stream = stream_key(tl.load(keys + sequence, mask=there, other=0), tl.load(positions + sequence, mask=there, other=0))
    best = tl.full((BATCH,), float("-inf"), tl.float32)
    chosen = tl.zeros((BATCH,), tl.int32)
    row = tl.zeros((BATCH,), tl.int64)
    for slot in range(m):
        at = sequence.to(tl.int64) * m + slot
        expert = tl.load(expert_keys + at, mask=there, other=0)
        score = tl.load(log_w + at, mask=there, other=float("-inf")) + noise_of_bits(_mix((stream ^ _mix(expert + _GOLDEN)) + _GOLDEN))
        row = tl.where(score > best, tl.load(rows + at, mask=there, other=0), row)
        chosen = tl.where(score > best, slot, chosen)
        best = tl.maximum(best, score)
    tl.store(slot_out + sequence, chosen.to(tl.int64), mask=there)
    group = tl.zeros((BATCH,), tl.int64)
    if not SHARED:
        for other in range(1, num_groups):
            group += (row >= tl.load(offsets_in + other)).to(tl.int64)
    # 20 bits of the group, 12 of the sequence, 31 of the row; what is beyond the batch comes last.
    packed = tl.where(there, group, (1 << 20) - 1) << 43 | sequence.to(tl.int64) << 31 | row
    packed = tl.sort(packed)
    tl.store(order_out + sequence, (packed >> 31) & 4095, mask=there)
    tl.store(source_out + sequence, packed & 0x7FFFFFFF, mask=there)
    if not SHARED:
        border = tl.arange(0, GROUPS)
        below = tl.sum((group[:, None] < border[None, :]).to(tl.int32) * there[:, None].to(tl.int32), axis=0)
        tl.store(offsets_out + border, below, mask=border <= num_groups)


@triton.jit
def finish_draw(
    tile_best,  # [R, tiles]
    tile_token,
    tile_logit,
    tile_max,
    tile_sum,
    order,  # [R] int64: the sequence of each row
    token_out,  # [B] int64
    logprob_out,  # [B] fp32
    num_tiles,
    vocab_size,
    BLOCK_V: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Token and log-probability of each row that an expert was drawn for."""
    row = tl.program_id(0).to(tl.int64)
    begin = row * num_tiles
    sequence = tl.load(order + row)
    _, chosen = first_of_best(tile_best + begin, tile_token + begin, num_tiles, vocab_size, SCAN)
    token = tl.minimum(chosen, vocab_size - 1)
    tl.store(token_out + sequence, token.to(tl.int64))
    highest, rest = sum_of_tiles(tile_max + begin, tile_sum + begin, num_tiles, SCAN)
    z = tl.load(tile_logit + begin + token // BLOCK_V)
    tl.store(logprob_out + sequence, z - highest - rest)
