"""How DeepSpeed's state reaches files: straight to disk, or as a copy in memory that a thread writes later."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from megaxelm.train.checkpoint_folder import Files, write_file


class Writer(CheckpointEngine):
    """Takes the place of DeepSpeed's checkpoint engine while one checkpoint is saved.

    DeepSpeed's own asynchronous engines (`checkpoint.writer`) give no hash, do not fsync, and a rank that could not write leaves the others
    waiting. Here a failure is kept in `error`, for all ranks to agree on.

    Args:
        in_memory: keep the state until `flush`, which may run in another thread.
    """

    def __init__(self, in_memory: bool) -> None:
        super().__init__()
        self.name = "megaxelm"
        self.in_memory = in_memory
        self.files: Files = {}
        self.error: str | None = None
        self._copies: list[tuple[Path, io.BytesIO]] = []

    @property
    def copied_bytes(self) -> int:
        """Size of the copies in memory."""
        return sum(copy.getbuffer().nbytes for _, copy in self._copies)

    def create(self, info: Any) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        if self.in_memory:
            copy = io.BytesIO()
            torch.save(state_dict, copy)
            self._copies.append((Path(path), copy))
        else:
            self._write(Path(path), lambda file: torch.save(state_dict, file))

    def load(self, path: str, map_location: Any = None) -> Any:
        raise NotImplementedError("checkpoints are loaded by DeepSpeed's own engine")

    def commit(self, info: Any) -> bool:
        return True

    def flush(self) -> None:
        """Write the copies to disk, and let them go."""
        while self._copies:
            path, copy = self._copies.pop(0)
            self._write(path, lambda file, copy=copy: file.write(copy.getbuffer()))

    def _write(self, path: Path, fill: Any) -> None:
        try:
            self.files[path.name] = write_file(path, fill)
        except OSError as error:
            self.error = self.error or str(error)
