"""The forgetting matrix of a table of perplexities, such as those that papers publish.

A CSV file with a header. Columns: `expert` (the model's name), optionally `own` (its own languages, with spaces between) and `parent`
(another row), and one column a language, with the perplexity a token. One row at least is a baseline: `seed`, `baseline` or `dense`, the
first of these is what changes are told against. Experts `typ8.0`, `typ8.1`, ... are a family, `typ8`: one chooses among them.

Without `own`, the own languages of an expert are those on which it is the best of its family, and the matrix says so.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

from megaxelm.errors import StageError
from megaxelm.evaluate.forgetting import PER_TOKEN, Matrix, Row

BASELINE_NAMES = ("seed", "baseline", "dense")
_NOT_LANGUAGES = ("expert", "own", "parent")
_WAY_OUT = "the first row names the columns: expert, optionally own and parent, and the languages"


def read_matrix_csv(path: Path) -> Matrix:
    """Read a table of perplexities.

    Raises:
        StageError: the file is missing, not a CSV of this form, has a value that is no perplexity, a name twice, or no baseline.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [line for line in csv.reader(file) if any(cell.strip() for cell in line)]
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; give a run directory or a CSV file of perplexities") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StageError(f"{path}: cannot be read as CSV in UTF-8 ({error})") from None
    if not lines:
        raise StageError(f"{path}: empty; {_WAY_OUT}")
    header = [name.strip() for name in lines[0]]
    languages = [name for name in header if name not in _NOT_LANGUAGES]
    if "expert" not in header or not languages:
        raise StageError(f"{path}: columns {', '.join(header)}: there is no column `expert`, or no language; {_WAY_OUT}")
    if "" in header or len(set(header)) < len(header):
        raise StageError(f"{path}: a column has no name, or two have the same ({', '.join(header)}); {_WAY_OUT}")
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise StageError(f"{path}: row {number} has {len(line)} cells, the header {len(header)}; fill or drop them")
        cells = dict(zip(header, (cell.strip() for cell in line), strict=True))
        name = cells["expert"]
        if not name or name in rows:
            raise StageError(f"{path}: row {number}: expert = {name!r}: each row needs a name of its own")
        rows[name] = _row(path, number, name, cells, languages)
    return _matrix(path, rows, languages, "own" in header)


def _row(path: Path, number: int, name: str, cells: dict[str, str], languages: list[str]) -> Row:
    perplexity = {}
    for language in languages:
        try:
            value = float(cells[language])
        except ValueError:
            value = math.nan
        if not 1 <= value < math.inf:
            raise StageError(
                f"{path}: row {number} ({name}), column {language}: {cells[language]!r}: a perplexity is a number of at least 1"
            )
        perplexity[language] = value
    own = cells.get("own", "").replace(",", " ").split()
    unknown = [language for language in own if language not in languages]
    if unknown:
        raise StageError(f"{path}: row {number} ({name}): own = {' '.join(unknown)}: no such column; there are {', '.join(languages)}")
    kind = "expert" if name not in BASELINE_NAMES else "baseline" if name == "baseline" else name
    family = name.rpartition(".")[0] if kind == "expert" else ""
    bits = {language: math.log2(value) for language, value in perplexity.items()}
    return Row(name, kind, bits, perplexity, cells.get("parent") or None, own, family)


def _matrix(path: Path, rows: dict[str, Row], languages: list[str], told: bool) -> Matrix:
    reference = next((name for name in BASELINE_NAMES if name in rows), None)
    if reference is None:
        raise StageError(f"{path}: no row named {', '.join(BASELINE_NAMES)}: name the model that the experts are compared with")
    lost = [(name, row.parent) for name, row in rows.items() if row.parent is not None and row.parent not in rows]
    if lost:
        raise StageError(f"{path}: {lost[0][0]}: parent = {lost[0][1]}: no such row; there are {', '.join(rows)}")
    matrix = Matrix(rows, languages, reference, PER_TOKEN)
    if not matrix.families():
        raise StageError(f"{path}: no row but {', '.join(rows)}: a matrix needs at least one expert")
    if told:
        return matrix
    for experts in matrix.families().values():
        for language in languages:
            rows[min(experts, key=lambda key: rows[key].bits[language])].own.append(language)
    matrix.notes.append("own languages were not told: an expert's own are those on which it is the best of its family")
    return matrix
