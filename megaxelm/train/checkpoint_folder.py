"""A folder of checkpoints on disk: how one becomes complete, which one is resumed from, which ones stay.

A checkpoint is written into a hidden folder `.<step>.making`. When all its files are on disk (fsync), the marker `complete.json`, which
lists each with size and hash, is written last; then the folder is renamed to `<step>` and `latest` is replaced. So a folder with a number
for a name is whole, and whatever a kill leaves is hidden, ignored, told, and removed once the next checkpoint is complete.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import xxhash

from megaxelm.errors import CheckpointError, StageError
from megaxelm.files import hash_file, read_json, remove, write_json

COMPLETE = "complete.json"
_READERS = 8
_ARRIVAL_SECONDS = 60.0


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
    offload: bool = False
    """The optimiser works on the host: another Adam, which counts its steps in another form."""

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''} of ZeRO {self.zero_stage} in {self.precision}" + (
            ", optimiser on the host" if self.offload else ""
        )


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint whose files are those that were written."""

    folder: Path
    progress: Progress
    layout: Layout


Files = dict[str, dict[str, Any]]
"""Files of a checkpoint by their path in it: {"bytes": size, "xxh3": hash}."""


class _Hashed:
    """A binary file that hashes what is written to it. A failed write is kept in `error`: torch would end the process with its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = xxhash.xxh3_128()
        self.bytes = 0
        self.error: OSError | None = None

    def write(self, piece: Any) -> None:
        self.digest.update(piece)
        self.bytes += len(piece)
        self._keep_error(lambda: self.file.write(piece))

    def flush(self) -> None:
        self._keep_error(self.file.flush)

    def _keep_error(self, action: Callable[[], object]) -> None:
        if self.error is None:
            try:
                action()
            except OSError as error:
                self.error = error


def write_file(path: Path, fill: Callable[[Any], object]) -> dict[str, Any]:
    """Write `path` by `fill(file)`, down to the disk; returns its entry in the marker. The hash is that of what was meant to be written.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    with open(path, "wb") as file:
        hashed = _Hashed(file)
        fill(hashed)
        hashed.flush()
        if hashed.error is not None:
            raise hashed.error
        os.fsync(file.fileno())
    return {"bytes": hashed.bytes, "xxh3": hashed.digest.hexdigest()}


def making(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies until it is complete."""
    return folder / f".{step}.making"


def start_checkpoint(folder: Path, step: int) -> None:
    """An empty folder for the files of the checkpoint of `step`; what an earlier attempt left is removed."""
    remove(making(folder, step))
    making(folder, step).mkdir(parents=True)


def complete_checkpoint(folder: Path, progress: Progress, layout: Layout, files: Files, keep: int, keep_every: int | None) -> None:
    """Make the checkpoint of `progress` count, now that all ranks have written `files` to disk; older ones beyond those to keep go.

    Args:
        keep: newest checkpoints that stay.
        keep_every: checkpoints at multiples of so many steps stay for good.

    Raises:
        CheckpointError: a file that another rank wrote is not seen here.
    """
    aside, target = making(folder, progress.step), folder / str(progress.step)
    for name, wanted in files.items():
        _await_file(aside / name, wanted["bytes"])
    write_json(aside / COMPLETE, {"step": progress.step, "samples": progress.samples, "layout": asdict(layout), "files": files})
    _fsync_folder(aside)
    remove(target)  # an unfinished one of the same name: a complete one is never saved again
    os.rename(aside, target)
    _fsync_folder(folder)
    point_latest(folder, progress.step)
    _remove_old(folder, keep, keep_every)


def find_checkpoint(folder: Path) -> tuple[Saved | None, list[str]]:
    """The newest complete checkpoint, its files verified, and a note for every unfinished one that is ignored.

    Raises:
        CheckpointError: its files are not those that were written.
    """
    if not folder.exists():
        return None, []
    notes = [f"{path}: an unfinished checkpoint, ignored" for path in _unfinished(folder)]
    steps = complete_steps(folder)
    return (verified(folder / str(steps[-1])) if steps else None), notes


def point_latest(folder: Path, step: int) -> None:
    """Let `latest` name the checkpoint of `step`: for DeepSpeed's tools and the export."""
    aside = folder / ".latest.new"
    with open(aside, "w", encoding="utf-8") as file:
        file.write(str(step))
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, folder / "latest")
    _fsync_folder(folder)


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    return sorted(int(tag.name) for tag in folder.iterdir() if tag.name.isdigit() and (tag / COMPLETE).exists())


def _await_file(path: Path, size: int) -> None:
    """Network file systems may show a file of another node late."""
    deadline = time.monotonic() + _ARRIVAL_SECONDS
    while not path.exists() or path.stat().st_size != size:
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{path}: written by another rank and not seen by rank 0 after {_ARRIVAL_SECONDS:g} s: the run must lie on a file system "
                "that all nodes share"
            )
        time.sleep(0.1)


def verified(tag: Path) -> Saved:
    """The complete checkpoint in `tag`, its files compared with what was written.

    Raises:
        CheckpointError: it is damaged.
    """
    way_out = f"remove the folder {tag} to resume from the checkpoint before it, or from the start where there is none"
    try:
        note = read_json(tag / COMPLETE, step=int, samples=int, layout=dict, files=dict)
        layout = Layout(**note["layout"])
        wanted = {name: (int(entry["bytes"]), str(entry["xxh3"])) for name, entry in note["files"].items()}
    except (StageError, TypeError, KeyError, ValueError):
        raise CheckpointError(f"{tag / COMPLETE}: damaged; {way_out}") from None

    def is_sound(name: str) -> bool:
        path, (size, digest) = tag / name, wanted[name]
        return path.is_file() and path.stat().st_size == size and hash_file(path) == digest

    with ThreadPoolExecutor(_READERS) as pool:
        damaged = [name for name, sound in zip(wanted, pool.map(is_sound, wanted), strict=True) if not sound]
    if damaged:
        raise CheckpointError(f"{tag / damaged[0]}: damaged since it was written; {way_out}")
    return Saved(tag, Progress(note["step"], note["samples"]), layout)


def _unfinished(folder: Path) -> list[Path]:
    """What kills left behind: hidden folders, and numbered ones without a marker."""
    tags = [path for path in folder.iterdir() if path.is_dir()]
    return sorted(path for path in tags if path.name.startswith(".") or (path.name.isdigit() and not (path / COMPLETE).exists()))


def _remove_old(folder: Path, keep: int, keep_every: int | None) -> None:
    for step in complete_steps(folder)[:-keep]:
        if keep_every is None or step % keep_every:
            # Hidden first: a kill amid the removal must not leave a folder that looks complete.
            os.rename(folder / str(step), folder / f".{step}.old")
    for path in _unfinished(folder):
        remove(path)


def _fsync_folder(folder: Path) -> None:
    """Bring the entries of a folder to disk: without it a rename may be lost when the power fails."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
