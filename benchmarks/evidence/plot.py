"""The picture at the top of docs/results.md, from the same figures as its tables."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from megaxelm.report.svg import BLUE, MUTED, ORANGE, SKY, VERMILLION, figure_style, light_grid, new_figure

Found = Mapping[str, Any]
Series = dict[str, dict[str, Mapping[str, float]]]
"""Label in the legend -> row -> interval."""

_COLOURS = (BLUE, ORANGE, SKY, VERMILLION)
_MARKERS = ("o", "D", "s", "^")
_ROUTERS = {"own": "own expert", "mixture:posterior": "posterior router", "mixture:tfidf": "TF-IDF router"}
_SALT = "results"


def panels(runs: Mapping[str, Found], clusterings: Sequence[str]) -> dict[str, Series]:
    """What is drawn: title of a panel -> its series. Differences in bits per byte, below zero is better.

    Args:
        runs: name of a JSON file -> what collect.py found. clusterings: the runs that are compared in the mean, in order.
    """
    ours = runs["typology-8"]["against"]["dense"]["own"]["languages"]
    order = sorted(ours, key=lambda code: -(runs["typology-8"]["languages"][code]["train_tokens"] or 0))
    by_language = {
        f"{run['settings']['k']} experts": {code: run["against"]["dense"]["own"]["languages"][code] for code in order}
        for run in (runs[name] for name in ("typology-8", "typology-16") if name in runs)
    }
    by_run = {
        label: {name: runs[name]["against"]["dense"][model]["mean"] for name in clusterings if model in runs[name]["against"]["dense"]}
        for model, label in _ROUTERS.items()
    }
    found = {"Own expert minus dense, by language": by_language, "Mean of all languages minus dense": by_run}
    if "grown" in runs:
        found["Grown expert minus LAPT"] = {
            f"of the {base}": {
                ", ".join(item["languages"]): value
                for item in runs["grown"]["growth"]["experts"]
                for model, value in item["against"].items()
                if model.endswith(ending)
            }
            for base, ending in (("dense model", "-lapt-dense"), ("seed", "-lapt-seed"))
        }
    return found


def draw(found: Mapping[str, Series]) -> str:
    """An SVG file of the panels side by side. The same figures give the same bytes under the same matplotlib."""
    with figure_style():
        rows = max(len(_rows(series)) for series in found.values())
        figure = new_figure(1.3 + 0.26 * rows, 12.0)
        figure.set_facecolor("white")  # the page that shows it may be dark
        for axes, (title, series) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
            _draw_panel(axes, title, series)
        figure.supxlabel("bits per byte, below zero is better; bars: 95 % bootstrap intervals over documents", fontsize=9.6)
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": _SALT}):
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Description": digest(found)})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def digest(found: Mapping[str, Series]) -> str:
    """Stands in the file, so that a picture of other figures than the tables' is found."""
    return f"figures: {hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]}"


def _rows(series: Series) -> list[str]:
    return list(dict.fromkeys(row for values in series.values() for row in values))


def _draw_panel(axes: Axes, title: str, series: Series) -> None:
    rows = _rows(series)
    for number, (label, values) in enumerate(series.items()):
        shift = 0.22 * (number - (len(series) - 1) / 2)
        intervals = list(values.values())
        below = [interval["value"] - interval["low"] for interval in intervals]
        above = [interval["high"] - interval["value"] for interval in intervals]
        axes.errorbar(
            [interval["value"] for interval in intervals],
            [rows.index(row) + shift for row in values],
            xerr=[below, above],
            fmt=_MARKERS[number],
            markersize=4.5,
            color=_COLOURS[number],
            elinewidth=1.4,
            label=label,
        )
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(title)
    light_grid(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2, columnspacing=1.0, handletextpad=0.2)
