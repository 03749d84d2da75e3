"""Triton kernels of `mixture`: mixture of tiles of the vocabulary, the token. Launched by `mixture_triton`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .mixture_head_triton import first_of_best, stream_key, sum_of_tiles, token_noise


@triton.jit
def tempered_sums(logits, log_w, rows, temperature, lse, logits_stride, vocab_size, m, BLOCK: tl.constexpr):
    """Log-sum-exp [B, m] of the logits of each kept expert divided by the temperature of the sequence."""
    sequence = tl.program_id(0)
    slot = sequence * m + tl.program_id(1)
    if tl.load(log_w + slot) > float("-inf"):
        warm = tl.load(temperature + sequence)
        warm = tl.where(warm > 0.0, warm, 1.0)
        z_at = logits + tl.load(rows + slot) * logits_stride
        tops = tl.full((BLOCK,), float("-inf"), tl.float32)
        totals = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, vocab_size, BLOCK):
            token = first + tl.arange(0, BLOCK)
            z = tl.load(z_at + token, mask=token < vocab_size, other=float("-inf")) / warm
            higher = tl.maximum(tops, z)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            totals = totals * tl.exp(tops - base) + tl.exp(z - base)
            tops = higher
        top = tl.max(tops, axis=0)
        tl.store(lse + slot, top + tl.log(tl.sum(totals * tl.exp(tops - top), axis=0)))


@triton.jit
def _cannot_win(log_w, rows, row_max, lse, tile_max, m, tile, num_tiles, TILES: tl.constexpr):
    """Whether no token of this tile can be the likeliest: its bound is below the weight of some expert's likeliest token."""
    at = tile * TILES + tl.arange(0, TILES)
    floor = tl.full((), float("-inf"), tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    scale = tl.full((), 0.0, tl.float32)
    for slot in range(m):
        weight = tl.load(log_w + slot)
        if weight > float("-inf"):
            row = tl.load(rows + slot)
            norm = tl.load(lse + row)
            floor = tl.maximum(floor, weight + (tl.load(row_max + row) - norm))
            highest = tl.max(tl.load(tile_max + row * num_tiles + at, mask=at < num_tiles, other=float("-inf")), axis=0)
            bound = weight + (highest - norm)
            higher = tl.maximum(top, bound)
            total = total * tl.exp(top - higher) + tl.exp(bound - higher)
            top = higher
            scale = tl.maximum(scale, tl.abs(norm))
    # What the roundings of fp32 may have moved, and more.
    return top + tl.log(total) < floor - 1e-4 - 1e-5 * scale


@triton.jit
def mix_tiles(
    logits,  # [R, columns] fp32
    log_w,  # [B, m] fp32
    rows,  # [B, m] int64
    row_max,  # [R] fp32
    lse,  # [R] fp32; with ON_EXPERTS [B, m], of the tempered logits
    tile_max,  # [R, head tiles] fp32
    temperature,  # [B] fp32
    keys,  # [B] int64
    positions,
    scores,  # with WRITE: [B, vocab] fp32
    best,  # [B, tiles] fp32
    best_token,  # without WRITE: [B, tiles] int32
    mean_max,  # with MEAN: [B, tiles] fp32 of the mean logits
    mean_sum,
    logits_stride,
    vocab_size,
    m,
    num_head_tiles,
    MEAN: tl.constexpr,
    SKIP: tl.constexpr,
    NOISE: tl.constexpr,
    TEMPERED: tl.constexpr,
    ON_EXPERTS: tl.constexpr,
    WRITE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """log of the mixture (or the mean of the logits) of a tile: written divided by the temperature, or its best token."""
    tile = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    log_w += sequence * m
    rows += sequence * m
    place = sequence * tl.num_programs(0) + tile
    if SKIP:  # noqa: SIM102 - a constant and a value are two conditions to Triton
        if _cannot_win(log_w, rows, row_max, lse, tile_max, m, tile, num_head_tiles, TILES):
            tl.store(best + place, float("-inf"))
            tl.store(best_token + place, vocab_size)
            return
    token = tile * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab_size
    if TEMPERED:
        heat = tl.load(temperature + sequence)
        warm = tl.where(heat > 0.0, heat, 1.0)
    if MEAN:
        mixed = tl.zeros((BLOCK,), tl.float32)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(m):
        weight = tl.load(log_w + slot)
        # The row of an expert that is dropped may hold anything: it is not read.
        if weight > float("-inf"):
            row = tl.load(rows + slot)
            z = tl.load(logits + row * logits_stride + token, mask=inside, other=float("-inf"))
            if MEAN:
                mixed += tl.where(inside, z, 0.0) * tl.exp(weight)
            else:
                if ON_EXPERTS:
                    z = z / warm
                    row = sequence * m + slot
                part = z + (weight - tl.load(lse + row))
                higher = tl.maximum(top, part)
                base = tl.where(higher == float("-inf"), 0.0, higher)
                total = total * tl.exp(top - base) + tl.exp(part - base)
                top = higher
    if MEAN:
        z = tl.where(inside, mixed, float("-inf"))
        highest = tl.max(z, axis=0)
        tl.store(mean_max + place, highest)
        tl.store(mean_sum + place, tl.sum(tl.exp(z - highest), axis=0))
    else:
        z = tl.where(top == float("-inf"), float("-inf"), top + tl.log(total))
    if TEMPERED and not ON_EXPERTS:
        z = z / warm
    if WRITE:
        tl.store(scores + sequence * vocab_size + token, z, mask=inside)
        tl.store(best + place, tl.max(z, axis=0))
    else:
        if NOISE:
            stream = stream_key(tl.load(keys + sequence), tl.load(positions + sequence))
            z += tl.where(heat > 0.0, token_noise(stream, token.to(tl.int64)), 0.0)
        highest = tl.max(z, axis=0)
        tl.store(best + place, highest)
        tl.store(best_token + place, tl.min(tl.where(z == highest, token, vocab_size), axis=0))


@triton.jit
def finish(
    best,  # [B, bests] fp32
    best_token,  # [B, bests] int32
    mean_max,  # with MEAN: [B, tiles] fp32
    mean_sum,
    logits,
    log_w,
    rows,
    lse,  # [R] fp32, not tempered
    token_out,  # [B] int64
    logprob_out,  # [B] fp32
    expert_out,  # [B, m] fp32
    num_best,
    num_tiles,
    logits_stride,
    vocab_size,
    m,
    MEAN: tl.constexpr,
    SCAN: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    _, chosen = first_of_best(best + sequence * num_best, best_token + sequence * num_best, num_best, vocab_size, SCAN)
    # Where nothing was a number above -inf: some token, and its log-probability tells.
    token = tl.minimum(chosen, vocab_size - 1).to(tl.int64)
    tl.store(token_out + sequence, token)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    mean = tl.full((), 0.0, tl.float32)
    for slot in range(m):
        at = sequence * m + slot
        weight = tl.load(log_w + at)
        if weight > float("-inf"):
            row = tl.load(rows + at)
            z = tl.load(logits + row * logits_stride + token)
            logprob = z - tl.load(lse + row)
            tl.store(expert_out + at, logprob)
            if MEAN:
                mean += z * tl.exp(weight)
            else:
                higher = tl.maximum(top, weight + logprob)
                total = total * tl.exp(top - higher) + tl.exp(weight + logprob - higher)
                top = higher
        else:
            tl.store(expert_out + at, float("-inf"))
    if MEAN:
        highest, rest = sum_of_tiles(mean_max + sequence * num_tiles, mean_sum + sequence * num_tiles, num_tiles, SCAN)
        tl.store(logprob_out + sequence, mean - highest - rest)
    else:
        tl.store(logprob_out + sequence, top + tl.log(total))
