"""What the report knows of a run, typed; `load.py` fills it from the run directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megaxelm.report.measured import Forgetting, RouterRow, Statistics, TextSet


@dataclass(frozen=True)
class Language:
    """One evaluated language: `own` is the expert whose cluster holds most of it; sizes are of the held-out text."""

    code: str
    own: str
    documents: int
    bytes: int
    tokens: int


@dataclass(frozen=True)
class Model:
    """One column of the comparison: bits per byte and perplexity per token by language."""

    key: str
    label: str
    bits: dict[str, float]
    perplexity: dict[str, float]
    mean: float
    worst_language: str
    worst_bits: float


@dataclass(frozen=True)
class Member:
    """One node of the lineage graph. `parent` is None for a root; tokens and steps are its own, without its ancestors'; `tokens_seen` has
    theirs too. `round` counts the branches down from the seed. `folder` is that of its training, relative to the run."""

    name: str
    parent: str | None
    kind: str
    languages: str
    tokens: int | None
    steps: int | None
    weights: str | None
    round: int | None = None
    tokens_seen: int | None = None
    folder: str = ""


@dataclass(frozen=True)
class Curve:
    """Training metrics of one member in order of steps; `loss` in nats per token, `tokens` counted since its branch."""

    steps: list[int]
    tokens: list[float]
    loss: list[float]
    tokens_per_second: float | None
    """Median over the lines."""
    seconds: float | None
    """Time in training steps, over all processes of a resumed training."""
    skipped_lines: int = 0


@dataclass(frozen=True)
class Cluster:
    """One part of the corpus. `languages` holds the bytes of text by language, over the whole corpus."""

    name: str
    languages: dict[str, int]
    forced: bool


@dataclass(frozen=True)
class Clusters:
    """How the corpus was divided; `linkage` are scipy's linkage rows over `languages`, None when there is no tree."""

    partitioner: str
    method: str
    clusters: list[Cluster]
    languages: list[str]
    linkage: list[list[float]] | None
    no_linkage_reason: str
    notes: list[str]


@dataclass(frozen=True)
class Account:
    """Training tokens: `equal` says whether the dense model and all experts together got the same."""

    seed: int | None
    dense: int | None
    experts: dict[str, int]
    experts_total: int | None
    equal: bool | None


@dataclass(frozen=True)
class CorpusLanguage:
    """Size of one language: documents and UTF-8 bytes of text, tokens of the index."""

    code: str
    train_documents: int | None
    train_bytes: int | None
    valid_documents: int | None
    valid_bytes: int | None
    tokens: int | None


@dataclass(frozen=True)
class RunData:
    """Everything the page is made from.

    `languages` are those that everything was trained on, `grown` those that were added later, which only `experts` and `continued` have
    read; `models` are compared on `languages`, `continued` (LAPT) on `grown`.
    """

    name: str
    languages: list[Language]
    models: list[Model]
    experts: dict[str, dict[str, float]]
    settings: dict[str, Any]
    account: Account | None = None
    members: dict[str, Member] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    clusters: Clusters | None = None
    corpus: list[CorpusLanguage] = field(default_factory=list)
    sources: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    recipe_text: str | None = None
    forgetting: Forgetting | None = None
    routers: dict[str, RouterRow] = field(default_factory=dict)
    statistics: Statistics | None = None
    texts: dict[str, TextSet] = field(default_factory=dict)
    grown: list[Language] = field(default_factory=list)
    continued: list[Model] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def model(self, key: str) -> Model | None:
        """The model with this key (`seed`, `dense`, `own`, `mixture-<router>`, `worst`), or None."""
        return next((model for model in self.models if model.key == key), None)
