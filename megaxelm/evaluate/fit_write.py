"""What becomes of a fit: told on the console, written into the run's recipe, and remembered by the evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megaxelm.files import read_json, write_json
from megaxelm.recipe import Recipe, parse_recipe
from megaxelm.run import RunFolder

FIT_FILE = "router_fit.json"


def write_fit(folder: RunFolder, found: Mapping[str, Any]) -> Recipe:
    """Put the fitted values into the run's recipe.yaml, and the whole fit beside it; returns the recipe.

    Raises:
        RecipeError: the values do not go with the rest of the recipe.
    """
    tree = folder.recipe().model_dump(mode="json")
    tree["ensemble"] |= found["recipe"]
    recipe = parse_recipe(tree, str(folder.path / "recipe.yaml"))
    with folder.lock():
        folder.write_recipe(recipe)
        write_json(folder.path / FIT_FILE, dict(found))
    return recipe


def fitted_fields(recipe: Recipe, run_folder: Path) -> list[str]:
    """Fields of `ensemble.*` whose values in the recipe were fitted on half of the run's held-out documents."""
    path = run_folder / FIT_FILE
    if not path.is_file():
        return []
    ensemble = recipe.ensemble.model_dump(mode="json")
    return [name for name, value in read_json(path, recipe=dict)["recipe"].items() if value is not None and ensemble.get(name) == value]


def fit_text(found: Mapping[str, Any]) -> str:
    """The fit in words: for each router today's figure, the fitted one, and whether the difference is more than chance."""
    lines = [found["split"]]
    for name, row in found["routers"].items():
        judged = row["other_half"]
        lines.append(f"router {name}:")
        lines += [f"  {field} {_shown(row['today'].get(field))} -> {_shown(value)}" for field, value in row["fitted"].items()]
        if not row["fitted"]:
            lines.append("  nothing of it can be fitted")
        before, after = judged["today"]["value"], judged["fitted"]["value"]
        lines.append(f"  bits per byte on the other half: {before:.4f} -> {after:.4f}, {_difference(judged['difference'])}")
        lines.append(
            f"  regret against the best expert of each document: {judged['regret_today']['value']:+.4f} -> "
            f"{judged['regret_fitted']['value']:+.4f}"
        )
    choice = found["top_m"]
    bits = ", ".join(f"{m}: {value:.4f}" for m, value in choice["bits"].items())
    chosen = choice["chosen"] or "all"
    lines.append(f"experts kept by the {choice['router']} router, bits per byte on the first half: {bits}")
    judged = found["routers"][choice["router"]]["other_half"]["with_top_m"]["difference"]
    lines.append(
        f"  top_m {chosen} is the smallest within {choice['tolerance']:g} of the best; on the other half, with what was fitted: "
        f"{_difference(judged)} against today"
    )
    lines += ["fitted values for the recipe:", *("  " + line for line in recipe_text(found).splitlines())]
    return "\n".join(lines)


def recipe_text(found: Mapping[str, Any]) -> str:
    """The fitted fields as YAML."""
    return yaml.safe_dump({"ensemble": found["recipe"]}, sort_keys=False, default_flow_style=None, width=120).strip()


def _difference(row: Mapping[str, Any]) -> str:
    text = f"{row['value']:+.4f}"
    if row["low"] is None:
        return text
    text += f" ({row['low']:+.4f} to {row['high']:+.4f})"
    if row["low"] <= 0 <= row["high"]:
        return text + ", not told from chance"
    return text + (", better" if row["high"] < 0 else ", WORSE")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(f"{item:.3g}" for item in value) + "]"
    return "uniform" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def significant(value: float, digits: int = 4) -> float:
    """A fitted number to so many digits: more of them mean nothing."""
    return float(f"{value:.{digits - 1}e}") if value and math.isfinite(value) else value
