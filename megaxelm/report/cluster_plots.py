"""Figures of the clusters' own page: where languages and domains went, and the documents on a plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from numpy.typing import NDArray

from megaxelm.report.language_plots import cluster_mark
from megaxelm.report.svg import BLUE, GREY, INK, WIDTH, Drawing, bare_figure, new_figure, shorten, to_svg

_SHARES = LinearSegmentedColormap.from_list("shares", ["#f7f7f5", "#b9d8ea", "#5aa5d0", BLUE, "#00406a"])
_PICTURE_HEIGHT = 7.0
_PANEL_COLUMNS = 6
_POINT = 3.2
_ISLANDS, _ISLAND, _FAR = 3, 0.2, 0.15  # a group has up to 3 labels: where 20 % of it lie farther than 0.15 from the others


def draw_shares(name: str, what: str, rows: Sequence[str], columns: Sequence[str], table: NDArray[np.int64], caption: str) -> Drawing:
    """A table as shares of its rows, in per cent: rows by the cluster that has most of them.

    Args:
        name: of the figure, unique in the page.
        what: what the rows are, for screen readers, e.g. `Languages by cluster`.
        table: counts, [rows, clusters].
    """
    totals = table.sum(axis=1, keepdims=True)
    shares = np.divide(table, totals, out=np.zeros(table.shape), where=totals > 0)
    order = sorted(range(len(rows)), key=lambda row: (int(shares[row].argmax()), -float(shares[row].max()), rows[row]))
    shares = shares[order]
    labels = [shorten(column, 24) for column in columns]
    row_labels = [shorten(rows[row], 24 if len(columns) <= 24 else 18) for row in order]
    upright = max(map(len, labels), default=0) * len(labels) <= 84
    height = 0.5 + 0.27 * len(rows) + (0.1 if upright else 0.085 * max(map(len, labels), default=0))
    # 32 clusters fit into the page; beyond that the figure is scrolled.
    figure = new_figure(height, max(WIDTH, 0.35 + 0.085 * max(map(len, row_labels), default=0) + 0.24 * len(columns)))
    axes = figure.subplots()
    axes.imshow(shares, aspect="auto", cmap=_SHARES, vmin=0, vmax=1)
    axes.set_yticks(range(len(rows)), row_labels)
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(columns)), labels, rotation=0 if upright else 90)
    axes.tick_params(length=0)
    for row, column in np.argwhere(shares > 0):
        share = shares[row, column]
        # A share that rounds to 0 is not nothing.
        text = f"{100 * share:.0f}" if share >= 0.005 else "·"
        axes.text(column, row, text, ha="center", va="center", fontsize=8.4, color="#ffffff" if share > 0.55 else "#1b1b1b")
    for side in axes.spines.values():
        side.set_visible(False)
    return Drawing(to_svg(figure, name, what), caption)


def draw_picture(name: str, picture: dict[str, Any], groups: Sequence[str], numbers: Sequence[int], what: str, caption: str) -> Drawing:
    """The documents on a plane, each with the mark of its group, and each group's name where most of it lies, and again
    where much of it lies elsewhere.

    Args:
        picture: `x`, `y` [documents], in 0 to 1.
        groups: names; a group without a document in the picture gets no label.
        numbers: group of each document, [documents].
        what: `cluster` or `language`, for screen readers.
    """
    places = np.column_stack([picture["x"], picture["y"]]).astype(np.float64)
    number = np.asarray(numbers)
    figure, [axes] = bare_figure(_PICTURE_HEIGHT)
    for group in range(len(groups)):
        colour, marker = cluster_mark(group)
        mine = places[number == group]
        axes.plot(mine[:, 0], mine[:, 1], marker, color=colour, markersize=_POINT, alpha=0.75, markeredgewidth=0)
    _limit(axes, places)
    taken: list[tuple[float, float, float, float]] = []
    sizes = [int((number == group).sum()) for group in range(len(groups))]
    for group in sorted(range(len(groups)), key=lambda group: -sizes[group]):
        label = shorten(groups[group], 18)
        rest = places[number == group]
        for island in range(_ISLANDS):
            if len(rest) == 0 or len(rest) < _ISLAND * sizes[group]:
                break
            place = _free_place(rest, len(label), taken)
            if place is None and island:
                break
            # No name is left out: the first of a group would rather stand on another one.
            x, y = place or (float(rest[0, 0]), float(rest[0, 1]))
            # Above the place, or the label would hide a small group. By this id the page's style gives it a rim.
            offset: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom"}
            axes.annotate(label, (x, y), (0, 4), fontweight="bold", color=INK, gid=f"label-{group}-{island}", **offset)
            rest = rest[np.hypot(rest[:, 0] - x, rest[:, 1] - y) > _FAR]
    return Drawing(to_svg(figure, name, f"Documents on a plane, marked by {what}"), caption)


def draw_panels(picture: dict[str, Any], groups: Sequence[str], caption: str) -> Drawing:
    """One small picture a cluster: its documents in its colour, all others in grey."""
    places = np.column_stack([picture["x"], picture["y"]]).astype(np.float64)
    number = np.asarray(picture["cluster"])
    columns = min(_PANEL_COLUMNS, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure, panels = bare_figure(1.55 * rows + 0.1, rows, columns)
    thin = places[:: max(1, len(places) // 500)]
    for group, axes in enumerate(panels):
        _limit(axes, places)
        if group >= len(groups):
            axes.set_visible(False)
            continue
        mine = places[number == group]
        _dots(axes, thin, GREY, 1.4, 0.35)
        _dots(axes, mine, cluster_mark(group)[0], 2.4, 0.9)
        share = len(mine) / max(len(places), 1)
        axes.set_title(f"{shorten(groups[group], 11)} ({share:.0%})", fontsize=9, pad=2)
    return Drawing(to_svg(figure, "panels", "Documents on a plane, one panel a cluster"), caption)


def _limit(axes: Axes, places: NDArray[np.float64]) -> None:
    """Room for the marks at the border."""
    low, high = places.min(axis=0) - 0.03, places.max(axis=0) + 0.03
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1], high[1])


def _dots(axes: Axes, places: NDArray[np.float64], colour: str, size: float, alpha: float) -> None:
    """Points as one path of zero-length strokes with round ends: a tenth of the page's weight of single marks."""
    if len(places):
        path = Path(np.repeat(places, 2, axis=0), [Path.MOVETO, Path.LINETO] * len(places))
        # Strokes without length would be left out.
        path.should_simplify = False
        axes.add_patch(PathPatch(path, edgecolor=colour, facecolor="none", linewidth=size, alpha=alpha, capstyle="round"))


def _free_place(places: NDArray[np.float64], characters: int, taken: list[tuple[float, float, float, float]]) -> tuple[float, float] | None:
    """The densest of `places` at which a label of so many characters covers none of `taken`, to which it is added. Else None."""
    distances = np.hypot(places[:, None, 0] - places[None, :, 0], places[:, None, 1] - places[None, :, 1])
    width, height = 0.006 * characters + 0.006, 0.016
    for x, y in places[np.argsort(-(distances < 0.06).sum(axis=1), kind="stable")].tolist():
        if all(abs(x - left) > width + wide or abs(y - low) > height + high for left, low, wide, high in taken):
            taken.append((x, y, width, height))
            return x, y
    return None
