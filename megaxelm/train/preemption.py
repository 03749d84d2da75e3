"""A training that is asked to stop: a signal to any rank, or a file, and all ranks agree within a micro-batch.

`catch_signals()` comes first in the process, before slow imports: an uncaught SIGUSR1 would end it. `StopRequest` is what the loop asks.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP_FILE = "stop"

_caught: list[int] = []
_LOOK_SECONDS = 1.0  # between looks for the stop file, which may lie on a network file system


def catch_signals() -> None:
    """From now on SIGTERM and SIGUSR1 are remembered; the training that is under way obeys at its next micro-batch."""
    for number in SIGNALS:
        signal.signal(number, _remember)


def _remember(number: int, frame: FrameType | None) -> None:
    _caught.append(number)


class StopRequest:
    """What this process was told, and what all ranks agree on. `agree` is collective.

    Args:
        folder: of the model; rank 0 looks for the file `stop` in it.
        rank, world_size: of this process.
    """

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.file = folder / STOP_FILE
        self.rank = rank
        self.agreed: str | None = None
        self._looked = 0.0
        self._group = None
        self._together = world_size > 1
        if self._together:
            import torch.distributed as dist

            # Of its own, on the CPU: asking must not wait for a device, nor come between the collectives of training.
            self._group = dist.new_group(backend="gloo")

    def agree(self) -> str | None:
        """Why all ranks shall stop, or None. Once there is a reason it stays."""
        if self.agreed is None:
            self.agreed = self._agree()
        return self.agreed

    def obeyed(self) -> None:
        """The state is saved: the file is removed, so that the next start goes on."""
        if self.rank == 0:
            self.file.unlink(missing_ok=True)

    def _agree(self) -> str | None:
        code = _caught[0] if _caught else self._look()
        if self._together:
            import torch
            import torch.distributed as dist

            told = torch.tensor(code)
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
            code = int(told)
        if code == 0:
            return None
        return f"the file {STOP_FILE}" if code == _FILE else signal.Signals(code).name

    def _look(self) -> int:
        now = time.monotonic()
        if self.rank != 0 or now - self._looked < _LOOK_SECONDS:
            return 0
        self._looked = now
        return _FILE if self.file.exists() else 0


_FILE = 1000  # no signal has this number
