"""The heat map of differences: blue is better, orange is worse, the number stands in the cell."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.colors import FuncNorm, LinearSegmentedColormap
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from megaxelm.report.svg import BLUE, VERMILLION, WIDTH, new_figure, to_svg, wrap

_COLOURS = ["#00507f", BLUE, "#7fb8d8", "#f7f7f5", "#f0b48a", VERMILLION, "#8f3d00"]


def bits_cell(value: float) -> str:
    """A difference in bits: two decimals, a true minus sign."""
    text = f"{value:+.2f}" if abs(value) < 9.995 else f"{value:+.1f}"
    return text.replace("-", "−")


def percent_cell(value: float) -> str:
    """A difference in per cent."""
    return (
        f"{value:+.0f}".replace("-", "−").replace("+0", "0").replace("−0", "0") if abs(value) < 0.5 else f"{value:+.0f}".replace("-", "−")
    )


def draw_heat(
    cells: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    framed: Callable[[int, int], bool],
    label: str,
    name: str,
    title: str,
    text: Callable[[float], str] = bits_cell,
    unclear: Callable[[int, int], bool] = lambda row, column: False,
    gaps: Sequence[int] = (),
) -> str:
    """The `<svg>` of cells [rows, columns]; NaN is drawn as not known.

    Args:
        framed, unclear: which cells have a black frame, and which are in italics.
        label: of the colours. name: makes ids unique in the page. title: for screen readers. gaps: columns that have a space before them.
    """
    reach = float(np.nanmax(np.abs(cells))) if np.isfinite(cells).any() else 1.0
    # Roots spread the small gains and the large losses over the colours; a linear scale would show the losses alone.
    norm = FuncNorm((lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda y: np.sign(y) * y**2), vmin=-max(reach, 1e-6), vmax=max(reach, 1e-6))
    colours = LinearSegmentedColormap.from_list("better-worse", _COLOURS).with_extremes(bad="#c9ccd1")
    name_width = 13 if len(columns) > 6 else 22
    figure = new_figure(1.9 + 0.29 * len(rows), max(WIDTH, 1.6 + 0.48 * len(columns)))
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(cells), aspect="auto", cmap=colours, norm=norm)
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.tick_top()
    labels = [wrap(each, name_width) for each in columns]
    upright = max(len(line) for each in labels for line in each.split("\n")) * len(columns) <= 96
    axes.set_xticks(range(len(columns)), labels, rotation=0 if upright else 90)
    axes.tick_params(length=0)
    for row in range(len(rows)):
        for column in range(len(columns)):
            value = cells[row, column]
            known = math.isfinite(value)
            shade = abs(float(norm(value)) - 0.5) if known else 0.0
            axes.text(
                column, row, text(value) if known else "n/a", ha="center", va="center", fontsize=8.4,
                color="#ffffff" if shade > 0.3 else "#1b1b1b", style="italic" if unclear(row, column) else "normal",
            )  # fmt: skip
            if framed(row, column):
                axes.add_patch(Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, fill=False, edgecolor="#000000", linewidth=2.2, zorder=3))
    for column in gaps:
        axes.axvline(column - 0.5, color="#ffffff", linewidth=4)
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.015, aspect=30)
    bar.set_label(label)
    ticks = sorted([sign * reach * share for share in (1.0, 0.36, 0.09) for sign in (-1, 1)] + [0.0])
    bar.set_ticks(ticks, labels=["0" if tick == 0 else text(tick) for tick in ticks])
    bar.outline.set_visible(False)
    return to_svg(figure, name, title)
