"""The picture of a weight trace: stacked areas along the text, the pieces beneath."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megaxelm.ensemble.trace import WeightTrace
from megaxelm.errors import RoutingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 9.0  # inches
_CELLS = 110
"""Characters beside each other in one line of the picture; one of Chinese takes two."""
_LINE_HEIGHT = 1.05  # inches
_INK, _MUTED = "#202124", "#60656d"
_FONTS = ("DejaVu Sans Mono", "Noto Sans Mono CJK SC", "Noto Sans CJK SC", "Noto Sans Mono", "Noto Sans Devanagari", "Noto Sans Thai")
"""Those that are installed are tried in turn for each character of a PNG; `monospace` stands for the reader's own in an SVG."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9.6,
    "text.parse_math": False,
    "text.color": _INK,
}


def plot_weights(trace: WeightTrace, path: Path, title: str | None = None) -> None:
    """Write a picture of the weights along the text, SVG or PNG by the name of `path`.

    A token is as wide as its text, a band as high as the weight of its expert; long texts run over several lines. A line beneath the
    pieces has the colour of the heaviest expert.

    Raises:
        RoutingError: another ending, or no token.
    """
    if path.suffix not in (".svg", ".png"):
        raise RoutingError(f"picture of weights: {path.name} ends in {path.suffix or 'nothing'}; choose .svg or .png")
    if not trace.pieces:
        raise RoutingError("picture of weights: there is no token to show")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.font_manager import get_font_names
    from matplotlib.patches import Patch

    installed = set(get_font_names())
    fonts = [*(name for name in _FONTS if name in installed), "monospace"]
    lines = _lines([_cells(piece) for piece in trace.pieces])
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "weights"}), warnings.catch_warnings():
        # The text of an SVG is drawn by the reader's fonts, whatever matplotlib's own have.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        height = 0.75 + _LINE_HEIGHT * len(lines)
        figure = Figure(figsize=(_WIDTH, height), facecolor="white")
        all_axes: NDArray[Any] = figure.subplots(len(lines), 1, squeeze=False)[:, 0]
        # Room for the title above and the names below is the same however many lines there are.
        figure.subplots_adjust(left=0.045, right=0.995, top=1 - 0.32 / height, bottom=0.68 / height, hspace=0.5)
        for axes, (begin, end) in zip(all_axes, lines, strict=True):
            _draw_line(axes, trace, begin, end, fonts)
        figure.suptitle(
            title or f"Weights of the experts along a text, router {trace.router}", x=0.005, ha="left", fontsize=10, weight="bold"
        )
        shown = [expert for expert in range(len(trace.experts)) if float(trace.weights[:, expert].amax()) >= 0.005]
        handles = [Patch(color=trace.colour(expert), label=_name(trace, expert)) for expert in shown]
        figure.legend(handles=handles, loc="lower left", ncols=min(6, len(handles)), frameon=False, bbox_to_anchor=(0.03, 0.0))
        figure.savefig(path, dpi=160, metadata={"Date": None, "Creator": None} if path.suffix == ".svg" else None)


def _name(trace: WeightTrace, expert: int) -> str:
    return f"{trace.experts[expert]} (fallback)" if trace.experts[expert] == trace.fallback else trace.experts[expert]


def _cells(piece: str) -> int:
    """Characters that a piece takes in a line; at least one, so that a piece of unfinished bytes can be seen."""
    return max(1, sum(_character_cells(character) for character in _visible(piece)))


def _character_cells(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0  # stands on the character before
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _visible(piece: str) -> str:
    return re.sub(r"[\r\n]", "⏎", piece).replace("\t", " ")


def _lines(widths: Sequence[int]) -> list[tuple[int, int]]:
    """First and last token (exclusive) of each line."""
    lines, begin, used = [], 0, 0
    for token, width in enumerate(widths):
        if used and used + width > _CELLS:
            lines.append((begin, token))
            begin, used = token, 0
        used += width
    return [*lines, (begin, len(widths))]


def _draw_line(axes: Axes, trace: WeightTrace, begin: int, end: int, fonts: list[str]) -> None:
    widths = np.array([_cells(piece) for piece in trace.pieces[begin:end]])
    left = np.concatenate([[0], widths.cumsum()])
    weights = trace.weights[begin:end].numpy()
    top = np.zeros(end - begin)
    for expert in range(weights.shape[1]):
        bottom, top = top, top + weights[:, expert]
        low, high = (np.append(edge, edge[-1]) for edge in (bottom, top))
        axes.fill_between(left, low, high, step="post", color=trace.colour(expert), linewidth=0)
    for place, width, piece, expert in zip(left, widths, trace.pieces[begin:end], trace.heaviest()[begin:end], strict=False):
        text = _visible(piece)
        # A piece that begins with a space stands behind the space.
        shift = len(text) - len(text.lstrip(" "))
        axes.text(place + shift + 0.05, -0.16, text.strip(" "), family=fonts, fontsize=9.2, ha="left", va="center", clip_on=False)
        axes.plot([place + 0.15, place + width - 0.15], [-0.33, -0.33], color=trace.colour(expert), linewidth=2.2, clip_on=False)
    axes.set_xlim(0, _CELLS)
    axes.set_ylim(0, 1)
    axes.set_xticks([])
    axes.set_yticks([0, 0.5, 1], ["0", "½", "1"])
    axes.tick_params(length=0, labelsize=8, labelcolor=_MUTED)
    for side in axes.spines.values():
        side.set_visible(False)
