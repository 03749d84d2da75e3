"""Figures of token indexes: documents, tokens, bytes a token and the lengths of documents."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megaxelm.corpus.token_index import TokenIndex

PERCENTILES = (5, 25, 50, 75, 95)
_CHUNK = 1 << 20
_WIDTH = 140


@dataclass(frozen=True)
class IndexStats:
    """Figures of one index; `num_bytes` of its text is None where no manifest tells it.

    `mean_length` and `length_percentiles` ({percentile: length}; nearest rank) are tokens a document, special tokens included.
    """

    name: str
    documents: int
    tokens: int
    num_bytes: int | None
    mean_length: float
    length_percentiles: dict[int, int]

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text a token, or None."""
        return None if self.num_bytes is None or not self.tokens else self.num_bytes / self.tokens


def index_stats(index: TokenIndex, name: str, num_bytes: int | None = None) -> IndexStats:
    """Figures of an index, exact, in memory that grows with the number of different lengths alone.

    Raises:
        TokenIndexError: documents that do not lie one after the other.
    """
    lengths, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for first in range(0, index.num_documents, _CHUNK):
        found, times = np.unique(index.document_lengths(first, _CHUNK), return_counts=True)
        both = np.concatenate([lengths, found])
        lengths, places = np.unique(both, return_inverse=True)
        merged = np.zeros(len(lengths), np.int64)
        np.add.at(merged, places, np.concatenate([counts, times]))
        counts = merged
    below = np.cumsum(counts)
    percentiles = {}
    if index.num_documents:
        ranks = {percent: -(-percent * index.num_documents // 100) for percent in PERCENTILES}
        percentiles = {percent: int(lengths[np.searchsorted(below, rank)]) for percent, rank in ranks.items()}
    mean = index.num_tokens / index.num_documents if index.num_documents else 0.0
    return IndexStats(name, index.num_documents, index.num_tokens, num_bytes, mean, percentiles)


def stats_json(stats: IndexStats) -> dict[str, Any]:
    """The figures as a JSON object; `bytes_per_token` with them."""
    return asdict(stats) | {"bytes_per_token": stats.bytes_per_token}


def print_stats(stats: Iterable[IndexStats], file: TextIO | None = None) -> None:
    """Print a table: a row an index, lengths in tokens."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("index", no_wrap=True)
    for name in ("documents", "tokens", "bytes", "bytes/token", "mean length", *(f"p{percent}" for percent in PERCENTILES)):
        table.add_column(name, justify="right", no_wrap=True)
    for row in stats:
        table.add_row(
            row.name,
            f"{row.documents:,}",
            f"{row.tokens:,}",
            "-" if row.num_bytes is None else f"{row.num_bytes:,}",
            "-" if row.bytes_per_token is None else f"{row.bytes_per_token:.2f}",
            f"{row.mean_length:,.1f}",
            *(f"{row.length_percentiles[percent]:,}" if row.documents else "-" for percent in PERCENTILES),
        )
    # As wide as it is: a table that is piped into a file must not be cut at the width of a terminal.
    console = Console(file=file or sys.stdout, highlight=False)
    console.width = max(_WIDTH, console.measure(table).maximum)
    console.print(table)
