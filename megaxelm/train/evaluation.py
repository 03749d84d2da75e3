"""Held-out text scored while a model trains: bits per byte by language, every `train.evaluate_every` steps.

One document a segment, the start token in front (given, not scored), cut at the sequence length, no end token scored: as in
`megaxelm evaluate`, but on few documents and in the compute type of the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaxelm.corpus.packing import IGNORED
from megaxelm.corpus.prepare import read_documents
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.errors import StageError
from megaxelm.train.setting import Setting


@dataclass(frozen=True)
class _Batch:
    """Packed documents, as the model's forward pass takes them; `rows` [N]: the number of each token's language."""

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    labels: Tensor
    rows: Tensor


class HeldOut:
    """Some held-out documents of each language, in batches that the ranks share.

    Args:
        languages: of the model.
        options: of the model's forward pass.

    Raises:
        StageError: a language has no held-out text.
    """

    def __init__(self, setting: Setting, languages: Iterable[str], tokenizer: Tokenizer, options: dict[str, Any]) -> None:
        self.setting = setting
        self.options = options
        self.languages = sorted(languages)
        length = setting.member.sequence_length
        documents: list[tuple[int, list[int]]] = []
        self._bytes = torch.zeros(len(self.languages), dtype=torch.float64)
        for row, language in enumerate(self.languages):
            for ids, size in self._read(language, tokenizer, length):
                documents.append((row, [tokenizer.start_id, *ids]))
                self._bytes[row] += size
        budget = length * setting.ds_config["train_micro_batch_size_per_gpu"]
        batches = [_pack(part) for part in _parts(documents, budget)]
        world = setting.processes.world_size
        # Under ZeRO-3 every rank takes part in every forward pass: where batches do not share out evenly, some are read and not counted.
        batches += [_uncounted(batches[0])] * (-len(batches) % world)
        self._batches = batches[setting.processes.rank :: world]

    def _read(self, language: str, tokenizer: Tokenizer, length: int) -> list[tuple[list[int], int]]:
        path = self.setting.run.folder("corpus") / "valid" / f"{language}.jsonl"
        count = self.setting.recipe.train.evaluate_documents
        found = islice(read_documents(path), count) if path.is_file() else []
        cuts = [(ids, size) for ids, size in (tokenizer.cut(document.text, length - 1) for document in found) if ids]
        if not cuts:
            raise StageError(
                f"train.evaluate_every: there is no held-out text of {language} (corpus/valid/{path.name} is missing or empty): raise "
                "corpus.held_out.share, give corpus.valid, or leave out train.evaluate_every"
            )
        return cuts

    @torch.no_grad()
    def score(self, engine: Any, watch: Callable[[], None]) -> dict[str, float]:
        """Bits per byte of each language, and their mean under the name `mean`. Collective.

        Args:
            watch: called after each batch; what it raises ends the evaluation.
        """
        device = self.setting.device
        nats = torch.zeros(len(self.languages), dtype=torch.float64, device=device)
        engine.eval()
        try:
            for batch in self._batches:
                output = engine.module(
                    batch.tokens.to(device), batch.positions.to(device), batch.cu_seqlens, labels=batch.labels.to(device), **self.options
                )
                nats.index_add_(0, batch.rows.to(device), output.token_losses.double())
                watch()
        finally:
            engine.train()
        if self.setting.processes.world_size > 1:
            dist.all_reduce(nats)
        bits = (nats.cpu() / math.log(2) / self._bytes).tolist()
        return {"mean": math.fsum(bits) / len(bits)} | dict(zip(self.languages, bits, strict=True))


def _parts(documents: list[tuple[int, list[int]]], budget: int) -> Iterable[list[tuple[int, list[int]]]]:
    """The documents in order, as many at a time as have `budget` tokens together, at least one."""
    part: list[tuple[int, list[int]]] = []
    for document in documents:
        if part and sum(len(ids) for _, ids in part) + len(document[1]) > budget:
            yield part
            part = []
        part.append(document)
    yield part


def _pack(documents: list[tuple[int, list[int]]]) -> _Batch:
    sizes = [len(ids) for _, ids in documents]
    return _Batch(
        tokens=torch.tensor([token for _, ids in documents for token in ids]),
        positions=torch.cat([torch.arange(size) for size in sizes]),
        cu_seqlens=torch.tensor([0, *sizes]).cumsum(0, dtype=torch.int32),
        labels=torch.tensor([label for _, ids in documents for label in [*ids[1:], IGNORED]]),
        rows=torch.tensor([row for row, ids in documents for _ in ids]),
    )


def _uncounted(batch: _Batch) -> _Batch:
    return _Batch(batch.tokens, batch.positions, batch.cu_seqlens, torch.full_like(batch.labels, IGNORED), batch.rows)
