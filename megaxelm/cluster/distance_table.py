"""A user's own distances of languages, read from a CSV file and checked to be distances."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megaxelm.errors import ClusterError

FIELD = "clusters.typology.distances"
_ROUNDING = 1e-6
"""Largest difference of the two halves of a matrix that counts as rounding; their mean is taken."""


def read_distances(path: Path | str, languages: Sequence[str]) -> NDArray[np.float64]:
    """Distances of `languages` from a CSV file in UTF-8: [languages, languages], symmetric, zero on the diagonal.

    The first row and the first column name the languages in the same order, by the codes that the corpus uses; the corner may hold
    anything. Languages that are not asked for are checked like the others and left out.

    Raises:
        ClusterError: if the file cannot be read, is not square, names a language twice or differently in row and column, lacks one of
            `languages`, or holds a value that is not a finite number of at least 0, not 0 on the diagonal, or other than its mirror image.
    """
    names, table = _read(Path(path))
    missing = [code for code in languages if code not in names]
    if missing:
        raise ClusterError(
            f"{FIELD} = {path}: no row for {', '.join(missing)}; it has {', '.join(names)}. Every language of the corpus needs a row and a "
            "column under the code that the corpus uses: add them, or leave the language out (corpus.languages)"
        )
    rows = [names.index(code) for code in languages]
    return table[np.ix_(rows, rows)]


def _read(path: Path) -> tuple[list[str], NDArray[np.float64]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file, strict=True) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ClusterError(f"{FIELD} = {path}: cannot be read ({error}); give a CSV file in UTF-8 with commas") from None
    if len(rows) < 2:
        raise ClusterError(f"{FIELD} = {path}: holds no matrix; the first row and the first column name the languages, the rest is numbers")
    names = rows[0][1:]
    _check_names(path, names, rows[1:])
    table = np.array([[_number(path, row[0], names[column], cell) for column, cell in enumerate(row[1:])] for row in rows[1:]])
    for index, name in enumerate(names):
        if table[index, index] != 0:
            raise ClusterError(f"{FIELD} = {path}: row {name}, column {name}: {table[index, index]:g}; the distance to itself is 0")
    for a, b in zip(*np.nonzero(np.triu(np.abs(table - table.T) > _ROUNDING)), strict=True):
        raise ClusterError(
            f"{FIELD} = {path}: row {names[a]}, column {names[b]} is {table[a, b]:g}, but row {names[b]}, column {names[a]} is "
            f"{table[b, a]:g}; a distance is the same both ways: make them equal"
        )
    return names, (table + table.T) / 2


def _check_names(path: Path, names: list[str], rows: list[list[str]]) -> None:
    if len(rows) != len(names):
        raise ClusterError(f"{FIELD} = {path}: {len(rows)} rows for {len(names)} columns of languages; the matrix is to be square")
    for number, (name, row) in enumerate(zip(names, rows, strict=True), start=1):
        if len(row) != len(names) + 1:
            raise ClusterError(
                f"{FIELD} = {path}: row {number} ({row[0]}) has {len(row) - 1} values for {len(names)} languages; give one for each"
            )
        if not name or row[0] != name:
            raise ClusterError(
                f"{FIELD} = {path}: row {number} is named {row[0]!r}, but column {number} {name!r}; rows and columns name the same "
                "languages in the same order"
            )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ClusterError(f"{FIELD} = {path}: {', '.join(twice)} named more than once; keep one row and column of each language")


def _number(path: Path, row: str, column: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ClusterError(f"{FIELD} = {path}: row {row}, column {column}: {cell!r}; a distance is a finite number of at least 0")
    return value
