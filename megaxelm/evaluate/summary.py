"""`statistics` of `results.json`: intervals of every column of the comparison, and the differences that matter, paired."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from megaxelm.evaluate.statistics import Bootstrap


def statistics_results(bootstrap: Bootstrap, columns: Mapping[str, str], grown: Collection[str] = ()) -> dict[str, Any]:
    """Intervals of columns and of their differences to `seed`, `dense` and `own`, where those are and have read the same languages.

    Args:
        columns: column of `results.json` -> model in the bootstrap. grown: languages that means and differences leave out.
    """
    bases = [name for name in ("seed", "dense", "own") if name in columns]

    def compared(*models: str) -> list[str]:
        return [code for code in bootstrap.languages_of(*models) if code not in grown]

    return {
        "resamples": bootstrap.resamples,
        "confidence": bootstrap.confidence,
        "seed": bootstrap.seed,
        "models": {
            column: {
                "mean": bootstrap.mean(model, None, compared(model)).to_json(),
                "languages": {code: bootstrap.language(model, code).to_json() for code in bootstrap.languages_of(model)},
            }
            for column, model in columns.items()
            if compared(model)
        },
        "differences": [
            {"model": column, "base": base} | difference(bootstrap, model, columns[base], compared(model, columns[base]))
            for column, model in columns.items()
            for base in bases[: bases.index(column) if column in bases else None]
            if compared(model, columns[base])
        ],
    }


def difference(bootstrap: Bootstrap, model: str, base: str, languages: Sequence[str] | None = None) -> dict[str, Any]:
    """A model minus another in bits per byte (below 0: better), over the languages that both have read.

    `better`, `worse` and `unclear` tell languages by their intervals: wholly below zero, wholly above, or neither.
    """
    codes = list(languages or bootstrap.languages_of(model, base))
    rows = {code: bootstrap.language(model, code, base) for code in codes}
    worst = max(codes, key=lambda code: rows[code].value)
    return {
        "mean": bootstrap.mean(model, base, codes).to_json(),
        "worst": bootstrap.worst(model, base, codes).to_json() | {"language": worst},
        "gini_of_gains": bootstrap.gini(model, base, codes).to_json(),
        "better": [code for code, row in rows.items() if row.sign < 0],
        "worse": [code for code, row in rows.items() if row.sign > 0],
        "unclear": [code for code, row in rows.items() if row.sign == 0],
        "languages": {code: row.to_json() for code, row in rows.items()},
    }
