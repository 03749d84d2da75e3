"""Memory of tensors that come and go one at a time on a CPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Give the memory of a freed tensor back at once.

    glibc else keeps the holes that tensors leave between what stays: cutting a model into parts then takes twice the parts, and reading
    one tensor by tensor grows without bound. Afterwards large blocks are kept for the next use again, up to the sizes that glibc itself
    goes to, or as MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ say.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda parameter, value: 0)  # other C libraries have none, and other habits
    mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _given("MALLOC_MMAP_THRESHOLD_", 32 << 20))
        mallopt(_TRIM_THRESHOLD, _given("MALLOC_TRIM_THRESHOLD_", 64 << 20))


def _given(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default
