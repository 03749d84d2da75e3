"""The weights of several experts, stacked by name [slots, ...]; projections that read the same input are joined into one.

Joined are q, k and v (`attention.qkv`) and the gate and up projections (`gate_up`). A tensor that is equal in all experts is kept once.

Experts that are low-rank deltas of one base keep the base once, and of each expert A [slots, rank, in] and B [slots, out, rank]. The
ranks of joined projections lie one behind the other, and B has zeros where a rank belongs to another one: so a joined projection is one
product with A and one with B. An expert without deltas (the seed as a fallback) has zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaxelm.model.config import DecoderConfig
from megaxelm.model.decoder import parameter_shapes
from megaxelm.model.source import WeightSource

_JOINED = {
    "attention.q": ("attention.qkv", ("attention.q", "attention.k", "attention.v")),
    "gate": ("gate_up", ("gate", "up")),
}


@dataclass(frozen=True)
class _Delta:
    """A projection with deltas inside of a joined one: its rows `row` to `row + rows`."""

    module: str
    row: int
    rows: int


class StackedWeights(dict[str, Tensor]):
    """Stacked tensors by name, each [slots, ...]; made by `load`."""

    num_slots: int
    dtype: torch.dtype
    device: torch.device
    layout: dict[str, list[str]]
    """Name of a stacked tensor -> the decoder's parameters that lie in it, one below the other."""
    shared: set[str]
    """Names of tensors that all experts have in common: kept once, with a stride of zero over the slots."""
    deltas: dict[str, list[_Delta]]
    """Name of a joined projection -> the projections with deltas in it; empty where every expert has weights of its own."""
    rank: int
    """The largest of the experts' ranks; smaller ones have zeros behind them."""

    @classmethod
    def load(cls, sources: Sequence[WeightSource], num_slots: int, dtype: torch.dtype, device: torch.device) -> StackedWeights:
        """The first `num_slots` experts in their slots. All experts are read, to see what they share."""
        stack = cls()
        stack.num_slots, stack.dtype, stack.device, stack.shared = num_slots, dtype, device, set()
        stack.deltas, stack.rank = {}, 0
        shapes = parameter_shapes(sources[0].config)
        stack.layout = stacked_names(sources[0].config)
        base = common_base(sources, list(shapes))
        for name, parts in stack.layout.items():
            stack[name] = stack._stacked(sources if base is None else [base] * len(sources), parts, shapes)
        if base is not None:
            stack._add_deltas(sources, shapes)
        return stack

    @property
    def nbytes(self) -> int:
        """Bytes in memory; what is shared counts once."""
        return sum(tensor[0].nbytes if tensor.stride(0) == 0 else tensor.nbytes for tensor in self.values())

    def fill(self, slot: int, source: WeightSource) -> int:
        """Put an expert's weights into a slot; what all experts share stays. Returns the bytes moved."""
        moved = 0
        for name, parts in self.layout.items():
            if name not in self.shared:
                moved += self[name][slot].nbytes
                _fill(self[name][slot], source, parts)
        for name in self.deltas:
            moved += self[f"{name}.lora_A"][slot].nbytes + self[f"{name}.lora_B"][slot].nbytes
            self._fill_delta(slot, source, name)
        return moved

    def _add_deltas(self, sources: Sequence[WeightSource], shapes: dict[str, tuple[int, ...]]) -> None:
        loras = [source.adapter.lora for source in sources if source.adapter is not None]
        targets = {target for lora in loras for target in lora.targets}
        self.rank = max(lora.rank for lora in loras)
        for stacked, parts in self.layout.items():
            if not stacked.endswith(".weight"):
                continue
            row, found = 0, []
            for part in parts:
                module, rows = part.removesuffix(".weight"), shapes[part][0]
                if module.split(".", 2)[-1] in targets:
                    found.append(_Delta(module, row, rows))
                row += rows
            if not found:
                continue
            name, ranks = stacked.removesuffix(".weight"), len(found) * self.rank
            self.deltas[name] = found
            for kind, shape in (("lora_A", (ranks, shapes[parts[0]][1])), ("lora_B", (row, ranks))):
                self[f"{name}.{kind}"] = torch.zeros(self.num_slots, *shape, dtype=self.dtype, device=self.device)
            for slot in range(self.num_slots):
                self._fill_delta(slot, sources[slot], name)

    def _fill_delta(self, slot: int, source: WeightSource, name: str) -> None:
        lora_a, lora_b = (self[f"{name}.{kind}"][slot].zero_() for kind in ("lora_A", "lora_B"))
        adapter = source.adapter
        if adapter is None:
            return
        for number, part in enumerate(self.deltas[name]):
            if part.module.split(".", 2)[-1] in adapter.lora.targets:
                ranks = slice(number * self.rank, number * self.rank + adapter.lora.rank)
                lora_a[ranks].copy_(adapter.tensor(f"{part.module}.lora_A.weight"))
                scaled = adapter.tensor(f"{part.module}.lora_B.weight").float() * adapter.lora.scale
                lora_b[part.row : part.row + part.rows, ranks].copy_(scaled)

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


def common_base(sources: Sequence[WeightSource], names: Sequence[str]) -> WeightSource | None:
    """The one base of experts of which some are low-rank deltas and the others the base itself; None where there is none.

    Deltas of different bases are merged, each expert as large as a whole model; that is said.
    """
    if all(source.adapter is None for source in sources):
        return None
    bases: dict[object, WeightSource] = {}
    for number, source in enumerate(sources):
        if source.adapter is None:
            bases[number] = source
        else:
            bases.setdefault(source.adapter.folder.absolute(), source.adapter.base)
    first, *others = bases.values()
    if all(_equal(first, other, [name]) for name in names for other in others):
        return first
    print(
        f"stack: low-rank deltas of {len(bases)} different bases are merged with them, so each expert takes the memory of a whole model",
        flush=True,
    )
    return None


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
    return first is other or all(torch.equal(first.weight(part), other.weight(part)) for part in parts)
