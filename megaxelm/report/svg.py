"""From a matplotlib figure to an SVG that can stand inside an HTML page: shared colours, no outside references, own ids."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# These become CSS variables in the page, so that figures follow its light or dark colours.
INK, MUTED, GRID = "#202124", "#60656d", "#dcdfe4"

# Okabe and Ito's colours, distinct with every common colour blindness; yellow is left out, being faint on white.
BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
GREY = "#8a8f98"

_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", BLUE: "var(--blue)"}

WIDTH = 9.0
"""Width of a figure in inches: 864 CSS pixels, and 83 % of it on A4, where 9.6 points print as 8."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9.6,
    "axes.titlesize": 10,
    "axes.labelsize": 9.6,
    "xtick.labelsize": 9.6,
    "ytick.labelsize": 9.6,
    "legend.fontsize": 9.6,
    # A name with dollar signs is a name.
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
}


@dataclass(frozen=True)
class Drawing:
    """One figure of the page: an `<svg>` element, and a caption in plain words that says what to see."""

    svg: str
    caption: str


@contextmanager
def figure_style() -> Iterator[None]:
    """The settings under which every figure is made and written."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Text stays text in the SVG, so the browser looks for a font; matplotlib's own need not have the script.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, sizes in inches, laid out so that labels do not collide."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def bare_figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of panels that may have a title and nothing else beside them, [rows * columns]: no layout has to be searched for."""
    figure = Figure(figsize=(WIDTH, height), facecolor="none")
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=1 - 0.25 / height, wspace=0.06, hspace=0.22)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_visible(False)
    return figure, list(grid.flat)


def light_grid(axes: Axes, axis: str = "both") -> None:
    """Thin grid lines behind the data."""
    axes.grid(True, axis=axis)  # type: ignore[arg-type]
    axes.tick_params(length=0)


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element. `name` makes its ids unique in the page, `description` is read by screen readers."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style type=\"text/css\">.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = _squeeze(text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1).strip()


def _squeeze(text: str) -> str:
    """The same picture in a third of the bytes: hundredths of a point, dots as one move, and the style of equal marks once."""
    text = re.sub(r"\b(d|x|y)=\"[^\"]*\"", lambda found: re.sub(r"(\d\.\d\d)\d+", r"\1", found.group()), text)
    text = re.sub(r"M ([\d.]+) ([\d.]+) \nL \1 \2 ", r"M\1 \2h0", text)
    text = re.sub(r"<g (clip-path=\"[^\"]*\")>((?:\s*<use [^>]*/>)+)\s*</g>", _style_once, text)
    return re.sub(r"\n\s+<", "\n<", text)


def _style_once(found: re.Match[str]) -> str:
    styles = set(re.findall(r' style="([^"]*)"/>', found[2]))
    if len(styles) != 1:
        return found.group()
    marks = re.sub(r' style="[^"]*"/>', "/>", found[2])
    return f'<g {found[1]} style="{styles.pop()}">{marks}\n</g>'


def shorten(name: str, width: int) -> str:
    """A name cut in the middle to at most `width` characters; the whole one stands in the page's tables."""
    if len(name) <= width:
        return name
    tail = max(1, (width - 1) // 3)
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"


def wrap(name: str, width: int, lines: int = 2) -> str:
    """A cluster's name broken at hyphens into at most `lines` lines of about `width` characters, shortened beyond that."""
    if len(name) <= width:
        return name
    rows = [""]
    for part in name.split("-"):
        candidate = f"{rows[-1]}-{part}" if rows[-1] else part
        if len(candidate) <= width or not rows[-1]:
            rows[-1] = candidate
        else:
            rows[-1] += "-"
            rows.append(part)
    if len(rows) > lines:
        rows = [*rows[: lines - 1], shorten("".join(rows[lines - 1 :]), width)]
    return "\n".join(shorten(row, width + 1) for row in rows)
