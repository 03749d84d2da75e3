"""Rows that lie sorted by group: by the expert whose weights they meet. One product serves all groups."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class RowGroups:
    """Which rows of `x` [rows, ...] belong to which group: those of group g are `offsets[g]` to `offsets[g + 1]`; a group may be empty.

    Raises:
        ValueError: offsets that do not start at 0 or that fall.
    """

    def __init__(self, offsets: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.offsets = tuple(offsets)
        self.device = torch.device(device)
        if not self.offsets or self.offsets[0] != 0 or any(a > b for a, b in zip(self.offsets, self.offsets[1:], strict=False)):
            raise ValueError(f"offsets = {self.offsets}: start at 0 and never fall")

    @classmethod
    def from_counts(cls, counts: Sequence[int], device: torch.device | str = "cpu") -> RowGroups:
        """Groups of so many rows each."""
        offsets = [0]
        for count in counts:
            offsets.append(offsets[-1] + count)
        return cls(offsets, device)

    @property
    def num_groups(self) -> int:
        """Groups, the empty ones too."""
        return len(self.offsets) - 1

    @property
    def num_rows(self) -> int:
        """Rows of all groups."""
        return self.offsets[-1]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Rows of each group."""
        return tuple(b - a for a, b in zip(self.offsets, self.offsets[1:], strict=False))

    @cached_property
    def device_offsets(self) -> Tensor:
        """`offsets` [groups + 1] int32 on the device."""
        return torch.tensor(self.offsets, dtype=torch.int32, device=self.device)

    @cached_property
    def group_of_row(self) -> Tensor:
        """[rows] int64 on the device."""
        groups = [group for group, count in enumerate(self.counts) for _ in range(count)]
        return torch.tensor(groups, dtype=torch.int64, device=self.device)
