"""Causal attention over packed documents: a token sees the earlier tokens of its own document and nothing else.

`PackedLayout` is built once a forward pass from `cu_seqlens`. `choose_backend` says which kernel runs: those of `attention_backends.py`, or

- `sdpa`: any device. Documents are laid in rows of about the length of the longest, several short ones in one row with a
  block-diagonal mask, so memory and work are about N x longest, never N x N.
- `reference`: explicit scores, for tests.

Padding after the last document must be a document of its own: the kernels leave the gradients of tokens without one undefined.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megaxelm_kernels.attention_backends import BACKENDS, HALF_TYPES, call_flash, call_flex, call_varlen, capability, load
from megaxelm_kernels.packed_layout import PackedLayout

__all__ = ["BACKENDS", "PackedLayout", "choose_backend", "describe_backend", "packed_attention", "packed_attention_reference"]

AUTO_ORDER = ("flash4", "flash3", "flash2", "varlen")  # on CUDA, fastest first; then sdpa
_SHORT_ROW = 128  # tokens; see `_short_rows`


def _obstacle(
    name: str, device: torch.device | str, attention_dropout: float, head_dim: int | None, dtype: torch.dtype | None
) -> tuple[str, str] | None:
    """Why a backend cannot do it here and what to do, or None. `head_dim` and `dtype` None: not asked about."""
    backend = BACKENDS[name]
    kind = torch.device(device).type
    if backend.devices and kind not in backend.devices:
        return f"works on {' and '.join(x.upper() for x in backend.devices)} only, this is {kind}", "choose auto or sdpa"
    if backend.module is not None and load(name)[0] is None:
        return f"{backend.module} does not import ({load(name)[1]})", f"{backend.install}, or choose auto or sdpa"
    found = capability(device)
    if backend.majors and found is not None and found[0] not in backend.majors:
        wanted = ", ".join(f"{major}.x" for major in backend.majors)
        return f"needs compute capability {wanted}, this device has {found[0]}.{found[1]}", "choose auto or sdpa"
    if attention_dropout > 0 and not backend.dropout:
        able = " or ".join(other.name for other in BACKENDS.values() if other.dropout)
        return f"has no attention dropout, which is {attention_dropout}", f"set it to 0 or choose {able}"
    if dtype is not None and backend.half_only and dtype not in HALF_TYPES:
        return f"takes bfloat16 or float16, not {str(dtype).removeprefix('torch.')}", "choose sdpa or another precision"
    if head_dim is not None and backend.head_dim_largest is not None:
        low, high, multiple = backend.head_dim_smallest, backend.head_dim_largest, backend.head_dim_multiple
        if not low <= head_dim <= high or head_dim % multiple:
            rule = f"takes {low} to {high} features a head" + ("" if multiple == 1 else f" in multiples of {multiple}")
            return f"{rule}, not head_dim = {head_dim}", "choose sdpa or another head_dim"
    return None


def choose_backend(
    requested: str,
    device: torch.device | str,
    attention_dropout: float,
    *,
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """The backend for `requested`, a name of `BACKENDS` or `auto`: on CUDA the first of flash4, flash3, flash2, varlen that imports,
    fits the device and has dropout where `attention_dropout` > 0; else sdpa. `head_dim` and `dtype`, where given, must fit too.

    Raises:
        ValueError: an unknown name, or a backend that was asked for and cannot do it here.
    """
    if requested == "auto":
        if torch.device(device).type == "cuda":
            for name in AUTO_ORDER:
                if _obstacle(name, device, attention_dropout, head_dim, dtype) is None:
                    return name
        return "sdpa"
    if requested not in BACKENDS:
        raise ValueError(f"attention = {requested!r}: choose auto, {' or '.join(BACKENDS)}")
    obstacle = _obstacle(requested, device, attention_dropout, head_dim, dtype)
    if obstacle is not None:
        raise ValueError(f"attention = {requested}: {'; '.join(obstacle)}")
    return requested


def describe_backend(
    requested: str,
    device: torch.device | str,
    attention_dropout: float,
    *,
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """One line on what `choose_backend` takes and why, for the user: `sdpa (...): auto; flash4 works on CUDA only, this is cpu; ...`.

    Raises:
        ValueError: as `choose_backend`.
    """
    chosen = choose_backend(requested, device, attention_dropout, head_dim=head_dim, dtype=dtype)
    line = f"{chosen} ({BACKENDS[chosen].about}): "
    if requested != "auto":
        return line + "asked for"
    if torch.device(device).type != "cuda":
        return line + f"auto; the packed kernels work on CUDA only, this is {torch.device(device).type}"
    passed = AUTO_ORDER[: AUTO_ORDER.index(chosen)] if chosen in AUTO_ORDER else AUTO_ORDER
    obstacles = [(name, _obstacle(name, device, attention_dropout, head_dim, dtype)) for name in passed]
    return line + "; ".join(["auto", *(f"{name} {why[0]}" for name, why in obstacles if why is not None)])


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    sliding_window: int | None = None,
    dropout_p: float = 0.0,
    backend: str = "sdpa",
) -> Tensor:
    """Causal attention inside each document: `q` [N, heads, d], `k` and `v` [N, kv_heads, d] -> [N, heads, d]; scale 1 / sqrt(d).

    `sliding_window`: a token sees itself and the `sliding_window - 1` tokens before it. `dropout_p` draws from torch's own generator.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot do what is asked.
    """
    if q.shape[0] != layout.num_tokens or k.shape != v.shape or k.shape[0] != q.shape[0] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together or the layout's {layout.num_tokens} tokens"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit together: the last sizes must be equal")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window = {sliding_window}: choose 1 or more tokens, or None for no window")
    if backend not in BACKENDS:
        raise ValueError(f"attention backend = {backend!r}: choose {' or '.join(BACKENDS)}")
    choose_backend(backend, q.device, dropout_p, head_dim=q.shape[-1], dtype=q.dtype)
    if sliding_window is not None and sliding_window >= layout.longest:
        sliding_window = None
    if backend == "varlen":
        return call_varlen(q, k, v, layout, sliding_window)
    if backend in ("flash2", "flash3", "flash4"):
        return call_flash(backend, q, k, v, layout, sliding_window, dropout_p)
    if backend == "flex":
        return call_flex(q, k, v, layout, sliding_window)
    if backend == "reference":
        return packed_attention_reference(q, k, v, layout, sliding_window=sliding_window)
    return _sdpa(q, k, v, layout, sliding_window, dropout_p)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, sliding_window: int | None, dropout_p: float) -> Tensor:
    if q.device.type != "cpu" and k.shape[1] != q.shape[1]:
        # The fused CUDA kernels with a mask have no grouped queries: torch would fall back to full scores.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and layout.rows.length <= _SHORT_ROW:
        return _short_rows(q, k, v, layout, sliding_window, dropout_p)
    mask = layout.mask(sliding_window, q.dtype)
    out = F.scaled_dot_product_attention(
        layout.to_rows(q),
        layout.to_rows(k),
        layout.to_rows(v),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=mask is None,
        enable_gqa=k.shape[1] != q.shape[1],
    )
    return layout.from_rows(out)


def _short_rows(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, sliding_window: int | None, dropout_p: float) -> Tensor:
    """Plain batched products with all scores of a row: on a CPU in bf16 about three times as fast as torch's fused kernel up to
    128 tokens a row (forward and backward), and no faster from 256 on."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    rows_q, rows_k, rows_v = (layout.to_rows(x) for x in (q, k, v))
    scores = (rows_q * q.shape[-1] ** -0.5) @ rows_k.transpose(2, 3)
    scores += layout.mask(sliding_window, q.dtype, causal=True)
    return layout.from_rows(F.dropout(scores.softmax(dim=-1), dropout_p) @ rows_v)


def packed_attention_reference(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, *, sliding_window: int | None = None) -> Tensor:
    """The same, one document at a time from explicit scores in the type of `q`: the truth that the backends are tested against."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out, start = [], 0
    for length in layout.lengths:
        part = slice(start, start + length)
        start += length
        scores = torch.einsum("ihd,jhd->hij", q[part], k[part]) / q.shape[-1] ** 0.5
        place = torch.arange(length, device=q.device)
        distance = place[:, None] - place[None, :]
        hidden = distance < 0 if sliding_window is None else (distance < 0) | (distance >= sliding_window)
        out.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v[part]))
    return torch.cat(out)
