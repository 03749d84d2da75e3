"""Figures about the languages: their family tree with the clusters, and how much text each has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes

from megaxelm.report.data import Clusters, RunData
from megaxelm.report.svg import BLUE, GREEN, GREY, MUTED, ORANGE, PURPLE, SKY, VERMILLION, Drawing, light_grid, new_figure, shorten, to_svg
from megaxelm.report.verdict import format_count

# 6 colours x 5 markers: each cluster has a pair of its own up to 30, and its name stands beside it in any case.
_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
_MARKERS = ("o", "s", "D", "^", "v")


def draw_tree(run: RunData) -> Drawing | None:
    """Dendrogram of the languages by typological distance; each leaf carries the mark and name of its cluster."""
    return draw_language_tree(run.clusters) if run.clusters else None


def draw_language_tree(clusters: Clusters) -> Drawing | None:
    """`draw_tree` from the clusters alone. None without a linkage, or with one language."""
    if clusters.linkage is None or len(clusters.languages) < 2:
        return None
    from scipy.cluster.hierarchy import dendrogram

    tree = dendrogram(np.array(clusters.linkage), no_plot=True, labels=clusters.languages)
    leaves: list[str] = tree["ivl"]
    owner = cluster_of_language(clusters)
    names = [cluster.name for cluster in clusters.clusters]
    figure = new_figure(0.9 + 0.27 * len(leaves))
    axes = figure.subplots()
    for heights, places in zip(tree["dcoord"], tree["icoord"], strict=True):
        axes.plot(heights, [(place - 5) / 10 for place in places], color=GREY, linewidth=1.5, solid_joinstyle="miter")
    top = max(row[2] for row in clusters.linkage) or 1.0
    for row, code in enumerate(leaves):
        name = owner.get(code, "")
        colour, marker = cluster_mark(names.index(name)) if name in names else (MUTED, "x")
        axes.plot(-0.014 * top, row, marker, color=colour, markersize=7, clip_on=False)
        axes.text(-0.035 * top, row, code, ha="left", va="center", fontweight="bold")
        axes.text(
            -0.11 * top - 0.012 * top * max(0, max(map(len, leaves)) - 3), row, shorten(name, 34), ha="left", va="center", color=MUTED
        )
    axes.set_xlim(1.03 * top, -0.5 * top)
    axes.set_ylim(len(leaves) - 0.4, -0.6)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_bounds(0, top)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= top])
    axes.set_xlabel("typological distance at which two branches join (0 = same features)", x=0.34)
    light_grid(axes, "x")
    spread = [code for code in leaves if sum(code in cluster.languages for cluster in clusters.clusters) > 1]
    caption = (
        "The languages by the distance of their syntactic features (URIEL); the further left two branches join, the less alike they are. "
        "Mark and name at the right are the cluster whose expert trains on the language: equal marks side by side are relatives who share "
        "an expert, equal marks far apart are an expert with unlike languages."
    )
    if spread:
        caption += " Clusters here are made of documents and not of languages: the one with most of a language's text is shown."
    return Drawing(to_svg(figure, "tree", "Tree of the languages with their clusters"), caption)


def cluster_of_language(clusters: Clusters) -> dict[str, str]:
    """Language -> the cluster with most of its bytes."""
    best: dict[str, tuple[int, str]] = {}
    for cluster in clusters.clusters:
        for code, size in cluster.languages.items():
            if code not in best or size > best[code][0]:
                best[code] = (size, cluster.name)
    return {code: name for code, (_, name) in best.items()}


def cluster_mark(number: int) -> tuple[str, str]:
    """Colour and marker of a cluster by its number, the same in every figure."""
    return _COLOURS[number % len(_COLOURS)], _MARKERS[(number // len(_COLOURS)) % len(_MARKERS)]


def draw_corpus(run: RunData) -> Drawing | None:
    """Bars by language: bytes of text, tokens, and bytes a token."""
    rows = [row for row in run.corpus if row.train_bytes is not None or row.tokens is not None]
    if not rows:
        return None
    rows.sort(key=lambda row: (-(row.train_bytes or row.tokens or 0), row.code))
    bits = [row.train_bytes / row.tokens if row.train_bytes and row.tokens else None for row in rows]
    panels: list[tuple[str, str, Sequence[float | None], Callable[[float], str], str]] = [
        ("Training text", "bytes (UTF-8)", [row.train_bytes for row in rows], _format_bytes, BLUE),
        ("Training tokens", "tokens in the index", [row.tokens for row in rows], format_count, GREEN),
        ("Bytes a token", "bytes", bits, lambda value: f"{value:.2f}", PURPLE),
    ]
    panels = [panel for panel in panels if any(value is not None for value in panel[2])]
    figure = new_figure(0.9 + 0.27 * len(rows))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, unit, values, show, colour) in zip(grid, panels, strict=True):
        _bars(axes, values, show, colour)
        axes.set_title(title)
        axes.set_xlabel(unit)
    grid[0].set_yticks(range(len(rows)), [row.code for row in rows])
    grid[0].set_ylim(len(rows) - 0.4, -0.6)
    caption = (
        "What each language brings, most text first. Scripts that need two or three bytes a letter have more bytes for the same text. "
        "Between languages of one script, many bytes a token mean that the tokenizer knows the language well, "
        "and few that it cuts words to pieces."
    )
    return Drawing(to_svg(figure, "corpus", "Size of the corpus by language"), caption)


def _format_bytes(value: float) -> str:
    text = format_count(value)
    return f"{text}B" if value >= 1000 else f"{text} B"


def _bars(axes: Axes, values: Sequence[float | None], show: Callable[[float], str], colour: str) -> None:
    top = max(value for value in values if value is not None) or 1.0
    for row, value in enumerate(values):
        if value is not None:
            axes.barh(row, value, height=0.66, color=colour, alpha=0.8, linewidth=0)
        axes.text((value or 0) + 0.02 * top, row, show(value) if value is not None else "n/a", va="center", ha="left")
    axes.set_xlim(0, 1.3 * top)
    axes.set_xticks([])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.tick_params(length=0)
