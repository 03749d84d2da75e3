"""A clock that shows where a training hangs: when nothing has moved for too long, the stacks of all threads go to the log."""

from __future__ import annotations

import faulthandler
import sys
from types import TracebackType


class Watchdog:
    """While open, `beat()` must come every `seconds`; else the stacks are written to stderr, once a hang. Nothing is ended.

    The clock is faulthandler's own thread, which needs no lock of the interpreter: it works inside of a collective that never returns.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> Watchdog:
        self.beat()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Something moved: the time starts anew."""
        faulthandler.dump_traceback_later(self.seconds, file=sys.__stderr__)  # type: ignore[arg-type]
