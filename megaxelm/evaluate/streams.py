"""Token log-probabilities of the experts on the held-out text: `evaluation/streams.npz`.

A mixture is arithmetic on these numbers, so a router can be fitted from this file without a model: one float32 an expert and token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megaxelm.errors import StageError
from megaxelm.evaluate.documents import read_arrays
from megaxelm.evaluate.perplexity import HeldOut
from megaxelm.evaluate.subjects import model_key


@dataclass(frozen=True)
class ExpertStreams:
    """`experts`: in the order of the ensemble's weights. `logprobs`: language -> documents of [experts, tokens] fp32."""

    experts: list[str]
    held_out: dict[str, HeldOut]
    logprobs: dict[str, list[Tensor]]


def save_streams(
    path: Path, experts: Sequence[str], held_out: Mapping[str, HeldOut], streams: Mapping[str, Mapping[str, Sequence[Tensor]]]
) -> None:
    """Write ids and log-probabilities of the experts; `streams`: model -> language -> documents of [tokens]."""
    arrays: dict[str, np.ndarray] = {"experts": np.array(list(experts))}
    for language, item in held_out.items():
        arrays[f"ids|{language}"] = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in item.ids])
        arrays[f"lengths|{language}"] = np.array([len(ids) for ids in item.ids], dtype=np.int32)
        arrays[f"bytes|{language}"] = np.array(item.num_bytes, dtype=np.int64)
        rows = [torch.cat(list(streams[model_key(name)][language])) for name in experts]
        arrays[f"logprobs|{language}"] = torch.stack(rows).float().numpy()
    with open(path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_streams(path: Path) -> ExpertStreams:
    """Read what `save_streams` wrote.

    Raises:
        StageError: the file is missing or damaged.
    """
    arrays = read_arrays(path)
    held_out, logprobs = {}, {}
    try:
        for name in arrays:
            kind, _, language = name.partition("|")
            if kind != "ids":
                continue
            lengths = arrays[f"lengths|{language}"]
            ends = np.cumsum(lengths)[:-1]
            ids = [part.tolist() for part in np.split(arrays[name], ends)]
            held_out[language] = HeldOut(language, ids, arrays[f"bytes|{language}"].tolist())
            logprobs[language] = list(torch.from_numpy(arrays[f"logprobs|{language}"]).split(lengths.tolist(), dim=1))
        return ExpertStreams([str(name) for name in arrays["experts"]], held_out, logprobs)
    except (KeyError, ValueError, RuntimeError) as error:
        raise StageError(f"{path}: damaged ({error}); make it again: megaxelm run RECIPE --from evaluation") from None
