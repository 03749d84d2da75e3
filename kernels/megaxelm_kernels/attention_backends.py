"""The attention kernels that others wrote, each called with a packed batch: what it needs, and how it is asked.

`BACKENDS` names them with what they take; `packed_attention` of `attention.py` is the function to call.

- `varlen`: torch's own, FlashAttention-2 inside (Dao 2023, arXiv 2307.08691).
- `flash2`, `flash3` (Shah et al. 2024, arXiv 2407.08608), `flash4`: the packages of their authors, where installed.
- `flex`: `torch.nn.attention.flex_attention` (Dong et al. 2024, arXiv 2412.05496), compiled on CUDA.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megaxelm_kernels.packed_layout import PackedLayout

HALF_TYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """What a backend needs. `devices` is empty where any will do, `majors` where any compute capability will."""

    name: str
    about: str
    module: str | None = None
    function: str = ""
    install: str = ""
    devices: tuple[str, ...] = ()
    majors: tuple[int, ...] = ()
    half_only: bool = False
    dropout: bool = False
    head_dim_multiple: int = 1
    head_dim_smallest: int = 1
    head_dim_largest: int | None = None


_AMPERE_ON = (8, 9, 10, 11, 12)

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "flash4",
            "flash_attn.cute of FlashAttention 4",
            "flash_attn.cute",
            "flash_attn_varlen_func",
            "install flash-attn-4",
            ("cuda",),
            (9, 10, 11),
            half_only=True,
            head_dim_largest=128,
            head_dim_multiple=8,
            head_dim_smallest=8,
        ),
        Backend(
            "flash3",
            "flash_attn_interface of FlashAttention 3",
            "flash_attn_interface",
            "flash_attn_varlen_func",
            "install FlashAttention 3 from its folder `hopper`",
            ("cuda",),
            (9,),
            half_only=True,
            head_dim_largest=256,
            head_dim_multiple=8,
            head_dim_smallest=8,
        ),
        Backend(
            "flash2",
            "flash_attn of FlashAttention 2",
            "flash_attn",
            "flash_attn_varlen_func",
            "install flash-attn >= 2.3",
            ("cuda",),
            _AMPERE_ON,
            half_only=True,
            dropout=True,
            head_dim_largest=256,
            head_dim_multiple=8,
            head_dim_smallest=8,
        ),
        Backend(
            "varlen",
            "torch.nn.attention.varlen, FlashAttention 2 inside torch",
            "torch.nn.attention.varlen",
            "varlen_attn",
            "install a torch that has torch.nn.attention.varlen",
            ("cuda",),
            _AMPERE_ON,
            half_only=True,
            head_dim_largest=256,
            head_dim_multiple=8,
            head_dim_smallest=8,
        ),
        Backend(
            "flex",
            "torch.nn.attention.flex_attention with a block mask",
            "torch.nn.attention.flex_attention",
            "flex_attention",
            "install a torch that has torch.nn.attention.flex_attention",
            ("cuda", "cpu"),
            head_dim_smallest=16,
            head_dim_largest=256,
        ),
        Backend("sdpa", "scaled_dot_product_attention over rows of documents", dropout=True),
        Backend("reference", "explicit scores, one document at a time: for tests"),
    )
}


@cache
def load(name: str) -> tuple[Callable[..., Any] | None, str]:
    """The function of a backend, or None and why it is not here. An installed package that fails to load is named with its error."""
    backend = BACKENDS[name]
    if backend.module is None:
        return None, ""
    try:
        return getattr(importlib.import_module(backend.module), backend.function), ""
    except Exception as error:  # a binary for another torch or CUDA fails with any of several errors
        return None, f"{type(error).__name__}: {error}"


def capability(device: torch.device | str) -> tuple[int, int] | None:
    """Compute capability of a CUDA device, None where there is none."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def call_varlen(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, sliding_window: int | None) -> Tensor:
    """torch's packed kernel. torch 2.11 has no `enable_gqa` there: keys and values are then repeated."""
    attend, _ = load("varlen")
    assert attend is not None
    accepted = inspect.signature(attend).parameters
    options: dict[str, Any] = {}
    if "window_size" in accepted:
        options["window_size"] = (-1 if sliding_window is None else sliding_window - 1, 0)
    elif sliding_window is not None:
        raise ValueError(f"attention = varlen: torch {torch.__version__} has no sliding window there; choose sdpa")
    else:
        options["is_causal"] = True
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in accepted:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    ends = layout.cu_seqlens
    return attend(q, k, v, ends, ends, layout.longest, layout.longest, **options)


def call_flash(name: str, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, sliding_window: int | None, dropout_p: float) -> Tensor:
    """`flash_attn_varlen_func` of FlashAttention 2, 3 or 4. All take grouped queries as they are and count a window without the token
    itself; 4 writes None where 2 and 3 write -1 for no limit, and its first versions have no `max_seqlen_q` and no `deterministic`."""
    attend, _ = load(name)
    assert attend is not None
    accepted = inspect.signature(attend).parameters
    ends = layout.cu_seqlens
    options: dict[str, Any] = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "causal": True}
    if "max_seqlen_q" in accepted:
        options |= {"max_seqlen_q": layout.longest, "max_seqlen_k": layout.longest}
    if sliding_window is not None:
        if "window_size" not in accepted:
            raise ValueError(f"attention = {name}: the installed version has no sliding window; install a newer one, or choose sdpa")
        options["window_size"] = (sliding_window - 1, 0)
    if "deterministic" in accepted:
        options["deterministic"] = torch.are_deterministic_algorithms_enabled()
    if dropout_p > 0:
        options["dropout_p"] = dropout_p
    out = attend(q, k, v, **options)
    return out[0] if isinstance(out, tuple) else out  # 4, and early versions of 3, give the log-sum-exp too


@cache
def _compiled_flex() -> Callable[..., Any]:
    attend, _ = load("flex")
    assert attend is not None
    return torch.compile(attend)


def call_flex(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, sliding_window: int | None) -> Tensor:
    """All tokens as one sequence; without CUDA it runs uncompiled, with all N x N scores and no gradient."""
    if q.device.type == "cuda":
        attend: Callable[..., Any] | None = _compiled_flex()
    else:
        attend, _ = load("flex")
    assert attend is not None
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    try:
        out = attend(*heads_first, block_mask=layout.block_mask(sliding_window), enable_gqa=k.shape[1] != q.shape[1])
    except NotImplementedError as error:
        raise ValueError(f"attention = flex: {str(error).splitlines()[0]} Choose sdpa") from error
    return out[0].transpose(0, 1)
