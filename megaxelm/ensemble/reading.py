"""One expert reading the texts of a batch: its KV cache, and what each text still lacks in it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megaxelm.ensemble.mixture import expert_logprobs
from megaxelm.errors import RoutingError

if TYPE_CHECKING:
    from megaxelm.model.decoder import Decoder, KVCache

_ROWS_PER_CHUNK = 1024
"""Rows of full logits that exist at one time when a prompt is scored."""


class ExpertReader:
    """Keeps the texts (by number) that this expert has read so far; a text it is not asked about costs nothing.

    Raises:
        RoutingError: `max_length`, the longest text in tokens, is more than the expert has positions.
    """

    def __init__(self, decoder: Decoder, name: str, max_length: int) -> None:
        if max_length > decoder.config.max_positions:
            raise RoutingError(
                f"prompt and max_new_tokens together make {max_length} tokens, expert {name} has {decoder.config.max_positions} positions: "
                "shorten the prompt or lower max_new_tokens"
            )
        self._decoder = decoder
        self._max_length = max_length
        self._cache: KVCache | None = None
        self._texts: list[int] = []  # the text in each row of the cache
        self._read: dict[int, int] = {}  # tokens read of each text
        self._logits: dict[int, Tensor] = {}  # [vocab] after the last token read

    def read(self, history: Mapping[int, Sequence[int]]) -> Tensor:
        """Next-token logits [texts, vocab] after each of the given texts; only tokens not read before are run."""
        fresh = [text for text in history if text not in self._read]
        if fresh:
            cache = self._decoder.new_cache(len(fresh), self._max_length)
            hidden = self._advance(cache, [history[text] for text in fresh])
            self._keep(fresh, history, self._decoder.logits(hidden))
            self._cache = cache if self._cache is None else _join(self._cache, cache)
            self._texts += fresh
        behind = [text for text in history if self._read[text] < len(history[text])]
        if behind:
            assert self._cache is not None
            rows = [history[text][self._read[text] :] if text in behind else [] for text in self._texts]
            hidden = self._advance(self._cache, rows)
            moved = [index for index, row in enumerate(rows) if row]
            self._keep([self._texts[index] for index in moved], history, self._decoder.logits(hidden[moved]))
        return torch.stack([self._logits[text] for text in history])

    def read_scored(self, history: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Read texts for the first time; log-probability [tokens - 1] fp32 of each token but the first of each text."""
        assert not self._texts, "read_scored is the first call"
        cache = self._decoder.new_cache(len(history), self._max_length)
        hidden = self._advance(cache, list(history.values()), all_positions=True)
        found = {}
        for row, (text, ids) in enumerate(history.items()):
            targets = torch.tensor(ids[1:], dtype=torch.int64, device=hidden.device)
            parts = [
                expert_logprobs(self._decoder.logits(hidden[row, begin : begin + len(part)])).gather(-1, part.unsqueeze(-1)).squeeze(-1)
                for begin, part in zip(range(0, len(targets), _ROWS_PER_CHUNK), targets.split(_ROWS_PER_CHUNK), strict=False)
                if len(part)
            ]
            found[text] = torch.cat(parts).cpu() if parts else torch.empty(0)
        last = torch.tensor([len(ids) - 1 for ids in history.values()], device=hidden.device)
        self._keep(list(history), history, self._decoder.logits(hidden[torch.arange(len(history), device=hidden.device), last]))
        self._cache, self._texts = cache, list(history)
        return found

    def forget(self, text: int) -> None:
        """Drop a text that is finished, or that this expert is not to go on with."""
        if text not in self._read:
            return
        del self._read[text], self._logits[text]
        rows = [row for row, kept in enumerate(self._texts) if kept != text]
        self._texts = [self._texts[row] for row in rows]
        assert self._cache is not None
        self._cache = self._cache.select(torch.tensor(rows, device=self._decoder.device)) if rows else None

    def _advance(self, cache: KVCache, rows: Sequence[Sequence[int]], all_positions: bool = False) -> Tensor:
        width = max(map(len, rows))
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64, device=self._decoder.device)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=self._decoder.device)
        return self._decoder.decode(tokens, lengths, cache, all_positions=all_positions)

    def _keep(self, texts: Sequence[int], history: Mapping[int, Sequence[int]], logits: Tensor) -> None:
        for text, row in zip(texts, logits, strict=True):
            self._read[text] = len(history[text])
            self._logits[text] = row


def _join(first: KVCache, second: KVCache) -> KVCache:
    """One cache with the rows of both."""
    joined = copy.copy(first)
    joined.keys = [torch.cat(pair) for pair in zip(first.keys, second.keys, strict=True)]
    joined.values = [torch.cat(pair) for pair in zip(first.values, second.values, strict=True)]
    joined.lengths = torch.cat([first.lengths, second.lengths])
    joined.longest = max(first.longest, second.longest)
    return joined
