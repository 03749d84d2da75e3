"""The weights of several experts, stacked by name [slots, ...]; projections that read the same input are joined into one.

Joined are q, k and v (`attention.qkv`) and the gate and up projections (`gate_up`). A tensor that is equal in all experts is kept once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaxelm.model.config import DecoderConfig
from megaxelm.model.decoder import parameter_shapes
from megaxelm.model.source import WeightSource

_JOINED = {
    "attention.q": ("attention.qkv", ("attention.q", "attention.k", "attention.v")),
    "gate": ("gate_up", ("gate", "up")),
}


class StackedWeights(dict[str, Tensor]):
    """Stacked tensors by name, each [slots, ...]; made by `load`."""

    num_slots: int
    dtype: torch.dtype
    device: torch.device
    layout: dict[str, list[str]]
    """Name of a stacked tensor -> the decoder's parameters that lie in it, one below the other."""
    shared: set[str]
    """Names of tensors that all experts have in common: kept once, with a stride of zero over the slots."""

    @classmethod
    def load(cls, sources: Sequence[WeightSource], num_slots: int, dtype: torch.dtype, device: torch.device) -> StackedWeights:
        """The first `num_slots` experts in their slots. All experts are read, to see what they share."""
        stack = cls()
        stack.num_slots, stack.dtype, stack.device, stack.shared = num_slots, dtype, device, set()
        shapes = parameter_shapes(sources[0].config)
        stack.layout = stacked_names(sources[0].config)
        for name, parts in stack.layout.items():
            stack[name] = stack._stacked(sources, parts, shapes)
        return stack

    def fill(self, slot: int, source: WeightSource) -> int:
        """Put an expert's weights into a slot; what all experts share stays. Returns the bytes moved."""
        moved = 0
        for name, parts in self.layout.items():
            if name not in self.shared:
                moved += self[name][slot].nbytes
                _fill(self[name][slot], source, parts)
        return moved

    def _stacked(self, sources: Sequence[WeightSource], parts: list[str], shapes: dict[str, tuple[int, ...]]) -> Tensor:
        rows = sum(shapes[part][0] for part in parts)
        shape = (rows, *shapes[parts[0]][1:])
        first = torch.empty(shape, dtype=self.dtype, device=self.device)
        _fill(first, sources[0], parts)
        if len(sources) > 1 and all(_equal(sources[0], source, parts) for source in sources[1:]):
            self.shared.add(_stacked_name(parts))
            return first.expand(self.num_slots, *shape)
        if self.num_slots == 1:
            return first[None]
        stacked = torch.empty(self.num_slots, *shape, dtype=self.dtype, device=self.device)
        stacked[0] = first
        del first
        for slot in range(1, self.num_slots):
            _fill(stacked[slot], sources[slot], parts)
        return stacked


def stacked_names(config: DecoderConfig) -> dict[str, list[str]]:
    """Name of each stacked tensor -> names of the decoder's parameters in it."""
    found: dict[str, list[str]] = {}
    taken: set[str] = set()
    names = parameter_shapes(config)
    for name in names:
        if name in taken:
            continue
        parts = [name]
        for first, (_, members) in _JOINED.items():
            if f".{first}." in name:
                parts = [name.replace(f".{first}.", f".{member}.") for member in members]
        taken.update(parts)
        found[_stacked_name(parts)] = parts
    return found


def _stacked_name(parts: list[str]) -> str:
    for first, (joined, _) in _JOINED.items():
        if len(parts) > 1 and f".{first}." in parts[0]:
            return parts[0].replace(f".{first}.", f".{joined}.")
    return parts[0]


def _fill(tensor: Tensor, source: WeightSource, parts: list[str]) -> None:
    at = 0
    for part in parts:
        weight = source.weight(part)
        tensor[at : at + weight.shape[0]].copy_(weight)
        at += weight.shape[0]


def _equal(first: WeightSource, other: WeightSource, parts: list[str]) -> bool:
    return all(torch.equal(first.weight(part), other.weight(part)) for part in parts)
