"""Keys and values of the texts that a stack of experts reads: a row for each (text, expert), in slabs by capacity.

A row gets the smallest capacity that holds its text's bound, so a long text costs its neighbours nothing and no row ever moves. All rows of
one capacity lie in one slab, which attention reads in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megaxelm.errors import ModelError
from megaxelm.model.config import DecoderConfig
from megaxelm_kernels.attention import PackedLayout, choose_backend, packed_attention
from megaxelm_kernels.decode_attention import SlotOrder, decode_attention, order_slots, store_kv

SMALLEST = 128
"""Capacity of the smallest slab, in tokens; each further one holds twice as many."""


@dataclass
class CacheRow:
    """One text as one expert has read it: `length` tokens are stored, `capacity` fit."""

    capacity: int
    slot: int
    length: int = 0


class _Slab:
    """`keys` and `values` [layers, slots, kv_heads, capacity, head_dim]; slots are taken from a list of free ones."""

    def __init__(self, config: DecoderConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (config.num_kv_heads, capacity, config.head_dim)
        # Zeros and not empty: a masked place is multiplied by zero, which would not undo a NaN.
        self.keys = torch.zeros(config.num_layers, 0, *self.shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.free: list[int] = []

    @property
    def num_slots(self) -> int:
        return self.keys.shape[1]

    def take(self) -> int:
        if not self.free:
            self._grow(max(4, self.num_slots))
        return self.free.pop(0)

    def _grow(self, more: int) -> None:
        had = self.num_slots
        self.free = list(range(had, had + more))
        fresh = self.keys.new_zeros(self.keys.shape[0], more, *self.shape)
        self.keys = torch.cat([self.keys, fresh], 1)
        self.values = torch.cat([self.values, fresh], 1)

    def give_back(self, slot: int) -> None:
        # The lowest slot is taken first, so that those in use lie together and attention need not skip many.
        self.free = sorted([*self.free, slot])


class StackedCache:
    """The rows of all texts that are being read.

    Args:
        max_tokens: places of all rows together; None: no bound.
    """

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device, max_tokens: int | None = None) -> None:
        self.config, self.dtype, self.device, self.max_tokens = config, dtype, device, max_tokens
        self.num_tokens = 0
        """Places that are taken, used or not."""
        self._slabs: dict[int, _Slab] = {}

    def capacity(self, longest: int) -> int:
        """Places that a row for a text of at most `longest` tokens takes.

        Raises:
            ModelError: the model has fewer positions.
        """
        if not 1 <= longest <= self.config.max_positions:
            raise ModelError(f"cache: {longest} tokens; choose 1 to {self.config.max_positions}, the positions of this model")
        capacity = SMALLEST
        while capacity < longest:
            capacity *= 2
        return min(capacity, self.config.max_positions)

    def new_row(self, longest: int) -> CacheRow:
        """An empty row for a text of at most `longest` tokens."""
        capacity = self.capacity(longest)
        if capacity not in self._slabs:
            self._slabs[capacity] = _Slab(self.config, capacity, self.dtype, self.device)
        self.num_tokens += capacity
        return CacheRow(capacity, self._slabs[capacity].take())

    def free(self, row: CacheRow) -> None:
        """Give the place of a row to others."""
        self._slabs[row.capacity].give_back(row.slot)
        self.num_tokens -= row.capacity

    def slab(self, capacity: int) -> _Slab:
        """The slab whose rows hold `capacity` tokens."""
        return self._slabs[capacity]


class CachedAttention:
    """One call of the stack: where its new keys and values go, and which token sees what.

    `rows[i]` gets `counts[i]` new tokens; the tokens of the call lie one row after the other.

    Raises:
        ModelError: a row would outgrow its capacity.
    """

    def __init__(self, cache: StackedCache, rows: Sequence[CacheRow], counts: Sequence[int], kernels: str) -> None:
        self.cache, self.kernels = cache, kernels
        self.window = cache.config.sliding_window
        for row, count in zip(rows, counts, strict=True):
            if row.length + count > row.capacity:
                raise ModelError(
                    f"cache: {row.length + count} tokens do not fit a row for {row.capacity}: make it longer or the text shorter"
                )
        starts, at = [], 0
        for count in counts:
            starts.append(at)
            at += count
        # Tokens by themselves are one call a slab, fresh texts are packed into one, and what continues a text by several is read alone.
        self._single: list[_Step] = []
        self._continued: list[_Continued] = []
        fresh: list[int] = []
        for capacity in sorted({row.capacity for row in rows}):
            here = [i for i, row in enumerate(rows) if row.capacity == capacity]
            single = [i for i in here if counts[i] == 1]
            if single:
                self._single.append(_Step(self, capacity, [rows[i] for i in single], [starts[i] for i in single], at))
        for i, row in enumerate(rows):
            if counts[i] == 1:
                continue
            if row.length == 0:
                fresh.append(i)
            else:
                self._continued.append(_Continued(self, row, starts[i], counts[i]))
        self._fresh = _Fresh(self, [rows[i] for i in fresh], [starts[i] for i in fresh], [counts[i] for i in fresh]) if fresh else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the new tokens `q` [N, heads, d] over what their texts hold and `k`, `v` [N, kv_heads, d]: [N, heads, d]."""
        if len(self._single) == 1 and self._single[0].whole:
            return self._single[0].attend(layer, q, k, v)
        out = torch.empty_like(q)
        parts: list[_Step | _Continued | _Fresh] = [*self._single, *self._continued]
        for part in [*parts, self._fresh] if self._fresh else parts:
            part.write(layer, q, k, v, out)
        return out


class _Step:
    """One new token for each of some rows of a slab."""

    def __init__(self, call: CachedAttention, capacity: int, rows: Sequence[CacheRow], starts: Sequence[int], num_tokens: int) -> None:
        self.slab, self.window, self.kernels = call.cache.slab(capacity), call.window, call.kernels
        device = call.cache.device
        self.whole = len(starts) == num_tokens
        self.at = torch.tensor(starts, device=device)
        lengths = [row.length for row in rows]
        self.slots = torch.tensor([row.slot for row in rows], device=device)
        self.positions = torch.tensor(lengths, device=device)
        self.lengths = self.positions + 1
        self.longest = max(lengths) + 1
        self.order: SlotOrder | None = None
        if device.type == "cpu":
            # What a CPU needs to know of slots and lengths is the same in every layer.
            self.order = order_slots(self.slab.keys[0], self.slots, self.lengths, longest=self.longest, sliding_window=self.window)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.slab.keys[layer], self.slab.values[layer]
        store_kv(keys, values, k, v, self.slots, self.positions, kernels=self.kernels)
        return decode_attention(
            q,
            keys,
            values,
            self.slots,
            self.lengths,
            longest=self.longest,
            sliding_window=self.window,
            slot_order=self.order,
            kernels=self.kernels,
        )

    def write(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        out[self.at] = self.attend(layer, q[self.at], k[self.at], v[self.at])


class _Continued:
    """Several new tokens behind what a row already holds."""

    def __init__(self, call: CachedAttention, row: CacheRow, start: int, count: int) -> None:
        self.slab, self.slot = call.cache.slab(row.capacity), row.slot
        self.tokens = slice(start, start + count)
        self.begin, self.end = row.length, row.length + count
        distance = torch.arange(self.begin, self.end)[:, None] - torch.arange(self.end)
        seen = distance >= 0 if call.window is None else (distance >= 0) & (distance < call.window)
        self.seen = seen.to(call.cache.device)

    def write(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        keys, values = self.slab.keys[layer, self.slot], self.slab.values[layer, self.slot]
        keys[:, self.begin : self.end] = k[self.tokens].transpose(0, 1)
        values[:, self.begin : self.end] = v[self.tokens].transpose(0, 1)
        found = F.scaled_dot_product_attention(
            q[self.tokens].transpose(0, 1)[None],
            keys[None, :, : self.end],
            values[None, :, : self.end],
            attn_mask=self.seen,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out[self.tokens] = found[0].transpose(0, 1)


class _Fresh:
    """The beginnings of texts, packed."""

    def __init__(self, call: CachedAttention, rows: Sequence[CacheRow], starts: Sequence[int], counts: Sequence[int]) -> None:
        self.cache, self.window = call.cache, call.window
        device = call.cache.device
        self.backend = choose_backend("auto", device, 0.0, head_dim=call.cache.config.head_dim, dtype=call.cache.dtype)
        self.tokens = torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]).to(device)
        bounds = torch.tensor([0, *counts]).cumsum(0)
        self.layout = PackedLayout(bounds.to(torch.int32), device)
        self.parts = list(zip(rows, bounds.tolist(), bounds.tolist()[1:], strict=False))

    def write(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        q, k, v = q[self.tokens], k[self.tokens], v[self.tokens]
        for row, begin, end in self.parts:
            slab = self.cache.slab(row.capacity)
            slab.keys[layer, row.slot, :, : end - begin] = k[begin:end].transpose(0, 1)
            slab.values[layer, row.slot, :, : end - begin] = v[begin:end].transpose(0, 1)
        out[self.tokens] = packed_attention(q, k, v, self.layout, sliding_window=self.window, backend=self.backend)
