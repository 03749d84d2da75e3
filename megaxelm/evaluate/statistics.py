"""Statistics of a comparison: bits per byte, bootstrap intervals over documents, paired differences, means over languages, inequality.

```python
documents = DocumentScores.load(run / "evaluation/documents.npz")
bootstrap = Bootstrap(documents.nats, documents.num_bytes)
bootstrap.mean("dense")                   # Interval(value, low, high): macro mean over languages
bootstrap.mean("mixture:posterior", "dense")   # the difference, paired: both read the same documents
bootstrap.language("expert:de", "de", "seed")
```

What is resampled are whole documents, with replacement, within each language: tokens of one document depend on each other, and the set
of languages is given and not drawn. All models see the same resamples, so a difference has the interval of the paired comparison.
Intervals are percentiles (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3); they tell what another draw of
documents would change, and nothing of another training seed (`across_seeds`). With fewer than about twenty documents they are somewhat
too short.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
_CELLS = 4_000_000
"""Numbers of draws that are held at one time."""

ByLanguage = Mapping[str, ArrayLike]
"""Language -> [documents]."""


@dataclass(frozen=True)
class Interval:
    """A figure, and its percentile interval. `low` and `high` are None where there is a single document to draw from."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def sign(self) -> int:
        """-1 or 1 where the whole interval lies on one side of zero, else 0: the difference is not told from chance."""
        if self.low is None or self.high is None:
            return 0
        return -1 if self.high < 0 else 1 if self.low > 0 else 0

    def to_json(self) -> dict[str, float | None]:
        """Plain numbers."""
        return {"value": self.value, "low": self.low, "high": self.high}


def bits_per_byte(nats: ArrayLike, num_bytes: ArrayLike) -> float:
    """Bits per byte of documents taken together: sum of nats / ln 2 / sum of bytes. Not the mean of the documents' own figures."""
    return math.fsum(np.atleast_1d(np.asarray(nats, dtype=np.float64))) / math.log(2) / float(np.sum(num_bytes))


def bootstrap_interval(
    nats: ByLanguage | ArrayLike,
    num_bytes: ByLanguage | ArrayLike,
    base: ByLanguage | ArrayLike | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Bits per byte with its interval: of one language (arrays [documents]), or the macro mean over languages (mappings of them).

    Args:
        nats: negative log-likelihood of each document.
        base: nats of another model on the same documents; the figure is then `nats` minus `base`, paired.
    """
    models = {"model": nats} if base is None else {"model": nats, "base": base}
    named = {name: found if isinstance(found, Mapping) else {"": found} for name, found in models.items()}
    sizes = num_bytes if isinstance(num_bytes, Mapping) else {"": num_bytes}
    return Bootstrap(named, sizes, resamples, confidence, seed).mean("model", None if base is None else "base")


class Bootstrap:
    """Many models on the same documents, resampled together.

    Args:
        nats: model -> language -> [documents]. num_bytes: language -> [documents]; languages that a model lacks are left out for it.
        seed: the draws of a language follow from it and the language's name alone, so other languages do not change them.
    """

    def __init__(
        self,
        nats: Mapping[str, ByLanguage],
        num_bytes: ByLanguage,
        resamples: int = RESAMPLES,
        confidence: float = CONFIDENCE,
        seed: int = 0,
    ) -> None:
        if not 0 < confidence < 1 or resamples < 1:
            raise ValueError(f"confidence = {confidence}, resamples = {resamples}: a share between 0 and 1, and at least one resample")
        self.resamples, self.confidence, self.seed = resamples, confidence, seed
        self.languages = list(num_bytes)
        self._points: dict[tuple[str, str], float] = {}
        self._draws: dict[tuple[str, str], NDArray[np.float64] | None] = {}
        for language, given in num_bytes.items():
            sizes = np.asarray(given, dtype=np.float64)
            names = [model for model, found in nats.items() if language in found]
            rows = (
                np.stack([np.asarray(nats[model][language], dtype=np.float64) for model in names]) if names else np.empty((0, len(sizes)))
            )
            if rows.shape[1:] != sizes.shape:
                raise ValueError(f"{language}: nats of {rows.shape[1]} documents, bytes of {len(sizes)}")
            drawn = _resampled(rows, sizes, resamples, [seed, zlib.crc32(language.encode())]) if len(sizes) > 1 else None
            for number, model in enumerate(names):
                self._points[model, language] = bits_per_byte(rows[number], sizes)
                self._draws[model, language] = None if drawn is None else drawn[number]

    def languages_of(self, *models: str | None) -> list[str]:
        """The languages that all the models have read."""
        asked = [model for model in models if model is not None]
        return [language for language in self.languages if all((model, language) in self._points for model in asked)]

    def language(self, model: str, language: str, base: str | None = None) -> Interval:
        """Bits per byte of a model in a language, or its difference to `base`."""
        return self._interval(*self._column(model, language, base))

    def mean(self, model: str, base: str | None = None, languages: Sequence[str] | None = None) -> Interval:
        """Macro mean over languages, each counting the same, or that of the differences to `base`."""
        return self._over(model, base, languages, np.mean)

    def worst(self, model: str, base: str | None = None, languages: Sequence[str] | None = None) -> Interval:
        """The largest bits per byte of any language, or the largest difference to `base`; the language may differ from draw to draw."""
        return self._over(model, base, languages, np.max)

    def gini(self, model: str, base: str, languages: Sequence[str] | None = None) -> Interval:
        """Gini coefficient over languages of the differences to `base` (`gini`; it is the same for gains and for losses)."""
        return self._over(model, base, languages, gini)

    def _column(self, model: str, language: str, base: str | None) -> tuple[float, NDArray[np.float64] | None]:
        value, drawn = self._points[model, language], self._draws[model, language]
        if base is None:
            return value, drawn
        under = self._draws[base, language]
        return value - self._points[base, language], None if drawn is None or under is None else drawn - under

    def _over(self, model: str, base: str | None, languages: Sequence[str] | None, figure: Callable[..., Any]) -> Interval:
        columns = [self._column(model, language, base) for language in languages or self.languages_of(model, base)]
        value = float(figure(np.array([value for value, _ in columns]), axis=0))
        rows = [drawn for _, drawn in columns if drawn is not None]
        if len(rows) < len(columns):
            return Interval(value)
        return self._interval(value, figure(np.stack(rows), axis=0))

    def _interval(self, value: float, drawn: NDArray[np.float64] | None) -> Interval:
        if drawn is None:
            return Interval(value)
        outside = (1 - self.confidence) / 2
        low, high = np.quantile(drawn, [outside, 1 - outside])
        return Interval(value, float(low), float(high))


def _resampled(rows: NDArray[np.float64], sizes: NDArray[np.float64], resamples: int, seed: Sequence[int]) -> NDArray[np.float64]:
    """Bits per byte [models, resamples] of nats [models, documents] and bytes [documents]."""
    generator = np.random.default_rng(seed)
    count = len(sizes)
    found = np.empty((len(rows), resamples))
    each = max(1, _CELLS // count)
    for begin in range(0, resamples, each):
        number = min(each, resamples - begin)
        drawn = generator.integers(0, count, (number, count)) + count * np.arange(number)[:, None]
        times = np.bincount(drawn.ravel(), minlength=number * count).reshape(number, count).astype(np.float64)
        found[:, begin : begin + number] = (rows @ times.T) / (times @ sizes) / math.log(2)
    return found


def gini(values: ArrayLike, axis: int = 0) -> NDArray[np.float64] | float:
    """Gini coefficient of gains that may be losses: 0 where all are the same, 1 where one has it all.

    G = sum_ij |x_i - x_j| / (2 (n - 1) sum_i |x_i|), the normalisation of Raffinetti, Siletti and Vernizzi (On the Gini coefficient
    normalization when attributes with negative values are considered, Statistical Methods & Applications 24, 2015). For gains without
    a loss it is the usual coefficient times n / (n - 1). With one value, or where nothing is gained or lost, it is 0.
    """
    ordered = np.sort(np.moveaxis(np.asarray(values, dtype=np.float64), axis, 0), axis=0)
    count = len(ordered)
    total = np.abs(ordered).sum(0)
    if count < 2:
        return np.zeros_like(total)
    # sum over pairs i < j of x_(j) - x_(i): each value counts by its rank
    ranks = (2 * np.arange(1, count + 1) - count - 1).reshape(-1, *[1] * (ordered.ndim - 1))
    spread = (ranks * ordered).sum(0)
    return np.where(total > 0, spread / np.where(total > 0, (count - 1) * total, 1.0), 0.0)


@dataclass(frozen=True)
class Spread:
    """A figure over several trainings: mean, standard deviation (n - 1), interval of the mean by Student's t; None after one training."""

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    runs: int


def across_seeds(values: Iterable[float], confidence: float = CONFIDENCE) -> Spread:
    """Mean and spread of a figure over trainings that differ in nothing but their seed.

    Raises:
        ValueError: no value.
    """
    found = np.array(list(values), dtype=np.float64)
    if not len(found):
        raise ValueError("no value: give the figure of at least one training")
    mean = float(found.mean())
    if len(found) == 1:
        return Spread(mean, None, None, None, 1)
    from scipy.stats import t

    deviation = float(found.std(ddof=1))
    half = float(t.ppf((1 + confidence) / 2, len(found) - 1)) * deviation / math.sqrt(len(found))
    return Spread(mean, deviation, mean - half, mean + half, len(found))
