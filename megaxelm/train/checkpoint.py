"""Checkpoints of a training run: DeepSpeed's folders, made trustworthy.

`checkpoints/<step>/` is what DeepSpeed saves. `complete.json` in it, written last, lists every file with size and hash.
`checkpoints/latest` names the newest complete one and is replaced atomically. An unfinished folder is ignored and reported, a damaged
one is an error.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaxelm.errors import CheckpointError, StageError
from megaxelm.files import hash_file, read_json, write_json
from megaxelm.train.environment import Processes

_COMPLETE = "complete.json"


@dataclass(frozen=True)
class Progress:
    """How far a training run is: optimiser steps done and samples consumed."""

    step: int
    samples: int


@dataclass(frozen=True)
class Layout:
    """How DeepSpeed divides the state among files."""

    ranks: int
    zero_stage: int
    precision: str


class Checkpoints:
    """The checkpoints of one model in training. Every method is collective: all ranks call it.

    Args:
        folder: `checkpoints/` of the model.
        layout: of this training.
        keep: newest checkpoints that stay.
        keep_every: checkpoints at multiples of so many steps stay for good.
        asynchronous: write while training goes on.
    """

    def __init__(
        self, folder: Path, layout: Layout, processes: Processes, *, keep: int, keep_every: int | None, asynchronous: bool
    ) -> None:
        self.folder = folder
        self.layout = layout
        self.processes = processes
        self.keep = keep
        self.keep_every = keep_every
        self.asynchronous = asynchronous

    def resume(self, engine: Any) -> Progress:
        """Load the newest complete checkpoint into `engine`; what is unfinished is told and ignored.

        Raises:
            CheckpointError: it is damaged, or of another layout.
        """
        progress, notes = find_checkpoint(self.folder, asdict(self.layout))
        if self.processes.rank == 0:
            for note in notes:
                print(note, flush=True)
        if progress is None:
            return Progress(0, 0)
        loaded, state = engine.load_checkpoint(str(self.folder), tag=str(progress.step))
        assert loaded is not None and state["step"] == progress.step, "a verified checkpoint loads"
        return progress

    def save(self, engine: Any, progress: Progress) -> float:
        """Save the state after `progress`; returns the seconds for which training waited."""
        began = time.monotonic()
        tag = self.folder / str(progress.step)
        first = self.processes.rank == 0
        if first and tag.exists():
            shutil.rmtree(tag)
        self._barrier()
        state = {"step": progress.step, "samples": progress.samples}
        engine.save_checkpoint(str(self.folder), tag=str(progress.step), client_state=state, save_latest=False)
        self._barrier()
        if first:
            complete_checkpoint(self.folder, progress, asdict(self.layout), self.keep)
        return time.monotonic() - began

    def finish(self) -> None:
        """Wait until the last checkpoint is complete on disk."""

    def _barrier(self) -> None:
        if self.processes.world_size > 1:
            import torch.distributed as dist

            dist.barrier()


def complete_checkpoint(folder: Path, progress: Progress, layout: dict[str, Any], keep: int) -> None:
    """Mark the checkpoint of `progress` complete after all ranks have written their files, and drop older ones beyond `keep`."""
    tag = folder / str(progress.step)
    files = {
        str(path.relative_to(tag)): {"bytes": path.stat().st_size, "xxh3": hash_file(path)}
        for path in sorted(tag.rglob("*"))
        if path.is_file() and path.name != _COMPLETE
    }
    write_json(tag / _COMPLETE, {"step": progress.step, "samples": progress.samples, "layout": layout, "files": files})
    aside = folder / ".latest.new"
    aside.write_text(str(progress.step), encoding="utf-8")
    os.replace(aside, folder / "latest")
    for step in _steps(folder)[:-keep]:
        shutil.rmtree(folder / str(step))


def find_checkpoint(folder: Path, layout: dict[str, Any]) -> tuple[Progress | None, list[str]]:
    """The newest complete checkpoint, verified, and a note for every unfinished one that is ignored.

    Raises:
        CheckpointError: its files are not those that were written, or another number of ranks, ZeRO stage or precision wrote them.
    """
    notes: list[str] = []
    if not folder.exists():
        return None, notes
    for tag in folder.iterdir():
        if tag.is_dir() and not (tag / _COMPLETE).exists():
            notes.append(f"checkpoint {tag.name} is unfinished and ignored")
    steps = _steps(folder)
    if not steps:
        return None, notes
    tag = folder / str(steps[-1])
    note = _verified(tag)
    if note["layout"] != layout:
        saved, now = (", ".join(f"{key} {value}" for key, value in item.items()) for item in (note["layout"], layout))
        raise CheckpointError(
            f"{tag}: saved with {saved}, and this training has {now}: resume as it was saved, or remove the folder `checkpoints` "
            "to train from the start"
        )
    return Progress(note["step"], note["samples"]), notes


def _verified(tag: Path) -> dict[str, Any]:
    try:
        note = read_json(tag / _COMPLETE, step=int, samples=int, layout=dict, files=dict)
    except StageError:
        raise CheckpointError(f"{tag / _COMPLETE}: damaged; remove the folder {tag} to resume from an earlier checkpoint") from None
    for name, wanted in note["files"].items():
        path = tag / name
        if not path.exists() or path.stat().st_size != wanted["bytes"] or hash_file(path) != wanted["xxh3"]:
            raise CheckpointError(f"{path}: damaged since it was written; remove the folder {tag} to resume from an earlier checkpoint")
    return note


def _steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    return sorted(int(tag.name) for tag in folder.iterdir() if tag.name.isdigit() and (tag / _COMPLETE).exists())
