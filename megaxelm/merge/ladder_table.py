"""The ladder on the console: what each rung costs and gives, then bits per byte by language."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_COLUMNS = {
    "mean": "mean_bits_per_byte",
    "worst": "worst_bits_per_byte",
    "in": "worst_language",
    "parameters": "parameters",
    "active": "active_parameters",
    "tokens/s": "tokens_per_second",
}
_LANGUAGE_WIDTH = len("12.345*") + 1


def print_ladder(results: Mapping[str, Any], file: TextIO | None = None, width: int | None = None) -> None:
    """Print `evaluation/ladder.json`: a row a model. The best figure of a column is starred; languages that do not fit the width come in
    further tables below.

    Args:
        width: columns of the terminal; None asks it, or takes $COLUMNS, or 120 where there is no terminal.
    """
    width = width or shutil.get_terminal_size((120, 24)).columns
    models = results["models"]
    codes = [row["code"] for row in results["languages"]]
    first = max(len("model"), *(len(model["label"]) for model in models.values())) + 2
    console = Console(file=file or sys.stdout, width=max(width, first + 70), highlight=False)
    console.print("bits per byte on held-out text (lower is better; * best of the column), and what a model costs", soft_wrap=True)
    table = _table()
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "in" else "right", no_wrap=True)
    for model in models.values():
        table.add_row(model["label"], *(_cell(models, model, key) for key in _COLUMNS.values()))
    console.print(table)
    at_once = max(1, (width - first) // (_LANGUAGE_WIDTH + 1))
    for begin in range(0, len(codes), at_once):
        table = _table()
        part = codes[begin : begin + at_once]
        for code in part:
            table.add_column(code, justify="right", no_wrap=True)
        for model in models.values():
            table.add_row(model["label"], *(_language_cell(models, model, code) for code in part))
        console.print(table)


def short_number(value: float) -> str:
    """Three digits and a unit: 1.2k, 34.5M, 1.7B."""
    for bound, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= bound:
            return f"{value / bound:.3g}{unit}"
    return f"{value:.3g}"


def _table() -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("model", no_wrap=True)
    return table


def _cell(models: Mapping[str, Any], model: Mapping[str, Any], key: str) -> Text:
    value = model[key]
    if key in ("parameters", "active_parameters"):
        return Text(short_number(value))
    if key == "tokens_per_second":
        return Text("-" if value is None else f"{value:,.0f}")
    if isinstance(value, str):
        return Text(value)
    return _starred(value, min(other[key] for other in models.values()))


def _language_cell(models: Mapping[str, Any], model: Mapping[str, Any], code: str) -> Text:
    return _starred(model["bits_per_byte"][code], min(other["bits_per_byte"][code] for other in models.values()))


def _starred(value: float, best: float) -> Text:
    return Text(f"{value:.3f}{'*' if value == best else ' '}", style="bold" if value == best else "")
