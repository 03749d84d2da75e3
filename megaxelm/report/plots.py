"""The figures of the report: `draw_figures(run)` makes every figure that the run has data for.

The figures of the comparison are here; training curves are in `curves.py`, languages and corpus in `language_plots.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from megaxelm.report.curves import draw_curves, draw_expert_curves
from megaxelm.report.data import Model, RunData
from megaxelm.report.forgetting import draw_forgetting, draw_parents
from megaxelm.report.heat import draw_heat
from megaxelm.report.language_plots import draw_corpus, draw_tree
from megaxelm.report.router_plots import draw_routers
from megaxelm.report.svg import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Drawing,
    figure_style,
    light_grid,
    new_figure,
    to_svg,
)
from megaxelm.report.verdict import format_bits

FIGURES: dict[str, Callable[[RunData], Drawing | None]] = {}
"""Name of a figure -> the function that draws it, in the order of the page; filled at the end of this module."""

_MODEL_MARKS = {"seed": ("v", GREY), "dense": ("s", INK), "own": ("o", BLUE), "worst": ("x", VERMILLION)}
_MIXTURE_MARKS = (("D", GREEN), ("^", PURPLE), ("P", SKY), ("<", ORANGE), ("*", GREEN))


def draw_figures(run: RunData) -> dict[str, Drawing]:
    """Draw all figures: name -> drawing. A figure without data is left out; the page says so."""
    drawings = {}
    with figure_style():
        for name, draw in tqdm(FIGURES.items(), desc="report: figures", unit=" figures", file=sys.stderr, mininterval=0.5, leave=False):
            drawing = draw(run)
            if drawing is not None:
                drawings[name] = drawing
    return drawings


def draw_models(run: RunData) -> Drawing | None:
    """Languages x models: left the difference to the dense model, right the bits per byte of all models."""
    own, base = run.model("own"), run.model("dense") or run.model("seed")
    if own is None or base is None:
        return None
    codes = _sorted_codes(run, lambda code: own.bits[code] - base.bits[code])
    # Variants by number of experts are in the table.
    run = replace(run, models=[model for model in run.models if "@" not in model.key])
    marks = _marks(run.models)
    figure = new_figure(1.5 + 0.27 * len(codes))
    near, wide = figure.subplots(1, 2, sharey=True, width_ratios=[1.15, 1])
    same = [model.label for model in run.models if _equals(model, own, codes)]
    left_out = _draw_differences(near, run, codes, own, base, marks)
    near.set_yticks(range(len(codes)), codes)
    near.set_ylim(len(codes) - 0.4, -0.6)
    near.set_title(f"Difference to the {base.label} model")
    near.set_xlabel("difference in bits per byte (left of 0 is better)")
    for row, code in enumerate(codes):
        values = [model.bits[code] for model in run.models if math.isfinite(model.bits[code])]
        wide.plot([min(values, default=0), max(values, default=0)], [row, row], color=GREY, linewidth=0.7, zorder=1)
    for model in run.models:
        marker, colour = marks[model.key]
        wide.plot(
            [model.bits[code] for code in codes], range(len(codes)), marker, color=colour, markersize=5.5, zorder=3, fillstyle=_fill(model)
        )
    wide.set_title("All models")
    wide.set_xlabel("bits per byte (lower is better)")
    light_grid(near, "x")
    light_grid(wide, "x")
    for axes in (near, wide):
        axes.spines["left"].set_visible(False)
    handles = [
        Line2D([], [], marker=marks[m.key][0], color=marks[m.key][1], linestyle="", markersize=6, label=m.label, fillstyle=_fill(m))
        for m in run.models
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    better = sum(own.bits[code] < base.bits[code] for code in codes)
    caption = (
        f"Left: how many bits per byte a model needs more (+) or fewer (−) than the {base.label} model, best language on top; "
        "the number is that of the own expert, "
        f"which lies left of the zero line in {better} of {len(codes)} languages (blue), else right of it (orange). "
    )
    if same:
        caption += f"Equal to the own expert here, so not drawn on the left: {', '.join(same)}. "
    if left_out:
        caption += f"Left out there, to keep small differences visible, and drawn only on the right: {', '.join(left_out)}. "
    caption += (
        "Right: all models at their true values. Compare marks within a row; rows differ because scripts and texts do. "
        "The length of a grey line is what the choice of model costs in that language."
    )
    return Drawing(to_svg(figure, "models", "Bits per byte by language and model"), caption)


def _draw_differences(
    axes: Axes, run: RunData, codes: Sequence[str], own: Model, base: Model, marks: dict[str, tuple[str, str]]
) -> list[str]:
    """Own expert as stems with values, mixtures as open marks. Returns the labels of models that lie outside the axis or in part."""
    differences = [own.bits[code] - base.bits[code] for code in codes]
    reach = max((abs(value) for value in differences if math.isfinite(value)), default=0.0) or 0.01
    low = min(0.0, *(value for value in differences if math.isfinite(value)), 0.0) - 0.12 * reach
    high = max(0.0, *(value for value in differences if math.isfinite(value)), 0.0) + 0.3 * reach
    shown = [base]
    for model in run.models:
        if model.key in ("own", "worst", base.key) or _equals(model, own, codes):
            continue
        values = [model.bits[code] - base.bits[code] for code in codes if math.isfinite(model.bits[code] - base.bits[code])]
        if values and min(values) > low - 0.5 * reach and max(values) < high + 0.5 * reach:
            shown.append(model)
            low, high = min(low, min(values) - 0.08 * reach), max(high, max(values) + 0.08 * reach)
    # Room at the left for the numbers, which stand in a column of their own: they cannot run into marks.
    column = low - 0.02 * (high - low)
    low -= 0.2 * (high - low)
    axes.axvline(0, color=INK, linewidth=1.2)
    for row, value in enumerate(differences):
        if not math.isfinite(value):
            axes.text(column, row, "n/a", va="center", ha="right", color=MUTED)
            continue
        colour = BLUE if value < 0 else VERMILLION
        axes.plot([0, value], [row, row], color=colour, linewidth=3, solid_capstyle="butt", alpha=0.55, zorder=2)
        axes.plot(value, row, "o", color=colour, markersize=7, zorder=4)
        axes.text(column, row, format_bits(value, signed=True), va="center", ha="right")
    for model in shown[1:]:
        marker, colour = marks[model.key]
        values = [model.bits[code] - base.bits[code] for code in codes]
        axes.plot(values, range(len(codes)), marker, color=colour, markersize=5, fillstyle="none", zorder=5)
    axes.set_xlim(low, high)
    axes.set_xticks([tick for tick in MaxNLocator(7).tick_values(low, high) if column < tick < high])
    keys = {model.key for model in shown} | {"own"}
    return [model.label for model in run.models if model.key not in keys and not _equals(model, own, codes)]


def _equals(model: Model, own: Model, codes: Sequence[str]) -> bool:
    return model.key != own.key and all(math.isclose(model.bits[code], own.bits[code], abs_tol=5e-5) for code in codes)


def draw_heat_map(run: RunData) -> Drawing | None:
    """Languages x experts, as the difference to the dense model (or to the seed) in bits per byte."""
    base = run.model("dense") or run.model("seed")
    if base is None or not run.experts:
        return None
    experts = list(run.experts)
    own = {language.code: language.own for language in [*run.languages, *run.grown]}
    rank = {name: number for number, name in enumerate(experts)}
    codes = sorted(own, key=lambda code: (rank.get(own[code], len(experts)), code))
    cells = np.array([[run.experts[name].get(code, math.nan) - base.bits[code] for name in experts] for code in codes])
    svg = draw_heat(
        cells,
        codes,
        experts,
        lambda row, column: own[codes[row]] == experts[column],
        "difference in bits per byte",
        "heat",
        "Difference in bits per byte by language and expert",
    )
    others = [cells[row, column] for row in range(len(codes)) for column, name in enumerate(experts) if own[codes[row]] != name]
    mean = float(np.nanmean(others)) if np.isfinite(others).any() else math.nan
    caption = (
        "Each row is a language, each column an expert; a cell says how many bits per byte that expert needs more "
        f"(+, orange) or fewer (−, blue) than the {base.label} model. A black frame marks a language's own expert. "
        "Blue inside the frames is the gain"
    )
    if math.isfinite(mean):
        caption += f"; orange outside is what a wrong choice costs: {format_bits(mean, signed=True)} on average over those cells"
    caption += ". Colours go by the root of the difference, so small ones can be seen."
    return Drawing(svg, caption)


def _marks(models: Sequence[Model]) -> dict[str, tuple[str, str]]:
    """Marker and colour of each model; no two share a marker, so colour is never the only difference."""
    mixtures = [model.key for model in models if model.key not in _MODEL_MARKS]
    return _MODEL_MARKS | {key: _MIXTURE_MARKS[number % len(_MIXTURE_MARKS)] for number, key in enumerate(mixtures)}


def _fill(model: Model) -> Literal["none", "full"]:
    return "none" if model.key not in _MODEL_MARKS or model.key == "dense" else "full"


def _sorted_codes(run: RunData, key: Callable[[str], float]) -> list[str]:
    codes = [language.code for language in run.languages]
    return sorted(codes, key=lambda code: (not math.isfinite(key(code)), key(code) if math.isfinite(key(code)) else 0.0, code))


FIGURES.update(
    models=draw_models,
    heat=draw_heat_map,
    forgetting=lambda run: draw_forgetting(run.forgetting) if run.forgetting else None,
    parents=lambda run: draw_parents(run.forgetting) if run.forgetting else None,
    routers=lambda run: draw_routers(run.routers),
    curves=draw_curves,
    expert_curves=draw_expert_curves,
    tree=draw_tree,
    corpus=draw_corpus,
)
