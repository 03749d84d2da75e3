"""The verdict of a run in words: own experts against the dense model, whatever the outcome."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from megaxelm.report.data import RunData


@dataclass(frozen=True)
class Verdict:
    """Headline, the sentences under it, and the differences own minus dense in bits per byte by language (NaN: not known)."""

    headline: str
    sentences: list[str]
    differences: dict[str, float]
    equal_tokens: bool | None
    mean_difference: float = math.nan


def judge(run: RunData) -> Verdict:
    """Compare each language's own expert with the dense model. The numbers are those of the table, not a stored verdict."""
    own, dense = run.model("own"), run.model("dense")
    if own is None or dense is None:
        return Verdict(*_without_dense(run), {}, None)
    differences = {language.code: own.bits[language.code] - dense.bits[language.code] for language in run.languages}
    known = {code: value for code, value in differences.items() if math.isfinite(value)}
    better = [code for code, value in known.items() if value < 0]
    equal = run.account.equal if run.account else None
    means = own.mean, dense.mean
    if 0 < len(known) < len(differences):
        # Means over different sets of languages must not be compared.
        means = statistics.fmean(own.bits[code] for code in known), statistics.fmean(dense.bits[code] for code in known)
    sentences = [_mean_sentence(*means), *_elsewhere(known, len(differences)), _token_sentence(run), *_routing_sentences(run)]
    sentences += _grown_sentences(run)
    return Verdict(_headline(len(better), len(known), len(differences), *means), sentences, differences, equal, means[0] - means[1])


def format_bits(value: float, signed: bool = False) -> str:
    """Bits per byte with three decimals, more where three would show a difference as zero; a true minus sign; `n/a` for NaN."""
    if not math.isfinite(value):
        return "n/a"
    decimals = 3
    while signed and value and round(abs(value), decimals) == 0 and decimals < 8:
        decimals += 1
    return f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "−")


def format_count(value: float | None) -> str:
    """A count with its magnitude: 950, 12.3 k, 1.05 M, 21 G (with a space that does not break); `n/a` for None."""
    if value is None:
        return "n/a"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.99995:
            return (
                f"{value / size:.3g}\N{NO-BREAK SPACE}{unit}"
                if abs(value) < 999.5 * size
                else f"{value / size:,.0f}\N{NO-BREAK SPACE}{unit}"
            )
    return f"{value:.0f}"


def _headline(better: int, known: int, total: int, own_mean: float, dense_mean: float) -> str:
    if not known:
        return "Own experts and dense model cannot be compared: their scores are not known"
    if better == known < total:
        return f"The own expert beats the dense model in all {known} languages that can be compared, of {total}"
    if better == known:
        return f"Every language's own expert beats the dense model ({known} of {known})"
    if better == 0:
        return f"The own expert beats the dense model in none of {known} languages"
    text = f"The own expert beats the dense model in {better} of {known} languages"
    return text + (", and on average" if own_mean < dense_mean else ", but the dense model is better on average")


def _mean_sentence(own: float, dense: float) -> str:
    if not (math.isfinite(own) and math.isfinite(dense)):
        return "The means over the languages are not known."
    difference = own - dense
    if difference == 0:
        compared = "the same"
    else:
        compared = f"{format_bits(abs(difference), True)[1:]} ({abs(difference) / dense:.1%}) {'fewer' if difference < 0 else 'more'}"
    return (
        f"Mean over the languages, in bits per byte of held-out text (lower is better): own expert {format_bits(own)}, "
        f"dense model {format_bits(dense)}; the own expert needs {compared}."
    )


def _elsewhere(known: dict[str, float], total: int) -> list[str]:
    worse = sorted(((value, code) for code, value in known.items() if value > 0), reverse=True)
    sentences = []
    if worse:
        sentences.append("Not better in " + ", ".join(f"{code} (by {format_bits(value, True)[1:]})" for value, code in worse) + ".")
    equal = [code for code, value in known.items() if value == 0]
    if equal:
        sentences.append(f"Exactly equal in {', '.join(equal)}.")
    if len(known) < total:
        sentences.append(
            f"Not comparable in {total - len(known)} of {total} languages, for want of a score; the means above leave these out."
        )
    return sentences


def _token_sentence(run: RunData) -> str:
    account = run.account
    if account is None or account.equal is None:
        return "Whether both sides were trained on equal numbers of tokens is not known, so this may not be a fair comparison."
    dense, experts = format_count(account.dense), format_count(account.experts_total)
    if account.equal:
        return f"Both sides got equal training tokens after the branch: dense {dense}, all experts together {experts}."
    return f"The comparison is NOT equal: after the branch the dense model got {dense} training tokens, all experts together {experts}."


def _routing_sentences(run: RunData) -> list[str]:
    """What the choice of expert costs: the best mixture, and the worst expert."""
    mixtures = [model for model in run.models if model.key.startswith("mixture-") and math.isfinite(model.mean)]
    sentences = []
    if mixtures:
        best = min(mixtures, key=lambda model: model.mean)
        told = "is told the language" if best.key == "mixture-language" else "is not told the language"
        sentences.append(f"The best mixture ({best.label}) reaches {format_bits(best.mean)}; it {told}.")
    worst = run.model("worst")
    if worst is not None and math.isfinite(worst.mean) and len(run.experts) > 1:
        sentences.append(f"The choice of expert matters: with the worst expert of each language it would be {format_bits(worst.mean)}.")
    return sentences


def _grown_sentences(run: RunData) -> list[str]:
    """Languages that were added are another comparison, since the dense model has not read them."""
    if not run.grown:
        return []
    codes = ", ".join(language.code for language in run.grown)
    return [f"Added later, and not in these figures: {codes}. The dense model never read them; they have a table of their own."]


def _without_dense(run: RunData) -> tuple[str, list[str]]:
    own, seed = run.model("own"), run.model("seed")
    sentences = ["Without a dense model trained on the same tokens nobody can say whether the experts were worth it."]
    if own is not None and seed is not None:
        sentences.append(
            f"Mean over the languages, in bits per byte of held-out text (lower is better): own expert {format_bits(own.mean)}, "
            f"seed {format_bits(seed.mean)}; but the experts saw more text than the seed."
        )
    return "There is no dense baseline to compare with", sentences + _routing_sentences(run) + _grown_sentences(run)
