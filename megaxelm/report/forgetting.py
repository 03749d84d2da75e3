"""Who forgets what, drawn: heat maps of the forgetting matrix, and the page of a matrix that belongs to no report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megaxelm.errors import StageError
from megaxelm.report.heat import bits_cell, draw_heat, percent_cell
from megaxelm.report.measured import Change, Forgetting, read_part
from megaxelm.report.svg import Drawing

_KINDS = ("dense", "expert", "lapt", "merged", "mixture")


def draw_forgetting(found: Forgetting, family: str | None = None) -> Drawing | None:
    """Languages x models: the change against the reference, of all models or of the experts of one family."""
    keys = [
        key
        for key, row in found.models.items()
        if found.reference in row.change and (family is None or (row.kind == "expert" and row.family == family))
    ]
    if not keys:
        return None
    changes = {key: found.models[key].change[found.reference] for key in keys}
    against = found.models[found.reference].label
    name = "forgetting" if family is None else "forgetting-" + "".join(each if each.isalnum() else "-" for each in family)
    return _draw(found, changes, f"the {against} model", name)


def draw_parents(found: Forgetting) -> Drawing | None:
    """Languages x models that did not branch from the reference: the change against their parents."""
    changes = {
        key: row.change[row.parent]
        for key, row in found.models.items()
        if row.parent is not None and row.parent != found.reference and row.parent in row.change
    }
    return _draw(found, changes, "the model that each branched from", "parents") if changes else None


def _draw(found: Forgetting, changes: Mapping[str, Mapping[str, Change]], against: str, name: str) -> Drawing:
    rank = {kind: number for number, kind in enumerate(_KINDS)}
    keys = sorted(changes, key=lambda key: rank.get(found.models[key].kind, len(rank)))
    owner = {code: number for number, key in enumerate(keys) for code in found.models[key].own}
    codes = sorted(found.languages, key=lambda code: (owner.get(code, len(keys)), found.languages.index(code)))
    in_percent = found.unit == "bits per token"

    def figure(change: Change | None) -> float:
        return math.nan if change is None else change.perplexity_percent if in_percent else change.bits

    cells = np.array([[figure(changes[key].get(code)) for key in keys] for code in codes])
    clear = [[changes[key][code].clear if code in changes[key] else True for key in keys] for code in codes]
    kinds = [found.models[key].kind for key in keys]
    unit = "per cent of perplexity" if in_percent else found.unit
    svg = draw_heat(
        cells,
        codes,
        [_column_name(found.models[key].label) for key in keys],
        lambda row, column: codes[row] in found.models[keys[column]].own,
        f"change, {unit}",
        name,
        f"Change against {against} by language and model",
        percent_cell if in_percent else bits_cell,
        lambda row, column: not clear[row][column],
        [number for number in range(1, len(keys)) if kinds[number] != kinds[number - 1]],
    )
    caption = (
        f"Each row is a language, each column a model; a cell is its change against {against} in {unit}: below zero (blue) it has gained, "
        "above (orange) it has forgotten. A black frame marks the languages that an expert was made for. "
        "Colours go by the root of the change."
    )
    if any("mixture" in kind for kind in kinds):
        caption += " The columns of the last block are mixtures, by router; @m: m experts kept."
    if not all(all(row) for row in clear):
        caption += " Numbers in italics are not told from chance: their interval over documents holds zero."
    return Drawing(svg, caption)


def _column_name(label: str) -> str:
    """A mixture's label as the head of a narrow column: `posterior mixture, top 2` is `posterior @2`."""
    return label.replace(" mixture", "").replace(", top ", " @")


def write_forgetting_page(values: Mapping[str, Any], name: str, path: Path) -> None:
    """Write the self-contained page of a forgetting matrix (`forgetting_results`).

    Raises:
        StageError: the values are damaged.
    """
    from megaxelm.report.page import page_environment, placed
    from megaxelm.report.svg import figure_style

    try:
        found = read_part({"forgetting": values}, "forgetting", Forgetting)
    except ValueError as error:
        raise StageError(f"{name}: {error}; evaluate the run again") from None
    assert found is not None
    with figure_style():
        drawings = {} if len(found.choice) > 1 else {"forgetting": draw_forgetting(found)}
        drawings |= {f"forgetting-{family}": draw_forgetting(found, family) for family in found.choice if len(found.choice) > 1}
        drawings["parents"] = draw_parents(found)
    page = page_environment().get_template("forgetting.html.j2")
    figures = placed({key: drawing for key, drawing in drawings.items() if drawing is not None})
    path.write_text(page.render(name=name, forgetting=found, figures=figures, **tables(found)), encoding="utf-8")


def tables(found: Forgetting) -> dict[str, Any]:
    """Rows of the tables beside the heat maps: every expert's own gain and its losses, and what choosing is worth."""
    return {"expert_rows": _expert_rows(found), "choice_rows": _choice_rows(found)}


def _expert_rows(found: Forgetting) -> list[dict[str, Any]]:
    rows = []
    for row in found.models.values():
        for base, parts in row.summary.items():
            if "elsewhere" in parts:
                rows.append(
                    {"label": row.label, "against": found.models[base].label, "own": parts.get("own"), "elsewhere": parts["elsewhere"]}
                )
    return rows


def _choice_rows(found: Forgetting) -> Sequence[dict[str, Any]]:
    several = len(found.choice) > 1
    return [
        {"family": family if several else "", "against": found.models[base].label, "worth": worth}
        for family, choice in found.choice.items()
        for base, worth in choice.against.items()
        if choice.experts > 1
    ]
