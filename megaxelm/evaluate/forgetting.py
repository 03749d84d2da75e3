"""The forgetting matrix: every model on every language, what it gained on its own languages and what it lost elsewhere.

A `Matrix` comes from a run (`run_matrix`), or from a table of perplexities (`matrix_csv.py`). `forgetting_results` makes of it what
`results.json` holds under `forgetting`, what `megaxelm forgetting` prints, and what the report draws:

```
unit, reference, languages
models.<key>   label, kind, parent, own (its languages), bits, perplexity by language
               change.<reference or parent>: by language bits (with low, high where documents are known), perplexity, perplexity_percent
               summary.<reference or parent>: own and elsewhere: mean bits and per cent, best and worst cell
choice         by family of experts: what choosing right gains and choosing wrong costs, against each baseline
verdict        sentences
```

Changes are model minus reference: below zero is better. Per cent are of perplexity a token; means of per cent are over languages.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megaxelm.evaluate.documents import DocumentScores, language_scores
from megaxelm.evaluate.statistics import Bootstrap

PER_BYTE, PER_TOKEN = "bits per byte", "bits per token"


@dataclass(frozen=True)
class Row:
    """One model: its figures by language. `own`: the languages that it was made for; `family`: experts that are chosen among."""

    label: str
    kind: str  # seed, dense, baseline, expert, mixture, ...
    bits: dict[str, float]
    perplexity: dict[str, float]  # per token
    parent: str | None = None
    own: list[str] = field(default_factory=list)
    family: str = ""


@dataclass(frozen=True)
class Matrix:
    """Models by key. `reference`: the model that changes are told against. `bootstrap`: of the documents, where they are known."""

    rows: dict[str, Row]
    languages: list[str]
    reference: str
    unit: str
    bootstrap: Bootstrap | None = None
    notes: list[str] = field(default_factory=list)

    def baselines(self) -> list[str]:
        """The reference, and what else there is that is no expert and no mixture of them."""
        others = [key for key, row in self.rows.items() if row.kind in ("seed", "dense", "baseline") and key != self.reference]
        return [self.reference, *others]

    def families(self) -> dict[str, list[str]]:
        """Family -> keys of its experts."""
        found: dict[str, list[str]] = {}
        for key, row in self.rows.items():
            if row.kind == "expert":
                found.setdefault(row.family, []).append(key)
        return found


def run_matrix(
    documents: DocumentScores,
    own: Mapping[str, str],
    labels: Mapping[str, str],
    parents: Mapping[str, str | None],
    bootstrap: Bootstrap | None = None,
    grown: Collection[str] = (),
) -> Matrix:
    """The matrix of a run.

    Args:
        own: language -> key of its expert. labels: key -> name for people. parents: key -> key of the model that it branched from.
        bootstrap: over the same models. grown: languages that the seed never read, which is noted.
    """
    rows = {}
    for key in documents.nats:
        scores = language_scores(documents, key)
        rows[key] = Row(
            labels.get(key, key.partition(":")[2] or key),
            key.partition(":")[0],
            {language: score.bits_per_byte for language, score in scores.items()},
            {language: score.perplexity for language, score in scores.items()},
            parents.get(key),
            [language for language in documents.languages if own.get(language) == key],
        )
    added = [language for language in documents.languages if language in grown]
    notes = [f"the seed never read {', '.join(added)}: all means have the gain of learning them in it"] if added else []
    return Matrix(rows, documents.languages, "seed", PER_BYTE, bootstrap, notes)


def forgetting_results(matrix: Matrix) -> dict[str, Any]:
    """Everything that follows from a matrix, as plain numbers; the keys are told above."""
    models = {}
    for key, row in matrix.rows.items():
        bases = dict.fromkeys(base for base in (matrix.reference, row.parent) if base in matrix.rows and base != key)
        change = {base: _change(matrix, key, base) for base in bases}
        models[key] = {
            "label": row.label,
            "kind": row.kind,
            "family": row.family,
            "parent": row.parent,
            "own": row.own,
            "bits": row.bits,
            "perplexity": row.perplexity,
            "change": change,
            "summary": {base: _summary(matrix, key, base, found) for base, found in change.items()},
        }
    found = {
        "unit": matrix.unit,
        "reference": matrix.reference,
        "languages": matrix.languages,
        "models": models,
        "choice": {family: _choice(matrix, experts) for family, experts in matrix.families().items()},
        "notes": matrix.notes,
    }
    return found | {"verdict": verdict(found)}


def _change(matrix: Matrix, key: str, base: str) -> dict[str, dict[str, Any]]:
    """By language: model minus base."""
    row, under, found = matrix.rows[key], matrix.rows[base], {}
    for language in matrix.languages:
        if language not in row.bits or language not in under.bits:
            continue
        cell: dict[str, Any] = {
            "bits": row.bits[language] - under.bits[language],
            "perplexity": row.perplexity[language] - under.perplexity[language],
            "perplexity_percent": 100 * (row.perplexity[language] / under.perplexity[language] - 1),
        }
        if matrix.bootstrap is not None:
            interval = matrix.bootstrap.language(key, language, base)
            cell |= {"low": interval.low, "high": interval.high}
        found[language] = cell
    return found


def _summary(matrix: Matrix, key: str, base: str, change: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A model's own languages and the others, where it has own ones; else all languages."""
    own = [language for language in change if language in matrix.rows[key].own]
    parts = {"own": own, "elsewhere": [language for language in change if language not in own]} if own else {"all": list(change)}
    return {name: _part(matrix, key, base, change, codes) for name, codes in parts.items() if codes}


def _part(matrix: Matrix, key: str, base: str, change: Mapping[str, Mapping[str, Any]], codes: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "languages": len(codes),
        "worse_in": sum(change[code]["bits"] > 0 for code in codes),
        "mean_bits": _mean([change[code]["bits"] for code in codes]),
        "mean_perplexity_percent": _mean([change[code]["perplexity_percent"] for code in codes]),
    }
    if matrix.bootstrap is not None:
        interval = matrix.bootstrap.mean(key, base, codes)
        found |= {"low": interval.low, "high": interval.high}
    for name, pick in (("best", min), ("worst", max)):
        code = pick(codes, key=lambda code: change[code]["perplexity_percent"])
        found[name] = {"language": code} | dict(change[code])
    return found


def _choice(matrix: Matrix, experts: Sequence[str]) -> dict[str, Any]:
    """What a choice of one expert a language is worth: right (`own`), best (`oracle`), wrong (any other with equal chance), blind.

    All are means over languages of bits minus those of the baseline. `wrong_costs` is wrong minus own, the regret of a mistake.
    `break_even_error` is the share of mistakes at which the gain of the own expert is used up: gain / wrong_costs.
    """
    rows = [matrix.rows[key] for key in experts]
    codes = [code for code in matrix.languages if all(code in row.bits for row in rows) and any(code in row.own for row in rows)]
    if not codes:
        return {"experts": len(rows), "languages": 0, "against": {}}
    languages = {}
    for code in codes:
        own = next(row for row in rows if code in row.own)
        wrong = [row.bits[code] for row in rows if row is not own]
        languages[code] = {
            "own": own.bits[code],
            "oracle": min(row.bits[code] for row in rows),
            "wrong": _mean(wrong) if wrong else own.bits[code],
            "blind": _mean([row.bits[code] for row in rows]),
        }
    means = {name: _mean([found[name] for found in languages.values()]) for name in ("own", "oracle", "wrong", "blind")}
    costs = means["wrong"] - means["own"]
    against: dict[str, dict[str, float | None]] = {}
    for base in matrix.baselines():
        under = matrix.rows[base].bits
        if not all(code in under for code in codes):
            continue
        level = _mean([under[code] for code in codes])
        gain = level - means["own"]
        against[base] = {name: value - level for name, value in means.items()}
        against[base]["break_even_error"] = None if gain <= 0 else 1.0 if costs <= gain else gain / costs
    return {
        "experts": len(rows),
        "languages": len(codes),
        "wrong_costs": costs,
        "own_is_best_in": sum(found["own"] <= found["oracle"] for found in languages.values()),
        "regret_of_own": means["own"] - means["oracle"],
        "regret_of_blind": means["blind"] - means["oracle"],
        "against": against,
        "by_language": languages,
    }


def verdict(found: Mapping[str, Any]) -> list[str]:
    """What the matrix says, in sentences."""
    models, reference = found["models"], found["reference"]
    against, unit = models[reference]["label"], found["unit"]
    sentences = []
    for family, choice in found["choice"].items():
        experts = [row for row in models.values() if row["kind"] == "expert" and row["family"] == family]
        parts = {
            part: [(row["summary"][reference][part], row["label"]) for row in experts if part in row["summary"].get(reference, {})]
            for part in ("own", "elsewhere")
        }
        name = f"{family}: " if len(found["choice"]) > 1 else ""
        if parts["own"]:
            best, label = min(parts["own"], key=lambda item: item[0]["best"]["perplexity_percent"])
            text = (
                f"{name}on their own languages the experts change the perplexity of the {against} model by {_mean_percent(parts['own'])} "
            )
            text += f"on average, at best {_percent(best['best']['perplexity_percent'])} ({label} on {best['best']['language']})"
            worst, label = max(parts["own"], key=lambda item: item[0]["worst"]["perplexity_percent"])
            if worst["worst"]["perplexity_percent"] > 0:
                text += f"; {label} is worse on its own {worst['worst']['language']} ({_percent(worst['worst']['perplexity_percent'])})"
            sentences.append(text + ".")
        if parts["elsewhere"]:
            worst, label = max(parts["elsewhere"], key=lambda item: item[0]["worst"]["perplexity_percent"])
            cells = sum(item["languages"] for item, _ in parts["elsewhere"])
            worse = sum(item["worse_in"] for item, _ in parts["elsewhere"])
            cell = worst["worst"]
            sentences.append(
                f"{name}on other languages the change is {_mean_percent(parts['elsewhere'])} on average, and a loss in {worse} of {cells} "
                f"cases; the worst is {label} on {cell['language']}: {_percent(cell['perplexity_percent'])} "
                f"({cell['perplexity']:+.1f} perplexity)."
            )
        told = choice["against"].get(reference)
        if told and choice["experts"] > 1:
            sentences.append(name + _choice_sentence(told, choice["wrong_costs"], against, unit))
    # variants by number of experts are in the matrix
    mixtures = [row for key, row in models.items() if row["kind"] == "mixture" and "@" not in key]
    sentences += [_mixture_sentence(row, reference, against, unit) for row in mixtures]
    return [text[0].upper() + text[1:] if len(found["choice"]) < 2 else text for text in sentences]


def _choice_sentence(told: Mapping[str, Any], costs: float, against: str, unit: str) -> str:
    gain = -told["own"]
    if told["break_even_error"] is None:
        return f"the right expert gains nothing against the {against} model ({told['own']:+.3f} {unit}): no router makes the experts pay."
    text = f"the right expert gains {gain:.3f} {unit} against the {against} model, a wrong one costs {costs:.3f} more than the right one"
    if told["break_even_error"] == 1:
        return text + ": even a router that is always wrong loses nothing."
    return text + f": a router that errs at random must do so in fewer than {100 * told['break_even_error']:.0f} % of languages to pay."


def _mixture_sentence(row: Mapping[str, Any], reference: str, against: str, unit: str) -> str:
    found = row["summary"][reference]["all"]
    cell = found["worst"]
    text = f"{row['label']}: {found['mean_bits']:+.3f} {unit} against the {against} model{_interval(found)}, "
    if found["worse_in"]:
        return text + f"worse in {found['worse_in']} of {found['languages']} languages, most in {cell['language']} ({cell['bits']:+.3f})."
    return text + f"worse in none of {found['languages']} languages; it forgets nothing."


def _interval(found: Mapping[str, Any]) -> str:
    return "" if found.get("low") is None else f" ({found['low']:+.3f} to {found['high']:+.3f})"


def _mean_percent(parts: Sequence[tuple[Mapping[str, Any], str]]) -> str:
    total = sum(item["languages"] for item, _ in parts)
    return _percent(sum(item["mean_perplexity_percent"] * item["languages"] for item, _ in parts) / total)


def _percent(value: float) -> str:
    return f"{value:+.1f} %"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
