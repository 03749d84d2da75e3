"""Windows to one packed batch: what the model's forward takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megaxelm.corpus.sampling import Window

IGNORED = -100


@dataclass(frozen=True)
class PackedBatch:
    """A packed batch of N tokens in S segments that do not see each other.

    `tokens`, `labels` (-100: no target), `positions` and `sample_ids` (number of the sample in the run) are int64 [N],
    `cu_seqlens` is int32 [S + 1] on the CPU. `num_targets`: labels that count; `max_seqlen`: tokens of the longest segment; `languages`: of
    each window, which has N / windows tokens.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    sample_ids: Tensor
    num_targets: int
    max_seqlen: int
    languages: tuple[str, ...]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on `device`, but for `cu_seqlens`: its values are needed on the CPU, and reading them back would wait."""
        names = ("tokens", "labels", "positions", "sample_ids")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def pack(windows: Sequence[Window], document_mask: bool) -> PackedBatch:
    """Lay windows of equal length T one behind the other: N = len(windows) * T.

    With `document_mask` every start of a document begins a segment with positions from 0, and the label that would cross from
    one document into the next is ignored. Without it a segment is a window.
    """
    assert windows and len({len(window.tokens) for window in windows}) == 1
    length = len(windows[0].tokens) - 1
    tokens = np.concatenate([window.tokens[:-1] for window in windows])
    labels = np.concatenate([window.tokens[1:] for window in windows])
    borders = [np.arange(len(windows) + 1) * length]
    if document_mask:
        for i, window in enumerate(windows):
            inner = window.starts[window.starts > 0]
            labels[i * length + inner - 1] = IGNORED
            borders.append(i * length + inner[inner < length])
    cu_seqlens = np.unique(np.concatenate(borders))
    sizes = np.diff(cu_seqlens)
    positions = np.arange(len(tokens)) - np.repeat(cu_seqlens[:-1], sizes)
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        sample_ids=torch.from_numpy(np.repeat([window.sample for window in windows], length)),
        num_targets=int((labels != IGNORED).sum()),
        max_seqlen=int(sizes.max()),
        languages=tuple(window.language for window in windows),
    )
