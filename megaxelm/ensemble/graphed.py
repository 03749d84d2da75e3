"""A token step as one CUDA graph for each bucket of rows: on a GPU a step of many small launches is bound by the host that makes them.

Everything that changes from step to step (tokens, positions, lengths, slots, which rows belong to which expert, weights, seeds) lies in
tensors on the device, written before the graph is replayed; what decides the launches (rows, texts, capacity, the longest text) is rounded
up to a bucket and is the key of the graph. Rows that only fill a bucket store nothing, read nothing, and belong to no text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megaxelm.ensemble.mixture_head import MixtureSettings, fused
from megaxelm.ensemble.weights import Weights
from megaxelm.model.stacked import Piece, Read
from megaxelm_kernels.decode_attention import decode_attention, store_kv
from megaxelm_kernels.mixture import MixtureToken, Sampling
from megaxelm_kernels.row_groups import RowGroups

if TYPE_CHECKING:
    from megaxelm.model.stacked import StackedDecoder
    from megaxelm.model.stacked_cache import StackedCache

WARM_UPS = 2
"""Runs before a capture, in which Triton compiles and libraries take their workspaces."""


class GraphedSteps:
    """The graphs of one engine.

    Args:
        capture: False runs the same fixed tensors without a graph (on a CPU, to test them).
    """

    def __init__(self, stack: StackedDecoder, cache: StackedCache, settings: MixtureSettings, capture: bool = True) -> None:
        self._stack, self._cache, self._settings, self._capture = stack, cache, settings, capture
        self._steps: dict[tuple[object, ...], _Step] = {}

    def fits(self, pieces: Sequence[Piece]) -> bool:
        """Whether a step is one that a graph serves: a token a row, all rows of one capacity, all experts resident."""
        same = {piece.row.capacity for piece in pieces}
        return len(same) == 1 and all(len(piece.tokens) == 1 for piece in pieces) and self._stack.num_slots == self._stack.num_experts

    def run(self, pieces: Sequence[Piece], places: Sequence[tuple[int, int]], kept: Weights, sampling: Sampling) -> MixtureToken:
        """The next token of each text; `places` are (text, slot of its weights) of the pieces."""
        stack = self._stack
        order = sorted(range(len(pieces)), key=lambda index: stack.slot(pieces[index].expert))
        batch, m = kept.log_w.shape
        capacity = pieces[0].row.capacity
        longest = min(capacity, _bucket(1 + max(piece.row.length for piece in pieces), 128))
        slab = self._cache.slab(capacity)
        rows, texts = _bucket(len(pieces)), _bucket(batch)
        key = (rows, texts, m, capacity, longest, slab.keys.data_ptr(), sampling.greedy, sampling.filtered)
        if key not in self._steps:
            # A slab that has grown lies elsewhere: graphs of its old place are of no more use.
            self._steps = {other: step for other, step in self._steps.items() if other[3] != capacity or other[5] == slab.keys.data_ptr()}
            self._steps[key] = _Step(stack, slab.keys, slab.values, rows, texts, m, longest, sampling, self._settings)
        step = self._steps[key]
        step.fill([pieces[index] for index in order], [places[index] for index in order], kept, sampling)
        found = step.run(self._capture)
        for piece in pieces:
            piece.row.length += 1
        return MixtureToken(found.token[:batch], found.logprob[:batch], found.expert_logprob[:batch])


class _Step:
    """One bucket: its tensors, and the graph over them once it has been captured."""

    def __init__(
        self,
        stack: StackedDecoder,
        keys: Tensor,
        values: Tensor,
        rows: int,
        texts: int,
        m: int,
        longest: int,
        sampling: Sampling,
        settings: MixtureSettings,
    ) -> None:
        device = stack.device
        self.stack, self.keys, self.values, self.longest, self.settings = stack, keys, values, longest, settings

        def whole(size: int, value: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((size,), value, dtype=dtype, device=device)

        self.tokens, self.positions, self.slots, self.lengths = whole(rows), whole(rows, -1), whole(rows), whole(rows)
        # The host's bounds: all rows in one group. What holds is on the device.
        self.groups = RowGroups([0, *[rows] * stack.num_slots], device)
        self.groups.device_offsets = whole(stack.num_slots + 1, rows, torch.int32)
        self.groups.group_of_row = whole(rows)
        self.rows = torch.zeros(texts, m, dtype=torch.int64, device=device)
        self.log_w = torch.full((texts, m), -torch.inf, device=device)
        self.sampling = replace(
            sampling,
            temperature=whole(texts, 0, torch.float32),
            top_k=whole(texts),
            top_p=whole(texts, 1, torch.float32),
            min_p=whole(texts, 0, torch.float32),
            key=whole(texts),
            position=whole(texts),
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        self.found: MixtureToken | None = None

    def fill(self, pieces: Sequence[Piece], places: Sequence[tuple[int, int]], kept: Weights, sampling: Sampling) -> None:
        """Write a step's values; `pieces` lie sorted by slot of their expert."""
        rows, batch = len(self.tokens), len(kept.log_w)
        spare = rows - len(pieces)
        owners = [self.stack.slot(piece.expert) for piece in pieces]
        lengths = [piece.row.length for piece in pieces]
        last = self.stack.num_slots - 1
        _write(self.tokens, [piece.tokens[0] for piece in pieces] + [0] * spare)
        _write(self.slots, [piece.row.slot for piece in pieces] + [0] * spare)
        _write(self.positions, lengths + [-1] * spare)
        _write(self.lengths, [length + 1 for length in lengths] + [0] * spare)
        _write(self.groups.group_of_row, owners + [last] * spare)
        counts = [owners.count(slot) for slot in range(self.stack.num_slots)]
        counts[last] += spare
        _write(self.groups.device_offsets, [sum(counts[:slot]) for slot in range(len(counts) + 1)])
        table = [[0] * kept.log_w.shape[1] for _ in range(len(self.rows))]
        for row, (text, slot) in enumerate(places):
            table[text][slot] = row
        self.rows.copy_(torch.tensor(table), non_blocking=True)
        self.log_w[:batch].copy_(kept.log_w, non_blocking=True)
        self.log_w[batch:] = -torch.inf
        self.log_w[batch:, 0] = 0.0
        for name in ("temperature", "top_k", "top_p", "min_p", "key", "position"):
            getattr(self.sampling, name)[:batch].copy_(getattr(sampling, name), non_blocking=True)

    def run(self, capture: bool) -> MixtureToken:
        """Compute the step, by the graph where there is to be one."""
        if not capture:
            return self._compute()
        if self.graph is None:
            self._warm_up(self._compute)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.found = self._compute()
        self.graph.replay()
        assert self.found is not None
        return self.found

    def _warm_up(self, compute: Callable[[], object]) -> None:
        # What a warm-up stores is what the step stores: running it more than once changes nothing.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(stream)

    def _compute(self) -> MixtureToken:
        branch, residual = self.stack.layers(self.tokens, self.positions, self.groups, self)
        hidden = self.stack.last_norm(branch, residual, self.groups)
        read = Read(hidden, self.groups, [])
        return fused(self.stack, read, self.rows, self.log_w, self.sampling, self.settings)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the step's tokens over what their texts hold."""
        keys, values, kernels = self.keys[layer], self.values[layer], self.stack.kernels
        store_kv(keys, values, k, v, self.slots, self.positions, kernels=kernels)
        window = self.stack.config.sliding_window
        return decode_attention(q, keys, values, self.slots, self.lengths, longest=self.longest, sliding_window=window, kernels=kernels)


def _write(target: Tensor, values: list[int]) -> None:
    target.copy_(torch.tensor(values, dtype=target.dtype), non_blocking=True)


def _bucket(number: int, least: int = 1) -> int:
    """The next power of two."""
    bucket = least
    while bucket < number:
        bucket *= 2
    return bucket
