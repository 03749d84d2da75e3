"""Windows to one packed batch: what the model's forward takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megaxelm.corpus.sampling import Windows

IGNORED = -100


@dataclass(frozen=True)
class PackedBatch:
    """A packed batch of N tokens in S segments that do not see each other.

    `tokens`, `labels` (-100: no target), `positions` and `sample_ids` (number of the sample in the run) are int64 [N],
    `cu_seqlens` is int32 [S + 1] on the CPU. `first_sample`: of the batch, whose samples follow each other.
    `num_targets`: labels that count; `max_seqlen`: tokens of the longest segment; `languages`: of each window of
    N / windows tokens.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    sample_ids: Tensor
    first_sample: int
    num_targets: int
    max_seqlen: int
    languages: tuple[str, ...]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on `device`, but for `cu_seqlens`: its values are needed on the CPU, and reading them back would wait."""
        names = ("tokens", "labels", "positions", "sample_ids")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def pack(windows: Windows, document_mask: bool) -> PackedBatch:
    """Lay windows of length T one behind the other: N = windows * T.

    With `document_mask` every start of a document begins a segment with positions from 0, and the label that would cross from
    one document into the next is ignored. Without it a segment is a window.
    """
    count, length = windows.tokens.shape[0], windows.tokens.shape[1] - 1
    tokens = windows.tokens[:, :-1].flatten()
    labels = windows.tokens[:, 1:].flatten()
    borders = np.arange(count + 1) * length
    if document_mask:
        inner = windows.start_columns > 0
        places = windows.start_rows[inner] * length + windows.start_columns[inner]
        labels[places - 1] = IGNORED
        # one that begins with the last token of a window, a target alone, adds the border between two windows once more
        borders = np.unique(np.concatenate([borders, places]))
    sizes = np.diff(borders)
    positions = np.arange(len(tokens)) - np.repeat(borders[:-1], sizes)
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        sample_ids=torch.from_numpy(np.repeat(windows.samples, length)),
        first_sample=int(windows.samples[0]),
        num_targets=int((labels != IGNORED).sum()),
        max_seqlen=int(sizes.max()),
        languages=windows.languages,
    )
