"""Tensors in files, by their place: read one at a time with plain reads, so that nothing of the file stays in memory."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor


def read_numbers(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor that lies at byte `offset` of a file, in row order.

    A memory map would count every page it has touched as resident memory of the process, which for a model is all of it.

    Raises:
        EOFError: the file ends before the tensor does.
    """
    numbers = torch.empty(math.prod(shape), dtype=dtype)
    space = numbers.view(torch.uint8).numpy()
    with open(path, "rb") as file:
        file.seek(offset)
        found = file.readinto(space.data) if space.size else 0
    if found != space.size:
        raise EOFError(f"{space.size} bytes wanted at {offset}, {found} found")
    return numbers.view(shape)
