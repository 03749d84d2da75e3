"""Where the documents of a packed batch lie: rows and masks for plain attention, blocks for flex attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SHORTEST_ROW = 128  # tokens; shorter rows would be many tiny products
_PADDING_ALLOWED = 1.25  # rows of one document need no mask: worth this much padding
_FLEX_BLOCK = 128  # tokens; what flex attention's kernels are made for


@dataclass(frozen=True)
class _Rows:
    """Where each document lies: `num_rows` rows of `length` tokens. `slots` [N] is None when the rows are exactly the packed tokens."""

    num_rows: int
    length: int
    slots: list[int] | None
    one_document_a_row: bool


def _plan_rows(lengths: list[int]) -> _Rows:
    total, longest = sum(lengths), max(lengths)
    if len(lengths) * longest <= _PADDING_ALLOWED * total:
        if len(lengths) * longest == total:
            return _Rows(len(lengths), longest, None, True)
        slots = [row * longest + i for row, length in enumerate(lengths) for i in range(length)]
        return _Rows(len(lengths), longest, slots, True)
    aligned = _aligned_length(lengths, total, longest)
    if aligned is not None:
        return _Rows(total // aligned, aligned, None, False)
    row, used, limit = 0, 0, max(longest, _SHORTEST_ROW)
    places: list[tuple[int, int]] = []
    fullest = 0
    for length in lengths:
        if used + length > limit:
            row, used = row + 1, 0
        places.append((row, used))
        used += length
        fullest = max(fullest, used)
    slots = [row * fullest + start + i for (row, start), length in zip(places, lengths, strict=True) for i in range(length)]
    return _Rows(row + 1, fullest, slots, False)


def _aligned_length(lengths: list[int], total: int, longest: int) -> int | None:
    """The shortest row length that cuts the packed tokens only between documents, such as that of the training windows."""
    ends, end = set(), 0
    for length in lengths:
        end += length
        ends.add(end)
    limit = max(2 * longest, 2 * _SHORTEST_ROW)
    for num_rows in range(total // longest, 0, -1):
        length = total // num_rows
        if length > limit:
            return None
        if total % num_rows == 0 and all(row * length in ends for row in range(1, num_rows + 1)):
            return length
    return None


class PackedLayout:
    """Which tokens of a packed batch belong together.

    Args:
        cu_seqlens: [S + 1] integers, 0 first, the end of each document after it, N last. On any device; on a GPU the values are
            read once, which waits for it.
        device: where the masks are needed; default: that of `cu_seqlens`.

    Raises:
        ValueError: an empty list, a start other than 0, or a document without tokens.
    """

    def __init__(self, cu_seqlens: Tensor, device: torch.device | None = None) -> None:
        ends = cu_seqlens.tolist()
        if cu_seqlens.ndim != 1 or len(ends) < 2 or ends[0] != 0:
            raise ValueError(f"cu_seqlens of shape {tuple(cu_seqlens.shape)}: expected [S + 1] with S >= 1, starting with 0")
        self.lengths: list[int] = [stop - start for start, stop in zip(ends, ends[1:], strict=False)]
        if min(self.lengths) < 1:
            at = next(i for i, length in enumerate(self.lengths) if length < 1)
            raise ValueError(f"cu_seqlens: document {at} has {self.lengths[at]} tokens; leave empty documents out")
        self.num_tokens: int = ends[-1]
        self.longest: int = max(self.lengths)
        self.device = cu_seqlens.device if device is None else device
        self.cu_seqlens = cu_seqlens.to(device=self.device, dtype=torch.int32)
        self._plan: _Rows | None = None
        self._slots: Tensor | None = None
        self._masks: dict[tuple[int | None, torch.dtype, bool], Tensor | None] = {}
        self._blocks: dict[int | None, Any] = {}

    @property
    def rows(self) -> _Rows:
        """The plan of the `sdpa` backend, made at the first call."""
        if self._plan is None:
            self._plan = _plan_rows(self.lengths)
            if self._plan.slots is not None:
                self._slots = torch.tensor(self._plan.slots, dtype=torch.int64, device=self.device)
        return self._plan

    def to_rows(self, x: Tensor) -> Tensor:
        """[N, heads, d] -> [rows, heads, length, d], zeros where a row has no token."""
        rows = self.rows
        if self._slots is not None:
            x = x.new_zeros(rows.num_rows * rows.length, *x.shape[1:]).index_copy(0, self._slots, x)
        return x.view(rows.num_rows, rows.length, *x.shape[1:]).transpose(1, 2)

    def from_rows(self, x: Tensor) -> Tensor:
        """[rows, heads, length, d] -> [N, heads, d]."""
        rows = self.rows
        x = x.transpose(1, 2).reshape(rows.num_rows * rows.length, x.shape[1], x.shape[3])
        return x if self._slots is None else x.index_select(0, self._slots)

    def mask(self, sliding_window: int | None, dtype: torch.dtype, causal: bool = False) -> Tensor | None:
        """Additive mask [rows or 1, 1, length, length] of 0 and -inf, or None where plain causal attention is the same unless `causal`.

        A place without a token sees the other such places before it and itself, so no row of the softmax is empty.
        """
        rows = self.rows
        if sliding_window is not None and sliding_window >= rows.length:
            sliding_window = None
        key = (sliding_window, dtype, causal)
        if key not in self._masks:
            self._masks[key] = self._make_mask(rows, sliding_window, dtype, causal)
        return self._masks[key]

    def _make_mask(self, rows: _Rows, sliding_window: int | None, dtype: torch.dtype, causal: bool) -> Tensor | None:
        if rows.one_document_a_row and sliding_window is None and not causal:
            return None
        place = torch.arange(rows.length, device=self.device)
        distance = place[:, None] - place[None, :]
        seen = (distance >= 0)[None]
        if sliding_window is not None:
            seen = seen & (distance < sliding_window)
        if not rows.one_document_a_row:
            lengths = torch.tensor(self.lengths, device=self.device)
            documents = torch.arange(len(self.lengths), device=self.device).repeat_interleave(lengths, output_size=self.num_tokens)
            if self._slots is not None:
                documents = documents.new_full((rows.num_rows * rows.length,), -1).index_copy(0, self._slots, documents)
            documents = documents.view(rows.num_rows, rows.length)
            seen = seen & (documents[:, :, None] == documents[:, None, :])
        return torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, -torch.inf)[:, None]

    def block_mask(self, sliding_window: int | None = None) -> Any:
        """The `BlockMask` of flex attention over all N tokens as one sequence, made once for each window.

        The keys that a block of queries sees are one run of blocks, so it is written down from the lengths, and no N x N mask is made.
        """
        if sliding_window is not None and sliding_window >= self.longest:
            sliding_window = None
        if sliding_window not in self._blocks:
            self._blocks[sliding_window] = self._make_blocks(sliding_window)
        return self._blocks[sliding_window]

    def _make_blocks(self, sliding_window: int | None) -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        total, size = self.num_tokens, _FLEX_BLOCK
        lengths = torch.tensor(self.lengths)
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)  # [N] first token of each token's document
        first = torch.arange(0, total, size)
        last = (first + size).clamp(max=total) - 1
        seen_from = starts[first]
        wholly_from = starts[last]
        if sliding_window is not None:
            seen_from = torch.maximum(seen_from, first - sliding_window + 1)
            wholly_from = torch.maximum(wholly_from, last - sliding_window + 1)
        number = torch.arange(len(first))
        begin = seen_from // size
        # Every query of the block sees every key of these, which are before the diagonal. A last block that is cut short is masked.
        full_begin = torch.where(first + size <= total, (wholly_from + size - 1) // size, number).clamp(max=number)
        block = number[None, :]
        full = (block >= full_begin[:, None]) & (block < number[:, None])
        partial = (block >= begin[:, None]) & (block <= number[:, None]) & ~full

        document_start = starts.to(self.device)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = (key <= query) & (key >= document_start[query])
            return seen if sliding_window is None else seen & (query - key < sliding_window)

        def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
            order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
            return chosen.sum(-1).to(torch.int32)[None, None].to(self.device), order.to(torch.int32)[None, None].to(self.device)

        return BlockMask.from_kv_blocks(*listed(partial), *listed(full), BLOCK_SIZE=size, mask_mod=sees, seq_lengths=(total, total))
