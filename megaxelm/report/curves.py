"""Training curves: where every member starts and ends, and each expert on its own after the branch."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megaxelm.report.data import Curve, RunData
from megaxelm.report.svg import BLUE, GREY, INK, MUTED, ORANGE, Drawing, light_grid, new_figure, to_svg, wrap
from megaxelm.report.verdict import format_count

_MAX_POINTS = 240
_COLUMNS = 4


def draw_curves(run: RunData) -> Drawing | None:
    """Loss of all models against the tokens that the weights have seen, ancestors included."""
    if not run.curves:
        return None
    figure = new_figure(3.7)
    axes = figure.subplots()
    continued = [name for name in run.curves if name in run.members and run.members[name].kind == "lapt"]
    experts = [name for name in run.curves if name not in ("seed", "dense", *continued)]
    branch = 0.0
    for name, curve in run.curves.items():
        start = _tokens_before(run, name)
        tokens, loss = _thin(curve)
        colour = BLUE if name in experts else ORANGE if name in continued else INK if name == "dense" else GREY
        width, alpha = (1.0, 0.75) if name in (*experts, *continued) else (2.0, 1.0)
        axes.plot(start + tokens, loss, color=colour, linewidth=width, linestyle="--" if name == "dense" else "-", alpha=alpha)
        if name != "seed":
            branch = max(branch, start) if run.members.get(name) is None or run.members[name].parent == "seed" else branch
    if branch:
        axes.axvline(branch, color=MUTED, linewidth=1.0, linestyle=":")
        axes.annotate(
            "branch", (branch, 1), xycoords=("data", "axes fraction"), xytext=(4, -2), textcoords="offset points", va="top", color=MUTED
        )
    handles = [line for line in axes.get_lines() if line.get_linestyle() != ":"]
    groups = {name: f"experts ({len(experts)})" for name in experts} | {name: f"continued ({len(continued)})" for name in continued}
    legend = {groups.get(name, name): handle for name, handle in zip(run.curves, handles, strict=True)}
    axes.legend(legend.values(), legend.keys(), loc="upper right")
    axes.set_xlabel("training tokens that the weights have seen, those of the ancestors included")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axes.set_xlim(left=0)
    light_grid(axes)
    caption = "Training loss against tokens. "
    if branch:
        caption += f"At the dotted line, after the seed's {format_count(branch)} tokens, the dense model and the experts branch off. "
    if experts:
        caption += (
            "An expert's line is short because it sees its share of the tokens alone; the token account says how many "
            "all experts see together. Each expert is scored on the text of its own cluster, so these lines show that training went well, "
            "not who is better: for that see the held-out comparison above."
        )
    if continued:
        caption += " Continued: what grown experts are compared with (LAPT)."
    return Drawing(to_svg(figure, "curves", "Training loss against tokens"), caption + _thinning(run))


def draw_expert_curves(run: RunData) -> Drawing | None:
    """One small panel an expert: its loss since the branch, all others in grey behind."""
    curves = {name: _thin(curve) for name, curve in run.curves.items() if name not in ("seed", "dense")}
    if not curves:
        return None
    # Every panel holds all experts, so the grey lines must be light for the page too.
    behind = {name: _thin(run.curves[name], 40) for name in curves}
    rows = math.ceil(len(curves) / _COLUMNS)
    figure = new_figure(0.7 + 1.55 * rows)
    grid = figure.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for axes, (name, (tokens, loss)) in zip(panels, curves.items(), strict=False):
        for other, (other_tokens, other_loss) in behind.items():
            if other != name:
                axes.plot(other_tokens, other_loss, color=GREY, linewidth=0.6, alpha=0.35)
        axes.plot(tokens, loss, color=BLUE, linewidth=1.8)
        axes.plot(tokens[-1], loss[-1], "o", color=BLUE, markersize=4)
        axes.set_title(wrap(name, 26, 2), fontsize=9.6)
        axes.annotate(f"{loss[-1]:.2f}", (0.98, 0.95), xycoords="axes fraction", ha="right", va="top", color=BLUE)
        light_grid(axes)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    for number, axes in enumerate(panels):
        if number >= len(curves):
            axes.set_visible(False)
        elif number + _COLUMNS >= len(curves):
            axes.tick_params(labelbottom=True)
    figure.supxlabel("training tokens of the expert since its branch", fontsize=9.6)
    figure.supylabel("loss (nats per token)", fontsize=9.6)
    caption = (
        "Each expert since its branch (blue; the number is its last loss), the others in grey for scale. A line that rises or jumps "
        "would be a training that went wrong. Levels differ with the languages of a cluster and are no ranking."
    )
    return Drawing(to_svg(figure, "experts", "Training loss of each expert since its branch"), caption + _thinning(run))


def _tokens_before(run: RunData, name: str) -> float:
    """Tokens that a member's ancestors trained on."""
    member = run.members.get(name)
    if member is None:
        seed = run.account.seed if run.account and run.account.seed is not None else _last(run.curves.get("seed"))
        return 0.0 if name == "seed" else float(seed)
    total, seen = 0.0, {name}
    while member is not None and member.parent is not None and member.parent not in seen:
        seen.add(member.parent)
        member = run.members.get(member.parent)
        if member is not None:
            total += member.tokens if member.tokens is not None else _last(run.curves.get(member.name))
    return total


def _last(curve: Curve | None) -> float:
    return curve.tokens[-1] if curve else 0.0


def _thin(curve: Curve, points: int = _MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and loss at `points` points at most, each the mean of the lines it stands for."""
    groups = min(points, len(curve.steps))
    return tuple(np.array([part.mean() for part in np.array_split(np.array(values), groups)]) for values in (curve.tokens, curve.loss))  # type: ignore[return-value]


def _thinning(run: RunData) -> str:
    longest = max(len(curve.steps) for curve in run.curves.values())
    group = math.ceil(longest / _MAX_POINTS)
    return f" Up to {group} logged lines are averaged into one point." if group > 1 else ""
