"""Triton kernels for top-k, top-p and min-p without sorting: the score at which a filter cuts is found by 4 bits of it at a time.

Scores of fp32 are put in order as integers of 32 bits. A pass adds up, for each value of the next 4 bits, how many tokens have the bits
found so far (top-k), or how much probability (top-p); the next pass reads those sums and goes on with the value in which the cut lies. So
8 passes find the cut of top-k, 8 that of top-p; a block of tokens whose best is below what is looked for is not read. Tokens that are
equal to the cut are counted, and the first of them by id are kept. What is launched depends on shapes alone.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .mixture_head_triton import stream_key, token_noise
from .token_choice import Sampling

BLOCKS = 8  # blocks of tokens a program; fewer programs, whose sums each of the next pass reads
PASSES = 8


@triton.jit
def _ordered(score):
    """0 to 2^32 - 1 as int64, in the order of the scores; -0 is 0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648


@triton.jit
def _score_of(ordered):
    bits = (ordered - 2147483648).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _highest(tops, blocks, MANY: tl.constexpr):
    """The best score of a sequence, from those of its blocks."""
    at = tl.arange(0, MANY)
    return tl.max(tl.load(tops + at, mask=at < blocks, other=float("-inf")), axis=0)


@triton.jit
def _sums(partial, programs, MANY: tl.constexpr):
    """Sums [16] of all programs of a sequence."""
    at, digit = tl.arange(0, MANY), tl.arange(0, 16)
    return tl.sum(tl.load(partial + at[:, None] * 16 + digit[None, :], mask=at[:, None] < programs, other=0.0), axis=0)


@triton.jit
def _advance(sums, found, above, target, SHIFT: tl.constexpr):
    """The 4 bits in which the sum from above reaches `target`, put to `found`; and the sum above them."""
    digit = tl.arange(0, 16)
    from_here = tl.sum(tl.where(digit[:, None] >= digit[None, :], sums[:, None], 0.0), axis=0)
    chosen = tl.max(tl.where(above + from_here >= target, digit, 0), axis=0)
    return found | (chosen.to(tl.int64) << SHIFT), above + tl.sum(tl.where(digit > chosen, sums, 0.0), axis=0)


@triton.jit
def _count_target(top_k, vocab_size):
    return tl.where(top_k > 0, tl.minimum(top_k, vocab_size), vocab_size).to(tl.float32)


@triton.jit
def count_pass(
    scores,  # [B, vocab] fp32
    tops,  # [B, blocks] fp32: the best score of each block
    top_k,  # [B] int64
    top_p,  # [B] fp32
    min_p,  # [B] fp32
    partial_in,  # [B, programs, 16] fp32, of the pass before
    partial_out,
    found_in,  # [B] int64: bits found so far
    found_out,
    above_in,  # [B] fp32: sum of what is above them
    above_out,
    bound,  # [B] int64: the cut of top-k and min-p; found in the first pass of MASS
    bound_ties,  # [B] fp32: tokens equal to it that stay
    goal,  # [2, B] fp32: with MASS the probability above the bound, and that to be kept
    batch,
    vocab_size,
    blocks,
    MASS: tl.constexpr,
    PASS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    MANY_BLOCKS: tl.constexpr,
    MANY_PROGRAMS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    sequence = tl.program_id(1).to(tl.int64)
    tops += sequence * blocks
    partial_in += sequence * programs * 16
    digit = tl.arange(0, 16)
    SHIFT: tl.constexpr = 28 - 4 * PASS
    found = tl.full((), 0, tl.int64)
    above = tl.full((), 0.0, tl.float32)
    best = tl.full((), 0.0, tl.float32)
    least = tl.full((), -1, tl.int64)
    if MASS:
        best = _highest(tops, blocks, MANY_BLOCKS)
    if MASS and PASS == 0:
        # What the last pass for top-k counted, and min-p.
        k = _count_target(tl.load(top_k + sequence), vocab_size)
        cut, over = _advance(_sums(partial_in, programs, MANY_PROGRAMS), tl.load(found_in + sequence), tl.load(above_in + sequence), k, 0)
        ties = k - over
        share = tl.load(min_p + sequence)
        by_min_p = _ordered(best + tl.log(tl.where(share > 0.0, share, 1.0)))
        higher = (share > 0.0) & (by_min_p > cut)
        least = tl.where(higher, by_min_p - 1, cut)
        ties = tl.where(higher, 0.0, ties)
        if program == 0:
            tl.store(bound + sequence, least)
            tl.store(bound_ties + sequence, ties)
    if MASS and PASS > 0:
        least = tl.load(bound + sequence)
    if PASS > 0:
        sums = _sums(partial_in, programs, MANY_PROGRAMS)
        if MASS:
            if PASS == 1:
                inside = tl.sum(sums, axis=0)
                keep = tl.load(top_p + sequence)
                ties = tl.load(bound_ties + sequence)
                whole = inside + tl.where(ties > 0.0, ties * tl.exp(_score_of(least) - best), 0.0)
                target = tl.where(keep < 1.0, keep * whole, float("inf"))
                if program == 0:
                    tl.store(goal + sequence, inside)
                    tl.store(goal + batch + sequence, target)
            else:
                target = tl.load(goal + batch + sequence)
        else:
            target = _count_target(tl.load(top_k + sequence), vocab_size)
        found, above = _advance(sums, tl.load(found_in + sequence), tl.load(above_in + sequence), target, SHIFT + 4)
    if program == 0:
        tl.store(found_out + sequence, found)
        tl.store(above_out + sequence, above)
    total = tl.zeros((16,), tl.float32)
    for block in range(program * BLOCKS, tl.minimum(program * BLOCKS + BLOCKS, blocks)):
        if _ordered(tl.load(tops + block)) >= tl.maximum(found, least + 1):
            token = block * BLOCK + tl.arange(0, BLOCK)
            score = tl.load(scores + sequence * vocab_size + token, mask=token < vocab_size, other=0.0)
            place = _ordered(score)
            counts = (token < vocab_size) & (place > least)
            if PASS > 0:
                counts = counts & ((place >> (SHIFT + 4)) == (found >> (SHIFT + 4)))
            value = tl.where(counts, tl.exp(score - best) if MASS else 1.0, 0.0)
            here = ((place >> SHIFT) & 15).to(tl.int32)
            total += tl.sum(tl.where(here[:, None] == digit[None, :], value[:, None], 0.0), axis=0)
    tl.store(partial_out + (sequence * programs + program) * 16 + digit, total)


@triton.jit
def tie_pass(
    scores,
    tops,
    partial_in,
    found_in,
    above_in,
    bound,
    bound_ties,
    goal,
    cut_out,  # [B] int64: tokens above it stay,
    ties_out,  # [B] fp32: and so many of those equal to it
    equal_out,  # [B, programs] fp32: how many are equal to it
    batch,
    vocab_size,
    blocks,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    MANY_BLOCKS: tl.constexpr,
    MANY_PROGRAMS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    sequence = tl.program_id(1).to(tl.int64)
    tops += sequence * blocks
    best = _highest(tops, blocks, MANY_BLOCKS)
    inside, target = tl.load(goal + sequence), tl.load(goal + batch + sequence)
    sums = _sums(partial_in + sequence * programs * 16, programs, MANY_PROGRAMS)
    cut, above = _advance(sums, tl.load(found_in + sequence), tl.load(above_in + sequence), target, 0)
    # Where the tokens above the bound do not hold enough, the cut is the bound.
    reached = inside >= target
    least, most = tl.load(bound + sequence), tl.load(bound_ties + sequence)
    cut = tl.where(reached, cut, least)
    missing = (target - tl.where(reached, above, inside)) / tl.exp(_score_of(cut) - best)
    ties = tl.maximum(tl.ceil(missing), tl.where(reached, 1.0, 0.0))
    ties = tl.where(reached, ties, tl.minimum(ties, most))
    if program == 0:
        tl.store(cut_out + sequence, cut)
        tl.store(ties_out + sequence, ties)
    equal = tl.zeros((BLOCK,), tl.float32)
    for block in range(program * BLOCKS, tl.minimum(program * BLOCKS + BLOCKS, blocks)):
        if _ordered(tl.load(tops + block)) >= cut:
            token = block * BLOCK + tl.arange(0, BLOCK)
            score = tl.load(scores + sequence * vocab_size + token, mask=token < vocab_size, other=0.0)
            equal += tl.where((token < vocab_size) & (_ordered(score) == cut), 1.0, 0.0)
    tl.store(equal_out + sequence * programs + program, tl.sum(equal, axis=0))


@triton.jit
def draw_pass(
    scores,
    tops,
    cut,
    ties,
    equal,
    temperature,  # [B] fp32
    keys,  # [B] int64
    positions,
    best_out,  # [B, programs] fp32
    token_out,  # [B, programs] int32
    vocab_size,
    blocks,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    MANY_PROGRAMS: tl.constexpr,
):
    """The best of the tokens that stay, with their noise."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    sequence = tl.program_id(1).to(tl.int64)
    tops += sequence * blocks
    limit, allowed = tl.load(cut + sequence), tl.load(ties + sequence)
    at = tl.arange(0, MANY_PROGRAMS)
    before = tl.sum(tl.load(equal + sequence * programs + at, mask=at < program, other=0.0), axis=0)
    stream = stream_key(tl.load(keys + sequence), tl.load(positions + sequence))
    heat = tl.load(temperature + sequence)
    highest = tl.full((), float("-inf"), tl.float32)
    chosen = tl.full((), 0, tl.int32) + vocab_size
    for block in range(program * BLOCKS, tl.minimum(program * BLOCKS + BLOCKS, blocks)):
        if _ordered(tl.load(tops + block)) >= limit:
            token = block * BLOCK + tl.arange(0, BLOCK)
            score = tl.load(scores + sequence * vocab_size + token, mask=token < vocab_size, other=0.0)
            place = _ordered(score)
            same = tl.where((token < vocab_size) & (place == limit), 1.0, 0.0)
            rank = before + tl.cumsum(same, axis=0) - same
            stays = (token < vocab_size) & ((place > limit) | ((place == limit) & (rank < allowed)))
            score += tl.where(heat > 0.0, token_noise(stream, token.to(tl.int64)), 0.0)
            score = tl.where(stays, score, float("-inf"))
            top = tl.max(score, axis=0)
            first = tl.min(tl.where(score == top, token, vocab_size), axis=0)
            chosen = tl.where(top > highest, first, chosen)
            highest = tl.maximum(highest, top)
            before += tl.sum(same, axis=0)
    tl.store(best_out + sequence * programs + program, highest)
    tl.store(token_out + sequence * programs + program, chosen)


def draw_filtered(scores: Tensor, tops: Tensor, sampling: Sampling, block: int) -> tuple[Tensor, Tensor]:
    """Best score with noise, and its token, of each of some parts of the vocabulary: [B, parts] fp32 and int32.

    `scores` [B, vocab] fp32 are tempered; `tops` [B, blocks] holds the best of each `block` of them.
    """
    (batch, vocab), blocks = scores.shape, tops.shape[1]
    programs = triton.cdiv(blocks, BLOCKS)
    new = scores.new_empty
    partial = [new(batch, programs, 16) for _ in range(2)]
    found = [new(batch, dtype=torch.int64) for _ in range(2)]
    above = [new(batch) for _ in range(2)]
    bound, bound_ties, goal = new(batch, dtype=torch.int64), new(batch), new(2, batch)
    cut, ties, equal = new(batch, dtype=torch.int64), new(batch), new(batch, programs)
    best, token = new(batch, programs), new(batch, programs, dtype=torch.int32)
    sizes = {"BLOCKS": BLOCKS, "BLOCK": block, "num_warps": 4}
    many = {"MANY_BLOCKS": triton.next_power_of_2(blocks), "MANY_PROGRAMS": triton.next_power_of_2(programs)}
    grid = (programs, batch)
    for number in range(2 * PASSES):
        last, this = (number + 1) % 2, number % 2
        count_pass[grid](
            scores, tops, sampling.top_k, sampling.top_p, sampling.min_p, partial[last], partial[this], found[last], found[this],
            above[last], above[this], bound, bound_ties, goal, batch, vocab, blocks,
            MASS=number >= PASSES, PASS=number % PASSES, **sizes, **many,
        )  # fmt: skip
    last = (2 * PASSES - 1) % 2
    tie_pass[grid](
        scores,
        tops,
        partial[last],
        found[last],
        above[last],
        bound,
        bound_ties,
        goal,
        cut,
        ties,
        equal,
        batch,
        vocab,
        blocks,
        **sizes,
        **many,
    )
    draw_pass[grid](
        scores, tops, cut, ties, equal, sampling.temperature, sampling.key, sampling.position, best, token, vocab, blocks,
        MANY_PROGRAMS=many["MANY_PROGRAMS"], **sizes,
    )  # fmt: skip
    return best, token
