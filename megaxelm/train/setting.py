"""What one process needs to train its part of one model, and how it agrees with the other ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaxelm.recipe import Recipe
from megaxelm.run import RunFolder
from megaxelm.train.environment import Processes
from megaxelm.train.members import Member


@dataclass(frozen=True)
class Setting:
    """What one process needs to train its part of one model."""

    run: RunFolder
    recipe: Recipe
    member: Member
    ds_config: dict[str, Any]
    processes: Processes
    device: torch.device
    profile: range | None = None
    """Steps to trace, counted from 1."""

    @property
    def folder(self) -> Path:
        return self.run.expert(self.member.name)

    @property
    def is_first(self) -> bool:
        return self.processes.rank == 0


def sum_over_ranks(value: float, setting: Setting) -> float:
    """The sum of each rank's `value`. Collective."""
    if setting.processes.world_size == 1:
        return value
    total = torch.tensor(float(value), dtype=torch.float64, device=setting.device)
    dist.all_reduce(total)
    return float(total)


def barrier(processes: Processes) -> None:
    """Wait for all ranks."""
    if processes.world_size > 1:
        dist.barrier()
