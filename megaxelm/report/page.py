"""The page: the run's data and figures put into `template.html.j2`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megaxelm.report.data import Member, Model, RunData
from megaxelm.report.forgetting import tables
from megaxelm.report.language_plots import cluster_of_language
from megaxelm.report.svg import Drawing
from megaxelm.report.verdict import Verdict, format_bits, format_count, judge

_SOURCE_ORDER = ("kind", "name", "package", "distribution", "config", "split", "files", "version", "licence", "url")


@dataclass(frozen=True)
class Node:
    """A member in the lineage tree, with those that branch from it."""

    member: Member
    children: list[Node]
    orphan: bool = False


def render_page(run: RunData, drawings: dict[str, Drawing]) -> str:
    """The whole HTML page. Every name from the run is escaped; nothing is loaded from elsewhere."""
    template = page_environment().get_template("template.html.j2")
    verdict = judge(run)
    return template.render(
        run=run,
        verdict=verdict,
        tone=_tone(verdict),
        figures=placed(drawings),
        forgetting=run.forgetting,
        **(tables(run.forgetting) if run.forgetting else {"expert_rows": [], "choice_rows": []}),
        labels={model.key: model.label for model in [*run.models, *run.continued]},
        grown=_grown_table(run),
        best={language.code: _best(run.models, language.code) for language in run.languages},
        best_mean=_least([model.mean for model in run.models]),
        perplexity=lambda model, code: f"{model.perplexity[code]:.4g}" if math.isfinite(model.perplexity[code]) else "n/a",
        account=_account_rows(run),
        roots=lineage_roots(run.members),
        rounds=max((member.round or 0 for member in run.members.values() if member.kind == "expert"), default=0),
        deepest=max((member.round or 0 for member in run.members.values()), default=0),
        curves=run.curves,
        sources={name: _table(rows) for name, rows in run.sources.items()},
        owner=cluster_of_language(run.clusters) if run.clusters else {},
        settings={key: "all" if value is None and key == "top_m" else value for key, value in run.settings.items()},
    )


def placed(drawings: dict[str, Drawing]) -> dict[str, dict[str, str]]:
    """Figures as the templates take them: `svg` is markup, `caption` is text."""
    return {name: {"svg": Markup(item.svg), "caption": item.caption} for name, item in drawings.items()}


def page_environment() -> Environment:
    """Where the templates of this folder are rendered: every value is escaped, and one that is missing is an error."""
    loader = PackageLoader("megaxelm.report", package_path="")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        minus=_true_minus, interval=_format_interval, percent=_format_percent, bits=format_bits, count=format_count, seconds=_format_seconds
    )
    return environment


def lineage_roots(members: dict[str, Member]) -> list[Node]:
    """The members as trees. A parent that is not among them, or a circle, makes a root that is marked as an orphan."""
    placed: set[str] = set()

    def grow(name: str, orphan: bool = False) -> Node:
        placed.add(name)
        children = [grow(child) for child, member in members.items() if member.parent == name and child not in placed]
        return Node(members[name], children, orphan)

    roots = [grow(name) for name, member in members.items() if member.parent is None]
    for name, member in members.items():
        if name not in placed and member.parent not in members:
            roots.append(grow(name, orphan=True))
    return roots + [grow(name, orphan=True) for name in members if name not in placed]


def _tone(verdict: Verdict) -> str:
    """CSS class of the headline: good only when every language is better at equal tokens."""
    values = list(verdict.differences.values())
    if not values or not any(math.isfinite(value) for value in values) or verdict.equal_tokens is not True:
        return "unknown"
    better = sum(value < 0 for value in values)
    return "good" if better == len(values) else "bad" if better <= len(values) / 2 else "mixed"


def _best(models: list[Model], code: str) -> float:
    return _least([model.bits[code] for model in models])


def _least(values: list[float]) -> float:
    return min((value for value in values if math.isfinite(value)), default=math.nan)


def _grown_table(run: RunData) -> dict[str, Any]:
    """Added languages: a row each with the models of the comparison, and the seed and the dense model continued on it (LAPT).

    A cell is a value and whether it is the least of its row; models continued on another language are not shown.
    """
    models = [model for key in ("seed", "dense", "own") if (model := run.model(key))]
    models += [model for model in run.models if model.key.startswith("mixture-") and "@" not in model.key]
    starts = list(dict.fromkeys(model.key.rpartition("-lapt-")[2] for model in run.continued))
    by_key = {model.key: model for model in run.continued}
    rows = []
    for language in run.grown:
        values = [model.bits[language.code] for model in models]
        for start in starts:
            model = by_key.get(f"lapt:{language.own}-lapt-{start}")
            values.append(model.bits[language.code] if model else math.nan)
        best = _least(values)
        rows.append({"code": language.code, "own": language.own, "cells": [(value, value == best) for value in values]})
    return {"heads": [model.label for model in models] + [f"{start}, continued" for start in starts], "rows": rows}


def _account_rows(run: RunData) -> list[dict[str, Any]]:
    """Rows of the token account: name, tokens, and share of the largest for a bar."""
    account = run.account
    if account is None:
        return []
    rows = [("seed", account.seed), ("dense", account.dense), *account.experts.items()]
    rows.append(("all experts together", account.experts_total))
    top = max((tokens or 0 for _, tokens in rows), default=0) or 1
    return [
        {"name": name, "tokens": tokens, "share": 100 * (tokens or 0) / top}
        for name, tokens in rows
        if tokens is not None or name == "dense"
    ]


def _table(rows: list[dict[str, str]]) -> dict[str, list[Any]]:
    """Rows with any keys as a table: the keys that occur, known ones first."""
    found = dict.fromkeys(key for row in rows for key in row)
    keys = [key for key in _SOURCE_ORDER if key in found] + [key for key in found if key not in _SOURCE_ORDER]
    return {"keys": keys, "rows": [[row.get(key, "") for key in keys] for row in rows]}


def _true_minus(text: str) -> str:
    """A sentence with true minus signs before its numbers."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


def _format_interval(value: Any) -> str:
    """An interval's bounds as `−0.012 to +0.034`; nothing where there are none."""
    if value is None or value.low is None or value.high is None:
        return ""
    return f"{format_bits(value.low, True)} to {format_bits(value.high, True)}"


def _format_percent(value: float | None, signed: bool = False) -> str:
    if value is None:
        return "n/a"
    return f"{value:{'+' if signed else ''}.1f}\N{NO-BREAK SPACE}%".replace("-", "−")


def _format_seconds(value: float | None) -> str:
    if value is None:
        return "n/a"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
