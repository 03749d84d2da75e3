"""Checkpoints of a training run: DeepSpeed's folders, made trustworthy.

`checkpoints/<step>/` is what DeepSpeed saves. `complete.json` in it, written last, lists every file with size and hash.
`checkpoints/latest` names the newest complete one and is replaced atomically. An unfinished folder is ignored and reported, a damaged
one is an error.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaxelm.errors import CheckpointError, StageError
from megaxelm.files import hash_file, read_json, write_json

_COMPLETE = "complete.json"


@dataclass(frozen=True)
class Progress:
    """How far a training run is: optimiser steps done and samples consumed."""

    step: int
    samples: int


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
