"""The forgetting matrix on the console: change of perplexity by model and language, own languages marked, and the verdict in words."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megaxelm.evaluate.table import column_groups

_GAP = 2
"""A space behind a cell, and one to the next."""
_SUMMARY = 80
"""Columns that the summary needs beside long names, which wrap."""


def print_forgetting(found: Mapping[str, Any], file: TextIO | None = None, width: int | None = None) -> None:
    """Print `forgetting_results`: a row a model, a column a language; then what each expert gained and lost; then the verdict.

    Args:
        width: columns of the terminal; None asks it, or takes $COLUMNS, or 120 where there is no terminal. No column is ever cut: what
            does not fit comes in a further table below.
    """
    file = file or sys.stdout
    width = width or shutil.get_terminal_size((120, 24)).columns
    models, reference = found["models"], found["reference"]
    against = models[reference]["label"]
    rows = {key: row for key, row in models.items() if reference in row["change"]}
    cells = {
        (key, code): _cell(row["change"][reference].get(code), code in row["own"])
        for key, row in rows.items()
        for code in found["languages"]
    }
    first = max(len("model"), *(len(row["label"]) for row in rows.values())) + _GAP
    sizes = {code: max(len(code), *(len(cells[key, code].plain) for key in rows)) + _GAP for code in found["languages"]}

    # the console itself cuts nothing: the groups below keep within the width
    console = Console(file=file, width=max(width, first + max(sizes.values()), _SUMMARY), highlight=False)
    title = f"change of perplexity against the {against} model, per cent (below 0 is better; * own languages)"
    console.print(title, soft_wrap=True)
    for codes in column_groups(found["languages"], sizes, width - first):
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("model", width=first - _GAP)
        for code in codes:
            table.add_column(code, justify="right", width=sizes[code] - _GAP)
        for key, row in rows.items():
            table.add_row(Text(row["label"]), *(cells[key, code] for code in codes))
        console.print(table)
    _print_summary(console, {key: row for key, row in rows.items() if "elsewhere" in row["summary"][reference]}, reference)
    for note in found["notes"]:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    for sentence in found["verdict"]:
        console.print(f"- {sentence}", soft_wrap=True, markup=False)


def _print_summary(console: Console, rows: Mapping[str, Any], reference: str) -> None:
    """Own gain, mean and worst loss elsewhere, of every expert."""
    if not rows:
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("expert", overflow="fold")
    for name in ("own, mean", "elsewhere, mean", "elsewhere, worst", "worse in"):
        table.add_column(name, justify="right")
    for row in rows.values():
        found = row["summary"][reference]
        own, elsewhere = found.get("own"), found["elsewhere"]
        worst = elsewhere["worst"]
        table.add_row(
            Text(row["label"]),
            f"{own['mean_perplexity_percent']:+.1f} %" if own else "-",
            f"{elsewhere['mean_perplexity_percent']:+.1f} %",
            f"{worst['perplexity_percent']:+.1f} % ({worst['language']})",
            f"{elsewhere['worse_in']} of {elsewhere['languages']}",
        )
    console.print(table)


def _cell(change: Mapping[str, float] | None, own: bool) -> Text:
    if change is None:
        return Text("-")
    return Text(f"{change['perplexity_percent']:+.1f}{'*' if own else ' '}", style="bold" if own else "")
