"""Cells and tables of docs/results.md from the JSON of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Found = Mapping[str, Any]


def figure(found: Found, digits: int = 3) -> str:
    """`1.234 [1.210, 1.260]`, without the interval where there is none."""
    value = f"{found['value']:.{digits}f}"
    if found.get("low") is None:
        return value
    return f"{value} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def change(found: Found, digits: int = 3) -> str:
    """As `figure`, with a sign; bold where the interval lies on one side of zero."""
    value = _signed(found["value"], digits)
    if found.get("low") is None:
        return value
    told = f"**{value}**" if found["high"] < 0 or found["low"] > 0 else value
    return f"{told} [{_signed(found['low'], digits)}, {_signed(found['high'], digits)}]"


def _signed(value: float, digits: int) -> str:
    """A number with its sign, which zero does not have."""
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_language(run: Found) -> str:
    """Seed, dense and own expert in every language of the corpus, with what each has read of it."""
    rows = []
    dense, own = run["bits"]["dense"]["languages"], run["bits"]["own"]["languages"]
    difference = run["against"]["dense"]["own"]["languages"]
    for code, about in sorted(run["languages"].items(), key=lambda item: -(item[1]["train_tokens"] or 0)):
        if code not in difference:
            continue
        read = about["read"]
        share = f"{read['own'] / read['dense']:.2f}" if read["own"] and read["dense"] else "-"
        seed = f"{run['bits']['seed']['languages'][code]['value']:.3f}"
        rows.append(
            [code, f"{(about['train_tokens'] or 0) / 1e6:.2f}", about["own"], seed, f"{dense[code]['value']:.3f}"]
            + [f"{own[code]['value']:.3f}", change(difference[code]), share]
        )
    mean = run["bits"]
    rows.append(
        ["mean", "", "", *(f"{mean[model]['mean']['value']:.3f}" for model in ("seed", "dense", "own"))]
        + [change(run["against"]["dense"]["own"]["mean"]), ""]
    )
    heads = ["language", "corpus, M tokens", "own expert", "seed", "dense", "own", "own minus dense", "read, own / dense"]
    return table(heads, rows)


def by_clustering(runs: Mapping[str, Found], models: Mapping[str, str]) -> str:
    """Mean difference to the dense model of every way to use the experts, a row a run."""
    rows = []
    for name, run in runs.items():
        against = run["against"]["dense"]
        cells = [change(against[model]["mean"]) if model in against else "-" for model in models]
        best = min((model for model in models if model in against), key=lambda model: against[model]["mean"]["value"])
        worst = run["bits"][best]["worst"]
        rows.append(
            [name, *cells, f"{len(against[best]['better'])} / {len(against[best]['worse'])}", f"{worst['value']:.3f} ({worst['language']})"]
        )
    return table(["run", *models.values(), "languages better / worse", "worst language"], rows)


def routers(run: Found) -> str:
    """Accuracy and regret of every router."""
    rows = []
    for found in run["routers"].values():
        regret = found["regret"]
        rows.append(
            [found["label"], f"{found['accuracy_own']:.2f}", f"{found['accuracy_best']:.2f}", f"{found['weight_on_best']:.2f}"]
            + [change(regret[key]) for key in ("best-of-document", "best-of-language")]
            + [f"{found['calibration']['ece']:.2f}"]
        )
    heads = ["mixture", "arg max is own", "arg max is best", "weight on best", "regret, best of document", "best of language", "ECE"]
    return table(heads, rows)


def growth(run: Found) -> str:
    """Grown experts beside continued models, by language."""
    rows = []
    for found in run["growth"]["experts"]:
        against = found["against"]
        rows.append(
            [", ".join(found["languages"]), found["donor"], figure(found["bits"])]
            + [
                change(against[key]) if key else "-"
                for key in (
                    next((name for name in against if name.endswith("-lapt-dense")), ""),
                    next((name for name in against if name.endswith("-lapt-seed")), ""),
                    "dense",
                    next(iter(against)),
                )
            ]
        )
    return table(["language", "donor", "grown expert", "minus LAPT of dense", "minus LAPT of seed", "minus dense", "minus donor"], rows)


def old_languages(run: Found, models: Mapping[str, str], by_language: Found | None = None) -> str:
    """What growing, or continuing, did to the languages that were there before. `by_language`: the same with a centre for each language."""
    found = run["growth"]["old_languages"]
    rows = [[f"mixture, {label}", change(found[model])] for model, label in models.items() if model in found]
    if by_language:
        changed = by_language["growth"]["old_languages"]["mixture:tfidf"]
        rows.append([f"mixture, {models['mixture:tfidf']}, a centre for each language", change(changed)])
    for model, changed in found.items():
        if model.startswith("lapt:"):
            language, _, continued = model.removeprefix("lapt:").partition("-lapt-")
            rows.append([f"{continued}, continued on {language}", change(changed)])
    return table(["model", "change on the old languages"], rows)


def matrix(run: Found) -> str:
    """Every expert on every language: bits per byte minus the seed's, and the means over its own languages and all others."""
    seed = run["bits"]["seed"]["languages"]
    codes = [code for code in next(iter(run["matrix"].values())) if code in seed]
    rows = []
    for name, bits in run["matrix"].items():
        summary = run["forgetting"][f"expert:{name}"]
        means = [f"{summary[part]['mean_bits']:+.2f}" if part in summary else "-" for part in ("own", "elsewhere")]
        rows.append([name, *(f"{bits[code] - seed[code]['value']:+.2f}" for code in codes), *means])
    return table(["expert", *codes, "own", "elsewhere"], rows)


def parallel(runs: Mapping[str, Found], models: Mapping[str, str], name: str = "udhr") -> str:
    """As `by_clustering`, on a further set of texts."""
    found = {run: results["texts"][name]["against"]["dense"] for run, results in runs.items() if name in results.get("texts", {})}
    shown = {model: label for model, label in models.items() if any(model in against for against in found.values())}
    rows = [[run, *(change(against[model]["mean"]) if model in against else "-" for model in shown)] for run, against in found.items()]
    return table(["run", *shown.values()], rows)


def across_seeds(runs: Mapping[str, Found], models: Mapping[str, str]) -> str:
    """Mean difference to the dense model of the same training seed, and in how many languages it is better beyond chance."""
    rows = []
    for model, label in models.items():
        found = [run["against"]["dense"][model] for run in runs.values() if model in run["against"]["dense"]]
        if found:
            values = [each["mean"]["value"] for each in found]
            mean = sum(values) / len(values)
            spread = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else 0.0
            rows.append(
                [label, f"{mean:+.3f}", f"{spread:.4f}", ", ".join(f"{value:+.3f}" for value in values)]
                + [", ".join(str(len(each["better"])) for each in found)]
            )
    return table(["use", "mean", "standard deviation", "each", "languages better"], rows)


def ladder(run: Found) -> str:
    """Every rung: how good, how large, how fast."""
    rows = []
    for row in run["ladder"]["models"].values():
        speed = f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "-"
        rows.append(
            [row["label"], f"{row['mean_bits_per_byte']:.3f}", f"{row['worst_bits_per_byte']:.3f} ({row['worst_language']})"]
            + [f"{row['parameters'] / 1e6:.1f}", f"{row['active_parameters'] / 1e6:.1f}", speed]
            + [f"{row['training_tokens']:,}" if row["training_tokens"] is not None else ""]
        )
    return table(["rung", "bits per byte", "worst language", "M parameters", "M active", "tokens/s", "trained further on, tokens"], rows)


def tasks(run: Found) -> str:
    """Accuracy and standard error of every rung in every task."""
    names = sorted({task for found in run["tasks"].values() for task in found["results"]})
    rows = []
    for rung, found in run["tasks"].items():
        cells = [found["results"].get(name) for name in names]
        rows.append([rung, *(f"{cell['acc,none']:.2f} ± {cell['acc_stderr,none']:.2f}" if cell else "-" for cell in cells)])
    return table(["rung", *(name.removeprefix("evidence_xcopa_") for name in names)], rows)
