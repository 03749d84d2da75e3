"""Launches of the Triton kernels of `mixture`.

1. `head_product`: a program a tile of the vocabulary and group. The tile's weights are read once for all rows of the group; out come the
   logits in fp32, and the maximum and the sum of exponentials of each row in the tile.
2. `row_sums`: log-sum-exp and maximum of each row from those of its tiles.
3. `mix_tiles`: a program a larger tile and sequence: mixture, temperature, noise, arg max. Greedy, a tile whose bound is below what some
   token surely has is not read.
4. `finish`: the token of each sequence, and its log-probabilities.

Logits are kept in fp32: rounded to bf16, one of 20 would move a log-probability by 0.04, and the bytes saved are a sixteenth of the
heads' with 64 rows an expert and fewer with less. Nothing waits for the GPU, and shapes alone decide what is launched: all of it may be
captured in a CUDA graph. Groups are read from the device, and a program takes as many rows as it finds there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .backend import interpreted
from .mixture_head_triton import draw_experts, finish_draw, head_product, row_sums
from .mixture_tiles_triton import finish, mix_tiles, tempered_sums
from .row_groups import RowGroups
from .token_choice import Sampling, draw

BLOCK_V = 128  # tokens of a tile of the head product
MIX_TILES = 8  # tiles of the head product that a program of `mix_tiles` takes
SCAN = 1024  # tiles that `row_sums` and `finish` read at one time
MOST_DRAWN = 1 << 12  # sequences that `draw_experts` can sort


@dataclass(frozen=True)
class HeadLaunch:
    """Tile and warps of `head_product`."""

    block_r: int
    block_k: int
    num_warps: int
    num_stages: int


def head_launch(most_rows: int, itemsize: int, draws: bool = False) -> HeadLaunch:
    """For groups of at most so many rows (more are right too, but read the weights again for each tile of rows)."""
    block_r = min(max(16, triton.next_power_of_2(most_rows)), 32 if draws else 128)
    if itemsize == 4:
        return HeadLaunch(min(block_r, 16 if draws else 64), 32, 8, 2)
    # Few rows: what counts are the bytes of the weights on their way, here 64 KB a program.
    return HeadLaunch(block_r, 64, 8, 4 if block_r <= 64 else 3)


@dataclass(frozen=True)
class RowLogits:
    """Logits [R, columns] fp32, of which the first vocab_size are set, and of each row and tile what the mixture needs."""

    logits: Tensor
    tile_max: Tensor
    row_max: Tensor
    lse: Tensor
    vocab_size: int


def _head(hidden: Tensor, heads: Tensor, groups: RowGroups, vocab_size: int) -> RowLogits:
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    num_rows, tiles = hidden.shape[0], triton.cdiv(vocab_size, BLOCK_V)
    empty = hidden.new_empty
    # Rows begin at multiples of 64 bytes.
    logits = empty(num_rows, triton.cdiv(vocab_size, 16) * 16, dtype=torch.float32)
    tile_max, tile_sum = (empty(num_rows, tiles, dtype=torch.float32) for _ in range(2))
    row_max, lse = (empty(num_rows, dtype=torch.float32) for _ in range(2))
    if num_rows:
        shared = _is_shared(heads)
        most = num_rows if shared else max(groups.counts)
        at = head_launch(most, hidden.element_size())
        offsets = None if shared else groups.device_offsets
        head_product[(tiles, 1 if shared else groups.num_groups)](
            hidden, heads, offsets, logits, tile_max, tile_sum, None, None, None, None, None, None, None,
            num_rows, vocab_size, hidden.shape[1], hidden.stride(0), heads.stride(0), heads.stride(1), logits.stride(0), tiles,
            SHARED=shared, DRAW=False, EVEN=hidden.shape[1] % at.block_k == 0, UPCAST=interpreted(),
            BLOCK_V=BLOCK_V, BLOCK_R=at.block_r, BLOCK_K=at.block_k, num_warps=at.num_warps, num_stages=at.num_stages,
        )  # fmt: skip
        row_sums[(num_rows,)](tile_max, tile_sum, row_max, lse, tiles, SCAN=SCAN, num_warps=4)
    return RowLogits(logits, tile_max, row_max, lse, vocab_size)


def _is_shared(heads: Tensor) -> bool:
    return heads.shape[0] == 1 or heads.stride(0) == 0


def _check(hidden: Tensor, heads: Tensor) -> None:
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"kernels = triton: hidden is {hidden.dtype}; the kernels take bfloat16, float16 and float32, choose torch")
    if heads.stride(2) != 1:
        raise ValueError(f"kernels = triton: heads have strides {heads.stride()}; the features of a token must lie together")


@dataclass(frozen=True)
class _Mixed:
    scores: Tensor | None
    best: Tensor | None
    best_token: Tensor | None
    mean_max: Tensor | None
    mean_sum: Tensor | None
    tiles: int


def _mix(
    rows_of: RowLogits, rows: Tensor, log_w: Tensor, sampling: Sampling | None, *, mean: bool, on_experts: bool, write: bool
) -> _Mixed:
    """The best token of each tile, or with `write` all scores [B, vocab]: of the mixture as it is without `sampling`, else tempered."""
    (batch, m), vocab = rows.shape, rows_of.vocab_size
    tiles = triton.cdiv(vocab, BLOCK_V * MIX_TILES)
    empty = log_w.new_empty
    tempered = sampling is not None and not sampling.greedy
    scores = empty(batch, vocab) if write else None
    best, best_token = (None, None) if write else (empty(batch, tiles), empty(batch, tiles, dtype=torch.int32))
    mean_max, mean_sum = (empty(batch, tiles), empty(batch, tiles)) if mean else (None, None)
    lse = rows_of.lse
    if batch:
        temperature = None if sampling is None else sampling.temperature
        keys, positions = (None, None) if sampling is None else (sampling.key, sampling.position)
        stride = rows_of.logits.stride(0)
        if on_experts:
            lse = empty(batch, m)
            tempered_sums[(batch, m)](rows_of.logits, log_w, rows, temperature, lse, stride, vocab, m, BLOCK=4096, num_warps=8)
        mix_tiles[(tiles, batch)](
            rows_of.logits, log_w, rows, rows_of.row_max, lse, rows_of.tile_max, temperature, keys, positions,
            scores, best, best_token, mean_max, mean_sum, stride, vocab, m, rows_of.tile_max.shape[1],
            MEAN=mean, SKIP=not (tempered or write or mean), NOISE=tempered and not write, TEMPERED=tempered, ON_EXPERTS=on_experts,
            WRITE=write, TILES=MIX_TILES, BLOCK=BLOCK_V * MIX_TILES, num_warps=4,
        )  # fmt: skip
    return _Mixed(scores, best, best_token, mean_max, mean_sum, tiles)


def next_token(
    hidden: Tensor, heads: Tensor, groups: RowGroups, rows: Tensor, log_w: Tensor, sampling: Sampling, vocab_size: int,
    *, mean: bool, on_experts: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Token [B] int64, its log-probability [B] and those of the experts [B, m]: see `mixture.mixture_next_token`."""
    _check(hidden, heads)
    rows, log_w = rows.contiguous(), log_w.float().contiguous()
    (batch, m), filtered = rows.shape, sampling.filtered and not sampling.greedy
    with torch.cuda.device_of(hidden):
        rows_of = _head(hidden, heads, groups, vocab_size)
        mixed = _mix(rows_of, rows, log_w, sampling, mean=mean, on_experts=on_experts, write=filtered)
        token = torch.empty_like(sampling.key) if mixed.scores is None else draw(mixed.scores, sampling)
        logprob, expert_logprob = log_w.new_empty(batch), log_w.new_empty(batch, m)
        if batch:
            finish[(batch,)](
                mixed.best, mixed.best_token, mixed.mean_max, mixed.mean_sum, rows_of.logits, log_w, rows, rows_of.lse,
                token, logprob, expert_logprob, mixed.tiles, rows_of.logits.stride(0), vocab_size, m,
                MEAN=mean, GIVEN=filtered, SCAN=SCAN, num_warps=4,
            )  # fmt: skip
    return token, logprob, expert_logprob


def mixed_logprobs(
    hidden: Tensor, heads: Tensor, groups: RowGroups, rows: Tensor, log_w: Tensor, vocab_size: int, *, mean: bool
) -> tuple[Tensor, Tensor]:
    """Log of the mixture, or the mean of the logits, [B, vocab], and log-sum-exp of each row [R]."""
    _check(hidden, heads)
    rows, log_w = rows.contiguous(), log_w.float().contiguous()
    with torch.cuda.device_of(hidden):
        rows_of = _head(hidden, heads, groups, vocab_size)
        mixed = _mix(rows_of, rows, log_w, None, mean=mean, on_experts=False, write=True)
    assert mixed.scores is not None
    return mixed.scores, rows_of.lse


def draw_from_experts(
    hidden: Tensor, heads: Tensor, groups: RowGroups, rows: Tensor, log_w: Tensor, expert_keys: Tensor, sampling: Sampling, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Token, slot and log-probability [B]: see `mixture.draw_expert_then_token`. Only the heads of experts that were drawn are read."""
    _check(hidden, heads)
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    (batch, m), tiles, shared = rows.shape, triton.cdiv(vocab_size, BLOCK_V), _is_shared(heads)
    if batch > MOST_DRAWN:
        raise ValueError(f"{batch} sequences: draw_expert_then_token takes at most {MOST_DRAWN} by Triton")
    new = hidden.new_empty
    slot, order, source, token = (new(batch, dtype=torch.int64) for _ in range(4))
    offsets = new(groups.num_groups + 1, dtype=torch.int32)
    tile_max, tile_sum, tile_best, tile_logit = (new(batch, tiles, dtype=torch.float32) for _ in range(4))
    tile_token, logprob = new(batch, tiles, dtype=torch.int32), new(batch, dtype=torch.float32)
    if batch:
        at = head_launch(batch, hidden.element_size(), draws=True)
        with torch.cuda.device_of(hidden):
            draw_experts[(1,)](
                log_w.float().contiguous(), rows.contiguous(), expert_keys.contiguous(), sampling.key, sampling.position,
                None if shared else groups.device_offsets, slot, order, source, offsets, batch, m, groups.num_groups,
                SHARED=shared, BATCH=max(2, triton.next_power_of_2(batch)), GROUPS=triton.next_power_of_2(groups.num_groups + 1),
            )  # fmt: skip
            head_product[(tiles, 1 if shared else groups.num_groups)](
                hidden, heads, offsets, None, tile_max, tile_sum, source, order, sampling.key, sampling.position,
                tile_best, tile_token, tile_logit,
                batch, vocab_size, hidden.shape[1], hidden.stride(0), heads.stride(0), heads.stride(1), 0, tiles,
                SHARED=shared, DRAW=True, EVEN=hidden.shape[1] % at.block_k == 0, UPCAST=interpreted(),
                BLOCK_V=BLOCK_V, BLOCK_R=at.block_r, BLOCK_K=at.block_k, num_warps=at.num_warps, num_stages=at.num_stages,
            )  # fmt: skip
            finish_draw[(batch,)](
                tile_best, tile_token, tile_logit, tile_max, tile_sum, order, token, logprob, tiles, vocab_size,
                BLOCK_V=BLOCK_V, SCAN=SCAN, num_warps=4,
            )  # fmt: skip
    return token, slot, logprob
