"""Which words say most about a cluster, read from the texts themselves, so for every partitioner alike.

A term is a word; where a script is written without spaces (Chinese, Japanese, Thai, Lao, Burmese, Khmer), it is a pair of neighbouring
characters. Terms are ranked by the Mantel-Haenszel statistic (Mantel and Haenszel, 1959, with continuity correction): by how many
standard deviations more documents of the cluster have the term than would be expected if the cluster were drawn at random. Drawn from
all documents, this finds what a cluster is; drawn language by language, it finds what it is beyond its languages.
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

CHARACTERS = 1000
"""Characters read of each document, from its beginning: bounds time and memory where documents are books."""
_LEAST_DOCUMENTS = 3
_MOST_TERMS = 100_000
_CHANCE = 0.05
_JOINERS = "\u200c\u200d"
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"  # kana, Han
)


def terms_of(text: str) -> set[str]:
    """The distinct terms at the beginning of a text, lower-cased, in Unicode's composed form."""
    words, characters = _patterns()
    found = set()
    for match in words.finditer(unicodedata.normalize("NFC", text[:CHARACTERS]).lower()):
        if match.lastgroup == "run":
            units = characters.findall(match.group())
            found |= {first + second for first, second in pairwise(units)} or set(units)
        else:
            found.add(match.group())
    return found


@dataclass(frozen=True)
class TermTable:
    """Which text has which term, for the terms that at least three texts have."""

    terms: list[str]
    present: csr_matrix
    """1 where a text has a term, [texts, terms]."""


def read_terms(texts: Sequence[str]) -> TermTable:
    """The table of the terms of texts, of the 100,000 most widespread ones at most."""
    from scipy.sparse import csr_matrix
    from tqdm import tqdm

    numbers: dict[str, int] = {}
    columns: list[NDArray[np.int32]] = []
    for text in tqdm(texts, desc="typical terms", unit=" documents", file=sys.stderr, mininterval=0.5, leave=False):
        columns.append(np.array([numbers.setdefault(term, len(numbers)) for term in terms_of(text)], dtype=np.int32))
    if not numbers:
        return TermTable([], csr_matrix((len(texts), 0)))
    flat = np.concatenate(columns)
    frequency = np.bincount(flat, minlength=len(numbers))
    names = list(numbers)
    kept = np.flatnonzero(frequency >= _LEAST_DOCUMENTS)
    if len(kept) > _MOST_TERMS:
        kept = np.array(sorted(kept.tolist(), key=lambda term: (-frequency[term], names[term]))[:_MOST_TERMS])
    starts = np.cumsum([0, *map(len, columns)])
    matrix = csr_matrix((np.ones(len(flat)), flat, starts), shape=(len(texts), len(numbers)))
    return TermTable([names[term] for term in kept], matrix[:, kept])


def typical_terms(
    table: TermTable, clusters: NDArray[np.int64], strata: NDArray[np.int64], k: int, number: int
) -> list[list[dict[str, Any]]]:
    """The `number` most typical terms of each of `k` clusters, best first; fewer where fewer stand out, none for an empty cluster.

    A term is listed if at least three documents of the cluster have it and its statistic is so large that, by the normal approximation,
    the chance of listing anything at all is below 5 % where the clusters are drawn at random (Bonferroni over terms and clusters).

    Args:
        clusters: cluster of each text, [texts].
        strata: group of each text, [texts]; clusters are compared within a group only. All the same: with all other texts.

    Returns:
        by cluster, `{"term", "share", "expected", "z"}`: share of the cluster's documents that have the term, the share expected of as
        many documents at random from the same groups, and the difference in standard deviations.
    """
    from scipy.special import ndtri

    if not table.terms:
        return [[] for _ in range(k)]
    observed, expected, variance = (np.zeros((k, len(table.terms))) for _ in range(3))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        rows = table.present[members]
        total, having = len(members), np.asarray(rows.sum(axis=0)).ravel()
        inside = (clusters[members][None] == np.arange(k)[:, None]).astype(np.float64)
        observed += inside @ rows
        sizes = inside.sum(axis=1)[:, None]
        expected += sizes * having / total
        if total > 1:
            variance += sizes * (total - sizes) * having * (total - having) / (total**2 * (total - 1))
    # Half a document is taken off, or the normal approximation would list rare terms too easily.
    z = np.divide(observed - expected - 0.5, np.sqrt(variance), out=np.zeros_like(observed), where=variance > 1e-12)
    least = -float(ndtri(_CHANCE / z.size))
    sizes = np.maximum(np.bincount(clusters, minlength=k), 1)
    found = []
    for cluster in range(k):
        eligible = np.flatnonzero((z[cluster] > least) & (observed[cluster] >= _LEAST_DOCUMENTS))
        # The alphabet decides between equals, as the order of the texts should not.
        best = sorted(eligible.tolist(), key=lambda term: (-z[cluster, term], table.terms[term]))[:number]
        found.append(
            [
                {
                    "term": table.terms[term],
                    "share": round(float(observed[cluster, term] / sizes[cluster]), 4),
                    "expected": round(float(expected[cluster, term] / sizes[cluster]), 4),
                    "z": round(float(z[cluster, term]), 2),
                }
                for term in best
            ]
        )
    return found


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """A run of a script without spaces (`run`) or else a word; and a character of such a run with the marks on it.

    Python's own class for letters leaves out the vowel signs of Indic scripts and would cut words at each.
    """
    marks = "".join(_mark_ranges())
    letter = rf"(?:(?![{_UNSPACED}])[^\W\d_])"
    inner = rf"(?:{letter}|[{marks}{_JOINERS}])"
    words = re.compile(rf"(?P<run>(?!\d)[{_UNSPACED}](?:(?!\d)[{_UNSPACED}{marks}])*)|{letter}{inner}*(?:['’]{letter}{inner}*)*")
    return words, re.compile(rf"[{_UNSPACED}][{marks}]*")


def _mark_ranges() -> Iterator[str]:
    points = [point for point in range(0x300, 0x20000) if unicodedata.category(chr(point))[0] == "M"]
    for _, group in groupby(enumerate(points), key=lambda item: item[1] - item[0]):
        run = [point for _, point in group]
        yield f"{chr(run[0])}-{chr(run[-1])}"
