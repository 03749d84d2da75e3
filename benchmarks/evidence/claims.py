"""The claims of the paper, each judged by a rule on the figures of the runs.

A claim holds where the intervals say so, does not where they say the opposite, and cannot be told where zero lies in them, or where a run
that it needs is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.evidence.tables import change

Found = Mapping[str, Any]
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
FORGOTTEN = 0.005
"""Bits per byte. The upper end of an interval has to lie below it for a language to count as not forgotten."""


@dataclass(frozen=True)
class Claim:
    """A claim, the verdict, and the figures behind it."""

    text: str
    verdict: str
    by: str


def judge(runs: Mapping[str, Found]) -> list[Claim]:
    """All claims that the runs at hand can say something of."""
    base = runs["typology-8"]
    seeds = [run for name, run in runs.items() if name.startswith("typology-8-seed")]
    found = [_all_languages(base, seeds), _not_rich_only(base)]
    found += [_clusters_matter(base, runs["random-8"])] if "random-8" in runs else []
    found += [_typology_or_text(base, runs["tfidf-8"])] if "tfidf-8" in runs else []
    found += [_rounds(runs["typology-16"], runs["rounds"])] if {"typology-16", "rounds"} <= set(runs) else []
    found.append(_wrong_choice(base))
    found += [_no_forgetting(runs["grown"], runs.get("grown-centres")), _better_than_lapt(runs["grown"])] if "grown" in runs else []
    found += [_downstream(base)] if "tasks" in base else []
    return found


def exposure(run: Found) -> str:
    """How gains go with what was read more of a language, in a sentence."""
    ratios, gains = _ratios(run)
    if len(ratios) < 3:
        return "Too few languages to tell whether gains go with it."
    less = [(ratio, gain) for ratio, gain in zip(ratios, gains, strict=True) if ratio < 1]
    text = f"Gain and that ratio correlate with r = {np.corrcoef(np.log(ratios), gains)[0, 1]:.2f} (ratio in logs)."
    if less:
        won, mean = sum(gain > 0 for _, gain in less), np.mean([gain for _, gain in less])
        text += (
            f" In {len(less)} languages the expert has read *less* than the dense model; it is better in {won} of them, by {mean:.3f} "
            "in the mean."
        )
    return text


def _ratios(run: Found) -> tuple[np.ndarray, np.ndarray]:
    difference = run["against"]["dense"]["own"]["languages"]
    codes = [code for code in difference if run["languages"][code]["read"]["own"] and run["languages"][code]["read"]["dense"]]
    read = [run["languages"][code]["read"] for code in codes]
    return np.array([row["own"] / row["dense"] for row in read]), np.array([-difference[code]["value"] for code in codes])


def _told(found: Found) -> str:
    """Holds where the whole interval is below zero, fails where it is above."""
    return HOLDS if found["high"] < 0 else FAILS if found["low"] > 0 else OPEN


def _all_languages(run: Found, seeds: Sequence[Found]) -> Claim:
    """Judged on the run; what other training seeds say stands beside it."""
    found = run["against"]["dense"]["own"]
    count = len(found["languages"])
    verdict = HOLDS if len(found["better"]) == count else FAILS if found["worse"] else OPEN
    worse = f"; worse in {', '.join(found['worse'])}" if found["worse"] else ""
    others = [other["against"]["dense"]["own"] for other in seeds]
    told = [f"{len(other['better'])} better, {len(other['worse'])} worse" for other in others]
    beside = f"; with other training seeds {', '.join(told)}" if told else ""
    return Claim(
        "At the same number of training tokens X-ELM beats the dense model in all 16 languages (k = 8, own expert)",
        verdict,
        f"better in {len(found['better'])} of {count} beyond chance{worse}; mean {change(found['mean'])} bits per byte{beside}",
    )


def _not_rich_only(run: Found) -> Claim:
    languages = run["against"]["dense"]["own"]["languages"]
    ordered = sorted(languages, key=lambda code: run["languages"][code]["train_tokens"] or 0)
    half = len(ordered) // 2
    poor, rich = (np.mean([languages[code]["value"] for code in codes]) for codes in (ordered[:half], ordered[half:]))
    verdict = HOLDS if poor < 0 and all(languages[code]["high"] < 0 for code in ordered[:half]) else FAILS if poor >= 0 else OPEN
    gini = run["against"]["dense"]["own"]["gini"]["value"]
    return Claim(
        "The gain is not only for rich languages",
        verdict,
        f"mean {poor:+.3f} in the {half} languages with the least text, {rich:+.3f} in the others; Gini of the gains {gini:.2f}",
    )


def _clusters_matter(run: Found, control: Found) -> Claim:
    ours, random = (found["against"]["dense"]["mixture:posterior"]["mean"] for found in (run, control))
    apart = ours["high"] < random["low"]
    return Claim(
        "It is the clusters that matter, and not that there are k models (random clusters as control, posterior mixture)",
        HOLDS if apart else FAILS if random["high"] < ours["low"] else OPEN,
        f"typology {change(ours)}, random {change(random)} against dense",
    )


def _typology_or_text(run: Found, text: Found) -> Claim:
    ours, other = (found["against"]["dense"]["mixture:posterior"]["mean"] for found in (run, text))
    return Claim(
        "Typological clusters are at least as good as TF-IDF clusters (k = 8, posterior mixture)",
        HOLDS if ours["high"] < other["low"] else FAILS if other["high"] < ours["low"] else OPEN,
        f"typology {change(ours)}, TF-IDF {change(other)} against dense",
    )


def _rounds(flat: Found, rounds: Found) -> Claim:
    ours, other = (found["against"]["dense"]["own"]["mean"] for found in (rounds, flat))
    return Claim(
        "Rounds down the tree (4, 8, 16) beat 16 experts branched from the seed at the same tokens",
        HOLDS if ours["high"] < other["low"] else FAILS if other["high"] < ours["low"] else OPEN,
        f"own expert, rounds {change(ours)}, flat {change(other)} against dense",
    )


def _wrong_choice(run: Found) -> Claim:
    gain = -run["against"]["seed"]["own"]["mean"]["value"]
    matrix, own = run["matrix"], {code: about["own"] for code, about in run["languages"].items()}
    seed = run["bits"]["seed"]["languages"]
    others = np.mean(
        [bits[code] - seed[code]["value"] for name, bits in matrix.items() for code in seed if own.get(code) not in (None, name)]
    )
    return Claim(
        "A wrong choice of expert costs more than a right one wins, so the router must be measured",
        HOLDS if others > gain else FAILS,
        f"against the seed the own expert wins {gain:.3f}, another one loses {others:.3f} in the mean",
    )


def _no_forgetting(run: Found, by_language: Found | None) -> Claim:
    changes = run["growth"]["old_languages"]
    routers = {name: changes[f"mixture:{name}"] for name in ("language", "posterior", "tfidf")}
    kept = [name for name, found in routers.items() if found["high"] < FORGOTTEN]
    verdict = HOLDS if len(kept) == len(routers) else f"{HOLDS} in part" if kept else FAILS
    lost = np.mean([found["value"] for name, found in changes.items() if name.endswith("-lapt-dense")])
    told = {"language": "the language router", "posterior": "the posterior", "tfidf": "TF-IDF, whose space never saw the new languages"}
    changed = "; ".join(f"{change(routers[name])} with {told[name]}" for name in routers)
    remedy = ""
    if by_language:
        remedy = f" ({change(by_language['growth']['old_languages']['mixture:tfidf'])} with a centre for each language, `ensemble.centres`)"
    return Claim(
        f"New languages are added without forgetting (old languages lose less than {FORGOTTEN} bits per byte, with every router)",
        verdict,
        f"old languages change by {changed}{remedy}. A dense model that is continued: {lost:+.3f}",
    )


def _better_than_lapt(run: Found) -> Claim:
    rows = {
        ", ".join(found["languages"]): next(value for key, value in found["against"].items() if key.endswith("-lapt-dense"))
        for found in run["growth"]["experts"]
    }
    better, worse = ([name for name, row in rows.items() if _told(row) == verdict] for verdict in (HOLDS, FAILS))
    return Claim(
        "A grown expert is better on the new language than the dense model continued (LAPT)",
        HOLDS if len(better) == len(rows) else FAILS if len(worse) > len(rows) / 2 else OPEN,
        f"better in {len(better)} of {len(rows)}, worse in {len(worse)}: "
        + "; ".join(f"{name} {change(row)}" for name, row in rows.items()),
    )


def _downstream(run: Found) -> Claim:
    found = run["tasks"]
    gaps = []
    for task, mixture in found["mixture"]["results"].items():
        dense = found["dense"]["results"][task]
        gaps.append((mixture["acc,none"] - dense["acc,none"], np.hypot(mixture["acc_stderr,none"], dense["acc_stderr,none"])))
    mean = float(np.mean([gap for gap, _ in gaps]))
    error = float(np.sqrt(np.sum([error**2 for _, error in gaps])) / len(gaps))
    return Claim(
        "The gain carries to downstream tasks (XCOPA)",
        HOLDS if mean > 2 * error else FAILS if mean < -2 * error else OPEN,
        f"accuracy of the mixture minus dense {mean:+.3f} ± {error:.3f} (standard error) over {len(gaps)} languages",
    )
