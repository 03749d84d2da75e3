"""Causal attention over packed documents: a token sees the earlier tokens of its own document and nothing else.

`PackedLayout` is built once a forward pass from `cu_seqlens`. Backends:

- `sdpa`: any device. Documents are laid in rows of about the length of the longest, several short ones in one row with a
  block-diagonal mask, so memory and work are about N x longest, never N x N.
- `varlen`: `torch.nn.attention.varlen` on CUDA, in bf16 or fp16; no attention dropout.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("sdpa", "varlen")
_SHORTEST_ROW = 128  # tokens; shorter rows would be many tiny products
_SHORT_ROW = 128  # tokens; see `_short_rows`
_PADDING_ALLOWED = 1.25  # rows of one document need no mask: worth this much padding


@cache
def _varlen_attn() -> Any | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def choose_backend(requested: str, device: torch.device | str, attention_dropout: float) -> str:
    """The backend for `requested` (`auto`, `sdpa` or `varlen`): `auto` takes `varlen` on CUDA where torch has it and there is no dropout.

    Raises:
        ValueError: an unknown name, or a backend that was asked for and cannot do it here.
    """
    kind = torch.device(device).type
    if requested == "auto":
        return "varlen" if kind == "cuda" and attention_dropout == 0 and _varlen_attn() is not None else "sdpa"
    if requested not in BACKENDS:
        raise ValueError(f"attention = {requested!r}: choose auto, {' or '.join(BACKENDS)}")
    if requested == "varlen":
        if kind != "cuda":
            raise ValueError(f"attention = varlen: works on CUDA only, this is {kind}; choose auto or sdpa")
        if _varlen_attn() is None:
            raise ValueError(f"attention = varlen: torch {torch.__version__} has no torch.nn.attention.varlen; choose auto or sdpa")
        if attention_dropout > 0:
            raise ValueError(f"attention = varlen: has no attention dropout, which is {attention_dropout}; set it to 0 or choose sdpa")
    return requested


@dataclass(frozen=True)
class _Rows:
    """Where each document lies: `num_rows` rows of `length` tokens. `slots` [N] is None when the rows are exactly the packed tokens."""

    num_rows: int
    length: int
    slots: list[int] | None
    one_document_a_row: bool


def _plan_rows(lengths: list[int]) -> _Rows:
    total, longest = sum(lengths), max(lengths)
    if len(lengths) * longest <= _PADDING_ALLOWED * total:
        if len(lengths) * longest == total:
            return _Rows(len(lengths), longest, None, True)
        slots = [row * longest + i for row, length in enumerate(lengths) for i in range(length)]
        return _Rows(len(lengths), longest, slots, True)
    aligned = _aligned_length(lengths, total, longest)
    if aligned is not None:
        return _Rows(total // aligned, aligned, None, False)
    row, used, limit = 0, 0, max(longest, _SHORTEST_ROW)
    places: list[tuple[int, int]] = []
    fullest = 0
    for length in lengths:
        if used + length > limit:
            row, used = row + 1, 0
        places.append((row, used))
        used += length
        fullest = max(fullest, used)
    slots = [row * fullest + start + i for (row, start), length in zip(places, lengths, strict=True) for i in range(length)]
    return _Rows(row + 1, fullest, slots, False)


def _aligned_length(lengths: list[int], total: int, longest: int) -> int | None:
    """The shortest row length that cuts the packed tokens only between documents, such as that of the training windows."""
    ends, end = set(), 0
    for length in lengths:
        end += length
        ends.add(end)
    limit = max(2 * longest, 2 * _SHORTEST_ROW)
    for num_rows in range(total // longest, 0, -1):
        length = total // num_rows
        if length > limit:
            return None
        if total % num_rows == 0 and all(row * length in ends for row in range(1, num_rows + 1)):
            return length
    return None


class PackedLayout:
    """Which tokens of a packed batch belong together.

    Args:
        cu_seqlens: [S + 1] integers, 0 first, the end of each document after it, N last. On any device; on a GPU the values are
            read once, which waits for it.
        device: where the masks are needed; default: that of `cu_seqlens`.

    Raises:
        ValueError: an empty list, a start other than 0, or a document without tokens.
    """

    def __init__(self, cu_seqlens: Tensor, device: torch.device | None = None) -> None:
        ends = cu_seqlens.tolist()
        if cu_seqlens.ndim != 1 or len(ends) < 2 or ends[0] != 0:
            raise ValueError(f"cu_seqlens of shape {tuple(cu_seqlens.shape)}: expected [S + 1] with S >= 1, starting with 0")
        self.lengths: list[int] = [stop - start for start, stop in zip(ends, ends[1:], strict=False)]
        if min(self.lengths) < 1:
            at = next(i for i, length in enumerate(self.lengths) if length < 1)
            raise ValueError(f"cu_seqlens: document {at} has {self.lengths[at]} tokens; leave empty documents out")
        self.num_tokens: int = ends[-1]
        self.longest: int = max(self.lengths)
        self.device = cu_seqlens.device if device is None else device
        self.cu_seqlens = cu_seqlens.to(device=self.device, dtype=torch.int32)
        self._plan: _Rows | None = None
        self._slots: Tensor | None = None
        self._masks: dict[tuple[int | None, torch.dtype, bool], Tensor | None] = {}

    @property
    def rows(self) -> _Rows:
        """The plan of the `sdpa` backend, made at the first call."""
        if self._plan is None:
            self._plan = _plan_rows(self.lengths)
            if self._plan.slots is not None:
                self._slots = torch.tensor(self._plan.slots, dtype=torch.int64, device=self.device)
        return self._plan

    def to_rows(self, x: Tensor) -> Tensor:
        """[N, heads, d] -> [rows, heads, length, d], zeros where a row has no token."""
        rows = self.rows
        if self._slots is not None:
            x = x.new_zeros(rows.num_rows * rows.length, *x.shape[1:]).index_copy(0, self._slots, x)
        return x.view(rows.num_rows, rows.length, *x.shape[1:]).transpose(1, 2)

    def from_rows(self, x: Tensor) -> Tensor:
        """[rows, heads, length, d] -> [N, heads, d]."""
        rows = self.rows
        x = x.transpose(1, 2).reshape(rows.num_rows * rows.length, x.shape[1], x.shape[3])
        return x if self._slots is None else x.index_select(0, self._slots)

    def mask(self, sliding_window: int | None, dtype: torch.dtype, causal: bool = False) -> Tensor | None:
        """Additive mask [rows or 1, 1, length, length] of 0 and -inf, or None where plain causal attention is the same unless `causal`.

        A place without a token sees the other such places before it and itself, so no row of the softmax is empty.
        """
        rows = self.rows
        if sliding_window is not None and sliding_window >= rows.length:
            sliding_window = None
        key = (sliding_window, dtype, causal)
        if key not in self._masks:
            self._masks[key] = self._make_mask(rows, sliding_window, dtype, causal)
        return self._masks[key]

    def _make_mask(self, rows: _Rows, sliding_window: int | None, dtype: torch.dtype, causal: bool) -> Tensor | None:
        if rows.one_document_a_row and sliding_window is None and not causal:
            return None
        place = torch.arange(rows.length, device=self.device)
        distance = place[:, None] - place[None, :]
        seen = (distance >= 0)[None]
        if sliding_window is not None:
            seen = seen & (distance < sliding_window)
        if not rows.one_document_a_row:
            lengths = torch.tensor(self.lengths, device=self.device)
            documents = torch.arange(len(self.lengths), device=self.device).repeat_interleave(lengths, output_size=self.num_tokens)
            if self._slots is not None:
                documents = documents.new_full((rows.num_rows * rows.length,), -1).index_copy(0, self._slots, documents)
            documents = documents.view(rows.num_rows, rows.length)
            seen = seen & (documents[:, :, None] == documents[:, None, :])
        return torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, -torch.inf)[:, None]


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
    if backend == "varlen":
        return _varlen(q, k, v, layout, sliding_window, dropout_p)
    if backend != "sdpa":
        raise ValueError(f"attention backend = {backend!r}: choose {' or '.join(BACKENDS)}")
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


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, sliding_window: int | None, dropout_p: float) -> Tensor:
    choose_backend("varlen", q.device, dropout_p)
    attend = _varlen_attn()
    assert attend is not None  # choose_backend has raised otherwise
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
