"""How much each expert counts in an average: what `--weights` means."""

from __future__ import annotations

from collections.abc import Callable

from megaxelm.ensemble.scoring import weighted_scores
from megaxelm.errors import MergeError
from megaxelm.merge.material import Material
from megaxelm.merge.sample import SampleText, sample_texts

SAMPLE_TOKENS = 20_000
"""Tokens of sample text that a router's mean weights are taken over."""


def average_weights(
    material: Material, wanted: str, router: str | None, length: int, sample_tokens: int = SAMPLE_TOKENS
) -> dict[str, float]:
    """Weights of the experts by name, of sum 1.

    Args:
        wanted: `uniform`; `language:sw`, by the tokens of the language that each expert was trained on; `posterior:sw`, the mean weights
            of the posterior router on the language's sample; `router`, those of a router on the sample of all languages, each language the
            same; or `name=0.7,other=0.3`.
        router: for `router`: its name; None: the ensemble's default.
        length: tokens that a document of the sample is cut at.

    Raises:
        MergeError: not one of these, a language or expert that there is not, or weights that are no weights.
    """
    kind, _, code = wanted.partition(":")
    ways: dict[str, Callable[[], list[float]]] = {
        "uniform": lambda: [1.0] * len(material.names),
        "language": lambda: _by_tokens(material, code),
        "posterior": lambda: _mean_weights(material, "posterior", sample_texts(material, sample_tokens, length, code)),
        "router": lambda: _mean_weights(material, router, sample_texts(material, sample_tokens, length)),
    }
    if "=" in wanted:
        weights = _given(material, wanted)
    elif kind in ways and bool(code) == (kind in ("language", "posterior")):
        weights = ways[kind]()
    else:
        raise MergeError(
            f"--weights {wanted}: choose uniform, router, language:CODE, posterior:CODE (CODE a language, as in language:sw), or weights "
            f"by name, as in {material.names[0]}=0.7,{material.names[1]}=0.3"
        )
    total = sum(weights)
    if not total > 0 or min(weights) < 0:
        raise MergeError(f"--weights {wanted}: weights must not be negative, and at least one is above 0")
    return {name: weight / total for name, weight in zip(material.names, weights, strict=True)}


def _given(material: Material, wanted: str) -> list[float]:
    found: dict[str, float] = {}
    for part in wanted.split(","):
        name, _, text = (piece.strip() for piece in part.partition("="))
        if name not in material.names or name in found:
            what = "is named twice" if name in found else f"is no expert; there are {', '.join(material.names)}"
            raise MergeError(f"--weights {wanted}: {name!r} {what}")
        try:
            found[name] = float(text)
        except ValueError:
            raise MergeError(f"--weights {wanted}: {text!r} is no number") from None
        if not 0 <= found[name] < float("inf"):
            raise MergeError(f"--weights {wanted}: the weight of {name} must be 0 or above")
    return [found.get(name, 0.0) for name in material.names]


def _by_tokens(material: Material, language: str) -> list[float]:
    tokens = material.ensemble.languages
    found = [float(tokens.get(name, {}).get(language, 0)) for name in material.names]
    if not any(found):
        known = sorted({code for counts in tokens.values() for code in counts})
        raise MergeError(f"--weights language:{language}: no expert was trained on it; there are {', '.join(known)}")
    return found


def _mean_weights(material: Material, router: str | None, texts: list[SampleText]) -> list[float]:
    """Mean weight of each expert: over the tokens of a language, then over languages. What a fallback takes is left out."""
    ensemble = material.ensemble
    chosen = ensemble.router(router)
    scores = weighted_scores(
        ensemble.passing_decoders,
        [text.ids for text in texts],
        ensemble.tokenizer.start_id,
        chosen,
        [text.language for text in texts],
        progress=True,
    )
    by_language: dict[str, list[tuple[list[float], int]]] = {}
    for text, score in zip(texts, scores, strict=True):
        sums = score.log_w.exp().sum(0)[: len(material.names)].tolist()
        by_language.setdefault(text.language, []).append((sums, len(text.ids)))
    found = [0.0] * len(material.names)
    for rows in by_language.values():
        tokens = sum(count for _, count in rows)
        for number in range(len(found)):
            found[number] += sum(sums[number] for sums, _ in rows) / tokens
    return found
