"""Memory of this process: of its CUDA device, or resident in RAM."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def memory(device: torch.device) -> dict[str, int]:
    """Bytes: `allocated`, `reserved`, `peak_allocated`, `peak_reserved` on CUDA, `resident` and `peak_resident` on a CPU."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak_allocated": torch.cuda.max_memory_allocated(device),
            "peak_reserved": torch.cuda.max_memory_reserved(device),
        }
    lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="ascii").splitlines() if ":" in line)
    return {"resident": _bytes(lines["VmRSS"]), "peak_resident": _bytes(lines["VmHWM"])}


def reset_peak(device: torch.device) -> None:
    """Peaks count from here on. A kernel that does not allow it keeps the peak since the process began.

    On a CPU, what the start has freed goes back to the system first: the C library would keep pages of a whole second copy of the weights,
    in pieces that are too small for the flat buffers of the optimiser.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        _CLEAR.write_text("5", encoding="ascii")  # proc(5): resets VmHWM
    except OSError:
        return


def _bytes(text: str) -> int:
    number, unit = text.split()
    assert unit == "kB", text
    return int(number) * 1024
