"""Which implementation of an operation runs: its Triton kernel, or torch.

A Triton kernel lies in a module `<operation>_triton.py` of its own, imported when it is first wanted: without triton the package imports
and works, by torch.
"""

from __future__ import annotations

from functools import cache

import torch

KERNELS = ("auto", "triton", "torch")


@cache
def _triton_error() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as error:  # a wheel for another Python or glibc fails with any of several errors
        return f"{type(error).__name__}: {error}"
    return None


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU by its interpreter (TRITON_INTERPRET=1 before its first import): slow, for tests."""
    if _triton_error() is not None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def choose_kernels(requested: str, device: torch.device | str) -> str:
    """`triton` or `torch` for `requested` (`auto`, `triton`, `torch`): `auto` takes Triton on CUDA where it imports, else torch.

    Raises:
        ValueError: an unknown name, or `triton` where it cannot run.
    """
    kind = torch.device(device).type
    if requested not in KERNELS:
        raise ValueError(f"kernels = {requested!r}: choose {', '.join(KERNELS)}")
    if requested == "torch" or (requested == "auto" and (kind != "cuda" or _triton_error() is not None)):
        return "torch"
    if _triton_error() is not None:
        raise ValueError(f"kernels = triton: it does not import ({_triton_error()}); install triton, or choose auto or torch")
    if kind != "cuda" and not interpreted():
        raise ValueError(f"kernels = triton: works on CUDA, this is {kind}; choose auto or torch")
    return "triton"
