"""The comparison on the console: bits per byte by language and model, and the verdict in words."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_NUMBER = len("12.345*")
_GAP = 2
_TITLE = "bits per byte on held-out text (lower is better; * best of the row)"


def print_table(results: Mapping[str, Any], file: TextIO | None = None, width: int | None = None) -> None:
    """Print `evaluation/results.json`: a row a language, then mean, worst language and the verdict.

    The best model of a row is bold and starred. No column is ever cut: what does not fit the width comes in a further table below.

    Args:
        width: columns of the terminal; None asks it, or takes $COLUMNS, or 120 where there is no terminal.
    """
    file = file or sys.stdout
    width = width or shutil.get_terminal_size((120, 24)).columns
    models = results["models"]
    languages = [row["code"] for row in results["languages"]]
    rows = {code: {key: model["languages"][code]["bits_per_byte"] for key, model in models.items()} for code in languages}
    rows["mean"] = {key: model["mean_bits_per_byte"] for key, model in models.items()}
    rows["worst"] = {key: model["worst_bits_per_byte"] for key, model in models.items()}
    own = {row["code"]: row["own"] for row in results["languages"]}
    # A cell has a space behind it and one to the next; headings wrap between words.
    sizes = {key: max(_NUMBER, *map(len, model["label"].split())) + _GAP for key, model in models.items()}
    first = max(len("language"), *map(len, languages)) + _GAP
    sizes[""] = max(len("is"), *map(len, own.values()), len("expert")) + _GAP
    order = [key for model in models for key in ((model, "") if model == "own" else (model,))]

    console = Console(file=file, width=max(width, first + max(sizes.values())), highlight=False)
    console.print(_TITLE, soft_wrap=True)
    for keys in column_groups(order, sizes, width - first):
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("language", no_wrap=True)
        for key in keys:
            label = models[key]["label"] if key else "own is"
            table.add_column(label, justify="right" if key else "left", width=sizes[key] - _GAP)
        for name, values in rows.items():
            if name == "mean":
                table.add_section()
            table.add_row(name, *(_cell(values, key) if key else Text(own.get(name, "")) for key in keys))
        console.print(table)
    console.print(verdict_text(results), soft_wrap=True, markup=False)


def verdict_text(results: Mapping[str, Any]) -> str:
    """In how many languages the own expert beats the dense model, where not and by how much, and whether tokens were unequal."""
    found = results["verdict"]
    if found is None:
        return "no dense baseline was trained: the experts are compared with the seed only"
    compared = [*found["beaten"], *found["not_beaten"]]
    text = f"own expert beats dense in {len(found['beaten'])} of {len(compared)} languages"
    rows = [results["models"][key]["languages"] for key in ("own", "dense")]
    own, dense = (sum(row[code]["bits_per_byte"] for code in compared) / len(compared) for row in rows)
    text += f" (mean {own:.3f} against {dense:.3f} bits per byte)"
    if found["not_beaten"]:
        ordered = sorted(found["not_beaten"].items(), key=lambda item: -item[1])
        text += "; not in: " + ", ".join(f"{language} by {value:.3f}" for language, value in ordered)
    grown = [row["code"] for row in results["languages"] if row["code"] not in compared]
    if grown:
        text += f"; {', '.join(grown)} grown later, which dense never saw: see the columns lapt (mean and worst leave them out)"
    if (results.get("account") or {}).get("equal") is False:
        text += "; experts and dense did NOT get equal training tokens"
    return text


def column_groups(order: Sequence[str], sizes: Mapping[str, int], room: int) -> list[Sequence[str]]:
    """Columns in groups that fit `room`, each of at least one, in their order."""
    parts: list[list[str]] = [[]]
    for key in order:
        if parts[-1] and sum(sizes[other] for other in parts[-1]) + sizes[key] > room:
            parts.append([])
        parts[-1].append(key)
    return list(parts)


def _cell(values: Mapping[str, float], key: str) -> Text:
    best = values[key] == min(values.values())
    return Text(f"{values[key]:.3f}{'*' if best else ' '}", style="bold" if best else "")
