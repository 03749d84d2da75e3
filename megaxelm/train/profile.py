"""A trace of chosen steps by torch's profiler, to look at in Perfetto or chrome://tracing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from megaxelm.errors import TrainError


def parse_steps(text: str) -> range:
    """`10-12` or `10`: steps counted from 1, both ends included.

    Raises:
        TrainError: not of that form, or backwards.
    """
    first, dash, last = text.partition("-")
    last = last if dash else first
    if not (first.isdigit() and last.isdigit()) or not 1 <= int(first) <= int(last):
        raise TrainError(f"--profile {text}: give the steps to trace as FIRST-LAST, counted from 1, for example 10-12")
    return range(int(first), int(last) + 1)


class Profile:
    """Traces the steps in `steps` (counted from 1) of one rank into `folder/rank<rank>-steps<first>-<last>.json.gz`.

    with Profile(folder, parse_steps("10-12"), rank) as profile:
        for step in ...:
            with profile.step(step + 1):
                ...

    A training that ends or is stopped within the steps writes what there is. With `steps` None nothing is traced.
    """

    def __init__(self, folder: Path, steps: range | None, rank: int) -> None:
        self.folder, self.steps, self.rank = folder, steps, rank
        self._running: Any = None
        self._first = self._last = 0

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._write()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the work of step `number`, counted from 1."""
        if self.steps is None or number not in self.steps:
            yield
            return
        if self._running is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._running = torch.profiler.profile(activities=activities, profile_memory=True)
            self._running.start()
            self._first = number
        with torch.profiler.record_function(f"step {number}"):
            yield
        self._last = number
        if number == self.steps[-1]:
            self._write()

    def _write(self) -> None:
        if self._running is None:
            return
        self._running.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank{self.rank}-steps{self._first}-{self._last}.json.gz"
        self._running.export_chrome_trace(str(path))
        self._running = None
        if self.rank == 0:
            print(f"trace of steps {self._first} to {self._last}: {path}; open it in https://ui.perfetto.dev", flush=True)
