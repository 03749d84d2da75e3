"""Rows of a router's state: tensors [batch, ...], or lists with one entry a row. Every function makes a state of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def join_rows(first: Any, second: Any) -> Any:
    """The rows of both, those of `first` in front."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    return [copy_row(row) for row in (*first, *second)]


def select_rows(state: Any, rows: Sequence[int]) -> Any:
    """The given rows in the given order. A row that is named twice becomes two that go on apart."""
    if isinstance(state, Tensor):
        return state[torch.tensor(list(rows), dtype=torch.int64, device=state.device)]
    return [copy_row(state[row]) for row in rows]


def copy_row(row: Any) -> Any:
    """One entry of a list: a tensor, a tuple of entries, nothing at all or a word, or an object with `copy`."""
    if row is None or isinstance(row, str):
        return row
    if isinstance(row, Tensor):
        return row.clone()
    if isinstance(row, tuple):
        return tuple(map(copy_row, row))
    return row.copy()
