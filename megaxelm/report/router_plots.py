"""The figure of the routers: can their weights be believed, and how soon do they find the expert."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.lines import Line2D

from megaxelm.report.measured import RouterRow
from megaxelm.report.svg import BLUE, GREEN, GREY, MUTED, ORANGE, PURPLE, SKY, VERMILLION, Drawing, light_grid, new_figure, to_svg

_MARKS = (("o", BLUE), ("s", VERMILLION), ("^", GREEN), ("D", PURPLE), ("P", ORANGE), ("v", SKY))


def draw_routers(routers: Mapping[str, RouterRow]) -> Drawing | None:
    """Reliability, and right choices by place in the text. Variants by number of experts (`@m`) are left to the table."""
    shown = {key: row for key, row in routers.items() if "@" not in key}
    if not shown:
        return None
    figure = new_figure(3.9)
    reliability, position = figure.subplots(1, 2)
    reliability.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    marks = {key: _MARKS[number % len(_MARKS)] for number, key in enumerate(shown)}
    for key, row in shown.items():
        marker, colour = marks[key]
        bins = [(each.weight, each.frequency, each.share) for each in row.calibration.bins if each.weight is not None]
        reliability.plot([each[0] for each in bins], [each[1] for each in bins], color=colour, linewidth=1.2, alpha=0.7)
        reliability.scatter(
            [each[0] for each in bins],
            [each[1] for each in bins],
            s=[14 + 130 * each[2] for each in bins],
            marker=marker,
            color=colour,
            zorder=3,
            alpha=0.85,
            clip_on=False,
        )
    reliability.set_xlim(0, 1)
    reliability.set_ylim(-0.02, 1.04)
    reliability.set_title("Can the weights be believed?")
    reliability.set_xlabel("weight of the heaviest expert")
    reliability.set_ylabel("how often it is the best one")
    bands = [number for number, band in enumerate(next(iter(shown.values())).by_position) if band.tokens]
    for key, row in shown.items():
        marker, colour = marks[key]
        position.plot(
            range(len(bands)),
            [row.by_position[number].accuracy_own for number in bands],
            marker=marker,
            color=colour,
            markersize=6,
            clip_on=False,
            zorder=3,
        )
    position.set_xticks(range(len(bands)), [_band_name(next(iter(shown.values())), number) for number in bands])
    position.set_xlim(-0.2, max(len(bands) - 0.8, 0.2))
    position.set_ylim(-0.02, 1.04)
    position.set_title("How soon is the language's expert found?")
    position.set_xlabel("tokens of the text")
    position.set_ylabel("share of tokens with the own expert in front")
    for axes in (reliability, position):
        light_grid(axes)
        axes.tick_params(colors=MUTED)
    handles = [
        Line2D([], [], marker=marks[key][0], color=marks[key][1], linestyle="", markersize=6, label=row.label) for key, row in shown.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    caption = (
        "Left: tokens in bins by their heaviest weight; a mark's height says how often that expert is the best one of its document, its "
        "size how many tokens it stands for. On the dashed line the weights mean what they say; below it the router is too sure of "
        "itself, above it not sure enough. Right: how often the heaviest weight is on the expert of the document's language, by place in "
        "the text."
    )
    return Drawing(to_svg(figure, "routers", "Reliability of the routers, and right choices by place in the text"), caption)


def _band_name(row: RouterRow, number: int) -> str:
    begin = 1 + (row.by_position[number - 1].to or 0) if number else 1
    end = row.by_position[number].to
    return f"{begin}–{end}" if end is not None else f"{begin} on"
