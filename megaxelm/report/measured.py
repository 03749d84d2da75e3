"""What the report reads of `forgetting`, `routers` and `statistics` in `evaluation/results.json`; other keys are for other readers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Interval(_Part):
    """A figure with its interval; None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


class Change(_Part):
    """One cell: a model minus another in one language. `low`, `high`: interval of `bits`."""

    bits: float
    perplexity: float
    perplexity_percent: float
    low: float | None = None
    high: float | None = None

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero; True where there is none."""
        return self.low is None or self.high is None or self.low > 0 or self.high < 0


class Cell(Change):
    """A change and its language."""

    language: str


class Summary(_Part):
    """A model over its own languages, the others, or all."""

    languages: int
    worse_in: int
    mean_bits: float
    mean_perplexity_percent: float
    low: float | None = None
    high: float | None = None
    best: Cell
    worst: Cell


class MeasuredModel(_Part):
    """A row of the forgetting matrix; changes and summaries by the model that they are told against."""

    label: str
    kind: str
    family: str = ""
    parent: str | None = None
    own: list[str]
    change: dict[str, dict[str, Change]]
    summary: dict[str, dict[str, Summary]]


class Worth(_Part):
    """What choosing is worth against one baseline, in bits."""

    own: float
    oracle: float
    wrong: float
    blind: float
    break_even_error: float | None


class Choice(_Part):
    """A family of experts that one chooses among."""

    experts: int
    languages: int
    against: dict[str, Worth]


class Forgetting(_Part):
    """The forgetting matrix with what follows from it."""

    unit: Literal["bits per byte", "bits per token"]
    reference: str
    languages: list[str]
    models: dict[str, MeasuredModel]
    choice: dict[str, Choice]
    verdict: list[str]
    notes: list[str] = []


class Bin(_Part):
    """One bin of the reliability diagram; None where no token fell into it."""

    share: float
    weight: float | None
    frequency: float | None


class Calibration(_Part):
    """Whether the heaviest weight says how often it is right."""

    ece: float
    bins: list[Bin]


class Band(_Part):
    """A stretch of the texts that ends at token `to` (None: has no end); figures are None where no text is so long."""

    to: int | None
    tokens: int
    accuracy_own: float | None
    accuracy_best: float | None
    regret_bits_per_token: float | None


class RouterRow(_Part):
    """One mixture and its router."""

    label: str
    accuracy_own: float
    accuracy_best: float
    weight_on_best: float
    regret: dict[str, Interval]
    calibration: Calibration
    by_position: list[Band]


class TextScore(_Part):
    """A model on a further set of texts in one language."""

    bits: float
    """Of all texts together."""
    bits_per_byte: float


class TextModel(_Part):
    """A model on a further set of texts."""

    label: str
    languages: dict[str, TextScore]


class TextLanguage(_Part):
    """Size of a further set of texts in one language."""

    code: str
    texts: int
    bytes: int


class TextSet(_Part):
    """A further set of texts."""

    languages: list[TextLanguage]
    models: dict[str, TextModel]


class WorstLanguage(Interval):
    """The largest difference, and where it is."""

    language: str


class Difference(_Part):
    """Two columns of the comparison, paired."""

    model: str
    base: str
    mean: Interval
    worst: WorstLanguage
    gini_of_gains: Interval
    better: list[str]
    worse: list[str]
    unclear: list[str]


class Statistics(_Part):
    """Differences with their intervals."""

    resamples: int
    confidence: float
    differences: list[Difference]


_Read = TypeVar("_Read")


def read_part(values: Mapping[str, Any], key: str, kind: type[_Read]) -> _Read | None:
    """The part `key` of the results; None where it is absent, as in runs that were evaluated before it was made.

    Raises:
        ValueError: it is there and damaged; the text names the field.
    """
    if values.get(key) is None:
        return None
    try:
        return TypeAdapter(kind).validate_python(values[key])
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"`{'.'.join(map(str, (key, *first['loc'])))}`: {first['msg'].lower()}") from None
